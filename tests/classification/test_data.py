"""Data sets: which sample is which, what is held out, and what is refused before the first step."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from classification_toys import CLASSES, Colours, write_folders
from PIL import Image
from pskd_classification.data import Images, load_splits
from pskd_classification.label_noise import LabelNoise
from pskd_classification.sources import check_source


def colours(**options):
    return load_splits("classification_toys:build", None, **{"val_fraction": 0.2} | options)


def test_validation_is_held_out_of_training_evenly_by_class_and_apart_from_other_seeds():
    splits = colours()
    train, validation = set(splits.train.ids), set(splits.validation.ids)
    assert not train & validation
    assert train | validation == {str(i) for i in range(42)}
    assert torch.bincount(splits.validation.targets).tolist() == [3, 3, 3]
    assert colours().validation.ids == splits.validation.ids
    assert colours(split_seed=1).validation.ids != splits.validation.ids
    assert colours(val_fraction=0.0).validation is None
    own = load_splits("classification_toys:build_with_validation", None, val_fraction=0.2)
    assert (len(own.train), len(own.validation), len(own.test)) == (42, 9, 21)


def test_the_fingerprint_is_that_of_what_is_trained_on():
    assert colours().fingerprint == colours(augment="none").fingerprint
    assert colours().fingerprint != colours(val_fraction=0.0).fingerprint
    assert colours().fingerprint != colours(split_seed=1).fingerprint


@pytest.mark.parametrize("parts", [("train", "test"), ("train", "val"), ("train", "val", "test")])
def test_folders(parts, tmp_path):
    root = write_folders(tmp_path, dict(zip(parts, (12, 6, 9), strict=False)))
    splits = load_splits("folder", root, val_fraction=0.5)
    assert splits.class_names == tuple(sorted(CLASSES))
    sizes = (len(splits.train), len(splits.validation), len(splits.test))
    assert sizes == ((12, 6, 9) if len(parts) == 3 else (6, 6, 6))
    assert all(name.endswith(".png") and "/" in name for name in splits.train.ids)
    image, label = splits.test[0]
    assert image.dtype == torch.float32 and image.shape == (3, 8, 8) and label == 0


def test_digits_need_no_download_and_are_divided_by_class():
    splits = load_splits("digits", None, val_fraction=0.1)
    assert len(splits.train) + len(splits.validation) + len(splits.test) == 1797
    assert not {*splits.train.ids, *splits.validation.ids} & set(splits.test.ids)
    assert torch.bincount(splits.test.targets).min() >= 50
    assert splits.train[0][0].shape == (3, 8, 8)


def test_training_is_augmented_and_evaluation_is_not():
    splits = colours()
    torch.manual_seed(0)
    assert not torch.equal(splits.train[0][0], splits.train[0][0])
    assert torch.equal(splits.test[0][0], splits.test[0][0])
    plain = colours(augment="none", hflip=0.0).train
    assert torch.equal(plain[0][0], plain[0][0])
    assert np.array_equal(plain.picture(0), colours().train.picture(0))


def test_the_normalisation_is_the_data_sets_or_the_one_that_is_given():
    digits, own = load_splits("digits", None, val_fraction=0), (0.5, 0.25, 0.0)
    pixels = torch.tensor(np.asarray(digits.test.picture(0)) / 255).movedim(-1, 0)
    assert digits.view.mean == (0.3, 0.3, 0.3) and digits.view.std == (0.37, 0.37, 0.37)
    assert torch.allclose(digits.test[0][0], ((pixels - 0.3) / 0.37).float(), atol=1e-6)
    test = load_splits("digits", None, val_fraction=0, mean=own, std=(0.5, 0.5, 1)).test
    shift, scale = torch.tensor(own)[:, None, None], torch.tensor([0.5, 0.5, 1])[:, None, None]
    assert torch.allclose(test[0][0], ((pixels - shift) / scale).float(), atol=1e-6)


@pytest.mark.parametrize(
    ("augment", "size"), [("crop", 12), ("none", 6), ("resized-crop", 10), ("crop", None)]
)
def test_images_have_the_size_that_was_asked_for(augment, size):
    splits = colours(augment=augment, image_size=size)
    side = size or 8
    assert splits.train[0][0].shape == splits.test[0][0].shape == (3, side, side)


# ---- draws and wrong labels --------------------------------------------------------------------


def test_a_share_of_the_labels_is_wrong_and_evenly_one_of_the_others():
    labels = np.repeat(np.arange(4), 3000)
    noisy = LabelNoise(0.4, "symmetric", 0).apply(labels, 4)
    wrong = noisy != labels
    assert wrong.sum() == 4800  # the share itself: none is drawn to its own class
    assert np.bincount(labels[wrong]).min() > 1100
    steps = np.bincount((noisy - labels)[wrong] % 4, minlength=4)
    assert steps[0] == 0 and steps[1:].min() > 1500
    assert not np.array_equal(noisy, LabelNoise(0.4, "symmetric", 1).apply(labels, 4))


def test_the_next_class_and_after_the_last_the_first():
    labels = np.repeat(np.arange(3), 100)
    noisy = LabelNoise(0.25, "next", 0).apply(labels, 3)
    assert ((noisy - labels) % 3).tolist().count(1) == 75 == (noisy != labels).sum()


def test_label_noise_is_read_from_its_option():
    assert LabelNoise.parse("0.4", 3) == LabelNoise(0.4, "symmetric", 3)
    assert LabelNoise.parse("0.4:next", 0) == LabelNoise.parse(str(LabelNoise(0.4, "next", 0)), 0)
    assert LabelNoise.parse(None, 0) is LabelNoise.parse("0:next", 0) is None


def test_only_labels_that_are_trained_on_are_wrong():
    clean, noisy = colours(), colours(label_noise=LabelNoise(0.5, "symmetric", 0))
    assert noisy.noisy.sum() == 16 and not clean.noisy.any()  # of 33, rounded to even
    assert noisy.train.ids == clean.train.ids
    assert np.array_equal(noisy.train.targets != clean.train.targets, noisy.noisy)
    # A batch has the labels of the file.
    assert [label for _, label in noisy.train] == noisy.train.targets.tolist()
    for part in ("validation", "test"):
        assert torch.equal(getattr(noisy, part).targets, getattr(clean, part).targets)
    assert noisy.fingerprint != clean.fingerprint
    again = colours(label_noise=LabelNoise(0.5, "symmetric", 0))
    assert again.fingerprint == noisy.fingerprint


def test_as_many_training_images_of_each_class_as_asked_for():
    few, more = colours(train_per_class=2), colours(train_per_class=5)
    assert torch.bincount(few.train.targets).tolist() == [2, 2, 2]
    assert set(few.train.ids) < set(more.train.ids) < set(colours().train.ids)
    assert few.validation.ids == colours().validation.ids and len(few.test) == 21
    assert colours(train_per_class=2, split_seed=1).train.ids != few.train.ids


def labels_of(splits, part: str) -> dict[str, str]:
    images = getattr(splits, part)
    return {name: splits.class_names[c] for name, c in zip(images.ids, images.targets, strict=True)}


def test_some_classes_with_all_their_images():
    whole = colours(val_fraction=0.0)
    two = colours(val_fraction=0.0, num_classes=2, split_seed=1)
    assert len(two.class_names) == 2 and set(two.class_names) < set(whole.class_names)
    for part in ("train", "test"):
        kept = {n: c for n, c in labels_of(whole, part).items() if c in two.class_names}
        assert labels_of(two, part) == kept
    assert len({colours(num_classes=2, split_seed=seed).class_names for seed in range(9)}) == 3
    assert torch.bincount(colours(num_classes=2).validation.targets).tolist() == [3, 3]


# ---- what is refused ---------------------------------------------------------------------------


def changed(**attributes) -> Colours:
    source = Colours(6, 0)
    for name, value in attributes.items():
        setattr(source, name, value)
    return source


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (changed(targets=[0, 1, 2, 0, 1, 3]), r"labels in \[0, 2\] \(3 classes\), got 3 .* 5"),
        (changed(targets=[0, -1, 2, 0, 1, 2]), "got -1 for sample 1"),
        (changed(targets=[0.0, 1.0]), "integer labels"),
        (changed(targets=[0, 1]), "a label a sample, got 2 of 6"),
        (changed(ids=list("abcdea")), "an id of its own for each sample, got a 2x"),
        (changed(ids=list("abc")), "expected 6 ids, got 3"),
        (changed(classes=("red", "green")), "differs in: blue"),
        (changed(classes=("green", "red", "blue")), "differs in: another order"),
        ([1, 2], "with 'classes', got none"),
        (Colours(0, 0), "at least one sample, got none"),
    ],
)
def test_samples_that_cannot_be_told_apart_or_classified_are_refused(source, message):
    with pytest.raises(ValueError, match=f"^train: .*{message}"):
        check_source("train", source, CLASSES)


def test_a_data_set_of_ones_own_needs_its_parts():
    with pytest.raises(ValueError, match=r"expected train, test and perhaps val, got \[\]"):
        load_splits("collections:Counter", None, val_fraction=0.0)


def test_images_that_are_not_square_need_a_size(monkeypatch):
    monkeypatch.setattr(Colours, "__getitem__", lambda self, i: (Image.new("RGB", (8, 6)), 0))
    with pytest.raises(ValueError, match="--image-size: expected a number .* 8x6 pixels"):
        colours()
    assert colours(image_size=8).test[0][0].shape == (3, 8, 8)


def test_what_is_no_image_is_refused():
    source = Colours(6, 0)
    source.__class__ = type(
        "Tensors", (Colours,), {"__getitem__": lambda self, i: (torch.ones(3), 0)}
    )
    with pytest.raises(ValueError, match="expected an image of PIL, got Tensor"):
        Images(source, [str(i) for i in range(6)], range(6), lambda image: image)[0]


@pytest.mark.parametrize("text", ["1", "-0.1", "nan", "much", "0.4:pairs", ":next", ""])
def test_label_noise_that_is_none_is_refused(text):
    with pytest.raises(ValueError, match=r"--label-noise: expected a rate in \[0, 1\), .* got"):
        LabelNoise.parse(text, 0)


def test_a_single_class_has_no_wrong_label():
    with pytest.raises(ValueError, match="--label-noise: expected two classes or more, got 1"):
        LabelNoise(0.4, "next", 0).apply(np.zeros(5, np.int64), 1)


def test_file_names_need_not_be_utf_8(tmp_path):
    write_folders(tmp_path, {"train": 6, "test": 3})
    before = load_splits("folder", tmp_path, val_fraction=0).fingerprint
    first = tmp_path / "train" / CLASSES[0] / "000.png"
    first.rename(first.with_name("\udce9.png"))  # a byte of Latin-1, as Python names it
    splits = load_splits("folder", tmp_path, val_fraction=0)
    assert f"{CLASSES[0]}/\udce9.png" in splits.train.ids
    assert splits.fingerprint != before


def test_a_folder_of_deep_and_turned_images_is_seen_as_shown(tmp_path):
    gray = np.arange(64, dtype=np.uint8).reshape(8, 8) * 3
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn to the right
    for part in ("train", "test"):
        for label in "ab":
            (tmp_path / part / label).mkdir(parents=True)
            path = tmp_path / part / label / "0.png"
            Image.fromarray(gray.astype(np.uint16) * 257).save(path, exif=exif)
    splits = load_splits("folder", tmp_path, val_fraction=0, augment="none")
    expected = np.repeat(np.rot90(gray, -1)[None], 3, axis=0)
    for images in (splits.train, splits.test):
        assert np.array_equal(images.decode(8, resize=False)[0], expected)  # for the device
        picture = np.asarray(images.picture(1)).transpose(2, 0, 1)
        assert np.array_equal(picture, expected)


class Lazy(Colours):
    """Opens a file and leaves it to the reader to decode it."""

    path = ""

    def __getitem__(self, i: int) -> tuple[Image.Image, int]:
        return Image.open(self.path), self.targets[i]


def test_an_image_of_a_source_of_ones_own_is_named(tmp_path, monkeypatch):
    images = Images(source := Lazy(6, 0), [f"sample {i}" for i in range(6)], range(6), None)
    source.path = str(tmp_path / "a.png")
    Image.fromarray(np.full((8, 8), 1285, np.uint16)).save(source.path)
    assert np.array_equal(images.picture(2), np.full((8, 8, 3), 5))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    with pytest.raises(ValueError, match="sample 2: expected an image, got Image size"):
        images.picture(2)
    monkeypatch.undo()
    content = (tmp_path / "a.png").read_bytes()
    (tmp_path / "a.png").write_bytes(content[:45])  # within the pixels
    with pytest.raises(ValueError, match="sample 2: expected an image, got .*truncated"):
        images.picture(2)
