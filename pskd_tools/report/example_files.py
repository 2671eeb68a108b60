"""What a run says of single test examples: its pictures, its translations, its boxes.

Each reader raises ValueError, naming the file, for one that is not what docs/report.md says, and
OSError for one that cannot be read.

Shapes: S sentences.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from pskd.files import shown
from pskd_tools.files import read_json
from pskd_tools.report.files import check_image
from pskd_tools.report.sentences import BLEU_COUNTS, CHRF_COUNTS

__all__ = ["Box", "Boxes", "Sentences", "read_boxes", "read_pictures", "read_sentences"]

Found = TypeVar("Found")


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


def read_pictures(path: Path) -> dict[str, str]:
    """Read test_pictures.json: data URIs by the ids of test examples."""
    found = read_json(path)
    return _checked(path, "images by id", lambda: {k: check_image(v) for k, v in found.items()})


def read_sentences(path: Path) -> Sentences:
    """Read sentences.json."""
    found = read_json(path)
    return _checked(path, "source, reference, translation, bleu, chrf", lambda: _sentences(found))


def _sentences(found: dict[str, Any]) -> Sentences:
    source, reference, translation = (
        [str(text) for text in found.get(key, [])] for key in ("source", "reference", "translation")
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
    return _checked(
        path, "images with objects and detections", lambda: {k: _boxes(v) for k, v in found.items()}
    )


def _boxes(entry: dict[str, Any]) -> Boxes:
    def boxes(key: str) -> list[Box]:
        return [_box(**values) for values in entry[key]]

    image = check_image(entry["image"])
    size = float(entry["width"]), float(entry["height"])
    return Boxes(*size, image, boxes("objects"), boxes("detections"))


def _box(box: list[float], label: str, score: float | None = None, correct: bool = False) -> Box:
    left, top, width, height = map(float, box)
    known = None if score is None else float(score)
    return Box((left, top, width, height), str(label), known, bool(correct))


def _checked(path: Path, expected: str, read: Callable[[], Found]) -> Found:
    try:
        return read()
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise ValueError(f"{path}: expected {expected}: {shown(error)}") from error
