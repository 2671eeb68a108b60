"""The folder of a run, whatever its task, as a report reads it; docs/report.md is the contract.

Shapes: N rows (samples, tokens or boxes) that were tested, M training examples.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from pskd.files import shown
from pskd_tools.report import files
from pskd_tools.report.epochs import read_epochs

__all__ = ["TASKS", "Run", "read_run", "read_runs"]

TASKS = ("classification", "detection", "translation")

# A training's own folder, and where the tools put what they measured: detection and translation.
_PLACES = (".", "inference", "evaluation")
_NUMBERS = ("results.json", "evaluation.json")

Found = TypeVar("Found")


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
        pictures: data URIs of some test examples, by id.
        sentences: the test set's, with their translations; None without.
        boxes: some test images with what was detected, by id.
    """

    name: str
    folder: Path
    task: str
    numbers: dict[str, Any] = field(default_factory=dict)
    rows: dict[str, np.ndarray] = field(default_factory=dict)
    epochs: list[dict[str, float]] = field(default_factory=list)
    examples: dict[str, np.ndarray] = field(default_factory=dict)
    reweighted: dict[str, list[files.Example]] = field(default_factory=dict)
    pictures: dict[str, str] = field(default_factory=dict)
    sentences: files.Sentences | None = None
    boxes: dict[str, files.Boxes] = field(default_factory=dict)

    @property
    def has_teacher(self) -> bool:
        """Whether it was trained with PS-KD, as far as its files say."""
        factors = self.examples.get("rescaling", np.empty(0))
        return bool(np.isfinite(factors).any() or any(e.get("alpha", 0) > 0 for e in self.epochs))

    @property
    def command(self) -> str:
        """The command that made it; empty where it is not known."""
        command = self.numbers.get("command")
        return command if isinstance(command, str) else " ".join(command or ())

    @property
    def bins(self) -> int:
        """How many bins the run's own ECE has: 15 where it does not say."""
        places = (self.numbers.get("confidence", {}), self.numbers.get("last", {}), self.numbers)
        found = (place.get("bins") for place in places)
        return next((bins for bins in found if isinstance(bins, int)), 15)

    def number(self, *path: str) -> float | None:
        """Return what its numbers hold under a path of keys; None where that is no number."""
        found: Any = self.numbers
        for key in path:
            found = (found or {}).get(key)
        is_number = isinstance(found, int | float) and not isinstance(found, bool)
        return float(found) if is_number else None


def read_runs(words: Sequence[str]) -> list[Run]:
    """Read the runs of a command line, each ``FOLDER``, ``NAME=FOLDER`` or ``NAME=FOLDER,FOLDER``.

    A folder without a name is called by its last part, and by more parts where that alone would
    not tell it from another run. A name that is given several times makes those runs seeds of one.

    Raises:
        ValueError: no word, a folder given twice, or as `read_run`.
        OSError: a file that cannot be read.
    """
    if not words:
        raise ValueError("runs: expected at least one folder, got none")
    given = [pair for word in words for pair in _split(word)]
    folders = [folder for _, folder in given]
    for folder in folders:
        if [other.resolve() for other in folders].count(folder.resolve()) > 1:
            raise ValueError(f"{folder}: expected each folder once, got it again")
    names = {name for name, _ in given if name}
    return [read_run(folder, name or _own_name(folder, folders, names)) for name, folder in given]


def _split(word: str) -> list[tuple[str, Path]]:
    """Return names, empty where there is none, and folders."""
    name, mark, rest = word.partition("=")
    if not mark or Path(word).exists():
        return [("", Path(word))]
    folders = [rest] if Path(rest).exists() else rest.split(",")
    if not name.strip() or not all(folders):
        raise ValueError(f"{word!r}: expected FOLDER, NAME=FOLDER or NAME=FOLDER,FOLDER,...")
    return [(name.strip(), Path(folder)) for folder in folders]


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
    numbers = files.read_numbers(numbers_path) if numbers_path else {}

    def read(file: str, reader: Callable[[Path], Found], nothing: Found) -> Found:
        path = _find(folder, file)
        return reader(path) if path else nothing

    return Run(
        name=name,
        folder=folder,
        task=_task(numbers, numbers_path),
        numbers=numbers,
        rows=read("confidence.npz", files.read_rows, {}),
        epochs=read_epochs(_find(folder, "metrics.json"), _find_log(folder, numbers)),
        examples=read("examples.npz", files.read_examples, {}),
        reweighted=read("reweighted.json", files.read_reweighted, {}),
        pictures=read("test_pictures.json", files.read_pictures, {}),
        sentences=read("sentences.json", files.read_sentences, None),
        boxes=read("test_images.json", files.read_boxes, {}),
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


def _task(numbers: dict[str, Any], path: Path | None) -> str:
    """Return the task that the numbers name, or else show."""
    task: str | None = numbers.get("task")
    if task is None:
        detection = {"bbox", "voc", "confidence"} & numbers.keys()
        return "detection" if detection else "translation" if "bleu" in numbers else TASKS[0]
    if task not in TASKS:
        raise ValueError(f"{path}: task: expected one of {', '.join(TASKS)}, got {shown(task)}")
    return task
