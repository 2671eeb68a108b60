"""fairseq checkpoints: which types may be read from them, and what PS-KD keeps in them."""

from __future__ import annotations

import argparse
import collections
import errno
import hashlib
import logging
import os
import pickle
import re
import shutil
import typing
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import omegaconf
import torch
from fairseq.distributed.utils import _TensorPlaceholder
from fairseq.tasks import FairseqTask

from pskd.schedule import check_unchanged

logger = logging.getLogger(__name__)

#: Key of PS-KD's entry below the task's name in a checkpoint's ``extra_state``.
ENTRY = "pskd"
_FORMAT = 1
# What a checkpoint holds beside weights: configuration, and a header for each tensor.
_OVERHEAD = 1 << 17


def allow_fairseq_types() -> None:
    """Let torch >= 2.6 read fairseq checkpoints with its protection on.

    fairseq pickles its command line (`argparse.Namespace`), numpy counters of validation BLEU and,
    between processes, its omegaconf configuration. These types and no others join torch's
    allow-list, so a checkpoint that holds any other object is still refused.
    """
    torch.serialization.add_safe_globals(_plain_types() + _numpy_types() + _omegaconf_types())


def _plain_types() -> list:
    return [
        argparse.Namespace,
        collections.defaultdict,
        dict,
        int,
        list,
        typing.Any,
        _TensorPlaceholder,
    ]


def _numpy_types() -> list:
    multiarray = getattr(np, "_core", None) or np.core  # numpy < 2 has the latter only
    dtypes = {type(np.dtype(name)) for name in ("int32", "int64", "float32", "float64", "bool")}
    return [
        multiarray.multiarray._reconstruct,
        multiarray.multiarray.scalar,
        np.ndarray,
        np.dtype,
        *dtypes,
    ]


def _omegaconf_types() -> list:
    return [
        omegaconf.DictConfig,
        omegaconf.ListConfig,
        omegaconf.base.ContainerMetadata,
        omegaconf.base.Metadata,
        omegaconf.nodes.AnyNode,
    ]


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
        "format": _FORMAT,
        "epoch": epoch,
        "schedule": schedule,
        "vocabulary": vocabulary,
        "teacher": teacher,
        "teacher_sha256": _digest(teacher),
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


def _digest(teacher: dict) -> str:
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
    """

    save_dir: str
    suffix: str = ""
    keep_best: int = 0


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


@dataclass(frozen=True)
class ResumePlan:
    """What the command line says about resuming, as fairseq reads it."""

    save_dir: str
    restore_file: str
    reset_dataloader: bool
    continue_once: str | None = None
    suffix: str = ""

    def path(self) -> str | None:
        """Return the checkpoint whose *training state* will be continued, or None.

        Raises:
            FileNotFoundError: if a file was named that is not there; fairseq would start afresh.
        """
        name = self.restore_file.replace(".pt", f"{self.suffix}.pt")
        if self.restore_file != "checkpoint_last.pt":
            if not os.path.isfile(name):
                raise FileNotFoundError(
                    errno.ENOENT,
                    "--restore-file: expected a checkpoint (a path from the working directory, "
                    "which --checkpoint-suffix is added to), got none",
                    name,
                )
            path = name
        else:
            path = os.path.join(self.save_dir, name)
            if not os.path.isfile(path) and self.continue_once is not None:
                path = self.continue_once
        return path if os.path.isfile(path) and not self.reset_dataloader else None


def check_resume(
    plan: ResumePlan,
    task: FairseqTask,
    schedule: dict,
    allow_change: bool,
    options: Mapping[str, object] | None = None,
) -> None:
    """Refuse, before anything is loaded or trained, a checkpoint that cannot be continued.

    Args:
        plan: what is resumed from.
        task: tells the dictionaries.
        schedule: the fields of the alpha schedule.
        allow_change: whether the checkpoint's schedule may be another.
        options: as of `make_entry`.

    Raises:
        ValueError: if the file is damaged or holds objects that fairseq does not write, if it was
            made with dictionaries of another size, with other options, with another alpha schedule
            (unless ``allow_change``), or stops in the middle of an epoch without its teacher.
    """
    path = plan.path()
    if path is None:
        return
    state = _read(path)
    try:
        _check_state(path, state, task, schedule, allow_change, options or {})
    except (AttributeError, LookupError, RuntimeError, TypeError) as error:
        raise _damaged(path, error) from error


def _read(path: str) -> dict:
    try:
        # mmap: only the pages that are looked at are read, fairseq loads the rest a moment later.
        return torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except Exception as error:  # a damaged pickle can fail in any way
        foreign = re.search(r"GLOBAL (\S+)", str(error))
        if isinstance(error, pickle.UnpicklingError) and foreign:
            raise ValueError(
                f"{path}: expected the types of a fairseq checkpoint, got {foreign[1]}"
            ) from error
        raise _damaged(path, error) from error


def _damaged(path: str, error: Exception) -> ValueError:
    reason = str(error).partition("\n")[0]  # torch adds a trace of its C++ calls
    return ValueError(
        f"{path}: expected a complete fairseq checkpoint, got a damaged file "
        f"({reason}); name an older one with --restore-file"
    )


def _check_state(
    path: str,
    state: dict,
    task: FairseqTask,
    schedule: dict,
    allow_change: bool,
    options: Mapping[str, object],
) -> None:
    extra_state = state["extra_state"]
    position = extra_state["train_iterator"]
    entry = extra_state.get(type(task).__name__, {}).get(ENTRY)
    if entry is not None:
        _check_entry(path, entry, vocabulary_sizes(task))
        try:
            _check_options(entry, schedule, allow_change, options)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
    has_teacher = entry is not None and (
        entry["teacher"]["model"] is not None or bool(entry.get("memory"))
    )
    in_the_middle = position["iterations_in_epoch"] > 0 and position["epoch"] > 1
    if in_the_middle and not has_teacher and schedule["alpha_final"] > 0:
        raise ValueError(
            f"{path}: saved in the middle of epoch {position['epoch']}; expected its teacher, "
            "got none; resume from a checkpoint of an epoch's end, or start over with "
            "--reset-dataloader"
        )


def _check_entry(path: str, entry: dict, vocabulary: dict) -> None:
    if entry.get("format") != _FORMAT:
        raise ValueError(f"{path}: expected PS-KD state {_FORMAT}, got {entry.get('format')!r}")
    if entry["vocabulary"] != vocabulary:
        raise ValueError(
            f"{path}: expected the dictionaries it was trained with, of {entry['vocabulary']} "
            f"types, got {vocabulary}"
        )
    if _digest(entry["teacher"]) != entry["teacher_sha256"]:
        raise ValueError(
            f"{path}: the teacher's weights are damaged: expected SHA-256 "
            f"{entry['teacher_sha256']}, got {_digest(entry['teacher'])}"
        )


def _check_options(
    entry: dict, schedule: dict, allow_change: bool, options: Mapping[str, object]
) -> None:
    trained, now = _by_flag(entry["schedule"]), _by_flag(schedule)
    check_unchanged(
        trained,
        now,
        changeable=now,
        allowed=allow_change,
        allowed_by="--pskd-allow-schedule-change",
    )
    if trained != now:
        logger.warning("PS-KD: the schedule changes from %s to %s", trained, now)
    # Older checkpoints have no options; their memory, though, which is None with a snapshot.
    older = {"--pskd-teacher": "snapshot" if entry.get("memory") is None else "memory"}
    check_unchanged(entry.get("options") or older, options)


def _by_flag(schedule: dict) -> dict[str, object]:
    """Return the fields of an alpha schedule by what sets them."""
    return {
        "--pskd-alpha-final": schedule["alpha_final"],
        "--pskd-alpha-schedule": schedule["name"],
        "--pskd-start-epoch": schedule.get("start_epoch", 1),  # older ones do not tell
        "length of the training": f"{schedule['total']} {schedule['unit']}s",
    }
