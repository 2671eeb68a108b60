"""The file that a run is resumed from: written aside, renamed, and checked before it is used."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path

import torch

from pskd.run.files import written_aside
from pskd_torchvision.training import Trainer

__all__ = ["NAME", "load_model", "load_training", "read", "write"]

NAME = "checkpoint.pth"
#: Options that shape the weights; others may change, which is said in the log.
MODEL_OPTIONS = ("model", "anchor_sizes", "frozen_bn")
TRAINING_OPTIONS = ("opt", "fingerprint")
KEYS = {"model", "optimizer", "scaler", "epoch", "pskd", "options", "class_names"}
logger = logging.getLogger(__name__)


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
    with written_aside(path) as aside:
        torch.save(content, aside)


def read(path: Path) -> dict:
    """Read a checkpoint; no code in it is run.

    Raises:
        ValueError: naming the file, if it is damaged or none of this program's.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch, pickle and zipfile raise many kinds for a damaged file
        first = f"{type(error).__name__}: {error}".splitlines()[0]
        raise ValueError(f"{path}: expected a checkpoint of this program, got {first}") from error
    if not isinstance(content, dict) or not content.keys() >= KEYS:
        got = sorted(content) if isinstance(content, dict) else type(content).__name__
        raise ValueError(f"{path}: expected a checkpoint with {sorted(KEYS)}, got {got}")
    return content


def load_model(path: Path, content: dict, model, options: Mapping, class_names) -> None:
    """Load the model's weights.

    Raises:
        ValueError: naming the file, if it is another model's or has other classes.
    """
    _check_same(path, content, options, MODEL_OPTIONS)
    if content["class_names"] != list(class_names):
        raise ValueError(
            f"{path}: expected the classes {', '.join(class_names)}, got "
            f"{', '.join(content['class_names'])}"
        )
    try:
        model.load_state_dict(content["model"])
    except RuntimeError as error:
        first = str(error).splitlines()[-1].strip()
        raise ValueError(f"{path}: expected the weights of this model: {first}") from error


def load_training(path: Path, content: dict, trainer: Trainer, options: Mapping) -> int:
    """Load what goes on beside the model; return the epoch after which the run goes on.

    Raises:
        ValueError: naming the file, if it is of another training set, optimizer or PS-KD schedule.
    """
    _check_same(path, content, options, TRAINING_OPTIONS)
    try:
        trainer.epochs.load_state_dict(content["pskd"])
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    _load_optimizer(trainer.optimizer, content["optimizer"])
    if content["scaler"]:  # empty without mixed precision
        trainer.scaler.load_state_dict(content["scaler"])
    for name, value in content["options"].items():
        if name in options and options[name] != value:
            now = options[name]
            logger.warning("%s: trained with %s %s, goes on with %s", path, name, value, now)
    return content["epoch"]


def _load_optimizer(optimizer: torch.optim.Optimizer, state: dict) -> None:
    """Load what the optimizer has gathered; its rates and decays are those of this run."""
    own = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    optimizer.load_state_dict(state)
    for group, options in zip(optimizer.param_groups, own, strict=True):
        group.update(options)


def _check_same(path: Path, content: dict, options: Mapping, names: tuple[str, ...]) -> None:
    for name in names:
        expected, got = options[name], content["options"].get(name)
        if got != expected:
            raise ValueError(f"{path}: expected {name} {expected!r} as in this run, got {got!r}")
