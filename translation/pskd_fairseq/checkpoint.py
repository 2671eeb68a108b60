"""What PS-KD keeps in a fairseq checkpoint, and whether the disk has room for it."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
from collections.abc import Mapping

import torch
from fairseq.tasks import FairseqTask

from pskd_fairseq.config import PSKDCriterionConfig

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
        schedule: `Schedule.options`.
        vocabulary: `vocabulary_sizes`.
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


def check_free_space(cfg: PSKDCriterionConfig, *, first: int = 0, growth: int = 0) -> None:
    """Stop before a checkpoint is written where it does not fit.

    fairseq writes one file aside and renames it, but *copies* it to checkpoint_best.pt, to
    checkpoint_last.pt and to one more of the best that are kept, which a full disk would leave cut
    off. What is needed is estimated from above, by the size of the last checkpoint.

    Args:
        cfg: tells the files that are written.
        first: bytes of a checkpoint, for as long as there is none to go by; 0 if not known.
        growth: bytes by which the next one may exceed the last.

    Raises:
        OSError: ENOSPC, naming the folder, the bytes needed and the bytes free.
    """
    names = (f"checkpoint_{kind}{cfg.checkpoint_suffix}.pt" for kind in ("best", "last"))
    paths = [os.path.join(cfg.save_dir, name) for name in names]
    there = [os.path.getsize(path) if os.path.isfile(path) else 0 for path in paths]
    if not (there[-1] or first):
        return
    size = (there[-1] or first) + growth + (_OVERHEAD if growth or not there[-1] else 0)
    needed = size + sum(max(0, size - old) for old in there)
    # The worst of the best is removed only after the new one was written.
    needed += size if cfg.keep_best_checkpoints > 0 else 0
    free = shutil.disk_usage(cfg.save_dir).free
    if free < needed:
        raise OSError(
            errno.ENOSPC,
            f"no room for the next checkpoint: expected {needed:,} free bytes, got {free:,}; the "
            "checkpoints that are there stay as they are",
            cfg.save_dir,
        )
