"""The demo's images: held-out scans stay held out, boxes fit, every build gives the same files."""

from __future__ import annotations

import json
import sys
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("sklearn", reason="needs scikit-learn: pip install scikit-learn")
COCO = pytest.importorskip("pycocotools.coco", reason="needs pycocotools").COCO

from PIL import Image  # noqa: E402
from sklearn.datasets import load_digits  # noqa: E402

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from demo import digit_images as images  # noqa: E402
from demo import digits  # noqa: E402


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("digits")
    digits.write_digits(folder, num_train=60, num_test=40)
    return folder


def files_of(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


# ---- which scans -------------------------------------------------------------------------------


def test_parts_share_no_scan_and_have_every_digit_in_proportion():
    (train, train_target), (test, test_target) = map(images.scans_of, images.PARTS)
    sets = [{scan.tobytes() for scan in scans} for scans in (train, test)]
    assert not sets[0] & sets[1] and len(train) + len(test) == 1797
    for label in range(10):
        share = (test_target == label).sum() / (load_digits().target == label).sum()
        assert share == pytest.approx(0.2, abs=0.005)


def test_images_use_scans_of_their_own_part_only(monkeypatch):
    """Read from what is enlarged and scrambled, not from what the split says."""
    used = []

    def spied(draw):
        def spy(rng, scan, *more):
            used.append(tuple(sorted(scan.ravel())))  # scrambled scans keep their ink
            return draw(rng, scan, *more)

        return spy

    for name in ("enlarge", "scramble"):
        monkeypatch.setattr(images, name, spied(getattr(images, name)))
    own = {p: {tuple(sorted(s.ravel())) for s in images.scans_of(p)[0]} for p in images.PARTS}
    for part, other in (("train", "test"), ("test", "train")):
        used.clear()
        for index in range(40):
            images.draw_image(part, index)
        assert len(used) > 100
        assert set(used) <= own[part] and not set(used) & own[other]


# ---- boxes and labels --------------------------------------------------------------------------


def test_boxes_are_tight_and_labels_are_those_of_the_digits_shown(monkeypatch):
    """One digit on an empty canvas; a classifier that knows the scans alone reads it."""
    from sklearn.neighbors import KNeighborsClassifier

    monkeypatch.setattr(images, "MAX_DIGITS", 1)
    monkeypatch.setattr(images, "MAX_SCRAMBLED", 0)
    monkeypatch.setattr(images, "draw_canvas", lambda rng: np.full((128, 128, 3), 128.0))
    monkeypatch.setattr(images, "_finish", lambda rng, canvas: canvas)

    def feature(ink):
        return np.asarray(Image.fromarray((255 * ink).astype(np.uint8)).resize((8, 8))).ravel()

    def crop(scan):
        rows, columns = np.nonzero(scan >= 0.4)
        return scan[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]

    data = load_digits()
    scans = [feature(crop(scan / 16)) for scan in data.images]
    reader = KNeighborsClassifier(3).fit(scans, data.target)
    shown, labels, heights = [], [], []
    for index in range(150):
        canvas, [(label, (x, y, width, height))] = images.draw_image("test", index)
        ink = np.abs(canvas.mean(axis=2) - 128)
        ink /= ink.max()
        rows, columns = np.nonzero(ink >= 0.5)
        found = columns.min(), rows.min(), columns.max() + 1, rows.max() + 1
        # The darkest pixel of faint ink is below 1, hence the pixel.
        assert np.abs(np.subtract(found, (x, y, x + width, y + height))).max() <= 1
        heights.append(height)
        shown.append(feature(ink[y : y + height, x : x + width]))
        labels.append(label)
    assert 21 <= min(heights) < 28 and 42 < max(heights) <= 48
    assert reader.score(shown, labels) > 0.8 and set(labels) == set(range(10))


@pytest.mark.parametrize("part, count", [("train", 60), ("test", 40)])
def test_annotations_are_coco_and_describe_the_images(made, part, count):
    from pskd_detection import load_dataset

    dataset = load_dataset(f"coco:{made}/{part}.json:{made}/{part}")
    assert dataset.class_names == tuple("0123456789")
    coco = COCO(str(made / f"{part}.json"))
    assert len(coco.getImgIds()) == count == len(list((made / part).iterdir()))
    numbers = set()
    for image in coco.loadImgs(coco.getImgIds()):
        with Image.open(made / part / image["file_name"]) as picture:
            assert picture.size == (image["width"], image["height"]) == (128, 128)
            assert picture.mode == "RGB"
        boxes = [a["bbox"] for a in coco.loadAnns(coco.getAnnIds(image["id"]))]
        numbers.add(len(boxes))
        for x, y, width, height in boxes:
            assert x >= 0 and y >= 0 and x + width <= 128 and y + height <= 128
            assert 3 <= width <= 72 and 21 <= height <= 48
        for a, b in combinations(boxes, 2):
            wide = min(a[0] + a[2], b[0] + b[2]) - max(a[0], b[0])
            high = min(a[1] + a[3], b[1] + b[3]) - max(a[1], b[1])
            shared = max(0, wide) * max(0, high)
            assert shared <= 0.15 * min(a[2] * a[3], b[2] * b[3]) + 1e-9
    assert numbers == {1, 2, 3, 4, 5}
    assert all(a["area"] == a["bbox"][2] * a["bbox"][3] for a in coco.anns.values())


# ---- files -------------------------------------------------------------------------------------


def test_the_same_files_each_time_and_a_larger_set_begins_with_the_smaller(made, tmp_path):
    digits.write_digits(tmp_path / "again", num_train=60, num_test=40)
    assert files_of(tmp_path / "again") == files_of(made)
    digits.write_digits(tmp_path / "small", num_train=5, num_test=7)
    small = {k: v for k, v in files_of(tmp_path / "small").items() if k.endswith(".png")}
    assert len(small) == 12 and small.items() <= files_of(made).items()


def test_annotations_of_another_origin_are_left_alone(tmp_path):
    for text in ('{"info": {"description": "mine"}, "images": []}', "[]", "not JSON"):
        (tmp_path / "test.json").write_text(text)
        with pytest.raises(ValueError, match="test.json: expected no file or one made by"):
            digits.write_digits(tmp_path, num_train=1, num_test=1)
        assert files_of(tmp_path) == {"test.json": text.encode()}


def test_an_interrupted_build_leaves_no_annotations(tmp_path, monkeypatch):
    digits.write_digits(tmp_path, num_train=2, num_test=2)
    draw_image = digits.draw_image

    def stop(part, index):
        if part == "test":
            raise KeyboardInterrupt
        return draw_image(part, index)

    monkeypatch.setattr(digits, "draw_image", stop)
    with pytest.raises(KeyboardInterrupt):
        digits.write_digits(tmp_path, num_train=3, num_test=2)
    assert not (tmp_path / "test.json").exists()
    described = json.loads((tmp_path / "train.json").read_text())
    assert len(described["images"]) == 3


def test_command_line(tmp_path):
    options = ["--num-train", "2", "--num-test", "1"]
    assert digits.main(["--out", str(tmp_path / "set"), *options]) == 0
    assert sorted(files_of(tmp_path / "set")) == [
        "test.json", "test/00000.png", "train.json", "train/00000.png", "train/00001.png"
    ]  # fmt: skip
