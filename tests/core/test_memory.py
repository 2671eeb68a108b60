"""PredictionMemory: what is read is last epoch's, whole, and no file is half of one."""

from __future__ import annotations

import contextlib
import errno
import gc
import json
import os
import re
import shutil
import signal
import socket
import threading
import time
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

import pskd
from pskd.memory import epoch_files, table
from pskd.memory import exchange as exchange_py

PRELOADED = ["hypothesis", "pskd.memory", "pytest", "torch.distributed"]

FORMS = [None, 1, 3, 7]  # k of 7 classes
M, C = 20, 7


def predictions(rows: int, classes: int = C, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (3 * torch.randn(rows, classes, generator=generator)).softmax(dim=1)


def dense(past: torch.Tensor | pskd.TopK, classes: int = C) -> torch.Tensor:
    return past.dense(classes) if isinstance(past, pskd.TopK) else past


def kept(probs: torch.Tensor, k: int | None) -> torch.Tensor:
    """What a memory of k classes can know of a prediction."""
    if k is None:
        return probs
    values, indices = probs.topk(k, dim=1)
    return pskd.TopK(indices, values).dense(probs.size(1))


def names(folder: Path) -> list[str]:
    """Return the files of a memory's folder, without its lock."""
    return sorted(file.name for file in folder.iterdir() if file.name != ".lock")


@pytest.fixture(params=["ram", "file"])
def path(request, tmp_path):
    return None if request.param == "ram" else tmp_path / "memory"


@pytest.mark.parametrize("k", FORMS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_what_is_read_is_what_the_last_epoch_wrote(k, dtype, path):
    memory = pskd.PredictionMemory(M, C, top_k=k, dtype=dtype, path=path)
    rows, probs = torch.arange(0, M, 2), predictions(M // 2)
    memory.next_epoch()
    assert not memory.read(rows)[1].any()
    memory.write(rows.flip(0), probs.flip(0))
    assert not memory.read(rows)[1].any(), "this epoch's own predictions"
    memory.next_epoch()
    memory.write(rows, predictions(M // 2, seed=1))
    past, seen = memory.read(torch.arange(M))
    assert isinstance(past, pskd.TopK) == (k is not None)
    assert seen.tolist() == [True, False] * (M // 2)
    atol = 1e-3 if dtype == torch.float16 else 1e-6
    torch.testing.assert_close(dense(past)[seen], kept(probs, k), rtol=0, atol=atol)
    memory.next_epoch()
    past, _ = memory.read(rows)
    torch.testing.assert_close(dense(past), kept(predictions(M // 2, seed=1), k), rtol=0, atol=atol)
    memory.next_epoch()
    assert not memory.read(rows)[1].any(), "two epochs old"
    memory.close()


@settings(max_examples=25, deadline=None)
@given(k=st.one_of(st.none(), st.integers(1, C)), seed=st.integers(0, 2**32 - 1))
def test_a_target_always_sums_to_one(k, seed):
    memory = pskd.PredictionMemory(M, C, top_k=k)
    memory.next_epoch()
    memory.write(torch.arange(M), predictions(M, seed=seed))
    memory.next_epoch()
    past, _ = memory.read(torch.arange(M))
    total = dense(past).sum(dim=1)
    torch.testing.assert_close(total, torch.ones(M), rtol=0, atol=1e-6)


def test_unseen_rows_train_like_cross_entropy():
    memory = pskd.PredictionMemory(M, C, top_k=3)
    rows, logits = torch.arange(M), torch.randn(M, C)
    target = torch.randint(C, (M,))
    memory.next_epoch()
    past, seen = memory.read(rows)
    loss = pskd.pskd_cross_entropy(logits, target, past, 0.7 * seen)
    torch.testing.assert_close(loss, torch.nn.functional.cross_entropy(logits, target))


def test_the_sizes_of_records():
    size = {
        (k, classes, dtype): pskd.PredictionMemory(1, classes, top_k=k, dtype=dtype).bytes_per_row
        for k in (None, 16)
        for classes in (100, 1 << 16, (1 << 16) + 1)
        for dtype in (torch.float16, torch.float32)
    }
    assert size[None, 100, torch.float16] == 201
    assert size[None, 100, torch.float32] == 401
    assert size[16, 1 << 16, torch.float16] == 65
    assert size[16, 1 << 16, torch.float32] == 97
    assert size[16, (1 << 16) + 1, torch.float16] == 97


@pytest.mark.parametrize("classes", [1 << 16, (1 << 16) + 1])
def test_classes_of_sixteen_bits_and_more_come_back(classes):
    memory = pskd.PredictionMemory(1, classes, top_k=4)
    indices = torch.tensor([[classes - 1, 0, 1 << 15, (1 << 15) - 1]])
    memory.write(torch.tensor([0]), pskd.TopK(indices, torch.tensor([[0.5, 0.25, 0.125, 0.0625]])))
    memory.next_epoch()
    past, _ = memory.read(torch.tensor([0]))
    assert past.indices.tolist() == indices.tolist()


def test_top_k_of_all_classes_equals_dense():
    logits, target = torch.randn(M, C), torch.randint(C, (M,))
    losses = []
    for k in (None, C):
        memory = pskd.PredictionMemory(M, C, top_k=k, dtype=torch.float32)
        memory.write(torch.arange(M), predictions(M))
        memory.next_epoch()
        losses.append(pskd.pskd_cross_entropy(logits, target, memory.read(torch.arange(M))[0], 0.7))
    torch.testing.assert_close(*losses)


def test_no_gradient_is_kept():
    memory = pskd.PredictionMemory(M, C)
    memory.write(torch.arange(M), predictions(M).requires_grad_())
    memory.next_epoch()
    assert not memory.read(torch.arange(M))[0].requires_grad


def test_a_prediction_that_is_not_finite_is_not_kept():
    probs = predictions(3)
    probs[1, 2] = float("nan")
    memory = pskd.PredictionMemory(3, C)
    memory.write(torch.arange(3), probs)
    memory.next_epoch()
    assert memory.read(torch.arange(3))[1].tolist() == [True, False, True]


@pytest.mark.parametrize("k", FORMS)
def test_momentum_averages_what_is_kept(k):
    memory = pskd.PredictionMemory(M, C, top_k=k, dtype=torch.float32, momentum=0.6)
    rows = torch.arange(M)
    first, second = predictions(M), predictions(M, seed=1)
    memory.write(rows[: M // 2], first[: M // 2])
    memory.next_epoch()
    memory.write(rows, second)
    memory.next_epoch()
    mean = second.clone()  # a row's first prediction is taken whole
    old, new = kept(first, k)[: M // 2], kept(second, k)[: M // 2]
    mean[: M // 2] = 0.6 * old + 0.4 * new
    torch.testing.assert_close(dense(memory.read(rows)[0]), kept(mean, k))


def test_empty_calls():
    memory = pskd.PredictionMemory(M, C, top_k=2)
    none = torch.empty(0, dtype=torch.int64)
    memory.write(none, torch.empty(0, C))
    past, seen = memory.read(none)
    assert past.probs.shape == (0, 2) and seen.shape == (0,)


# ---- stop and resume ---------------------------------------------------------------------------


def epoch_of_writes(memory, epoch: int, start: int = 0, end: int = M) -> None:
    for row in range(start, end):
        memory.write(torch.tensor([row]), predictions(M, seed=epoch)[row : row + 1])


def the_same(memory, other) -> None:
    rows = torch.arange(M)
    (past, seen), (expected, expected_seen) = memory.read(rows), other.read(rows)
    assert torch.equal(seen, expected_seen)
    assert torch.equal(dense(past), dense(expected))


@pytest.mark.parametrize("stop", [0, 7, M])
@pytest.mark.parametrize("further", [0, 3, "into the next epoch"])
def test_a_resumed_memory_is_that_of_the_run_that_was_not_stopped(stop, further, path):
    """Also where the run went on for a while after it saved."""
    straight = pskd.PredictionMemory(M, C, top_k=3)
    for epoch in (1, 2, 3):
        straight.next_epoch()
        epoch_of_writes(straight, epoch)

    stopped = pskd.PredictionMemory(M, C, top_k=3, path=path)
    for epoch in (1, 2):
        stopped.next_epoch()
        epoch_of_writes(stopped, epoch, end=M if epoch == 1 else stop)
    state = stopped.state_dict()
    if further == "into the next epoch":
        epoch_of_writes(stopped, 2, stop)
        stopped.next_epoch()
        epoch_of_writes(stopped, 3, end=5)
    else:
        epoch_of_writes(stopped, 2, stop, min(M, stop + further))

    resumed = pskd.PredictionMemory(M, C, top_k=3, path=path)
    resumed.load_state_dict(state)
    assert resumed.epoch == 2
    epoch_of_writes(resumed, 2, stop)
    resumed.next_epoch()
    epoch_of_writes(resumed, 3)
    the_same(resumed, straight)
    resumed.next_epoch()
    straight.next_epoch()
    the_same(resumed, straight)


def train_until_killed(folder: Path) -> None:
    rows = torch.arange(50)
    memory = pskd.PredictionMemory(50, 200, top_k=64, path=folder / "memory")
    while True:
        memory.next_epoch()
        torch.save(memory.state_dict(), folder / "new")
        os.replace(folder / "new", folder / f"state_{memory.epoch}.pt")
        for _ in range(50):
            # All of a row's values tell the epoch: of a torn row they would not.
            probs = torch.full((50, 64), 1 / (64 + memory.epoch))
            memory.write(rows, pskd.TopK(torch.arange(64).expand(50, 64), probs))


def test_a_kill_at_any_moment_loses_nothing_that_was_saved(tmp_path, forkserver):
    for moment in range(10):
        folder = tmp_path / str(moment)
        folder.mkdir()
        child = forkserver.Process(target=train_until_killed, args=(folder,))
        child.start()
        while not (folder / "state_2.pt").exists():
            time.sleep(0.001)
        time.sleep(0.013 * moment)
        child.kill()
        child.join()
    for folder in sorted(tmp_path.iterdir()):
        last = max(int(path.stem[6:]) for path in folder.glob("state_*.pt"))
        memory = pskd.PredictionMemory(50, 200, top_k=64, path=folder / "memory")
        memory.load_state_dict(torch.load(folder / f"state_{last}.pt", weights_only=True))
        assert memory.epoch == last >= 2
        past, seen = memory.read(torch.arange(50))
        assert seen.all()
        expected = torch.full((50, 64), 1 / (63 + last)).half().float()
        torch.testing.assert_close(past.probs, expected)
        # What was begun is there as far as it came, each row whole or not at all.
        memory.next_epoch()
        past, seen = memory.read(torch.arange(50))
        expected = torch.full((50, 64), 1 / (64 + last)).half().float()
        torch.testing.assert_close(past.probs[seen], expected[seen])


def epochs_of_files(folder: Path) -> list[int]:
    return sorted(int(file.name[6:11]) for file in folder.glob("*.pskd"))


def test_files_are_kept_for_as_long_as_the_saved_state_needs_them(tmp_path):
    memory = pskd.PredictionMemory(M, C, path=tmp_path)
    for _ in range(3):
        memory.next_epoch()
    assert epochs_of_files(tmp_path) == [2]
    memory.state_dict()  # in the third epoch, which reads the second
    for _ in range(3):
        memory.next_epoch()
    assert epochs_of_files(tmp_path) == [2, 3, 5]
    memory.state_dict()
    memory.next_epoch()
    assert epochs_of_files(tmp_path) == [5, 6]


def test_a_state_of_an_epochs_end_needs_one_file(tmp_path):
    memory = pskd.PredictionMemory(M, C, path=tmp_path)
    states = []
    for epoch in range(1, 6):
        memory.next_epoch(states[-2:])
        epoch_of_writes(memory, epoch)
        states.append(memory.state_dict(ended=True))
    assert epochs_of_files(tmp_path) == [3, 4]  # and the part of the fifth
    resumed = pskd.PredictionMemory(M, C, path=tmp_path)
    resumed.load_state_dict(states[2])
    for call in (resumed.read, resumed.carry_over):
        with pytest.raises(ValueError, match="expected next_epoch after .* the end of epoch 3; to"):
            call(torch.arange(M))
    resumed.next_epoch()
    past, seen = resumed.read(torch.arange(M))
    assert seen.all()
    torch.testing.assert_close(dense(past), predictions(M, seed=3), rtol=0, atol=1e-3)


def test_a_new_run_deletes_the_old_ones_files_when_it_has_ended_an_epoch(tmp_path):
    old = pskd.PredictionMemory(M, C, path=tmp_path)
    for _ in range(7):
        old.next_epoch()
    (tmp_path / "notes.txt").write_text("not ours")
    left = {"epoch_00006.pskd", "epoch_00007.pskd.part", "notes.txt", ".lock"}
    memory = pskd.PredictionMemory(M, C, path=tmp_path)
    memory.next_epoch()
    assert {file.name for file in tmp_path.iterdir()} == left | {"epoch_00001.pskd.part"}
    memory.next_epoch([old.state_dict()])
    names = {file.name for file in tmp_path.iterdir()}
    assert names == {"epoch_00001.pskd", "epoch_00002.pskd.part", "notes.txt", ".lock"}


@pytest.mark.parametrize(("inside", "files"), [(False, [3]), (True, [2, 3])])
def test_a_criterion_keeps_what_its_last_state_needs(inside, files, tmp_path):
    criterion = pskd.MemoryCriterion(M, C, num_epochs=4, path=tmp_path)
    for epoch in range(1, 5):
        criterion.begin_epoch(epoch)
        if epoch < 4:
            state = criterion.state_dict(inside_epoch=inside)
    assert epochs_of_files(tmp_path) == files
    resumed = pskd.MemoryCriterion(M, C, num_epochs=4, path=tmp_path)
    resumed.load_state_dict(state)
    resumed.begin_epoch(4)


# ---- files that are not ours -------------------------------------------------------------------


def saved(tmp_path, **changes) -> tuple[dict, Path]:
    options = {"top_k": 3, "fingerprint": "data"} | changes
    memory = pskd.PredictionMemory(M, C, path=tmp_path, **options)
    for epoch in (1, 2):
        memory.next_epoch()
        epoch_of_writes(memory, epoch)
    return memory.state_dict(), tmp_path / "epoch_00001.pskd"


def resume(tmp_path, state, rows: int = M, classes: int = C, **changes) -> None:
    """Load a state, which changes nothing if it is refused."""
    options = {"top_k": 3, "fingerprint": "data", "path": tmp_path} | changes
    memory = pskd.PredictionMemory(rows, classes, **options)
    files = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    try:
        memory.load_state_dict(state)
    except ValueError:
        assert memory.epoch == 0 and not memory.read(torch.arange(rows))[1].any()
        assert {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == files
        raise


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rows": M + 1}, "expected rows 21, got 20"),
        ({"classes": C + 1}, "expected classes 8, got 7"),
        ({"path": None}, "path: expected the folder of the state's files, got none"),
        ({"path": "elsewhere"}, "elsewhere/epoch_00001.pskd: expected the predictions of epoch 1"),
        ({"top_k": 2}, "expected top_k 2, got 3"),
        ({"top_k": None}, "expected top_k None, got 3"),
        ({"dtype": torch.float32}, "expected dtype 'float32', got 'float16'"),
        ({"fingerprint": "other"}, "expected fingerprint 'other', got 'data'"),
    ],
)
def test_the_state_of_another_memory_is_refused(changes, message, tmp_path, monkeypatch):
    state, _ = saved(tmp_path)
    monkeypatch.chdir(tmp_path.parent)
    with pytest.raises(ValueError, match=message):
        resume(tmp_path, state, **changes)


def damage_byte(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-2] ^= 1
    file.write_bytes(content)


def later_version(file: Path) -> None:
    file.write_bytes(file.read_bytes().replace(b"pskd memory 1", b"pskd memory 2", 1))


def replace_by_folder(file: Path) -> None:
    file.unlink()
    file.mkdir()


def of_another_run(file: Path) -> None:
    folder = file.parent / "other"
    saved(folder)
    (folder / file.name).replace(file)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda file: file.unlink(), "expected the predictions of epoch 1, got none"),
        (lambda file: os.truncate(file, 4100), "bytes, got 4,100: cut off"),
        (lambda file: os.truncate(file, 0), "expected a file of 'pskd memory 1'"),
        (lambda file: file.write_bytes(b"\x80\x02" * 4000), "expected a file of 'pskd memory 1'"),
        (lambda file: file.write_text("[1]"), "expected a file of 'pskd memory 1'"),
        (damage_byte, "damaged: expected CRC-32"),
        (later_version, "expected a file of 'pskd memory 1', got 'pskd memory 2'"),
        (replace_by_folder, "expected the predictions of epoch 1, got a folder"),
        (of_another_run, "expected run "),
        (lambda file: file.with_suffix(".pskd").write_bytes(
            (file.parent / "epoch_00002.pskd.part").read_bytes()), "expected epoch 1, got 2"),
    ],
)  # fmt: skip
def test_a_file_that_cannot_be_used_is_named(damage, message, tmp_path):
    state, file = saved(tmp_path)
    damage(file)
    with pytest.raises(ValueError, match=message) as caught:
        resume(tmp_path, state)
    assert str(file) in str(caught.value)


def test_the_running_epochs_file_is_looked_at_too(tmp_path):
    state, file = saved(tmp_path)
    os.truncate(file.parent / "epoch_00002.pskd.part", 4100)
    with pytest.raises(ValueError, match="epoch_00002.pskd.part: expected 4,.* cut off"):
        resume(tmp_path, state)


def test_two_memories_of_a_process_do_not_write_to_one_folder(tmp_path):
    first, second = (pskd.PredictionMemory(M, C, path=tmp_path) for _ in range(2))
    for memory in (first, second):
        memory.next_epoch()
    with pytest.raises(ValueError, match="epoch_00001.pskd.part: expected run .*another training"):
        first.next_epoch()


def test_an_epoch_that_has_not_ended_is_not_read(tmp_path):
    state, file = saved(tmp_path)
    header = table._read_header(file)
    del header["crc32"]
    with open(file, "r+b") as stream:
        stream.write(table._encode(header))
    with pytest.raises(ValueError, match="expected a complete epoch"):
        resume(tmp_path, state)


def test_a_full_disk_is_an_error_and_the_last_epoch_stays(tmp_path, monkeypatch):
    memory = pskd.PredictionMemory(M, C, top_k=3, path=tmp_path)
    memory.next_epoch()
    epoch_of_writes(memory, 1)
    state = memory.state_dict()

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(table, "_allocate", full)
        with pytest.raises(OSError, match="no room for an epoch's predictions: expected 4,") as e:
            memory.next_epoch()
    assert e.value.errno == errno.ENOSPC and "epoch_00002" in str(e.value)
    assert names(tmp_path) == ["epoch_00001.pskd.part"]
    assert memory.epoch == 1
    epoch_of_writes(memory, 1)
    memory.next_epoch()  # there is room again
    again = pskd.PredictionMemory(M, C, top_k=3, path=tmp_path)
    again.load_state_dict(state)
    again.next_epoch()
    for made in (memory, again):
        assert made.epoch == 2 and made.read(torch.arange(M))[1].all()


@pytest.mark.parametrize("fails", ["create_file", "finish_file"])
def test_an_epoch_that_could_not_end_ends_when_it_is_tried_again(fails, tmp_path, monkeypatch):
    memory = pskd.PredictionMemory(M, C, top_k=3, path=tmp_path)
    for epoch in (1, 2):
        memory.next_epoch()
        epoch_of_writes(memory, epoch)
    past = memory.read(torch.arange(M))[0].probs
    with monkeypatch.context() as patch:
        patch.setattr(epoch_files, fails, mock.Mock(side_effect=OSError(errno.EIO, "broken")))
        for _ in range(2):
            with pytest.raises(OSError, match="broken"):
                memory.next_epoch()
    assert names(tmp_path) == ["epoch_00001.pskd", "epoch_00002.pskd.part"]
    assert torch.equal(memory.read(torch.arange(M))[0].probs, past)
    memory.write(torch.tensor([0]), torch.eye(C)[:1])
    memory.next_epoch()
    assert memory.read(torch.tensor([0]))[0].dense(C)[0, 0] == 1
    state = memory.state_dict()
    memory.close()
    pskd.PredictionMemory(M, C, top_k=3, path=tmp_path).load_state_dict(state)


def test_an_epoch_whose_new_file_could_not_be_opened_can_be_ended_again(tmp_path, monkeypatch):
    memory = pskd.PredictionMemory(M, C, top_k=3, path=tmp_path)
    memory.next_epoch()
    with monkeypatch.context() as patch:
        patch.setattr(epoch_files, "FileTable", mock.Mock(side_effect=PermissionError("no")))
        with pytest.raises(PermissionError):
            memory.next_epoch()
    epoch_of_writes(memory, 1)  # after its checksum was computed
    memory.next_epoch()
    state = memory.state_dict()
    again = pskd.PredictionMemory(M, C, top_k=3, path=tmp_path)
    again.load_state_dict(state)
    assert again.read(torch.arange(M))[1].all()


def test_an_old_file_that_cannot_be_deleted_stops_no_training(tmp_path, monkeypatch, caplog):
    memory = pskd.PredictionMemory(M, C, path=tmp_path)
    memory.next_epoch()
    memory.next_epoch()
    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", refuses(Path.unlink, "epoch_00001.pskd"))
        memory.next_epoch()
    assert memory.epoch == 3 and "epoch_00001.pskd" in caplog.text
    memory.next_epoch()
    assert names(tmp_path) == ["epoch_00003.pskd", "epoch_00004.pskd.part"]


def test_a_folder_that_cannot_be_listed_stops_no_training(tmp_path, monkeypatch, caplog):
    memory = pskd.PredictionMemory(M, C, path=tmp_path)
    memory.next_epoch()
    with monkeypatch.context() as patch:
        patch.setattr(Path, "iterdir", refuses(Path.iterdir, tmp_path.name))
        memory.next_epoch()  # if it failed now, another call would skip an epoch
    assert memory.epoch == 2 and "Permission denied" in caplog.text


@pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning")
def test_a_lock_that_cannot_be_made_is_the_only_error(tmp_path):
    (tmp_path / ".lock").mkdir()
    with pytest.raises(IsADirectoryError, match="lock"):
        pskd.PredictionMemory(M, C, path=tmp_path).next_epoch()
    gc.collect()


def refuses(real, name):
    """Return a method of Path that the system refuses for a name."""

    def method(path, *args, **options):
        if path.name == name:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return real(path, *args, **options)

    return method


@pytest.mark.parametrize("name", ["epoch_00001.pskd", "epoch_00002.pskd", "epoch_00002.pskd.part"])
def test_a_state_whose_files_may_not_be_used_changes_nothing(name, tmp_path, monkeypatch):
    """Also of an epoch that has ended since, whose file is to be reopened."""
    memory = pskd.PredictionMemory(M, C, top_k=3, path=tmp_path)
    for epoch in (1, 2):
        memory.next_epoch()
        epoch_of_writes(memory, epoch)
    state = memory.state_dict()
    if not name.endswith(".part"):
        memory.next_epoch()
    before, files = memory.state_dict() | {"seen": memory.read(torch.arange(M))[1]}, names(tmp_path)
    real = open

    def no_permission(path, mode="r", **options):
        if Path(path).name == name and "+" in mode:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return real(path, mode, **options)

    monkeypatch.setattr(table, "open", no_permission, raising=False)
    with pytest.raises(PermissionError, match=name):
        memory.load_state_dict(state)
    monkeypatch.undo()
    assert names(tmp_path) == files
    after = memory.state_dict() | {"seen": memory.read(torch.arange(M))[1]}
    assert torch.equal(after.pop("seen"), before.pop("seen")) and after == before
    memory.next_epoch()


def test_a_folder_that_may_not_be_renamed_in_leaves_the_memory_as_it_was(tmp_path, monkeypatch):
    memory = pskd.PredictionMemory(M, C, top_k=3, path=tmp_path)
    memory.next_epoch()
    state = memory.state_dict()
    memory.next_epoch()
    monkeypatch.setattr(Path, "rename", refuses(Path.rename, "epoch_00001.pskd"))
    with pytest.raises(PermissionError, match="epoch_00001.pskd"):
        memory.load_state_dict(state)
    assert memory.epoch == 2
    memory.next_epoch()


# ---- two trainings -----------------------------------------------------------------------------


def train(folder: Path, began: threading.Event) -> None:
    memory = pskd.PredictionMemory(20, 7, top_k=3, path=folder)
    memory.next_epoch()
    began.set()
    time.sleep(600)


def try_to_train(rank: int, size: int, folder: Path, error: str | None) -> None:
    memory = pskd.PredictionMemory(20, 7, top_k=3, path=folder)
    with pytest.raises(ValueError, match=error) if error else contextlib.nullcontext():
        memory.next_epoch()


@pytest.fixture
def training(tmp_path, forkserver):
    """Another process that trains in the folder."""
    began = forkserver.Event()
    child = forkserver.Process(target=train, args=(tmp_path, began))
    child.start()
    assert began.wait(120)
    yield child
    child.kill()
    child.join()


def test_a_second_training_in_a_folder_is_refused_until_the_first_dies(training, tmp_path):
    folder = re.escape(str(tmp_path))
    files = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    memory = pskd.PredictionMemory(20, 7, top_k=3, path=tmp_path)
    with pytest.raises(ValueError, match=f"{folder}: expected a folder for this training alone"):
        memory.next_epoch()
    assert {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == files
    assert memory.epoch == 0
    training.kill()
    training.join()
    memory.next_epoch()
    assert memory.epoch == 1


def test_a_training_that_runs_on_is_not_resumed_by_another(training, tmp_path):
    part = tmp_path / "epoch_00001.pskd.part"
    run = json.loads(part.read_bytes()[:4096])["run"]
    memory = pskd.PredictionMemory(20, 7, top_k=3, path=tmp_path)
    header = memory._header() | {"run": run, "machines": 1}
    with pytest.raises(ValueError, match="one that another training writes to"):
        memory.load_state_dict({"header": header, "epoch": 1})
    assert memory.epoch == 0


def test_a_folder_that_was_made_anew_is_locked_too(tmp_path, in_processes):
    old = pskd.PredictionMemory(M, C, path=tmp_path / "memory")
    old.next_epoch()
    shutil.rmtree(tmp_path / "memory")
    memory = pskd.PredictionMemory(M, C, path=tmp_path / "memory")
    memory.next_epoch()
    error = "one that another training writes to"
    in_processes(try_to_train, 1, tmp_path / "memory", error)


def test_a_worker_of_the_loader_does_not_hold_the_folder(tmp_path, in_processes):
    memory = pskd.PredictionMemory(M, C, path=tmp_path)
    memory.next_epoch()
    child = os.fork()
    if child == 0:
        time.sleep(600)
    try:
        memory.close()
        in_processes(try_to_train, 1, tmp_path, None)
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_a_file_system_without_locks_has_a_memory_too(tmp_path, monkeypatch, caplog):
    import fcntl

    refused = mock.Mock(side_effect=OSError(errno.ENOSYS, "Function not implemented"))
    monkeypatch.setattr(fcntl, "flock", refused)
    pskd.PredictionMemory(M, C, path=tmp_path).next_epoch()
    assert "another training here would not be noticed" in caplog.text


def test_another_error_of_the_disk_is_told_as_it_is(tmp_path, monkeypatch):
    def broken(*_):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(table, "_allocate", broken)
    with pytest.raises(OSError, match="Input/output error"):
        pskd.PredictionMemory(M, C, path=tmp_path).next_epoch()
    assert not names(tmp_path)


def test_a_system_without_posix_fallocate_has_a_memory_too(tmp_path, monkeypatch):
    monkeypatch.delattr(os, "posix_fallocate", raising=False)
    memory = pskd.PredictionMemory(M, C, top_k=3, path=tmp_path)
    memory.next_epoch()
    (file,) = tmp_path.glob("*.part")
    assert file.stat().st_size == 4096 + M * memory.bytes_per_row


def test_room_is_taken_before_an_epoch_begins(tmp_path):
    """A hole in a mapped file would be a SIGBUS where the disk is full."""
    memory = pskd.PredictionMemory(1 << 16, C, top_k=3, path=tmp_path)
    memory.next_epoch()
    (file,) = tmp_path.glob("*.part")
    assert file.stat().st_blocks * 512 >= memory.bytes_per_row << 16


def measure_resident(rank: int, size: int, folder: Path) -> None:
    def resident() -> int:
        return (
            int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE") >> 20
        )

    probs, grown = pskd.TopK(torch.arange(16).expand(64, 16), torch.full((64, 16), 0.01)), []
    for limit in (1 << 22, 1 << 40):
        table._RESIDENT_BYTES = limit
        memory = pskd.PredictionMemory(500_000, 1000, top_k=16, path=folder / str(limit))
        before = most = 0
        for _ in range(2):
            memory.next_epoch()
            before = before or resident()
            for rows in torch.randint(memory.num_rows, (200, 64)):
                memory.read(rows)
                memory.write(rows, probs)
                most = max(most, resident())
        grown.append(most - before)
        memory.close()
    bounded, unbounded = grown
    assert bounded < 24 < 48 < unbounded


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="needs Linux's /proc")
def test_resident_memory_does_not_grow_with_the_rows_of_a_file(tmp_path, in_processes):
    """12,800 random rows touch nearly all of two files of 32 MB."""
    in_processes(measure_resident, 1, tmp_path)


# ---- processes ---------------------------------------------------------------------------------


def one_process(rank: int, size: int, hosts: int, folder: Path) -> None:
    host = f"host{rank * hosts // size}"
    socket.gethostname = lambda: host
    dist.init_process_group(
        "gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=size
    )
    exchange_py._BYTES = 100  # several exchanges an epoch
    path = folder / "memory" / (host if hosts > 1 else "")  # a disk of its own
    memory = pskd.PredictionMemory(M, C, top_k=3, path=path)
    for epoch in (1, 2, 3):
        memory.next_epoch()
        shift = epoch  # another process has the row in every epoch
        rows = torch.arange(M - 1)[(torch.arange(M - 1) + shift) % size == rank]
        memory.write(rows, predictions(M, seed=epoch)[rows])
        if epoch == 2:
            state = memory.state_dict() if rank == 0 else None
            # Past the epoch's end, and back to where the state was saved.
            memory.next_epoch()
            memory.write(rows, predictions(M, seed=9)[rows])
            memory.close()
            memory = pskd.PredictionMemory(M, C, top_k=3, path=path)
            told = [state]
            dist.broadcast_object_list(told, src=0)
            memory.load_state_dict(state := told[0])
            # What a machine got from another before is not sent back over what that one writes now.
            memory.write(rows, predictions(M, seed=8)[rows])
    past, seen = memory.read(torch.arange(M))
    torch.save((past, seen), folder / f"read_{rank}.pt")
    try:
        pskd.PredictionMemory(M, C, path=path).load_state_dict(state)
    except (ValueError, RuntimeError) as error:
        (folder / f"error_{rank}").write_text(str(error))
    if rank == size - 1:
        for file in path.glob("**/epoch_00002.pskd"):
            file.unlink()
    dist.barrier()
    try:
        memory.load_state_dict(memory.state_dict())
    except (ValueError, RuntimeError) as error:
        (folder / f"missing_{rank}").write_text(str(error))
    dist.destroy_process_group()


@pytest.mark.parametrize(("size", "hosts"), [(2, 1), (4, 1), (4, 2), (3, 3)])
def test_processes_read_what_one_process_would(size, hosts, tmp_path, in_processes):
    in_processes(one_process, size, hosts, tmp_path)
    alone = pskd.PredictionMemory(M, C, top_k=3)
    for epoch in (1, 2, 3):
        alone.next_epoch()
        seed = 8 if epoch == 2 else epoch
        alone.write(torch.arange(M - 1), predictions(M, seed=seed)[: M - 1])
    expected, expected_seen = alone.read(torch.arange(M))
    for rank in range(size):
        past, seen = torch.load(tmp_path / f"read_{rank}.pt", weights_only=False)
        assert torch.equal(seen, expected_seen) and not seen[-1]
        assert torch.equal(past[0], expected.indices) and torch.equal(past[1], expected.probs)
        assert "expected top_k None, got 3" in (tmp_path / f"error_{rank}").read_text()
        missing = (tmp_path / f"missing_{rank}").read_text()
        assert "expected the predictions of epoch 2, got none" in missing
    folders = {path.parent for path in tmp_path.glob("memory/**/epoch_00003.pskd.part")}
    assert len(folders) == hosts


@pytest.mark.parametrize("machines", [2, None])
def test_the_state_of_another_number_of_machines_is_refused(machines, tmp_path):
    state, _ = saved(tmp_path)
    state["header"]["machines"] = machines
    with pytest.raises(ValueError, match=f"memory: expected machines 1, got {machines}"):
        resume(tmp_path, state)


# ---- bad input ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_rows": 0}, "num_rows: expected at least 1, got 0"),
        ({"num_classes": 0}, "num_classes: expected at least 1, got 0"),
        ({"num_rows": 2.5}, "num_rows: expected an integer, got 2.5"),
        ({"top_k": 8}, "top_k: expected 1 to 7 classes, got 8"),
        ({"top_k": 0}, "top_k: expected 1 to 7 classes, got 0"),
        ({"dtype": torch.bfloat16}, "dtype: expected torch.float16 or torch.float32, got"),
        ({"momentum": 1.0}, r"momentum: expected a number in \[0, 1\), got 1.0"),
        ({"momentum": float("nan")}, "momentum: expected a number"),
        ({"path": "memory", "device": "cuda"}, "device: expected cpu for a memory in a file"),
    ],
)
def test_a_memory_of_no_size_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        pskd.PredictionMemory(**({"num_rows": M, "num_classes": C} | options))


@pytest.mark.parametrize(
    ("rows", "probs", "message"),
    [
        (torch.tensor([0, M]), predictions(2), r"rows: expected numbers in \[0, 19\], got \[0, 20"),
        (torch.tensor([-1]), predictions(1), r"got \[-1, -1\]"),
        (torch.tensor([0.0]), predictions(1), r"rows: expected int64 of shape \(N,\), got torch.f"),
        (torch.tensor([[0]]), predictions(1), r"of \(1, 1\)"),
        (torch.tensor([0]), predictions(2), r"probs: expected \(1, 7\) probabilities or TopK of"),
        (torch.tensor([0]), predictions(1, C + 1), r"got Tensor of \(1, 8\)"),
        (
            torch.tensor([0]),
            pskd.TopK(torch.zeros(1, 2, dtype=torch.int64), torch.zeros(1, 2)),
            r"TopK of \(1, 3\), got TopK of \(1, 2\)",
        ),
    ],
)
def test_rows_and_predictions_that_do_not_fit_are_refused(rows, probs, message):
    with pytest.raises(ValueError, match=message):
        pskd.PredictionMemory(M, C, top_k=3).write(rows, probs)


def one_bad_state(rank: int, size: int, folder: Path) -> None:
    store = f"file://{folder / 'store'}"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=size)
    memory = pskd.PredictionMemory(M, C, path=folder / "memory")
    memory.next_epoch()
    state = memory.state_dict()
    refused = ValueError if rank else RuntimeError
    with pytest.raises(refused, match="expected a memory's state with 'header' and 'epoch'"):
        memory.load_state_dict({"epoch": 1} if rank else state)
    memory.load_state_dict(state)
    assert memory.epoch == 1


def test_a_process_with_a_bad_state_does_not_leave_the_others_waiting(tmp_path, in_processes):
    in_processes(one_bad_state, 2, tmp_path)


def test_a_file_where_the_folder_should_be_is_refused(tmp_path):
    (tmp_path / "memory").touch()
    with pytest.raises(ValueError, match="path: expected a folder for the memory's files, got the"):
        pskd.PredictionMemory(M, C, path=tmp_path / "memory")


def test_nothing_is_carried_over_before_there_is_a_past():
    memory = pskd.PredictionMemory(M, C)
    memory.next_epoch()
    memory.carry_over(torch.arange(M))
    memory.next_epoch()
    assert not memory.read(torch.arange(M))[1].any()


@pytest.mark.parametrize(
    ("records", "got"),
    [([1], "list"), (torch.zeros(M, 3), r"torch.float32 of \(20, 3\)")],
)
@pytest.mark.parametrize("name", ["past", "present"])
def test_records_that_do_not_fit_are_refused_and_nothing_is_changed(name, records, got):
    memory = pskd.PredictionMemory(M, C, top_k=3)
    epoch_of_writes(memory, 1)
    memory.next_epoch()
    state = memory.state_dict() | {name: records}
    message = rf"memory: expected {name} records, torch.uint8 of \(20, 13\), got {got}"
    with pytest.raises(ValueError, match=message):
        memory.load_state_dict(state)
    assert memory.epoch == 2 and memory.read(torch.arange(M))[1].all()


WRONG = [None, "1", [1], 1.5, True, -1, 10**400, {}, torch.ones(3), b"1"]


@pytest.mark.parametrize("wrong", WRONG, ids=lambda value: str(type(value).__name__))
@pytest.mark.parametrize("key", ["epoch", "header", "past", "present", "rows", "top_k", "run"])
def test_a_state_of_other_types_is_refused_and_nothing_is_changed(key, wrong, path):
    memory = pskd.PredictionMemory(M, C, top_k=3, path=path)
    for epoch in (1, 2):
        memory.next_epoch()
        epoch_of_writes(memory, epoch)
    state = memory.state_dict()
    if key in state["header"]:
        if wrong is None and (key, path) == ("run", None):
            return  # what it is in RAM
        changed = state | {"header": state["header"] | {key: wrong}}
    elif key in state:
        changed = state | {key: wrong}
    else:
        return  # a memory in files has no records in its state
    with pytest.raises(ValueError, match="expected") as error:
        memory.load_state_dict(changed)
    assert len(str(error.value)) < 500
    assert memory.epoch == 2 and memory.state_dict()["header"] == state["header"]
    assert memory.read(torch.arange(M))[1].all()


HEADERS = {
    "nested": b"[" * 4096,
    "many digits": b'{"format": "pskd memory 1", "rows": ' + b"9" * 4000 + b"}",
    "400 digits": b'{"format": "pskd memory 1", "rows": ' + b"9" * 400 + b"}",
    "a long text": b'{"format": "' + b"x" * 4000 + b'"}',
    "no checksum": None,
}


@pytest.mark.parametrize("header", HEADERS.values(), ids=HEADERS)
def test_a_header_made_to_do_harm_is_refused(header, tmp_path):
    state, file = saved(tmp_path)
    content = file.read_bytes()
    if header is None:
        told = json.loads(content[:4096]) | {"crc32": [["x"]]}
        header = json.dumps(told).encode()
    file.write_bytes(header.ljust(4096) + content[4096:])
    with pytest.raises(ValueError, match="epoch_00001.pskd: .*expected") as error:
        resume(tmp_path, state)
    assert len(str(error.value)) < 500


@pytest.mark.parametrize("name", ["epoch_00001.pskd", "epoch_00002.pskd.part"])
def test_a_pipe_in_the_place_of_a_file_is_refused(name, tmp_path):
    state, _ = saved(tmp_path)
    (tmp_path / name).unlink()
    os.mkfifo(tmp_path / name)
    with pytest.raises(ValueError, match=f"{name}: expected a file, got a pipe or a device"):
        resume(tmp_path, state)


@pytest.mark.parametrize("path", [None, "memory"])
@pytest.mark.parametrize("fingerprint", ["x" * 5000, "\N{SNOWMAN}" * 400, 5, None])
def test_a_fingerprint_that_no_header_can_hold_is_refused(fingerprint, path, tmp_path):
    path = path and tmp_path / path
    with pytest.raises(ValueError, match="fingerprint: expected"):
        pskd.PredictionMemory(M, C, fingerprint=fingerprint, path=path)
    assert not list(tmp_path.iterdir())


def test_the_longest_fingerprint_is_read_back(tmp_path):
    state, _ = saved(tmp_path, fingerprint="x" * 2046)
    resume(tmp_path, state, fingerprint="x" * 2046)


def test_more_rows_than_a_file_can_have_leave_no_file(tmp_path):
    memory = pskd.PredictionMemory(1 << 62, C, path=tmp_path)
    with pytest.raises(OSError, match="no room for an epoch's predictions"):
        memory.next_epoch()
    assert not names(tmp_path)


@pytest.mark.parametrize("state", [None, {}, {"epoch": 1}])
def test_what_is_no_state_is_refused(state):
    with pytest.raises(ValueError, match="expected a memory's state with 'header' and 'epoch'"):
        pskd.PredictionMemory(M, C).load_state_dict(state)


@pytest.mark.parametrize(
    ("indices", "message"),
    [
        ([0, 1, C], r"probs: expected TopK of classes in \[0, 6\], got \[0, 7\]"),
        ([70_000, 1, 2], r"got \[1, 70000\]"),
        ([-1, 1, 2], r"got \[-1, 2\]"),
        ([4, 2, 4], "probs: expected TopK of distinct classes in a row, got 4 twice"),
    ],
)
def test_classes_that_no_prediction_can_have_are_refused(indices, message):
    memory = pskd.PredictionMemory(M, C, top_k=3)
    memory.next_epoch()
    with pytest.raises(ValueError, match=message):
        memory.write(torch.tensor([0]), pskd.TopK(torch.tensor([indices]), torch.full((1, 3), 0.3)))
    memory.next_epoch()
    assert not memory.read(torch.tensor([0]))[1].any()


@pytest.mark.parametrize(
    ("rows", "probs", "message"),
    [
        ([0], predictions(1), "rows: expected a tensor, got list"),
        (torch.tensor([0]), predictions(1).tolist(), "probs: expected a tensor, got list"),
        (torch.tensor([0]), torch.ones(1, C).long(), "probs: expected a floating-point tensor"),
        (
            torch.tensor([0]),
            pskd.TopK(torch.zeros(1, 3), torch.zeros(1, 3)),
            "probs: expected 1 to 7 integer classes a row, got 3 of torch.float32",
        ),
    ],
)
def test_rows_and_predictions_of_other_types_are_refused(rows, probs, message):
    with pytest.raises(ValueError, match=message):
        pskd.PredictionMemory(M, C, top_k=3).write(rows, probs)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e6])  # the last in half precision
@pytest.mark.parametrize("k", FORMS)
def test_a_row_that_was_not_finite_reads_as_zeros(k, bad, path):
    """Also of files that were written before, which hold NaN."""
    memory = pskd.PredictionMemory(M, C, top_k=k, path=path)
    rows, probs = torch.arange(3), predictions(3)
    probs[1, 2] = bad
    memory.next_epoch()
    memory.write(rows, probs)
    memory._present.records[5:7, :-1] = 0xFF  # NaN of rows that say that they were not written
    memory.next_epoch()
    past, seen = memory.read(torch.arange(7))
    assert seen.tolist() == [True, False, True, False, False, False, False]
    for part in past if k else [past]:
        assert (part[~seen] == 0).all()
        assert part.isfinite().all()
    memory.close()


@pytest.mark.parametrize("k", FORMS)
def test_an_average_recovers_from_an_epoch_that_was_not_finite(k):
    memory = pskd.PredictionMemory(M, C, top_k=k, momentum=0.5)
    rows, nothing = torch.arange(M), torch.full((M, C), float("nan"))
    seen = []
    for probs in (predictions(M), nothing, predictions(M), predictions(M)):
        memory.next_epoch()
        seen.append(bool(memory.read(rows)[1].any()))
        memory.write(rows, probs)
    memory.next_epoch()
    past, is_there = memory.read(rows)
    assert seen == [False, True, False, True] and is_there.all()
    torch.testing.assert_close(dense(past), kept(predictions(M), k), rtol=0, atol=2e-3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_an_average_gives_nothing_to_classes_that_are_masked(dtype):
    """More classes are kept than can be said: the list is filled up with other masked ones."""
    memory = pskd.PredictionMemory(M, C, top_k=5, dtype=dtype, momentum=0.5)
    rows, said = torch.arange(M), torch.tensor([0.5, 0.3, 0.1999, 0.0, 0.0])  # a rounded sum
    for masked in ([1, 3], [4, 6], [1, 3]):
        memory.next_epoch()
        indices = torch.tensor([[0, 2, 5, *masked]]).expand(M, -1)
        memory.write(rows, pskd.TopK(indices, said.expand(M, -1)))
    memory.next_epoch()
    past, _ = memory.read(rows)
    is_masked = torch.isin(past.indices, torch.tensor([1, 3, 4, 6]))
    assert is_masked.any() and (past.probs[is_masked] == 0).all()


@pytest.mark.parametrize("k", [2, 3, 5])
def test_an_average_lists_each_class_once_where_there_is_no_past(k):
    """Of equal probabilities, as of a head that is all zeros, ties are many."""
    memory = pskd.PredictionMemory(M, 10, top_k=k, dtype=torch.float32, momentum=0.5)
    for _ in range(2):
        memory.next_epoch()
    memory.write(torch.arange(M), torch.full((M, 10), 1.0) / 10)
    memory.next_epoch()
    past, seen = memory.read(torch.arange(M))
    assert seen.all() and all(len(row.unique()) == k for row in past.indices)
    torch.testing.assert_close(past.dense(10), torch.full((M, 10), 0.1))
