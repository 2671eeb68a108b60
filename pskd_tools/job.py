"""What a run of a train script works on, and the checkpoint that it goes on from."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from pskd.distributed import World
from pskd.schedule import check_unchanged
from pskd_tools.checkpoint import (
    check_classes,
    load_weights,
    naming,
    read_checkpoint,
    tell_changes,
    write_archive,
)
from pskd_tools.log import MetricsLog
from pskd_tools.training import Trainer

__all__ = ["KEYS", "Job", "checkpoint_path", "find_saved"]

logger = logging.getLogger(__name__)

#: What every checkpoint has; a task adds its own.
KEYS = frozenset({"model", "optimizer", "scaler", "epoch", "options", "class_names"})


def checkpoint_path(args: argparse.Namespace) -> Path:
    """Return the path of a run's checkpoint."""
    return Path(args.output_dir) / "checkpoint.pth"


def find_saved(args: argparse.Namespace, keys: Collection[str]) -> dict[str, Any] | None:
    """Return the checkpoint that ``--resume`` goes on from, if it asks for one and there is one.

    Args:
        args: the command line.
        keys: of the task, beside `KEYS`.

    Raises:
        ValueError: for a training that would be written over, or a file that is no checkpoint of
            the task.
    """
    path = checkpoint_path(args)
    if args.resume and path.exists():
        return read_checkpoint(path, KEYS | set(keys))
    if args.resume:
        logger.info("--resume: no %s, so from the start", path)
    elif path.exists() and not (args.test_only or args.overwrite):
        raise ValueError(
            f"--output-dir: expected a folder without a training, got {path} (--resume goes on "
            "with it, --overwrite replaces it)"
        )
    return None


@dataclass
class Job:
    """What a run works on.

    Attributes:
        args: the command line.
        world: the processes.
        model: on the device.
        class_names: in the order of the model's outputs.
        options: that a checkpoint keeps, so that a resumed run can be compared.
        saved: the checkpoint that the run goes on from, until it is loaded; None without one.
    """

    args: argparse.Namespace
    world: World
    model: nn.Module
    class_names: Sequence[str]
    options: dict[str, object]
    saved: dict[str, Any] | None

    @property
    def path(self) -> Path:
        """Where the state at an epoch's end is written."""
        return checkpoint_path(self.args)

    @property
    def folder(self) -> Path:
        """Where the run writes."""
        return self.path.parent

    def load_model(self, fixed: Iterable[str]) -> None:
        """Load the saved weights, if there are any.

        Raises:
            ValueError: naming the file, if they are another model's, or if the classes or one of
                the ``fixed`` options differ.
        """
        if self.saved is None:
            return
        with naming(self.path):
            check_unchanged(self.saved["options"], {name: self.options[name] for name in fixed})
            check_classes(self.path, self.saved["class_names"], self.class_names)
            load_weights(self.path, self.model, self.saved["model"])

    def begin(self, trainer: Trainer, load: Callable[[dict[str, Any]], None]) -> range:
        """Load what goes on beside the model, open the log, and return the epochs that are left.

        Args:
            trainer: of the model.
            load: loads what the task keeps beside it, and raises ValueError before anything is
                changed.

        Raises:
            ValueError: naming the file, if it is another training's.
        """
        done, epochs = 0, self.args.epochs
        saved, self.saved = self.saved, None
        if saved is not None:
            done = saved["epoch"]
            if done > epochs:
                raise ValueError(
                    f"--epochs: expected at least {done}, as in {self.path}, got {epochs}"
                )
            with naming(self.path):
                load(saved)
                trainer.load_state_dict(saved)
                tell_changes(self.path, saved["options"], self.options)
            logger.info("%s: goes on after epoch %d of %d", self.path, done, epochs)
        if self.world.is_first:
            trainer.log = MetricsLog(self.folder, done)
        return range(done + 1, epochs + 1)

    def weights(self, epoch: int) -> dict[str, object]:
        """Return the model after an epoch, and what it is of."""
        return {
            "model": self.model.state_dict(),
            "class_names": list(self.class_names),
            "options": self.options,
            "epoch": epoch,
        }

    def save(self, trainer: Trainer, epoch: int, task: dict[str, object]) -> None:
        """Write the state at an epoch's end, in the first process.

        Args:
            trainer: of the model.
            epoch: that ended.
            task: what the task keeps beside it.
        """
        if self.world.is_first:
            write_archive(self.path, self.weights(epoch) | trainer.state_dict() | task)
