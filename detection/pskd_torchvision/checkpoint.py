"""What a run of torchvision's detectors keeps to be resumed from."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from pskd_tools.checkpoint import (
    check_classes,
    check_same,
    load_optimizer,
    load_weights,
    naming,
    read_checkpoint,
    tell_changes,
    write_checkpoint,
)
from pskd_torchvision.training import Trainer

__all__ = ["NAME", "load_model", "load_training", "read", "write"]

NAME = "checkpoint.pth"
#: Options that shape the weights; others may change, which is said in the log.
MODEL_OPTIONS = ("model", "anchor_sizes", "frozen_bn")
TRAINING_OPTIONS = ("opt", "fingerprint")
KEYS = {"model", "optimizer", "scaler", "epoch", "pskd", "options", "class_names"}


def write(path: Path, trainer: Trainer, epoch: int, options: Mapping, class_names) -> None:
    """Save the state at an epoch's end; a stop at any moment leaves the old file or the new one.

    The model in it is the teacher of the next epoch.
    """
    content = {
        "model": trainer.model.state_dict(),
        "optimizer": trainer.optimizer.state_dict(),
        "scaler": trainer.scaler.state_dict(),
        "epoch": epoch,
        "pskd": trainer.epochs.state_dict(),
        "options": dict(options),
        "class_names": list(class_names),
    }
    write_checkpoint(path, content)


def read(path: Path) -> dict:
    """Read a checkpoint; no code in it is run.

    Raises:
        ValueError: naming the file, if it is damaged or none of this program's.
    """
    return read_checkpoint(path, KEYS)


def load_model(path: Path, content: dict, model, options: Mapping, class_names) -> None:
    """Load the model's weights.

    Raises:
        ValueError: naming the file, if it is another model's or has other classes.
    """
    with naming(path):
        check_same(path, content["options"], options, MODEL_OPTIONS)
        check_classes(path, content["class_names"], class_names)
        load_weights(path, model, content["model"])


def load_training(path: Path, content: dict, trainer: Trainer, options: Mapping) -> None:
    """Load what goes on beside the model.

    Raises:
        ValueError: naming the file, if it is of another training set, optimizer or PS-KD schedule.
    """
    with naming(path):
        check_same(path, content["options"], options, TRAINING_OPTIONS)
        trainer.epochs.load_state_dict(content["pskd"], allowed_by="--pskd-allow-schedule-change")
        load_optimizer(trainer.optimizer, content["optimizer"])
        if content["scaler"]:  # empty without mixed precision
            trainer.scaler.load_state_dict(content["scaler"])
        tell_changes(path, content["options"], options)
