"""The picture shows what is right, wrong and missed, a row a run, and is whole or not there."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("pycocotools", reason="needs pycocotools: pip install pycocotools")

from PIL import Image, ImageColor  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
BOXES = [[10, 30, 20, 30], [60, 60, 30, 30]]  # of the two objects of every image, classes 1 and 2


@pytest.fixture(scope="module")
def pictures():
    sys.path.insert(0, str(ROOT))
    try:
        yield importlib.import_module("demo.detection_picture")
    finally:
        sys.path.remove(str(ROOT))


@pytest.fixture
def dataset(tmp_path):
    """Three grey images of two objects each; of unequal sizes, ids out of order."""
    images, annotations = [], []
    for number, size in ((3, (128, 128)), (1, (128, 96)), (2, (100, 128))):
        Image.new("L", size, 100).save(tmp_path / f"{number}.png")
        images.append(
            {"id": number, "file_name": f"{number}.png", "width": size[0], "height": size[1]}
        )
        for category, box in enumerate(BOXES, start=1):
            entry = {"image_id": number, "category_id": category, "bbox": box, "iscrowd": 0}
            annotations.append(entry | {"id": len(annotations) + 1, "area": box[2] * box[3]})
    categories = [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (tmp_path / "set.json").write_text(json.dumps(content))
    return tmp_path


def found(number, category, box, score=0.9):
    return {"image_id": number, "category_id": category, "bbox": box, "score": score}


def draw(pictures, folder, runs, **options):
    files = {}
    for name, detections in runs.items():
        files[name] = folder / f"{name}.json"
        files[name].write_text(json.dumps(detections))
    out = pictures.detections_picture(
        folder / "set.json", folder, files, folder / "out.png", **options
    )
    with Image.open(out) as image:
        assert image.format == "PNG"
        return np.asarray(image)


def legend_height(pictures, sheet):
    lines = pictures._legend_lines(sheet.shape[1] - 2 * pictures.MARGIN, 0.5)
    return len(lines) * (pictures.TEXT_SIZE + pictures.MARGIN)


def body(pictures, sheet):
    """The picture without its legend."""
    return sheet[: -legend_height(pictures, sheet)]


def shows(sheet, color):
    return bool((sheet == ImageColor.getrgb(color)).all(axis=2).any())


PERFECT = [found(number, c, box) for number in (1, 2, 3) for c, box in enumerate(BOXES, start=1)]


@pytest.mark.parametrize(
    "detections, right, wrong, missed",
    [
        (PERFECT, True, False, False),
        ([], False, False, True),
        # Another class on the right place: wrong, and the object is still missed.
        ([found(d["image_id"], 3 - d["category_id"], d["bbox"]) for d in PERFECT],
         False, True, True),
        # A second box of the same object.
        ([*PERFECT, found(1, 1, [11, 31, 20, 30], 0.8)], True, True, False),
        # The right class beside its object: IoU 1/3.
        ([found(d["image_id"], d["category_id"], [d["bbox"][0] + d["bbox"][2] / 2, *d["bbox"][1:]])
          for d in PERFECT], False, True, True),
        # Below the threshold nothing is shown.
        ([d | {"score": 0.49} for d in PERFECT], False, False, True),
        ([d | {"score": 0.5} for d in PERFECT], True, False, False),
    ],
)  # fmt: skip
def test_colours_say_what_is_right_wrong_and_missed(
    pictures, dataset, detections, right, wrong, missed
):
    sheet = body(pictures, draw(pictures, dataset, {"run": detections}))
    assert shows(sheet, pictures.RIGHT) == right
    assert shows(sheet, pictures.WRONG) == wrong
    assert shows(sheet, pictures.MISSED) == missed


def test_the_better_scored_box_is_the_right_one(pictures, dataset):
    content = json.loads((dataset / "set.json").read_text())
    worse, better = found(1, 1, [11, 31, 20, 30], 0.6), found(1, 1, [14, 33, 20, 30], 0.9)
    marks = pictures._marks(content, 1, [worse, better], 0.5)
    colors = {mark.text: mark.color for mark in marks}
    assert colors == {
        "dog": pictures.MISSED,
        "cat 0.60": pictures.WRONG,
        "cat 0.90": pictures.RIGHT,
    }
    assert pictures._headline("run", [marks]) == "run: 1 right, 1 wrong, 1 missed"


def test_boxes_are_drawn_where_they_are(pictures, dataset):
    sheet = draw(pictures, dataset, {"run": [found(1, 1, BOXES[0])]}, num_images=1)
    line, scale = pictures.TEXT_SIZE + pictures.MARGIN, pictures.IMAGE_SIDE / 128
    image = sheet[pictures.MARGIN + line :, pictures.MARGIN :]
    green = (image[: int(96 * scale)] == ImageColor.getrgb(pictures.RIGHT)).all(axis=2)
    x, y, width, height = (value * scale for value in BOXES[0])
    below = green[int(y) :]  # above lies the text
    rows, columns = np.nonzero(below)
    assert rows.max() + int(y) == pytest.approx(y + height, abs=1)
    assert columns[rows > 5].min() == pytest.approx(x, abs=1)
    assert columns[rows > 5].max() == pytest.approx(x + width, abs=1)


def test_runs_are_rows_in_their_order_and_images_the_first_by_id(pictures, dataset):
    same = draw(pictures, dataset, {"a": PERFECT, "b": PERFECT})
    line = pictures.TEXT_SIZE + pictures.MARGIN
    row = (len(same) - legend_height(pictures, same) - pictures.MARGIN) // 2
    first, second = (same[pictures.MARGIN + line + row * n :][: row - line] for n in (0, 1))
    assert np.array_equal(first, second)
    assert shows(first, pictures.RIGHT)
    two = draw(pictures, dataset, {"a": PERFECT, "b": []})
    first, second = (two[pictures.MARGIN + line + row * n :][: row - line] for n in (0, 1))
    assert not shows(first, pictures.MISSED) and not shows(second, pictures.RIGHT)
    one = draw(pictures, dataset, {"a": [found(1, 1, BOXES[0])]}, num_images=1)
    assert one.shape[1] == pictures.IMAGE_SIDE + 2 * pictures.MARGIN
    assert shows(body(pictures, one), pictures.RIGHT)  # image 1, though listed second


@pytest.mark.parametrize(
    "runs, options, message",
    [
        ({}, {}, "runs: expected at least one"),
        ({"a": []}, {"num_images": 0}, "num_images: expected at least 1, got 0"),
        ({"a": []}, {"score_threshold": 1.5}, r"score_threshold: expected .*\[0, 1\], got 1.5"),
        ({"a": {"boxes": []}}, {}, "a.json: expected a list of detections, got dict"),
        ({"a": [found(9, 1, BOXES[0])]}, {}, "detection 0: expected image_id .* got 9"),
        ({"a": [found(1, 0, BOXES[0])]}, {}, "detection 0: expected category_id .* got 0"),
        ({"a": [{"image_id": 1}]}, {}, "detection 0: expected bbox, category_id, image_id, score"),
    ],
)
def test_bad_input_is_named_and_nothing_is_written(pictures, dataset, runs, options, message):
    with pytest.raises(ValueError, match=message):
        draw(pictures, dataset, runs, **options)
    assert not [path for path in dataset.iterdir() if "out" in path.name]


def test_a_picture_that_cannot_be_finished_leaves_the_old_one(pictures, dataset, monkeypatch):
    draw(pictures, dataset, {"a": PERFECT})
    before = (dataset / "out.png").read_bytes()

    def fail(self, path, **kwargs):
        Path(path).write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(Image.Image, "save", fail)
    with pytest.raises(OSError, match="disk full"):
        draw(pictures, dataset, {"a": []})
    assert (dataset / "out.png").read_bytes() == before
    assert not list(dataset.glob("*.tmp")) and not list(dataset.glob(".*"))
