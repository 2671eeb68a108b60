"""PSKDTask with timm's own loader, Mixup, checkpoints and resume."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torch.utils.data import IterableDataset

pytest.importorskip("timm", reason="needs timm: pip install '.[timm]'")

from pskd_timm import PSKDTask, RowsInTargets
from timm.data import FastCollateMixup, create_loader
from timm.task import ClassificationTask, resume_task_checkpoint
from timm.utils import CheckpointSaver

import pskd

torch.set_num_threads(1)

M, C, BATCH, EPOCHS, SIZE = 22, 4, 6, 3, 16
TEACHERS = ["memory", "snapshot", "ema"]
_made = np.random.default_rng(0)
IMAGES = [Image.fromarray(_made.integers(0, 255, (SIZE, SIZE, 3), np.uint8)) for _ in range(M)]
LABELS = _made.integers(0, C, M).tolist()


class Pictures:
    """As timm's data sets are: the loader sets the transform."""

    transform = None

    def __len__(self):
        return M

    def __getitem__(self, index):
        image = IMAGES[index]
        return image if self.transform is None else self.transform(image), LABELS[index]


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, 2), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(196, C)
    )


def loader(data, **options):
    common = {"input_size": (3, SIZE, SIZE), "batch_size": BATCH, "is_training": True}
    common |= {"num_workers": 0, "device": torch.device("cpu"), "no_aug": True}
    return create_loader(data, use_prefetcher=True, **(common | options))


def task(teacher: str, data=None, **options) -> PSKDTask:
    given = {"num_epochs": EPOCHS, "alpha_final": 0.9} | options
    quiet = {"verbose": False}
    return PSKDTask(network(), teacher=teacher, dataset=data, task_options=quiet, **given)


def data_of(teacher: str):
    return RowsInTargets(Pictures(), C) if teacher == "memory" else Pictures()


def trained(made: ClassificationTask, batches, epochs=range(EPOCHS), saver=None) -> list[float]:
    """Train as timm's script does; return the losses."""
    optimizer = torch.optim.SGD(made.get_trainable_module().parameters(), lr=0.1)
    losses = []
    for epoch in epochs:
        torch.manual_seed(epoch)  # the order of the samples
        if isinstance(made, PSKDTask):
            made.begin_epoch(epoch + 1)
        made.get_trainable_module().train()
        for image, target in batches:
            optimizer.zero_grad()
            loss = made(image, target)["loss"]
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        if saver is not None:
            saver.optimizer = optimizer
            saver.save_checkpoint(epoch)
    return losses


@pytest.mark.parametrize("teacher", TEACHERS)
def test_it_is_the_loop_by_hand(teacher):
    data = data_of(teacher)
    losses = trained(task(teacher, data), loader(data))
    model, expected = network(), []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    options = {"num_epochs": EPOCHS, "alpha_final": 0.9}
    if teacher == "memory":
        criterion = pskd.MemoryCriterion(M, C, **options)
    else:
        criterion = pskd.SnapshotCriterion(model, teacher=teacher, **options)
    for epoch in range(EPOCHS):
        torch.manual_seed(epoch)
        criterion.begin_epoch(epoch + 1)
        model.train()
        for image, target in loader(data):
            optimizer.zero_grad()
            if teacher == "memory":
                loss = criterion(model(image), target % C, target // C)
            else:
                loss = criterion(model(image), target, image)
            loss.backward()
            optimizer.step()
            expected.append(loss.item())
    assert losses == expected
    assert len(losses) == EPOCHS * (M // BATCH)  # timm drops the last batch


@pytest.mark.parametrize("teacher", TEACHERS)
def test_with_alpha_zero_it_is_timms_own_task(teacher):
    data = data_of(teacher)
    stock = ClassificationTask(network(), nn.CrossEntropyLoss(), verbose=False)
    expected = trained(stock, loader(Pictures()))
    assert trained(task(teacher, data, alpha_final=0.0), loader(data)) == expected


@pytest.mark.parametrize("stop", [0, 1])
@pytest.mark.parametrize("teacher", TEACHERS)
def test_a_resumed_training_is_the_straight_one(teacher, stop, tmp_path):
    data = data_of(teacher)
    straight = task(teacher, data)
    straight.setup_ema()
    saver = CheckpointSaver(
        straight.get_trainable_module(), None, checkpoint_dir=str(tmp_path), task=straight,
        recovery_dir=str(tmp_path), max_history=EPOCHS,
    )  # fmt: skip
    losses = trained(straight, loader(data), saver=saver)
    resumed = task(teacher, data)
    epoch = resume_task_checkpoint(resumed, str(Path(tmp_path, f"checkpoint-{stop}.pth.tar")))
    assert epoch == stop + 1
    again = trained(resumed, loader(data), range(epoch, EPOCHS))
    assert again == losses[epoch * (M // BATCH) :]
    for own, expected in zip(resumed.parameters(), straight.parameters(), strict=False):
        assert torch.equal(own, expected)


def test_the_snapshot_learns_from_mixed_images():
    collate = FastCollateMixup(mixup_alpha=0.8, cutmix_alpha=1.0, num_classes=C)
    made = task("snapshot")
    np.random.seed(0)  # noqa: NPY002  of timm's Mixup
    losses = trained(made, loader(Pictures(), collate_fn=collate))
    assert len(losses) == 9 and all(np.isfinite(losses))
    assert made.pskd.take_means()["pskd/alpha"] == pytest.approx(0.9)


def test_evaluation_is_plain_cross_entropy():
    made = task("memory", data_of("memory"))
    made.begin_epoch(1)
    image, label = torch.randn(5, 3, SIZE, SIZE), torch.randint(C, (5,))
    with torch.no_grad():
        result = made.eval()(image, label + C * torch.arange(5))
    assert torch.equal(result["loss"], F.cross_entropy(result["output"], label))


def test_the_transforms_that_a_loader_sets_are_the_data_sets():
    data = RowsInTargets(Pictures(), C)
    loader(data)
    assert data.dataset.transform is not None and data.transform is data.dataset.transform
    image, target = data[7]
    assert (target // C, target % C) == (7, LABELS[7]) and image.shape == (3, SIZE, SIZE)


# ---- bad input -----------------------------------------------------------------------------------


class Streamed(IterableDataset):
    def __iter__(self):
        return iter(Pictures())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: task("memory", Pictures()),
            "dataset: expected RowsInTargets(dataset, ",
        ),
        (lambda: task("memory"), "dataset: expected RowsInTargets(dataset, num_classes), got None"),
        (lambda: task("both"), "teacher: expected 'memory' or 'snapshot' or 'ema', got 'both'"),
        (lambda: task("snapshot", alpha_final=2.0), "alpha_final: expected a number in [0, 1]"),
        (lambda: RowsInTargets(Streamed(), C), "dataset: expected one with indices, got the itera"),
        (lambda: RowsInTargets(Pictures(), 0), "num_classes: expected at least 1, got 0"),
        (
            lambda: RowsInTargets(Pictures(), 1)[int(np.argmax(LABELS))],
            "expected integer labels in",
        ),
    ],
)
def test_what_does_not_serve_is_refused(make, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        make()


def test_mixed_targets_and_a_memory_are_refused():
    made = task("memory", data_of("memory"))
    made.begin_epoch(1)
    with pytest.raises(ValueError, match="expected labels, got probabilities: Mixup needs a snap"):
        made(torch.randn(2, 3, SIZE, SIZE), torch.full((2, C), 1 / C))


def test_a_checkpoint_of_another_task_is_refused(tmp_path):
    stock = ClassificationTask(network(), nn.CrossEntropyLoss(), verbose=False)
    torch.save(stock.get_checkpoint_state(), tmp_path / "stock.pth.tar")
    with pytest.raises(ValueError, match="expected one of a PSKDTask, got one without task_state"):
        resume_task_checkpoint(task("snapshot"), str(tmp_path / "stock.pth.tar"))
