"""Test examples on which a method and the baseline disagree most, of the first run of each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from pskd_tools.report.compare import Comparison
from pskd_tools.report.files import Boxes
from pskd_tools.report.sentences import chrf
from pskd_tools.report.where import class_name

__all__ = ["Changed", "ChangedBoxes", "ChangedSentence", "Guess", "changed_examples"]

_MOST_PREDICTIONS = 12
_MOST_SENTENCES = 6
_MOST_IMAGES = 4


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
    """A test image, as the baseline and as the method sees it."""

    id: str
    seen: tuple[Boxes, Boxes]

    @property
    def more_errors(self) -> int:
        """How many errors the method makes more than the baseline."""
        return self.seen[1].errors - self.seen[0].errors


@dataclass(frozen=True)
class Changed:
    """What changed, and of it what is shown.

    Attributes:
        counts: of classifications, those that only the method has right, that only the baseline has
            right, and that both have wrong with different classes; of sentences, those with a
            higher chrF, with a lower one, and with the same text; of images, those of both runs.
        better, worse: the examples that changed most.
    """

    counts: list[int]
    better: Sequence[Guess | ChangedSentence | ChangedBoxes]
    worse: Sequence[Guess | ChangedSentence | ChangedBoxes]


def changed_examples(pair: Comparison) -> Changed | None:
    """Return what changed from the baseline to the method; None if the runs do not tell it."""
    own = {
        "classification": _changed_predictions,
        "detection": _changed_boxes,
        "translation": _changed_sentences,
    }
    return own[pair.baseline.runs[0].task](pair)


def _changed_predictions(pair: Comparison) -> Changed | None:
    if pair.tests is None:
        return None
    before, after = pair.tests.rows[0], pair.tests.rows[len(pair.baseline.runs)]
    needed = {"ids", "label", "predicted"}
    if not (needed <= before.keys() and needed <= after.keys()):
        return None
    right = [rows["predicted"] == before["label"] for rows in (before, after)]
    won, lost = ~right[0] & right[1], right[0] & ~right[1]
    still_wrong = ~right[0] & ~right[1] & (before["predicted"] != after["predicted"])
    fall = np.zeros(len(won))
    if "nll" in before and "nll" in after:
        fall = np.nan_to_num(np.asarray(before["nll"], float) - after["nll"])
    pictures = pair.method.runs[0].pictures | pair.baseline.runs[0].pictures
    name = partial(class_name, before)

    def shown(part: np.ndarray, order: np.ndarray) -> list[Guess]:
        return [
            Guess(
                id=str(before["ids"][row]),
                label=name(before["label"][row]),
                image=pictures.get(str(before["ids"][row])),
                predicted=(name(before["predicted"][row]), name(after["predicted"][row])),
                confidence=(float(before["confidence"][row]), float(after["confidence"][row])),
            )
            for row in order[part[order]][:_MOST_PREDICTIONS]
        ]

    order = np.argsort(-fall, kind="stable")
    counts = [int(part.sum()) for part in (won, lost, still_wrong)]
    return Changed(counts, shown(won, order), shown(lost, order[::-1]))


def _changed_sentences(pair: Comparison) -> Changed | None:
    before, after = pair.baseline.runs[0].sentences, pair.method.runs[0].sentences
    if before is None or after is None or before.reference != after.reference:
        return None
    scores = chrf(before.chrf.astype(float)), chrf(after.chrf.astype(float))
    gain = scores[1] - scores[0]
    same = sum(a == b for a, b in zip(before.translation, after.translation, strict=True))
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

    up, down = order[gain[order] > 0], order[::-1][gain[order[::-1]] < 0]
    return Changed([len(up), len(down), same], shown(up), shown(down))


def _changed_boxes(pair: Comparison) -> Changed | None:
    before, after = pair.baseline.runs[0].boxes, pair.method.runs[0].boxes
    shared = [key for key in before if key in after and before[key].objects == after[key].objects]
    if not shared:
        return None
    images = [ChangedBoxes(key, (before[key], after[key])) for key in shared]
    images.sort(key=lambda image: image.more_errors)
    better = [image for image in images if image.more_errors < 0]
    worse = [image for image in reversed(images) if image.more_errors > 0]
    return Changed([len(shared)], better[:_MOST_IMAGES], worse[:_MOST_IMAGES])
