"""Bad input to the memory of past predictions: its files, its folder, its state."""

from __future__ import annotations

import contextlib
import copy
import errno
import os
from pathlib import Path
from unittest import mock

import torch
from bad_input import Part, check, every_case

import pskd

M, C = 6, 4
PROBS = torch.full((M, C), 1.0 / C)
#: What the first epoch wrote, and what the second is writing.
FILE, RUNNING = Path("memory/epoch_00001.pskd"), Path("memory/epoch_00002.pskd.part")

FILES = Part(
    "The memory's files",
    "A memory of 6 rows and 4 classes in the folder `memory`, resumed in its second epoch; "
    "[the format](memory_format.md). A memory that refuses is as it was.",
)
FOLDERS = Part("The memory's folder and state")
PARTS = [FILES, FOLDERS]


def memory(rows: int = M, classes: int = C, **options) -> pskd.PredictionMemory:
    return pskd.PredictionMemory(rows, classes, **({"path": "memory"} | options))


def in_second_epoch(made: pskd.PredictionMemory) -> pskd.PredictionMemory:
    for _ in range(2):
        made.next_epoch()
        made.write(torch.arange(M), PROBS)
    return made


def state_of(made: pskd.PredictionMemory):
    """Return a function of what a memory holds and reads."""
    return lambda: (copy.deepcopy(made.state_dict()), made.read(torch.arange(M)))


def resumed(tried: str, says: str, spoil=lambda: None, **options) -> None:
    """Add a case of a memory that cannot go on with the files that are there."""

    def run():
        written = in_second_epoch(memory())
        saved = written.state_dict()
        written.close()
        spoil()
        made = memory(**options)
        yield state_of(made)
        made.load_state_dict(saved)

    FILES.add(tried, run, says)


def flip() -> None:
    content = bytearray(FILE.read_bytes())
    content[-3] ^= 4
    FILE.write_bytes(content)


def later_version() -> None:
    FILE.write_bytes(FILE.read_bytes().replace(b"pskd memory 1", b"pskd memory 2", 1))


def replace_by_folder() -> None:
    FILE.unlink()
    FILE.mkdir()


def of_another_training() -> None:
    in_second_epoch(memory()).close()


resumed(
    "a file cut off",
    f"{FILE}: expected 4,150 bytes, got 4,149: cut off",
    lambda: os.truncate(FILE, FILE.stat().st_size - 1),
)
resumed(
    "a file cut off in its header",
    f"{FILE}: expected a file of 'pskd memory 1', got another",
    lambda: os.truncate(FILE, 99),
)
resumed("a flipped bit", f"{FILE}: damaged: expected CRC-32 0x..., got 0x...", flip)
resumed(
    "a later version of the format",
    f"{FILE}: expected a file of 'pskd memory 1', got 'pskd memory 2'",
    later_version,
)
resumed(
    "another file under its name",
    f"{FILE}: expected a file of 'pskd memory 1', got another",
    lambda: FILE.write_bytes(b"PK\x03\x04" * 2000),
)
resumed("no file", f"{FILE}: expected the predictions of epoch 1, got none", FILE.unlink)
resumed(
    "a folder under its name",
    f"{FILE}: expected the predictions of epoch 1, got a folder",
    replace_by_folder,
)
resumed(
    "the running epoch's file cut off",
    f"{RUNNING}: expected 4,150 bytes, got 4,100: cut off",
    lambda: os.truncate(RUNNING, 4100),
)
resumed(
    "the files of another training",
    f"{FILE}: expected run '...', got '...', that of another training",
    of_another_training,
)
resumed("more rows than were written", "memory: expected rows 7, got 6", rows=7)
resumed("other classes", "memory: expected classes 5, got 4", classes=5)
resumed("another top_k", "memory: expected top_k 2, got None", top_k=2)
resumed(
    "another data set",
    "memory: expected fingerprint 'other', got ''",
    fingerprint="other",
)
resumed("another precision", "expected dtype 'float32', got 'float16'", dtype=torch.float32)
resumed(
    "a memory in RAM, with the state of files",
    "path: expected the folder of the state's files, got none",
    path=None,
)
resumed(
    "another folder",
    "elsewhere/epoch_00001.pskd: expected the predictions of epoch 1, got none",
    path="elsewhere",
)


@FOLDERS.case(
    "two trainings write to one folder",
    "memory/epoch_00001.pskd.part: expected run '...', got '...', that of another training",
)
def _two_writers():
    first, second = memory(), memory()
    for made in (first, second):
        made.next_epoch()
        made.write(torch.arange(M), PROBS)
    yield lambda: [second.state_dict()]
    first.next_epoch()


@FOLDERS.case(
    "a file where the folder should be",
    "path: expected a folder for the memory's files, got the file memory",
)
def _file_for_a_folder():
    Path("memory").write_text("notes")
    yield None
    memory()


@contextlib.contextmanager
def as_nobody():
    """Give up root's right to write anywhere, if it is root who tests."""
    is_root = os.geteuid() == 0
    if is_root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if is_root:
            os.seteuid(0)


@FOLDERS.case(
    "a folder that may not be written",
    "Permission denied: 'memory/.lock'",
    ends=PermissionError,
)
def _no_permission():
    Path("memory").mkdir(mode=0o555)
    Path().chmod(0o755)
    made = memory()
    yield None
    with as_nobody():
        made.next_epoch()


@FOLDERS.case(
    "a disk without room",
    "no room for an epoch's predictions: expected ... free bytes, got ...; what is there stays as "
    "it is: 'memory/epoch_00003.pskd.part'",
    ends=OSError,
)
def _no_room():
    made = in_second_epoch(memory())
    full = OSError(errno.ENOSPC, "No space left on device")
    yield made.state_dict
    with mock.patch("pskd.memory.table._allocate", side_effect=full):
        made.next_epoch()


FOLDERS.add("a memory of no rows", lambda: memory(rows=0), "num_rows: expected at least 1, got 0")
FOLDERS.add(
    "more kept classes than there are",
    lambda: memory(top_k=5),
    "top_k: expected 1 to 4 classes, got 5",
)
FOLDERS.add(
    "a memory of bfloat16",
    lambda: memory(dtype=torch.bfloat16),
    "dtype: expected torch.float16 or torch.float32, got torch.bfloat16",
)
FOLDERS.add(
    "momentum 1",
    lambda: memory(momentum=1.0),
    "momentum: expected a number in [0, 1), got 1.0",
)
FOLDERS.add(
    "a file's memory on a GPU",
    lambda: memory(device="cuda"),
    "device: expected cpu for a memory in a file, got cuda",
)


def written(tried: str, says: str, rows: object, probs: object) -> None:
    def run():
        made = in_second_epoch(memory(path=None))
        yield state_of(made)
        made.write(rows, probs)

    FOLDERS.add(tried, run, says)


written(
    "a row written beyond the memory",
    "rows: expected numbers in [0, 5], got [0, 6]",
    torch.tensor([0, 6]),
    PROBS[:2],
)
written(
    "rows of int32",
    "rows: expected int64 of shape (N,), got torch.int32 of (6,)",
    torch.arange(M, dtype=torch.int32),
    PROBS,
)
written(
    "predictions of other classes",
    "probs: expected (6, 4) probabilities, got Tensor of (6, 3)",
    torch.arange(M),
    PROBS[:, :3],
)


def loaded(tried: str, says: str, state) -> None:
    """Add a case of a malformed state in RAM."""

    def run():
        made = in_second_epoch(memory(path=None))
        wrong = state(copy.deepcopy(made.state_dict()))
        yield state_of(made)
        made.load_state_dict(wrong)

    FOLDERS.add(tried, run, says)


loaded(
    "a checkpoint's records of other rows",
    "memory: expected past records, torch.uint8 of (6, 9), got torch.uint8 of (5, 9)",
    lambda state: state | {"past": state["past"][:5]},
)
loaded(
    "a malformed state",
    "expected a memory's state with 'header' and 'epoch', got ['past']",
    lambda state: {"past": state["past"]},
)


@every_case(*PARTS)
def test_what_the_user_sees(case, tmp_path):
    check(case, tmp_path)
