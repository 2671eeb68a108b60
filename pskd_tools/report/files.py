"""The files of a run, read and checked.

Each reader raises ValueError, naming the file, for one that is not what docs/report.md says, and
OSError for one that cannot be read.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pskd.files import shown
from pskd_tools.files import read_json, read_npz

__all__ = [
    "ROW_ARRAYS",
    "Example",
    "check_image",
    "read_examples",
    "read_numbers",
    "read_reweighted",
    "read_rows",
]

#: The arrays of confidence.npz that have an entry for each row.
ROW_ARRAYS = (
    "confidence",
    "correct",
    "nll",
    "in_top5",
    "scaled_confidence",
    "scaled_nll",
    "ids",
    "label",
    "predicted",
)
_IMAGE = re.compile(r"data:image/(png|jpeg|gif|webp);base64,[A-Za-z0-9+/]+={0,2}")


@dataclass(frozen=True)
class Example:
    """A training example that PS-KD re-weighted.

    Attributes:
        label: its class, as a reader knows it.
        rescaling: the factor on its gradient, at most 1.
        difficulty: the mean of 1 - p[label] over the training; None if it was not told.
        image: a data URI; None for none.
    """

    id: str
    label: str
    rescaling: float
    difficulty: float | None = None
    image: str | None = None


def check_image(image: str) -> str:
    """Return an image's data URI; an image from elsewhere is a ValueError."""
    if not _IMAGE.fullmatch(image):
        raise ValueError(f"image: expected a data URI of an image in base64, got {image[:40]!r}")
    return image


def read_numbers(path: Path) -> dict[str, Any]:
    """Read results.json or evaluation.json."""
    numbers = read_json(path)
    for key in ("last", "best", "scaled", "bbox", "voc", "confidence", "ground_truth_rois"):
        if not isinstance(numbers.get(key, {}), dict):
            raise ValueError(f"{path}: {key}: expected an object, got {shown(numbers[key])}")
    command = numbers.get("command")
    words = command if isinstance(command, list) else [command or ""]
    if not all(isinstance(word, str) for word in words):
        got = shown(command)
        raise ValueError(f"{path}: command: expected text or a list of words, got {got}")
    if not isinstance(seed := numbers.get("seed"), int | str | None):
        raise ValueError(f"{path}: seed: expected an integer, got {shown(seed)}")
    return numbers


def _read_arrays(path: Path, needed: Sequence[str]) -> dict[str, np.ndarray]:
    arrays = read_npz(path)
    for key in needed:
        if key not in arrays:
            raise ValueError(f"{path}: expected an array {key}, got {', '.join(sorted(arrays))}")
    return arrays


def _check_lengths(path: Path, arrays: dict[str, np.ndarray], names: Sequence[str]) -> None:
    first, *others = [name for name in names if name in arrays]
    if arrays[first].ndim != 1:
        raise ValueError(f"{path}: {first}: expected a vector, got shape {arrays[first].shape}")
    for name in others:
        if arrays[name].shape != arrays[first].shape:
            expected, got = arrays[first].shape, arrays[name].shape
            raise ValueError(f"{path}: {name}: expected shape {expected}, got {got}")


def _check_numbers(path: Path, arrays: dict[str, np.ndarray], names: Sequence[str]) -> None:
    for name in names:
        if name in arrays and arrays[name].dtype.kind not in "fiu":
            raise ValueError(
                f"{path}: {name}: expected real numbers, got dtype {arrays[name].dtype}"
            )


def read_rows(path: Path) -> dict[str, np.ndarray]:
    """Read confidence.npz; nothing of one without rows."""
    rows = _read_arrays(path, ("confidence", "correct"))
    _check_lengths(path, rows, ROW_ARRAYS)
    _check_numbers(path, rows, ("temperature",))
    for name in ("label", "predicted"):
        if name in rows and rows[name].dtype.kind not in "iu":
            raise ValueError(f"{path}: {name}: expected integers, got dtype {rows[name].dtype}")
    if rows.get("temperature", np.empty(())).shape != ():
        raise ValueError(
            f"{path}: temperature: expected a single number, got shape {rows['temperature'].shape}"
        )
    return rows if len(rows["confidence"]) else {}


def read_examples(path: Path) -> dict[str, np.ndarray]:
    """Read examples.npz."""
    examples = _read_arrays(path, ("ids", "difficulty", "rescaling"))
    _check_lengths(path, examples, ("ids", "label", "difficulty", "rescaling"))
    _check_numbers(path, examples, ("difficulty", "rescaling"))
    difficulty = examples["difficulty"]
    if ((difficulty < 0.0) | (difficulty > 1.0)).any():  # NaN: never visited
        raise ValueError(
            f"{path}: difficulty: expected values in [0, 1], got values in "
            f"[{np.nanmin(difficulty):g}, {np.nanmax(difficulty):g}]"
        )
    if len(np.unique(examples["ids"])) < len(examples["ids"]):
        raise ValueError(f"{path}: ids: expected each once, got one again")
    return examples


def read_reweighted(path: Path) -> dict[str, list[Example]]:
    """Read reweighted.json: the examples of lowest factor, ``most``, and of highest, ``least``."""
    found = read_json(path)
    try:
        return {key: [_example(entry) for entry in found.get(key, [])] for key in ("most", "least")}
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise ValueError(
            f"{path}: expected examples with id, label and rescaling: {error!r}"
        ) from error


def _example(entry: dict[str, Any]) -> Example:
    image, difficulty = entry.get("image"), entry.get("difficulty")
    return Example(
        id=str(entry["id"]),
        label=str(entry["label"]),
        rescaling=float(entry["rescaling"]),
        difficulty=None if difficulty is None else float(difficulty),
        image=None if image is None else check_image(image),
    )
