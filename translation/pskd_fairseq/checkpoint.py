"""What PS-KD keeps in a fairseq checkpoint, and whether the disk has room for it."""

from __future__ import annotations

import errno
import hashlib
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from fairseq.tasks import FairseqTask

#: Key of PS-KD's entry below the task's name in a checkpoint's ``extra_state``.
ENTRY = "pskd"
FORMAT = 1
# What a checkpoint holds beside weights: configuration, and a header for each tensor.
_OVERHEAD = 1 << 17


def make_entry(
    *,
    epoch: int,
    schedule: dict,
    vocabulary: dict,
    teacher: dict,
    memory: dict | None = None,
    options: Mapping[str, object] | None = None,
) -> dict:
    """Return what a checkpoint keeps of PS-KD: plain values and tensors only.

    Args:
        epoch: the epoch that is running or has just ended, from 1.
        schedule: the fields of the alpha schedule.
        vocabulary: number of types of each dictionary, by language.
        teacher: a `pskd.SnapshotTeacher` state; without a model at an epoch's end.
        memory: a `TokenMemory` state, which names files; None with a snapshot.
        options: by flag, what beside the schedule a resumed run must have too.
    """
    return {
        "format": FORMAT,
        "epoch": epoch,
        "schedule": schedule,
        "vocabulary": vocabulary,
        "teacher": teacher,
        "teacher_sha256": digest(teacher),
        "memory": memory,
        "options": dict(options or {}),
    }


def with_entry(state: dict, task: FairseqTask, entry: dict) -> dict:
    """Return a task's checkpoint dict with PS-KD's entry beside what it already holds."""
    name = type(task).__name__
    return {**state, name: {**state.get(name, {}), ENTRY: entry}}


def vocabulary_sizes(task: FairseqTask) -> dict[str, int]:
    """Return the number of types in the task's source and target dictionaries."""
    found = {"source": task.source_dictionary, "target": task.target_dictionary}
    return {side: len(words) for side, words in found.items() if words is not None}


def digest(teacher: dict) -> str:
    """Return the SHA-256 of a teacher's weights; torch reads flipped bits without a word."""
    digest = hashlib.sha256()
    for name, value in sorted((teacher["model"] or {}).items()):
        digest.update(name.encode())
        if isinstance(value, torch.Tensor):
            digest.update(value.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def size_of(teacher: dict) -> int:
    """Return the bytes of a teacher's weights."""
    values = (teacher["model"] or {}).values()
    return sum(value.nbytes for value in values if isinstance(value, torch.Tensor))


@dataclass(frozen=True)
class SavePlan:
    """What the command line says about the files of a checkpoint, as fairseq reads it.

    Attributes:
        save_dir: the folder of the checkpoints.
        suffix: ends the name of every checkpoint, before ``.pt``.
        keep_best: how many of the best stay beside checkpoint_best.pt, each a file of its own.
        keep_epochs: how many of the epochs' ends stay; all below 1.
        keep_updates: how many of those inside an epoch stay; all below 1.
    """

    save_dir: str
    suffix: str = ""
    keep_best: int = 0
    keep_epochs: int = 0
    keep_updates: int = 0

    def resumable(self) -> list[Path]:
        """Return the checkpoints that a memory's files are kept for.

        The last and the best ones, and where fairseq was told how many others stay, these too:
        without a number it keeps a checkpoint of every epoch, and the files would fill the disk.
        """
        kinds = [r"_last", r"_best", r"\.best_.*"]
        kinds += [r"\d+"] if self.keep_epochs > 0 else []
        kinds += [r"_\d+_\d+"] if self.keep_updates > 0 else []
        name = re.compile(rf"checkpoint(?:{'|'.join(kinds)}){re.escape(self.suffix)}\.pt")
        return [path for path in Path(self.save_dir).glob("*.pt") if name.fullmatch(path.name)]


def check_free_space(plan: SavePlan, *, first: int = 0, growth: int = 0) -> None:
    """Stop before a checkpoint is written where it does not fit.

    fairseq writes one file aside and renames it, but *copies* it to checkpoint_best.pt, to
    checkpoint_last.pt and to one more of the best that are kept, which a full disk would leave cut
    off. What is needed is estimated from above, by the size of the last checkpoint.

    Args:
        plan: the files that are written.
        first: bytes of a checkpoint, for as long as there is none to go by; 0 if not known.
        growth: bytes by which the next one may exceed the last.

    Raises:
        OSError: ENOSPC, naming the folder, the bytes needed and the bytes free.
    """
    names = (f"checkpoint_{kind}{plan.suffix}.pt" for kind in ("best", "last"))
    paths = [os.path.join(plan.save_dir, name) for name in names]
    there = [os.path.getsize(path) if os.path.isfile(path) else 0 for path in paths]
    if not (there[-1] or first):
        return
    size = (there[-1] or first) + growth + (_OVERHEAD if growth or not there[-1] else 0)
    needed = size + sum(max(0, size - old) for old in there)
    # The worst of the best is removed only after the new one was written.
    needed += size if plan.keep_best > 0 else 0
    free = shutil.disk_usage(plan.save_dir).free
    if free < needed:
        raise OSError(
            errno.ENOSPC,
            f"no room for the next checkpoint: expected {needed:,} free bytes, got {free:,}; the "
            "checkpoints that are there stay as they are",
            plan.save_dir,
        )
