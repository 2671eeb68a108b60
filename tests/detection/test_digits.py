"""The demo's images: held-out scans stay held out, boxes fit, every build gives the same files."""

from __future__ import annotations

import importlib
import json
import sys
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("sklearn", reason="needs scikit-learn: pip install scikit-learn")
COCO = pytest.importorskip("pycocotools.coco", reason="needs pycocotools").COCO

from PIL import Image  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def digits():
    sys.path.insert(0, str(ROOT))
    try:
        yield importlib.import_module("demo.digits")
    finally:
        sys.path.remove(str(ROOT))


@pytest.fixture(scope="module")
def images(digits):
    """What draws them."""
    return importlib.import_module("demo.digit_images")


@pytest.fixture(scope="module")
def made(digits, tmp_path_factory):
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


def test_parts_share_no_scan_and_have_every_digit_in_proportion(images):
    from sklearn.datasets import load_digits

    train, test = (images.split_scans()[part] for part in ("train", "test"))
    assert not set(train) & set(test)
    assert sorted({*train, *test}) == list(range(1797))
    target = load_digits().target
    for label in range(10):
        share = (target[test] == label).sum() / (target == label).sum()
        assert share == pytest.approx(0.2, abs=0.005)


def test_images_use_scans_of_their_own_part_only(images, monkeypatch):
    """Read from what is enlarged and scrambled, not from what the split says."""
    used = []
    enlarge, scramble = images.enlarge, images.scramble

    def spy_enlarge(rng, scan, height):
        used.append(tuple(sorted(scan.ravel())))
        return enlarge(rng, scan, height)

    def spy_scramble(rng, scan):
        used.append(tuple(sorted(scan.ravel())))
        return scramble(rng, scan)

    monkeypatch.setattr(images, "enlarge", spy_enlarge)
    monkeypatch.setattr(images, "scramble", spy_scramble)
    from sklearn.datasets import load_digits

    scans = load_digits().images / 16
    for part, other in (("train", "test"), ("test", "train")):
        used.clear()
        for index in range(40):
            images.draw_image(part, index, size=128, seed=3)
        own, foreign = (
            {tuple(sorted(scans[index].ravel())) for index in images.split_scans()[name]}
            for name in (part, other)
        )
        assert len(used) > 100
        assert set(used) <= own and not set(used) & foreign


def test_scrambled_scans_keep_their_ink_and_lose_their_shape(images):
    from sklearn.datasets import load_digits

    rng = np.random.default_rng(0)
    for scan in load_digits().images[:20]:
        scrambled = images.scramble(rng, scan)
        assert sorted(scrambled.ravel()) == sorted(scan.ravel())
        assert np.corrcoef(scrambled.ravel(), scan.ravel())[0, 1] < 0.8


# ---- boxes and labels --------------------------------------------------------------------------


@pytest.fixture
def plain(images, monkeypatch):
    """One digit on an empty canvas, as it was pasted: (ink of (size, size) in [0, 1], digit)."""
    monkeypatch.setattr(images, "MAX_DIGITS", 1)
    monkeypatch.setattr(images, "MAX_SCRAMBLED", 0)
    monkeypatch.setattr(images, "draw_canvas", lambda rng, size: np.full((size, size, 3), 128.0))
    monkeypatch.setattr(images, "_finish", lambda rng, canvas: canvas)

    def draw(part, index):
        canvas, found = images.draw_image(part, index, size=128, seed=5)
        (digit,) = found
        ink = np.abs(canvas.mean(axis=2) - 128)
        return ink / ink.max(), digit

    return draw


def test_boxes_are_tight_around_the_ink(plain):
    heights = []
    for index in range(60):
        ink, (_, (x, y, width, height)) = plain("train", index)
        rows, columns = np.nonzero(ink >= 0.5)
        found = columns.min(), rows.min(), columns.max() + 1, rows.max() + 1
        # The darkest pixel of faint ink is below 1, hence the pixel.
        assert np.abs(np.subtract(found, (x, y, x + width, y + height))).max() <= 1
        heights.append(height)
    assert 21 <= min(heights) < 28 and 42 < max(heights) <= 48


def test_labels_are_those_of_the_digits_shown(plain):
    """A classifier that knows the scans alone reads the pasted digits."""
    from sklearn.datasets import load_digits
    from sklearn.neighbors import KNeighborsClassifier

    def feature(ink):
        return np.asarray(Image.fromarray((255 * ink).astype(np.uint8)).resize((8, 8))).ravel()

    def crop(scan):
        rows, columns = np.nonzero(scan >= 0.4)
        return scan[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]

    data = load_digits()
    scans = [feature(crop(scan / 16)) for scan in data.images]
    reader = KNeighborsClassifier(3).fit(scans, data.target)
    shown, labels = [], []
    for index in range(150):
        ink, (label, (x, y, width, height)) = plain("test", index)
        shown.append(feature(ink[y : y + height, x : x + width]))
        labels.append(label)
    assert reader.score(shown, labels) > 0.8
    assert set(labels) == set(range(10))


@pytest.mark.parametrize("part, count", [("train", 60), ("test", 40)])
def test_annotations_are_coco_and_describe_the_images(made, digits, part, count):
    coco = COCO(str(made / f"{part}.json"))
    assert [category["name"] for category in coco.loadCats(coco.getCatIds())] == list("0123456789")
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


def test_the_data_set_is_read_by_the_training_scripts(made):
    from pskd_detection import load_dataset

    train = load_dataset(f"coco:{made}/train.json:{made}/train")
    assert train.class_names == tuple("0123456789")
    test = load_dataset(f"coco:{made}/test.json:{made}/test", train.class_names)
    assert len(test.coco["images"]) == 40


# ---- files -------------------------------------------------------------------------------------


def test_same_seed_same_files_and_a_larger_set_begins_with_the_smaller(digits, made, tmp_path):
    digits.write_digits(tmp_path / "again", num_train=60, num_test=40)
    assert files_of(tmp_path / "again") == files_of(made)
    digits.write_digits(tmp_path / "small", num_train=5, num_test=7)
    small = {k: v for k, v in files_of(tmp_path / "small").items() if k.endswith(".png")}
    assert len(small) == 12 and small.items() <= files_of(made).items()
    digits.write_digits(tmp_path / "other", num_train=5, num_test=5, seed=2)
    assert not set(files_of(tmp_path / "other").values()) & set(files_of(made).values())


def test_training_images_are_no_test_images(made):
    pictures = {
        part: {p.read_bytes() for p in (made / part).iterdir()} for part in ("train", "test")
    }
    assert len(pictures["train"]) == 60 and not pictures["train"] & pictures["test"]


def test_annotations_of_another_origin_are_left_alone(digits, tmp_path):
    for text in ('{"info": {"description": "mine"}, "images": []}', "[]", "not JSON"):
        (tmp_path / "test.json").write_text(text)
        with pytest.raises(ValueError, match="test.json: expected no file or one made by"):
            digits.write_digits(tmp_path, num_train=1, num_test=1)
        assert files_of(tmp_path) == {"test.json": text.encode()}


def test_an_interrupted_build_leaves_no_annotations(digits, tmp_path, monkeypatch):
    digits.write_digits(tmp_path, num_train=2, num_test=2)
    draw_image = digits.draw_image

    def stop(part, index, **kwargs):
        if part == "test":
            raise KeyboardInterrupt
        return draw_image(part, index, **kwargs)

    monkeypatch.setattr(digits, "draw_image", stop)
    with pytest.raises(KeyboardInterrupt):
        digits.write_digits(tmp_path, num_train=3, num_test=2, seed=2)
    assert not (tmp_path / "test.json").exists()
    described = json.loads((tmp_path / "train.json").read_text())
    assert described["info"]["seed"] == 2 and len(described["images"]) == 3


@pytest.mark.parametrize(
    "options, message",
    [
        ({"num_train": 0}, "num_train: expected at least 1, got 0"),
        ({"num_test": -1}, "num_test: expected at least 1, got -1"),
        ({"size": 64}, "size: expected at least 96, got 64"),
        ({"seed": -1}, "seed: expected at least 0, got -1"),
    ],
)
def test_options_that_make_no_set_are_named(digits, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        digits.write_digits(tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_command_line(digits, tmp_path, capsys):
    options = ["--num-train", "2", "--num-test", "1", "--size", "96", "--seed", "4"]
    assert digits.main(["--out", str(tmp_path / "set"), *options]) == 0
    assert sorted(files_of(tmp_path / "set")) == [
        "test.json", "test/00000.png", "train.json", "train/00000.png", "train/00001.png"
    ]  # fmt: skip
    assert digits.main(["--out", str(tmp_path / "set"), "--seed", "-4"]) == 1
    assert "seed: expected at least 0" in capsys.readouterr().err
