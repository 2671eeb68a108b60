"""Images on the device: what a DataLoader gives, but for which random numbers are drawn."""

from __future__ import annotations

import itertools

import pytest
import torch
from classification_toys import Colours, checkpoint, results, same, train, write_folders
from pskd_classification import on_device
from pskd_classification.data import OddSizeError, load_splits
from pskd_classification.mixing import Mixer
from pskd_classification.models import build_model
from pskd_classification.objective import Objective
from pskd_classification.on_device import DeviceImages, DeviceLoader, place
from pskd_classification.training import Trainer
from pskd_classification.transforms import View
from torch.utils.data import DataLoader
from torchvision.transforms.v2 import functional as v2

import pskd
from pskd import WithRows
from pskd.distributed import World

CPU = torch.device("cpu")


def toys(**options):
    return load_splits("classification_toys:build", None, **{"val_fraction": 0.2} | options)


def placed(splits, part: str = "train", **options) -> DeviceImages:
    augmented = part == "train"
    return DeviceImages(getattr(splits, part), splits.view, CPU, augmented=augmented, **options)


@pytest.mark.parametrize(("part", "size"), [("train", None), ("test", None), ("validation", 12)])
def test_without_augmentation_batches_are_those_of_a_data_loader_bit_for_bit(part, size):
    splits = toys(augment="none", hflip=0.0, image_size=size)
    images = getattr(splits, part)
    order = torch.randperm(len(images)).tolist()
    options = {"batch_size": 4, "sampler": order}
    expected = list(DataLoader(WithRows(images), **options))
    found = DeviceLoader(placed(splits, part, resize=size is not None), **options)
    assert len(found) == len(expected) > 1
    for ours, theirs in zip(found, expected, strict=True):
        for one, other in zip(ours, theirs, strict=True):
            assert one.dtype == other.dtype and torch.equal(one, other)


@pytest.mark.parametrize("drop_last", [False, True])
def test_a_smaller_last_batch_is_kept_or_left_out(drop_last):
    images = placed(toys())
    found = DeviceLoader(images, batch_size=8, sampler=range(33), drop_last=drop_last)
    sizes = [len(rows) for rows, _, _ in found]
    assert sizes == ([8, 8, 8, 8] if drop_last else [8, 8, 8, 8, 1]) and len(found) == len(sizes)


def test_every_crop_and_flip_is_that_of_the_transforms():
    splits = toys(image_size=16)  # padded by 2
    images = placed(splits, resize=True)
    crops = torch.tensor(list(itertools.product(range(5), range(5))) * 2)
    flips = torch.arange(50) < 25
    rows = torch.arange(50) % len(images)
    seen = images.seen(rows, crops, flips)
    for row, (top, left), flip, found in zip(rows, crops.tolist(), flips, seen, strict=True):
        image = v2.resize(v2.pil_to_tensor(splits.train.picture(int(row))), [16, 16])
        image = v2.crop(v2.pad(image, [2]), top, left, 16, 16)
        image = v2.horizontal_flip(image) if flip else image
        image = v2.to_dtype(image, torch.float32, scale=True)
        assert torch.equal(found, v2.normalize(image, splits.view.mean, splits.view.std))


def test_crops_are_drawn_evenly_and_flips_as_often_as_asked():
    count, generator = 9000, torch.Generator().manual_seed(0)
    crops, flips = placed(toys(hflip=0.25)).draw(count, generator)  # padded by 1
    table = torch.bincount(crops[:, 0] * 3 + crops[:, 1], minlength=9)
    assert len(table) == 9 and (table - count / 9).abs().max() < 5 * (count / 9) ** 0.5
    assert flips.float().mean().item() == pytest.approx(0.25, abs=0.02)
    crops, flips = placed(toys(), "test").draw(count, generator)
    assert not crops.any() and not flips.any()


def test_the_generator_alone_decides_what_is_drawn():
    def epoch(seed: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        options = {"batch_size": 16, "sampler": range(33), "generator": generator}
        return torch.cat([batch[1] for batch in DeviceLoader(placed(toys()), **options)])

    assert torch.equal(epoch(0), epoch(0)) and not torch.equal(epoch(0), epoch(1))


# ---- where images are ----------------------------------------------------------------------------


class Odd(Colours):
    def __getitem__(self, i: int):
        image, label = super().__getitem__(i)
        return (image.resize((9, 8)) if i == 5 else image), label


def build_odd(_root) -> dict[str, Colours]:
    """For --dataset test_on_device:build_odd."""
    return {"train": Odd(42, 0), "test": Colours(21, 1)}


def view(size: int = 8, augment: str = "crop") -> View:
    return View(augment, size, 0.5, (0.5,) * 3, (0.5,) * 3)


def parts(splits) -> dict:
    return {"train": splits.train, "test": splits.test}


def test_small_images_of_one_size_are_placed_where_nobody_asked():
    images = place(parts(toys()), view(), CPU, wanted=None, resize=False)
    assert [len(images[part]) for part in ("train", "test")] == [33, 21]
    assert place(parts(toys()), view(), CPU, wanted=False, resize=False) is None


@pytest.mark.parametrize(
    ("seen", "free", "message"),
    [
        (view(augment="resized-crop"), 1e9, "expected another --augment than resized-crop"),
        # 33 of 10 x 10 pixels and 21 of 8 x 8.
        (view(), 13_931, "expected 13,932 free bytes on cpu, got 13,931"),
    ],
)
def test_what_cannot_be_placed_stays_or_is_refused(seen, free, message, monkeypatch):
    monkeypatch.setattr(on_device, "_free_bytes", lambda device: int(free))
    assert place(parts(toys()), seen, CPU, wanted=None, resize=False) is None
    with pytest.raises(ValueError, match=f"^--data-on-device: {message}"):
        place(parts(toys()), seen, CPU, wanted=True, resize=False)


def test_images_of_several_sizes_stay_or_are_refused_or_resized():
    splits = load_splits("test_on_device:build_odd", None, val_fraction=0.0)
    assert place(parts(splits), splits.view, CPU, wanted=None, resize=False) is None
    message = "^--data-on-device: 5: expected 8x8 pixels, got 9x8 .--image-size resizes"
    with pytest.raises(ValueError, match=message):
        place(parts(splits), splits.view, CPU, wanted=True, resize=False)
    assert place(parts(splits), splits.view, CPU, wanted=True, resize=True) is not None
    with pytest.raises(OddSizeError):
        splits.train.decode(8, resize=False)


def test_large_images_are_placed_only_if_it_is_wanted(monkeypatch):
    splits = toys(image_size=72)
    options = {"view": splits.view, "device": CPU, "resize": True}
    assert place(parts(splits), **options, wanted=None) is None
    assert place(parts(splits), **options, wanted=True) is not None
    monkeypatch.setattr(on_device, "AUTO_BYTES", 13_931)
    options["view"] = view()
    assert place(parts(splits), **options, wanted=None) is None


# ---- training ------------------------------------------------------------------------------------

SHORT = ["--pskd-alpha-final", "0.8", "--epochs", "2"]


def test_both_ways_train_alike_without_augmentation(tmp_path):
    flags = [*SHORT, "--augment", "none", "--hflip", "0"]
    assert train(tmp_path / "placed", *flags) == 0
    assert train(tmp_path / "read", *flags, "--no-data-on-device") == 0
    one, other = (checkpoint(tmp_path / name) for name in ("placed", "read"))
    assert one["options"]["data_on_device"] and not other["options"]["data_on_device"]
    for key in ("model", "optimizer", "criterion", "best"):
        assert same(one[key], other[key]), key


@pytest.mark.parametrize("began", [True, False])
def test_a_run_goes_on_where_its_images_were(began, tmp_path, caplog):
    caplog.set_level("WARNING")
    assert train(tmp_path, *SHORT, f"--{'' if began else 'no-'}data-on-device") == 0
    content = checkpoint(tmp_path)
    if not began:
        del content["options"]["data_on_device"]  # of before it was an option
        torch.save(content, tmp_path / "checkpoint.pth")
    assert train(tmp_path, *SHORT, "--resume") == 0
    assert results(tmp_path)["options"]["data_on_device"] == began
    assert not caplog.text
    if began:
        assert train(tmp_path, *SHORT, "--resume", "--no-data-on-device") == 0
        assert "trained with data_on_device True, goes on with False" in caplog.text


def test_every_image_is_checked_before_the_first_step(tmp_path, capsys, caplog):
    data = write_folders(tmp_path / "data", {"train": 12, "test": 6})
    flags = ["--dataset", "folder", "--data-dir", str(data), "--no-data-on-device"]
    flags += ["--check-images", "--epochs", "1"]
    caplog.set_level("INFO")
    assert train(tmp_path / "run", *flags) == 0
    assert "--check-images: read 18 images" in caplog.text
    for part, name in (("train", "red/003.png"), ("test", "blue/002.png")):
        (data / part / name).write_bytes(b"")
    assert train(tmp_path / "other", *flags) == 1
    error = capsys.readouterr().err
    assert "--check-images: expected 18 images that can be read, got 2 that cannot: " in error
    assert "train/red/003.png: " in error and "test/blue/002.png: " in error
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("teacher", ["memory", "snapshot"])
@pytest.mark.parametrize("mixing", [0.0, 1.0])
def test_no_step_reads_a_value_back_from_the_device(teacher, mixing, monkeypatch):
    """A tensor on the meta device has no values: to ask for one is an error."""
    meta, splits = torch.device("meta"), toys()
    images = DeviceImages(splits.train, splits.view, meta, augmented=True)
    with meta:
        model = build_model("preact_resnet10_tiny", 3)
    examples, options = pskd.ExampleStats(33, meta), {"num_epochs": 2}
    if teacher == "memory":
        criterion = pskd.MemoryCriterion(33, 3, examples=examples, device=meta, **options)
    else:
        criterion = pskd.SnapshotCriterion(model, examples=examples, **options)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, nesterov=True)
    trainer = Trainer(
        model,
        images,
        Objective(criterion, Mixer(mixing, mixing, probability=0.5)),
        optimizer,
        torch.optim.lr_scheduler.MultiStepLR(optimizer, [1]),
        world=World(0, 1, meta),
        batch_size=8,
    )
    step, done = trainer._step, []
    monkeypatch.setattr(trainer, "_step", lambda *batch: done.append(step(*batch)) or done[-1])
    for epoch in (1, 2):
        with pytest.raises((RuntimeError, NotImplementedError), match="meta tensor"):
            trainer.train_epoch(epoch)  # at its end, where the means are read
        assert len(done) == epoch * trainer.iterations
