"""The file that a run is resumed from: written aside, renamed, and checked before it is used."""

from __future__ import annotations

import contextlib
import logging
import os
import zipfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from pskd.files import open_regular, same_value
from pskd.teachers import load_into
from pskd_tools.files import named, written_aside

__all__ = [
    "check_classes",
    "load_archive",
    "load_optimizer",
    "load_weights",
    "naming",
    "read_checkpoint",
    "tell_changes",
    "write_archive",
]

logger = logging.getLogger(__name__)

_CHECKPOINT = "a checkpoint of this program"


def write_archive(path: str | os.PathLike[str], content: object) -> None:
    """Save with torch; a stop at any moment leaves the old file or the new one.

    Raises:
        OSError: naming the file and the cause, such as a full disk; the old file stays.
    """
    # Given a name, torch writes by itself, and does not tell what the system said.
    with written_aside(path) as aside, aside.open("wb") as file:
        torch.save(content, file)


def load_archive(path: str | os.PathLike[str], expected: str) -> Any:
    """Return what torch saved, on the CPU; no code in it is run.

    Args:
        expected: what it should be, for the message.

    Raises:
        ValueError: naming the file, if it is damaged, or compressed, which torch's never are: a
            small file could fill the memory.
        OSError: if it cannot be opened.
    """
    with open_regular(path) as file, named(path, f"expected {expected}, got"):
        if zipfile.is_zipfile(file):
            with zipfile.ZipFile(file) as archive:
                claimed = sum(member.file_size for member in archive.infolist())
            if claimed > (size := os.fstat(file.fileno()).st_size):
                raise ValueError(f"an archive of {claimed:,} bytes in {size:,}")
        file.seek(0)
        return torch.load(file, map_location="cpu", weights_only=True)


def read_checkpoint(path: Path, keys: Collection[str]) -> dict[str, Any]:
    """Read a checkpoint that has at least these keys; no code in it is run.

    Raises:
        ValueError: naming the file, if it is damaged or none of this program's.
    """
    try:
        content = load_archive(path, _CHECKPOINT)
    except OSError as error:
        raise ValueError(f"{path}: expected {_CHECKPOINT}, got {type(error).__name__}") from error
    if not isinstance(content, dict) or not content.keys() >= set(keys):
        got = sorted(content) if isinstance(content, dict) else type(content).__name__
        raise ValueError(f"{path}: expected a checkpoint with {sorted(keys)}, got {got}")
    return content


def load_weights(path: Path, model: torch.nn.Module, weights: Mapping[str, Any]) -> None:
    """Load a model's weights; raise ValueError, naming the file, if they are another model's."""
    with naming(path):
        load_into(model, weights)


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Raise ValueError, naming the file, where what it holds cannot be loaded."""
    kinds = (TypeError, LookupError, AttributeError)
    with named(path, f"expected {_CHECKPOINT}, got", kinds):
        try:
            yield
        except ValueError as error:
            if str(error).startswith(f"{path}: "):
                raise
            raise ValueError(f"{path}: {error}") from error


def check_classes(path: Path, saved: Sequence[str], now: Sequence[str]) -> None:
    """Raise ValueError, naming the file, if it knows other classes or another order of them."""
    if list(saved) != list(now):
        raise ValueError(f"{path}: expected the classes {', '.join(now)}, got {', '.join(saved)}")


def tell_changes(path: Path, saved: Mapping[str, object], now: Mapping[str, object]) -> None:
    """Warn of options that a resumed run has otherwise than the checkpoint."""
    for name, value in saved.items():
        if name in now and not same_value(now[name], value):
            logger.warning("%s: trained with %s %s, goes on with %s", path, name, value, now[name])


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Load what the optimizer has gathered; its rates and decays are those of this run."""
    own = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    optimizer.load_state_dict(state)
    for group, options in zip(optimizer.param_groups, own, strict=True):
        group.update(options)
