"""The folder of a run, whatever its task, as a report reads it; docs/report.md is the contract.

Shapes: N rows (samples, tokens or boxes) that were tested, M training examples.
"""

from __future__ import annotations

import json
import re
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from pskd.report.epochs import read_epochs

__all__ = ["TASKS", "Example", "Run", "read_run", "read_runs"]

TASKS = ("classification", "detection", "translation")

# A training's own folder, and where the tools put what they measured: detection and translation.
_PLACES = (".", "inference", "evaluation")
_NUMBERS = ("results.json", "evaluation.json")
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


@dataclass(frozen=True)
class Run:
    """What there is of a run.

    Attributes:
        name: runs of one name are seeds of one method.
        folder: as it was given.
        task: one of `TASKS`.
        numbers: results.json or evaluation.json; empty without.
        rows: the arrays of confidence.npz, (N,) each but ``temperature``; empty without.
        epochs: as `read_epochs` returns them.
        examples: the arrays of examples.npz; empty without.
        reweighted: the examples of lowest and of highest factor, ``most`` and ``least``.
    """

    name: str
    folder: Path
    task: str
    numbers: dict[str, Any] = field(default_factory=dict)
    rows: dict[str, np.ndarray] = field(default_factory=dict)
    epochs: list[dict[str, float]] = field(default_factory=list)
    examples: dict[str, np.ndarray] = field(default_factory=dict)
    reweighted: dict[str, list[Example]] = field(default_factory=dict)

    @property
    def has_teacher(self) -> bool:
        """Whether it was trained with PS-KD, as far as its files say."""
        factors = self.examples.get("rescaling", np.empty(0))
        return bool(np.isfinite(factors).any() or any(e.get("alpha", 0) > 0 for e in self.epochs))


def read_runs(words: Sequence[str]) -> list[Run]:
    """Read the runs of a command line, each ``FOLDER`` or ``NAME=FOLDER``.

    A folder without a name is called by its last part, and by more parts where that alone would
    not tell it from another run. A name that is given several times makes those runs seeds of one.

    Raises:
        ValueError: no word, a folder given twice, or as `read_run`.
        OSError: a file that cannot be read.
    """
    if not words:
        raise ValueError("runs: expected at least one folder, got none")
    given = [_split(word) for word in words]
    folders = [folder for _, folder in given]
    for folder in folders:
        if [other.resolve() for other in folders].count(folder.resolve()) > 1:
            raise ValueError(f"{folder}: expected each folder once, got it again")
    names = {name for name, _ in given if name}
    return [read_run(folder, name or _own_name(folder, folders, names)) for name, folder in given]


def _split(word: str) -> tuple[str, Path]:
    name, mark, folder = word.partition("=")
    if not mark or Path(word).exists():
        return "", Path(word)
    if not name.strip() or not folder:
        raise ValueError(f"{word!r}: expected FOLDER or NAME=FOLDER")
    return name.strip(), Path(folder)


def _own_name(folder: Path, folders: Sequence[Path], taken: set[str]) -> str:
    """Return as many of the path's last parts as tell it from the others."""
    parts = folder.resolve().parts
    others = [other.resolve().parts for other in folders if other.resolve().parts != parts]
    name = folder.resolve().name
    for count in range(1, len(parts) + 1):
        name = "/".join(parts[-count:])
        if name not in taken and all(other[-count:] != parts[-count:] for other in others):
            break
    return name


def read_run(folder: Path, name: str) -> Run:
    """Read one run.

    Args:
        folder: holds the files itself or in ``inference`` or ``evaluation``.
        name: to call it by.

    Raises:
        ValueError: a folder that holds no run, or a file that is not what the contract says.
        OSError: a file that cannot be read.
    """
    numbers_path = _find(folder, *_NUMBERS)
    rows_path = _find(folder, "confidence.npz")
    if numbers_path is None and rows_path is None:
        raise ValueError(
            f"{folder}: expected the folder of a run, with confidence.npz, results.json or "
            "evaluation.json in it or in its inference or evaluation folder, got "
            + (f"none of them{_elsewhere(folder)}" if folder.is_dir() else "no such folder")
        )
    numbers = _read_numbers(numbers_path) if numbers_path else {}
    return Run(
        name=name,
        folder=folder,
        task=_task(numbers, numbers_path),
        numbers=numbers,
        rows=_read_rows(rows_path) if rows_path else {},
        epochs=read_epochs(_find(folder, "metrics.json"), _find_log(folder, numbers)),
        examples=_read_examples(folder),
        reweighted=_read_reweighted(folder),
    )


def _elsewhere(folder: Path) -> str:
    """Return where to look instead, for a folder that is no run."""
    names = (*_NUMBERS, "confidence.npz")
    runs = sorted({path.parent for name in names for path in folder.glob(f"*/{name}")})
    if runs:
        return f"; of its folders these are runs: {', '.join(map(str, runs))}"
    if any(folder.glob("*.pt")):
        return "; of fairseq's checkpoints a run is made by translation/evaluate.py, in its --out"
    return ""


def _find(folder: Path, *names: str) -> Path | None:
    paths = (folder / place / name for name in names for place in _PLACES)
    return next((path for path in paths if path.is_file()), None)


def _find_log(folder: Path, numbers: dict[str, Any]) -> Path | None:
    """Return the log of fairseq-train, kept in the run's folder or beside the checkpoint."""
    places = [folder]
    if "checkpoint" in numbers:
        # As evaluate.py was told it, from wherever it ran; its usual folder lies in the training's.
        places += [Path(str(numbers["checkpoint"])).parent, folder.resolve().parent]
    paths = (place / "train.log" for place in places)
    return next((path for path in paths if path.is_file()), None)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: expected JSON, got {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(value).__name__}")
    return value


def _read_numbers(path: Path) -> dict[str, Any]:
    numbers = _read_json(path)
    for key in ("last", "best", "last_scaled", "bbox", "voc", "confidence", "ground_truth_rois"):
        if not isinstance(numbers.get(key, {}), dict):
            raise ValueError(f"{path}: {key}: expected an object, got {numbers[key]!r}")
    command = numbers.get("command")
    if not isinstance(command, str | list | None):
        raise ValueError(f"{path}: command: expected text or a list of words, got {command!r}")
    return numbers


def _task(numbers: dict[str, Any], path: Path | None) -> str:
    """Return the task that the numbers name, or else show."""
    task: str | None = numbers.get("task")
    if task is None:
        detection = {"bbox", "voc", "confidence"} & numbers.keys()
        return "detection" if detection else "translation" if "bleu" in numbers else TASKS[0]
    if task not in TASKS:
        raise ValueError(f"{path}: task: expected one of {', '.join(TASKS)}, got {task!r}")
    return task


def _read_arrays(path: Path, needed: Sequence[str]) -> dict[str, np.ndarray]:
    try:
        with np.load(path) as file:  # never a pickle
            arrays = {key: file[key] for key in file.files}
    except (
        ValueError,
        EOFError,
        zipfile.BadZipFile,
        zlib.error,
        NotImplementedError,
        TypeError,
        AttributeError,
    ) as error:
        raise ValueError(f"{path}: expected arrays as numpy.savez writes them: {error}") from error
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


def _read_rows(path: Path) -> dict[str, np.ndarray]:
    rows = _read_arrays(path, ("confidence", "correct"))
    vectors = ("confidence", "correct", "nll", "in_top5", "scaled_confidence", "scaled_nll")
    _check_lengths(path, rows, vectors)
    _check_numbers(path, rows, ("temperature",))
    if rows.get("temperature", np.empty(())).shape != ():
        raise ValueError(
            f"{path}: temperature: expected a single number, got shape {rows['temperature'].shape}"
        )
    return rows if len(rows["confidence"]) else {}


def _read_examples(folder: Path) -> dict[str, np.ndarray]:
    path = _find(folder, "examples.npz")
    if path is None:
        return {}
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


def _read_reweighted(folder: Path) -> dict[str, list[Example]]:
    path = _find(folder, "reweighted.json")
    if path is None:
        return {}
    found = _read_json(path)
    try:
        return {key: [_example(entry) for entry in found.get(key, [])] for key in ("most", "least")}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(
            f"{path}: expected examples with id, label and rescaling: {error!r}"
        ) from error


def _example(entry: dict[str, Any]) -> Example:
    image, difficulty = entry.get("image"), entry.get("difficulty")
    if image is not None and not _IMAGE.fullmatch(image):
        raise ValueError(f"image: expected a data URI of an image in base64, got {image[:40]!r}")
    return Example(
        id=str(entry["id"]),
        label=str(entry["label"]),
        rescaling=float(entry["rescaling"]),
        difficulty=None if difficulty is None else float(difficulty),
        image=image,
    )
