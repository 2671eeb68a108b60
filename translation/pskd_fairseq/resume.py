"""Which checkpoint a training goes on from, what is refused of it, and which ones need files."""

from __future__ import annotations

import errno
import logging
import os
import pickle
import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import torch
from fairseq import checkpoint_utils
from fairseq.dataclass.configs import CheckpointConfig
from fairseq.tasks import FairseqTask

from pskd.files import same_value, shown
from pskd.schedule import check_unchanged
from pskd_fairseq.checkpoint import ENTRY, FORMAT, digest, vocabulary_sizes
from pskd_fairseq.config import PSKDCriterionConfig
from pskd_fairseq.evaluated import UnsafeArgumentError
from pskd_fairseq.memory import positioned
from pskd_tools.checkpoint import naming

logger = logging.getLogger(__name__)


def check_resume(
    cfg: PSKDCriterionConfig, task: FairseqTask, schedule: dict, options: Mapping[str, object]
) -> None:
    """Refuse, before anything is loaded or trained, a checkpoint that cannot be continued.

    Args:
        cfg: tells what fairseq reads, and whether the schedule may be another.
        task: tells the dictionaries.
        schedule, options: as of `make_entry`.

    Raises:
        ValueError: naming the file, if it is damaged or may run code, was made with other
            dictionaries, options or (unless that is allowed) another schedule, or stops in the
            middle of an epoch without its teacher.
        FileNotFoundError: as `resumed_from`.
    """
    path = resumed_from(cfg)
    if path is None:
        return
    with naming(path):
        extra_state = _read(path)["extra_state"]
        entry = extra_state.get(type(task).__name__, {}).get(ENTRY)
        if entry is not None:
            _check_entry(entry, vocabulary_sizes(task))
            _check_options(entry, schedule, cfg.pskd_allow_schedule_change, options)
        has_teacher = entry is not None and (
            entry["teacher"]["model"] is not None or bool(entry.get("memory"))
        )
        position = extra_state["train_iterator"]
        epoch, is_inside = position["epoch"], position["iterations_in_epoch"] > 0
        if is_inside and epoch > 1 and not has_teacher and schedule["alpha_final"] > 0:
            raise ValueError(
                f"saved in the middle of epoch {epoch}; expected its teacher, got none; resume "
                "from a checkpoint of an epoch's end, or start over with --reset-dataloader"
            )


class _AskedTrainer:
    """Stands in for fairseq's trainer, to learn which checkpoint it would be told to read."""

    def __init__(self, suffix: str) -> None:
        self.checkpoint_suffix = suffix
        self.path = ""

    def load_checkpoint(self, path: str, *_, **__) -> None:
        self.path = path  # None returned: as where there is no such file

    def get_train_iterator(self, epoch: int, **_) -> SimpleNamespace:
        return SimpleNamespace(epoch=epoch)

    def lr_step(self, epoch: int) -> None:
        pass


def resumed_from(cfg: PSKDCriterionConfig) -> Path | None:
    """Return the checkpoint whose *training state* will be continued, as fairseq finds it, or None.

    Raises:
        FileNotFoundError: if a file was named that is not there; fairseq would start afresh.
    """
    trainer = _AskedTrainer(cfg.checkpoint_suffix)
    names = {name: getattr(cfg, name) for name in ("save_dir", "restore_file", "continue_once")}
    checkpoint_utils.load_checkpoint(CheckpointConfig(**names), trainer)
    if os.path.isfile(trainer.path):
        return None if cfg.reset_dataloader else Path(trainer.path)
    if cfg.restore_file != CheckpointConfig.restore_file:
        raise FileNotFoundError(
            errno.ENOENT,
            "--restore-file: expected a checkpoint (a path from the working directory, which "
            "--checkpoint-suffix is added to), got none",
            trainer.path,
        )
    return None


def kept_memories(cfg: PSKDCriterionConfig, task: FairseqTask) -> list[dict]:
    """Return the `TokenMemory` states whose files stay: those of checkpoints to resume from.

    These are the last and the best ones, and where fairseq was told how many others stay, these
    too: without a number it keeps a checkpoint of every epoch, and the files would fill the disk.
    """
    kinds = [r"_last", r"_best", r"\.best_.*"]
    kinds += [r"\d+"] if cfg.keep_last_epochs > 0 else []
    kinds += [r"_\d+_\d+"] if cfg.keep_interval_updates > 0 else []
    name = re.compile(rf"checkpoint(?:{'|'.join(kinds)}){re.escape(cfg.checkpoint_suffix)}\.pt")
    found = []
    for path in Path(cfg.save_dir).glob("*.pt"):
        # One that is damaged, or has no memory, needs no files.
        with suppress(AttributeError, LookupError, OSError, TypeError, ValueError):
            if name.fullmatch(path.name):
                extra_state = _read(path)["extra_state"]
                epoch = extra_state["train_iterator"]["epoch"]
                memory = extra_state[type(task).__name__][ENTRY]["memory"] or {}
                found.append({shard: positioned(state, epoch) for shard, state in memory.items()})
    return found


def _read(path: Path) -> dict:
    try:
        # mmap: only the pages that are looked at are read, fairseq loads the rest a moment later.
        return torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except UnsafeArgumentError:
        raise
    except Exception as error:  # a damaged pickle can fail in any way
        foreign = re.search(r"GLOBAL (\S+)", str(error))
        if isinstance(error, pickle.UnpicklingError) and foreign:
            raise ValueError(
                f"expected the types of a fairseq checkpoint, got {foreign[1]}; name another one "
                "with --restore-file"
            ) from error
        reason = str(error).partition("\n")[0]  # torch adds a trace of its C++ calls
        raise ValueError(
            f"expected a complete fairseq checkpoint, got a damaged file ({reason}); name an older "
            "one with --restore-file"
        ) from error


def _check_entry(entry: dict, vocabulary: dict) -> None:
    if not same_value(entry.get("format"), FORMAT):
        raise ValueError(
            f"expected PS-KD state {FORMAT}, got {shown(entry.get('format'))}; resume with the "
            "version of pskd that saved it, or start over with --reset-dataloader"
        )
    if not same_value(entry["vocabulary"], vocabulary):
        raise ValueError(
            f"expected the dictionaries it was trained with, of {shown(entry['vocabulary'])} "
            f"types, got {vocabulary}; give the data folder of that training"
        )
    if not same_value(entry["teacher_sha256"], found := digest(entry["teacher"])):
        raise ValueError(
            f"the teacher's weights are damaged: expected SHA-256 {shown(entry['teacher_sha256'])}"
            f", got {found}; name an older one with --restore-file"
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
