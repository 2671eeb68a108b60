"""The files of a run, read and checked.

Each reader raises ValueError, naming the file, for one that is not what docs/report.md says, and
OSError for one that cannot be read.

Shapes: S sentences.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pskd.files import shown
from pskd_tools.files import named, read_json, read_npz
from pskd_tools.report.sentences import BLEU_COUNTS, CHRF_COUNTS

__all__ = [
    "ROW_ARRAYS",
    "SHOWN_SCORE",
    "Box",
    "Boxes",
    "Example",
    "Sentences",
    "read_boxes",
    "read_examples",
    "read_numbers",
    "read_pictures",
    "read_reweighted",
    "read_rows",
    "read_sentences",
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
#: Boxes of a lower score are not shown and count neither for nor against a run.
SHOWN_SCORE = 0.5

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
class Sentences:
    """The sentences of a test set.

    Attributes:
        source: (S,) texts; empty where they are not known.
        reference: (S,) texts.
        translation: (S,) texts of the run.
        bleu: (S, 10) int64, as `pskd_tools.report.sentences.BLEU_COUNTS` says.
        chrf: (S, 18) int64, likewise.
    """

    source: list[str]
    reference: list[str]
    translation: list[str]
    bleu: np.ndarray
    chrf: np.ndarray


@dataclass(frozen=True)
class Box:
    """An object or a detection: left, top, width and height in pixels, and what it is.

    Attributes:
        score: of a detection, or else None.
        correct: whether a detection is matched to an object.
    """

    box: tuple[float, float, float, float]
    label: str
    score: float | None = None
    correct: bool = False


@dataclass(frozen=True)
class Boxes:
    """A test image: size in pixels, a data URI, its objects and what the run detected."""

    width: float
    height: float
    image: str
    objects: list[Box]
    detections: list[Box]

    @property
    def shown(self) -> list[Box]:
        """The detections that count."""
        return [box for box in self.detections if (box.score or 0.0) >= SHOWN_SCORE]

    @property
    def errors(self) -> int:
        """How many shown boxes are wrong and how many objects are missed."""
        right = sum(box.correct for box in self.shown)
        return len(self.shown) - right + len(self.objects) - right


# ---- numbers and arrays --------------------------------------------------------------------------


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


def read_rows(path: Path) -> dict[str, np.ndarray]:
    """Read confidence.npz; nothing of one without rows."""
    rows = _read_arrays(path, ROW_ARRAYS, needed=("confidence", "correct"))
    _check_kind(path, rows, ("temperature",), "fiu", "real numbers")
    _check_kind(path, rows, ("label", "predicted"), "iu", "integers")
    if rows.get("temperature", np.empty(())).shape != ():
        raise ValueError(
            f"{path}: temperature: expected a single number, got shape {rows['temperature'].shape}"
        )
    return rows if len(rows["confidence"]) else {}


def read_examples(path: Path) -> dict[str, np.ndarray]:
    """Read examples.npz."""
    needed = ("ids", "difficulty", "rescaling")
    examples = _read_arrays(path, (*needed, "label"), needed)
    _check_kind(path, examples, ("difficulty", "rescaling"), "fiu", "real numbers")
    difficulty = examples["difficulty"]
    if ((difficulty < 0.0) | (difficulty > 1.0)).any():  # NaN: never visited
        raise ValueError(
            f"{path}: difficulty: expected values in [0, 1], got values in "
            f"[{np.nanmin(difficulty):g}, {np.nanmax(difficulty):g}]"
        )
    if len(np.unique(examples["ids"])) < len(examples["ids"]):
        raise ValueError(f"{path}: ids: expected each once, got one again")
    return examples


def _read_arrays(
    path: Path, vectors: Sequence[str], needed: Sequence[str]
) -> dict[str, np.ndarray]:
    """Read arrays, of which all ``vectors`` that are there have one length."""
    arrays = read_npz(path)
    for key in needed:
        if key not in arrays:
            raise ValueError(f"{path}: expected an array {key}, got {', '.join(sorted(arrays))}")
    first, *others = [name for name in vectors if name in arrays]
    shape = arrays[first].shape
    if len(shape) != 1:
        raise ValueError(f"{path}: {first}: expected a vector, got shape {shape}")
    for name in others:
        if (got := arrays[name].shape) != shape:
            raise ValueError(f"{path}: {name}: expected shape {shape}, got {got}")
    return arrays


def _check_kind(
    path: Path, arrays: Mapping[str, np.ndarray], names: Sequence[str], kinds: str, expected: str
) -> None:
    for name in names:
        if name in arrays and arrays[name].dtype.kind not in kinds:
            raise ValueError(f"{path}: {name}: expected {expected}, got dtype {arrays[name].dtype}")


# ---- single examples -----------------------------------------------------------------------------


def read_reweighted(path: Path) -> dict[str, list[Example]]:
    """Read reweighted.json: the examples of lowest factor, ``most``, and of highest, ``least``."""
    found = read_json(path)
    with named(path, "expected examples with id, label and rescaling:", _ERRORS):
        return {key: [_example(entry) for entry in found.get(key, [])] for key in ("most", "least")}


def read_pictures(path: Path) -> dict[str, str]:
    """Read test_pictures.json: data URIs by the ids of test examples."""
    found = read_json(path)
    with named(path, "expected images by id:", _ERRORS):
        return {key: _image(uri) for key, uri in found.items()}


def read_sentences(path: Path) -> Sentences:
    """Read sentences.json."""
    found = read_json(path)
    with named(path, "expected source, reference, translation, bleu, chrf:", _ERRORS):
        source, reference, translation = (
            [str(text) for text in found.get(key, [])]
            for key in ("source", "reference", "translation")
        )
        rows = len(translation)
        if len(reference) != rows or len(source) not in (0, rows):
            raise ValueError(f"{len(source)}, {len(reference)} and {rows} sentences")
        bleu, chrf = (
            np.array(found[key], dtype=np.int64).reshape(rows, width)
            for key, width in (("bleu", BLEU_COUNTS), ("chrf", CHRF_COUNTS))
        )
        return Sentences(source, reference, translation, bleu, chrf)


def read_boxes(path: Path) -> dict[str, Boxes]:
    """Read test_images.json: images by id."""
    found = read_json(path)
    with named(path, "expected images with objects and detections:", _ERRORS):
        return {
            key: Boxes(
                float(entry["width"]),
                float(entry["height"]),
                _image(entry["image"]),
                *([_box(**box) for box in entry[kind]] for kind in ("objects", "detections")),
            )
            for key, entry in found.items()
        }


#: What values of other types than expected raise.
_ERRORS = (LookupError, TypeError, ValueError, AttributeError, OverflowError)


def _image(uri: str) -> str:
    """Return an image's data URI; an image from elsewhere is a ValueError."""
    if not _IMAGE.fullmatch(uri):
        raise ValueError(f"image: expected a data URI of an image in base64, got {uri[:40]!r}")
    return uri


def _example(entry: dict[str, Any]) -> Example:
    image, difficulty = entry.get("image"), entry.get("difficulty")
    return Example(
        id=str(entry["id"]),
        label=str(entry["label"]),
        rescaling=float(entry["rescaling"]),
        difficulty=None if difficulty is None else float(difficulty),
        image=None if image is None else _image(image),
    )


def _box(box: list[float], label: str, score: float | None = None, correct: bool = False) -> Box:
    left, top, width, height = map(float, box)
    known = None if score is None else float(score)
    return Box((left, top, width, height), str(label), known, bool(correct))
