"""Files that a reader finds whole or not at all: written aside, then renamed."""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

__all__ = ["write_json", "written_aside"]


@contextlib.contextmanager
def written_aside(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Give a path to write to, which becomes ``path`` if all goes well and is removed if not."""
    path = Path(path)
    # Processes of one run may write the same file, each under a name of its own.
    aside = path.with_name(f"{path.stem}.{os.getpid()}.part{path.suffix}")
    try:
        yield aside
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def write_json(path: str | os.PathLike[str], value: object, *, indent: int | None = None) -> Path:
    """Write strict JSON aside and rename it, so that a reader never finds half a file.

    NaN and infinity, which JSON does not have, become null; numpy's numbers and arrays become
    numbers and lists, paths text.

    Args:
        path: the file; its folder must exist.
        value: what to write.
        indent: as of `json.dumps`.

    Raises:
        TypeError: for what JSON cannot hold; the file is left as it was.
    """
    text = json.dumps(_plain(value), allow_nan=False, indent=indent)
    with written_aside(path) as aside:
        aside.write_text(text + "\n", encoding="utf-8")
    return Path(path)


def _plain(value: object) -> object:
    if isinstance(value, Mapping):
        return {key: _plain(entry) for key, entry in value.items()}
    if isinstance(value, np.ndarray):
        return _plain(value.tolist())
    if isinstance(value, (list, tuple)):
        return [_plain(entry) for entry in value]
    if isinstance(value, np.generic):
        return _plain(value.item())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return str(value) if isinstance(value, os.PathLike) else value
