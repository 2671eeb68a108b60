"""PSKDCallback in Lightning's own Trainer: a loop by hand, resumes, two processes."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

pytest.importorskip("lightning", reason="needs lightning: pip install '.[lightning]'")

import lightning
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning_toys import (
    BATCH,
    DATA,
    EPOCHS,
    C,
    M,
    Module,
    Shuffled,
    net,
    train_in_two_processes,
    trainer,
)
from processes import in_two_processes
from pskd_lightning import PSKDCallback

import pskd

torch.set_num_threads(1)

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # of few workers, of no logger

PRELOADED = ["lightning.pytorch", "pskd_lightning"]
FORMS = pytest.mark.parametrize("teacher", ["memory", "snapshot", "ema"])


def callback(teacher: str, /, **options) -> PSKDCallback:
    classes = {"num_classes": C} if teacher == "memory" else {}
    return PSKDCallback(**(classes | {"teacher": teacher, "alpha_final": 0.9} | options))


def loader(teacher: str) -> DataLoader:
    data = pskd.WithRows(DATA) if teacher == "memory" else DATA
    return DataLoader(data, batch_size=BATCH, sampler=Shuffled())


def fit(folder: Path, teacher: str, *more, path=None, validate=False, **options):
    """Return the module and the callback of a training that may be resumed from a path."""
    module, made = Module(snapshot=teacher != "memory"), callback(teacher)
    validation = DataLoader(DATA, batch_size=BATCH) if validate else None
    run = trainer(folder, made, *more, **options)
    run.fit(module, loader(teacher), validation, ckpt_path=path)
    return module, made


def by_hand(teacher: str):
    """Return the net, the losses and the means an epoch of a loop without Lightning."""
    model, losses, told = net(), [], []
    criterion = (
        pskd.MemoryCriterion(M, C, num_epochs=EPOCHS, alpha_final=0.9)
        if teacher == "memory"
        else pskd.SnapshotCriterion(model, num_epochs=EPOCHS, alpha_final=0.9, teacher=teacher)
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
    data = loader("memory")
    for epoch in range(1, EPOCHS + 1):
        criterion.begin_epoch(epoch)
        data.sampler.set_epoch(epoch - 1)
        for index, (rows, inputs, target) in enumerate(data):
            torch.manual_seed(1000 * (epoch - 1) + index)
            seen = rows if teacher == "memory" else inputs
            loss = criterion(model(inputs), target, seen)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        told.append(criterion.take_means())
    return model, losses, told


def same_weights(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    pairs = zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    return all(torch.equal(*pair) for pair in pairs)


@FORMS
def test_it_is_the_loop_by_hand(teacher, tmp_path):
    """To the last bit, and with validations in between."""
    module, _ = fit(tmp_path, teacher, validate=True)
    model, losses, told = by_hand(teacher)
    assert module.losses == losses and same_weights(module.net, model)
    for one, expected in zip(module.told, told, strict=True):
        assert one == pytest.approx(expected, rel=1e-6)
    assert module.told[-1]["pskd/alpha"] == pytest.approx(0.9)


@FORMS
@pytest.mark.parametrize("precision", ["bf16-true", "16-true", "bf16-mixed"])
def test_half_precision_trains_near_the_loop_by_hand(teacher, precision, tmp_path):
    """``...-true`` makes half precision torch's default dtype around each step."""
    module, made = fit(tmp_path, teacher, precision=precision, validate=True)
    losses, told = by_hand(teacher)[1:]
    assert len(module.losses) == len(losses)
    # Weights in half precision go another way, a little more in every step.
    assert module.losses[0] == pytest.approx(float(losses[0]), rel=0.05)
    assert module.losses[-1] == pytest.approx(float(losses[-1]), rel=0.5)
    assert all(torch.tensor(module.losses + module.validated).isfinite())
    assert made.criterion.alpha == 0.9 and torch.get_default_dtype() == torch.float32


@FORMS
@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8])
def test_labels_may_be_any_integers(teacher, dtype, tmp_path):
    """In the training, and in a validation before it, in it and without one."""
    inputs, target = DATA.tensors
    data = TensorDataset(inputs, target.to(dtype))
    module, made = Module(snapshot=teacher != "memory"), callback(teacher)
    validation = DataLoader(data, batch_size=BATCH)
    run = trainer(tmp_path, made)
    rows = pskd.WithRows(data) if teacher == "memory" else data
    run.fit(module, DataLoader(rows, batch_size=BATCH, sampler=Shuffled()), validation)
    run.validate(module, validation, verbose=False)
    expected, _ = fit(tmp_path, teacher, validate=True)
    assert module.losses == expected.losses
    assert module.validated[: len(expected.validated)] == expected.validated


def test_a_validation_is_plain_cross_entropy(tmp_path):
    """Before the training (Lightning looks at two batches first), in it, and without one."""
    module, _ = fit(tmp_path, "memory", validate=True)
    assert len(module.validated) == 2 + EPOCHS * 4
    trainer(tmp_path, callback("memory")).validate(
        module, DataLoader(DATA, batch_size=M), verbose=False
    )
    inputs, target = DATA.tensors
    with torch.no_grad():
        expected = F.cross_entropy(module.net.eval()(inputs), target)
    assert module.validated[-1] == expected.item()
    last = module.validated[-5:-1]  # the same by batches
    sizes = [BATCH, BATCH, BATCH, M - 3 * BATCH]
    mean = sum(loss * size for loss, size in zip(last, sizes, strict=True)) / M
    assert mean == pytest.approx(expected.item())


@FORMS
def test_a_module_can_be_saved_whole_before_and_after_its_training(teacher, tmp_path):
    module, made = Module(snapshot=teacher != "memory"), callback(teacher)
    run, data = trainer(tmp_path, made), DataLoader(DATA, batch_size=M)
    run.validate(module, data, verbose=False)
    torch.save(module, tmp_path / "before.pt")
    run.fit(module, loader(teacher))
    torch.save(module, tmp_path / "after.pt")
    for name in ("before", "after"):
        saved = torch.load(tmp_path / f"{name}.pt", weights_only=False)
        assert len(saved.validated) == 1
        trainer(tmp_path, callback(teacher)).validate(saved, data, verbose=False)
        assert (saved.validated[1] == saved.validated[0]) == (name == "before")
    assert same_weights(saved.net, module.net)


# ---- stop and resume -----------------------------------------------------------------------------


@FORMS
@pytest.mark.parametrize("validate", [False, True], ids=["training only", "with validation"])
@pytest.mark.parametrize("stop", [1, 2])
def test_a_resumed_training_is_the_straight_one(teacher, validate, stop, tmp_path):
    """Where Lightning saves at an epoch's end, or after the validation there."""
    straight, first = fit(tmp_path, teacher, validate=validate)
    saver = ModelCheckpoint(
        tmp_path, "{epoch}", save_top_k=-1, save_on_train_epoch_end=not validate
    )
    stopped, _ = fit(tmp_path, teacher, saver, validate=validate)
    assert stopped.losses == straight.losses
    path = tmp_path / f"epoch={stop - 1}.ckpt"
    resumed, again = fit(tmp_path, teacher, path=path, validate=validate)
    assert resumed.losses == straight.losses[stop * 4 :]
    assert same_weights(resumed, straight)
    assert again.criterion.epoch == first.criterion.epoch == EPOCHS


class StatefulLoader:
    """A loader that goes on where it was saved, as torchdata's does."""

    def __init__(self, teacher: str) -> None:
        self.loader, self.taken, self.skipped = loader(teacher), 0, 0
        self.dataset, self.sampler = self.loader.dataset, self.loader.sampler

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self):
        self.taken, self.skipped = self.skipped, 0
        for batch in itertools.islice(self.loader, self.taken, None):
            self.taken += 1
            yield batch

    def state_dict(self) -> dict:
        return {"taken": self.taken}

    def load_state_dict(self, state: dict) -> None:
        self.skipped = state["taken"]


@pytest.mark.skipif(
    tuple(map(int, lightning.__version__.split(".")[:2])) < (2, 5),
    reason="lightning before 2.5 takes other batches then, also of plain cross-entropy",
)
@FORMS
def test_a_training_resumed_inside_an_epoch_is_the_straight_one(teacher, tmp_path):
    saver = ModelCheckpoint(tmp_path, "{step}", save_top_k=-1, every_n_train_steps=1)
    straight = Module(snapshot=teacher != "memory")
    trainer(tmp_path, callback(teacher), saver).fit(straight, StatefulLoader(teacher))
    resumed, made = Module(snapshot=teacher != "memory"), callback(teacher)
    path = tmp_path / "step=6.ckpt"  # of 4 steps an epoch
    trainer(tmp_path, made).fit(resumed, StatefulLoader(teacher), ckpt_path=path)
    assert resumed.losses == straight.losses[6:]
    assert same_weights(resumed, straight)


@FORMS
def test_a_training_resumed_after_the_last_batch_of_an_epoch_is_the_straight_one(teacher, tmp_path):
    """Lightning, which saves before the epoch's end then, does not tell of the next one's start."""
    saver = ModelCheckpoint(tmp_path, "{step}", save_top_k=-1, every_n_train_steps=4)
    straight, _ = fit(tmp_path, teacher, saver)
    resumed, made = fit(tmp_path, teacher, path=tmp_path / "step=8.ckpt")
    assert made.criterion.epoch == EPOCHS
    assert resumed.losses == straight.losses[8:]
    assert same_weights(resumed, straight)


def test_a_checkpoint_of_another_training_is_refused(tmp_path):
    saver = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
    fit(tmp_path, "memory", saver, max_epochs=2)
    module = Module()
    with pytest.raises(ValueError, match="num_epochs: expected 2, .* got 4"):
        trainer(tmp_path, callback("memory")).fit(
            module, loader("memory"), ckpt_path=tmp_path / "epoch=1.ckpt"
        )
    assert not module.losses


# ---- bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "trained", "message"),
    [
        ({"teacher": "both"}, {}, "teacher: expected 'memory' or 'snapshot'.*, got 'both'"),
        ({"num_classes": 0}, {}, "num_classes: expected at least 1, got 0"),
        ({"alpha_final": 2.0}, {}, r"alpha_final: expected a number in \[0, 1\], got 2.0"),
        ({}, {"max_epochs": -1, "max_steps": 9}, "max_epochs: expected 1 or more, got -1"),
    ],
)
def test_what_cannot_be_trained_by_is_refused_before_the_first_step(
    options, trained, message, tmp_path
):
    module, made = Module(), callback("memory", **options)
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, made, **trained).fit(module, loader("memory"))
    assert not module.losses


def test_data_without_row_numbers_are_refused_before_the_first_step(tmp_path):
    module = Module()
    message = r"training data: expected pskd.WithRows\(dataset\), got TensorDataset"
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, callback("memory")).fit(module, loader("snapshot"))
    assert not module.losses


# ---- processes -----------------------------------------------------------------------------------


def test_two_processes_are_one_with_batches_of_both(forkserver, tmp_path):
    """The gradient of DDP is the mean of the two, and each reads what the other wrote."""
    in_two_processes(train_in_two_processes, tmp_path)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    for one, other in zip(first["rows"], second["rows"], strict=True):
        assert torch.equal(one, other)

    model = net(dropout=0.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
    criterion = pskd.MemoryCriterion(M, C, num_epochs=EPOCHS, alpha_final=0.9)
    inputs, target = DATA.tensors
    told = []
    for epoch in range(1, EPOCHS + 1):
        criterion.begin_epoch(epoch)
        orders = []
        for rank in range(2):
            sampler = DistributedSampler(DATA, num_replicas=2, rank=rank, seed=0)
            sampler.set_epoch(epoch - 1)
            orders.append(torch.tensor(list(sampler)).split(4))
        for parts in zip(*orders, strict=True):
            optimizer.zero_grad()
            before = [buffer.clone() for buffer in model.buffers()]
            for rank, rows in enumerate(parts):
                loss = criterion(model(inputs[rows]), target[rows], rows) / 2
                loss.backward()
                if rank == 0:  # whose statistics DDP gives the other
                    kept = [buffer.clone() for buffer in model.buffers()]
                    load(model, before)
            load(model, kept)
            optimizer.step()
        told.append(criterion.take_means())
    for name, value in model.state_dict().items():
        torch.testing.assert_close(first["weights"][name], value, rtol=1e-4, atol=1e-5)
    for one, expected in zip(first["told"], told, strict=True):
        assert one == pytest.approx(expected, rel=1e-3)

    state = torch.load(tmp_path / "checkpoint", weights_only=False)["callbacks"]["PSKDCallback"]
    again = pskd.MemoryCriterion(M, C, num_epochs=EPOCHS, alpha_final=0.9)
    again.load_state_dict(state)
    for one, expected in zip(again.memory.read(torch.arange(M)), first["rows"], strict=True):
        assert torch.equal(one, expected)


def load(model: torch.nn.Module, buffers: list[torch.Tensor]) -> None:
    for own, value in zip(model.buffers(), buffers, strict=True):
        own.copy_(value)
