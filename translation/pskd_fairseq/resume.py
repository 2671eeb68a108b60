"""Which checkpoint a training goes on from, and what of it is refused before the first update."""

from __future__ import annotations

import errno
import logging
import os
import pickle
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass

import torch
from fairseq.tasks import FairseqTask

from pskd.schedule import check_unchanged
from pskd_fairseq.checkpoint import ENTRY, FORMAT, SavePlan, digest, vocabulary_sizes
from pskd_fairseq.evaluated import UnsafeArgumentError
from pskd_fairseq.memory import positioned

logger = logging.getLogger(__name__)


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
        ValueError: if the file is damaged or holds objects that fairseq does not write, if an
            argument in it may run code, if it was made with dictionaries of another size, with
            other options, with another alpha schedule (unless ``allow_change``), or stops in the
            middle of an epoch without its teacher.
        FileNotFoundError: as `ResumePlan.path`.
    """
    path = plan.path()
    if path is None:
        return
    state = _read(path)
    try:
        _check_state(path, state, task, schedule, allow_change, options or {})
    except (AttributeError, LookupError, RuntimeError, TypeError) as error:
        raise _damaged(path, error) from error


def kept_memories(plan: SavePlan, task: FairseqTask) -> list[dict]:
    """Return the `TokenMemory` states of the checkpoints that a run may be resumed from."""
    found = []
    for path in plan.resumable():
        # One that is damaged, or has no memory, needs no files.
        with suppress(AttributeError, LookupError, OSError, TypeError, ValueError):
            extra_state = _read(str(path))["extra_state"]
            epoch = extra_state["train_iterator"]["epoch"]
            memory = extra_state[type(task).__name__][ENTRY]["memory"] or {}
            found.append({shard: positioned(state, epoch) for shard, state in memory.items()})
    return found


def _read(path: str) -> dict:
    try:
        # mmap: only the pages that are looked at are read, fairseq loads the rest a moment later.
        return torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except UnsafeArgumentError as error:
        raise ValueError(f"{path}: {error}") from error
    except Exception as error:  # a damaged pickle can fail in any way
        foreign = re.search(r"GLOBAL (\S+)", str(error))
        if isinstance(error, pickle.UnpicklingError) and foreign:
            raise ValueError(
                f"{path}: expected the types of a fairseq checkpoint, got {foreign[1]}; name "
                "another one with --restore-file"
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
    if entry.get("format") != FORMAT:
        raise ValueError(
            f"{path}: expected PS-KD state {FORMAT}, got {entry.get('format')!r}; resume with the "
            "version of pskd that saved it, or start over with --reset-dataloader"
        )
    if entry["vocabulary"] != vocabulary:
        raise ValueError(
            f"{path}: expected the dictionaries it was trained with, of {entry['vocabulary']} "
            f"types, got {vocabulary}; give the data folder of that training"
        )
    if digest(entry["teacher"]) != entry["teacher_sha256"]:
        raise ValueError(
            f"{path}: the teacher's weights are damaged: expected SHA-256 "
            f"{entry['teacher_sha256']}, got {digest(entry['teacher'])}; name an older one with "
            "--restore-file"
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
