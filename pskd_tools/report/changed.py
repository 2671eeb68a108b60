"""Test examples on which a method and the baseline disagree most, of the first run of each."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pskd_tools.report.compare import Comparison
from pskd_tools.report.example_files import Boxes
from pskd_tools.report.sentences import chrf

__all__ = [
    "ChangedBoxes",
    "ChangedSentence",
    "Guess",
    "changed_boxes",
    "changed_sentences",
    "changed_predictions",
]

_MOST_PREDICTIONS = 12
_MOST_SENTENCES = 6
_MOST_IMAGES = 4
#: Boxes of a lower score are not shown and count neither for nor against a run.
SHOWN_SCORE = 0.5


@dataclass(frozen=True)
class Guess:
    """A test example that one run has right and the other wrong.

    Attributes:
        image: a data URI; None for none.
        predicted: by the baseline and by the method.
        confidence: likewise.
    """

    id: str
    label: str
    image: str | None
    predicted: tuple[str, str]
    confidence: tuple[float, float]


@dataclass(frozen=True)
class ChangedSentence:
    """A sentence, its translation by the baseline and by the method, and their chrF."""

    source: str | None
    reference: str
    translations: tuple[str, str]
    scores: tuple[float, float]


@dataclass(frozen=True)
class ChangedBoxes:
    """A test image, as the baseline and as the method sees it, and the number of their errors."""

    id: str
    seen: tuple[Boxes, Boxes]
    errors: tuple[int, int]


def changed_predictions(pair: Comparison) -> tuple[list[int], list[Guess], list[Guess]] | None:
    """Return the classifications that changed; None if the runs do not tell them.

    Returns:
        How many only the method has right, only the baseline has right, and both have wrong with
        different classes; examples of the first and of the second, by the change of their NLL.
    """
    if pair.tests is None:
        return None
    split = len(pair.baseline.runs)
    before, after = pair.tests.rows[0], pair.tests.rows[split]
    needed = {"ids", "label", "predicted"}
    if not (needed <= before.keys() and needed <= after.keys()):
        return None
    right = [rows["predicted"] == before["label"] for rows in (before, after)]
    moved = before["predicted"] != after["predicted"]
    won, lost = ~right[0] & right[1], right[0] & ~right[1]
    counts = [int(part.sum()) for part in (won, lost, moved & ~right[0] & ~right[1])]
    fall = np.zeros(len(won))
    if "nll" in before and "nll" in after:
        fall = np.nan_to_num(np.asarray(before["nll"], float) - after["nll"])
    pictures = pair.method.runs[0].pictures | pair.baseline.runs[0].pictures
    names = before.get("class_names", np.empty(0))

    def name(label: int) -> str:
        return str(names[label]) if 0 <= label < len(names) else str(label)

    def shown(part: np.ndarray, order: np.ndarray) -> list[Guess]:
        chosen = order[part[order]][:_MOST_PREDICTIONS]
        return [
            Guess(
                id=str(before["ids"][row]),
                label=name(before["label"][row]),
                image=pictures.get(str(before["ids"][row])),
                predicted=(name(before["predicted"][row]), name(after["predicted"][row])),
                confidence=(float(before["confidence"][row]), float(after["confidence"][row])),
            )
            for row in chosen
        ]

    order = np.argsort(-fall, kind="stable")
    return counts, shown(won, order), shown(lost, order[::-1])


def changed_sentences(
    pair: Comparison,
) -> tuple[list[int], list[ChangedSentence], list[ChangedSentence]] | None:
    """Return the translations that changed; None if the runs do not tell them.

    Returns:
        How many have a higher chrF, a lower one, and the same text; those that gained most, and
        those that lost most.
    """
    before, after = pair.baseline.runs[0].sentences, pair.method.runs[0].sentences
    if before is None or after is None or before.reference != after.reference:
        return None
    scores = chrf(before.chrf.astype(float)), chrf(after.chrf.astype(float))
    gain = scores[1] - scores[0]
    same = sum(a == b for a, b in zip(before.translation, after.translation, strict=True))
    counts = [int((gain > 0).sum()), int((gain < 0).sum()), same]
    order = np.argsort(-gain, kind="stable")

    def shown(rows: np.ndarray) -> list[ChangedSentence]:
        return [
            ChangedSentence(
                source=before.source[row] if before.source else None,
                reference=before.reference[row],
                translations=(before.translation[row], after.translation[row]),
                scores=(float(scores[0][row]), float(scores[1][row])),
            )
            for row in rows[:_MOST_SENTENCES].tolist()
        ]

    return counts, shown(order[gain[order] > 0]), shown(order[::-1][gain[order[::-1]] < 0])


def changed_boxes(
    pair: Comparison,
) -> tuple[int, list[ChangedBoxes], list[ChangedBoxes]] | None:
    """Return the images on which detections changed; None if the runs share no image.

    Returns:
        The number of images that are known of both; those where the method makes fewest errors
        more than the baseline, and those where it makes most.
    """
    before, after = pair.baseline.runs[0].boxes, pair.method.runs[0].boxes
    shared = [key for key in before if key in after and before[key].objects == after[key].objects]
    if not shared:
        return None
    found = [
        ChangedBoxes(key, (before[key], after[key]), (_errors(before[key]), _errors(after[key])))
        for key in shared
    ]
    ordered = sorted(found, key=lambda image: image.errors[1] - image.errors[0])
    won = [image for image in ordered if image.errors[1] < image.errors[0]]
    lost = [image for image in reversed(ordered) if image.errors[1] > image.errors[0]]
    return len(shared), won[:_MOST_IMAGES], lost[:_MOST_IMAGES]


def _errors(image: Boxes) -> int:
    """Return how many boxes are wrong and how many objects are missed."""
    shown = [box for box in image.detections if (box.score or 0.0) >= SHOWN_SCORE]
    right = sum(box.correct for box in shown)
    return len(shown) - right + len(image.objects) - right
