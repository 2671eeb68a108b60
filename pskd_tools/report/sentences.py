"""BLEU and chrF of sentences, from the counts that sacreBLEU makes of each.

Shapes: S sentences; the counts of a sentence are integers that add up over a corpus.
"""

from __future__ import annotations

import numpy as np

from pskd.calibration.inputs import Doubles, Integers

__all__ = ["BLEU_COUNTS", "CHRF_COUNTS", "SentenceMetrics", "bleu", "chrf"]

#: Length of translation and reference, then matches and n-grams of 1 to 4 words.
BLEU_COUNTS = 10
#: n-grams of the translation, of the reference and in both, for 1 to 6 characters.
CHRF_COUNTS = 18


def bleu(counts: np.ndarray) -> float:
    """Return BLEU in points, from (10,) counts, with sacreBLEU's exponential smoothing."""
    length, reference = counts[:2]
    matches, total = counts[2:6], counts[6:10]
    if not matches.any() or not total.all():
        return 0.0
    zeros = np.cumsum(matches == 0)
    precision = np.where(matches == 0, 0.5**zeros, matches) / total
    brevity = min(0.0, 1.0 - reference / length)
    return float(100.0 * np.exp(brevity + np.log(precision).mean()))


def chrf(counts: np.ndarray) -> Doubles:
    """Return chrF in points, (...), from (..., 18) counts, as sacreBLEU computes it (beta 2)."""
    own, reference, both = np.moveaxis(counts.reshape(*counts.shape[:-1], 6, 3), -1, 0)
    known = (own > 0) & (reference > 0)
    orders = np.maximum(known.sum(axis=-1), 1)
    precision = (known * both / np.maximum(own, 1)).sum(axis=-1) / orders
    recall = (known * both / np.maximum(reference, 1)).sum(axis=-1) / orders
    weighted = 4.0 * precision + recall
    return np.asarray(500.0 * precision * recall / np.where(weighted > 0, weighted, 1.0))


class SentenceMetrics:
    """BLEU and chrF of a corpus of which each sentence counts several times or not at all.

    Args:
        bleu_counts: (S, 10).
        chrf_counts: (S, 18).
    """

    def __init__(self, bleu_counts: np.ndarray, chrf_counts: np.ndarray) -> None:
        self._bleu, self._chrf = bleu_counts.astype(float), chrf_counts.astype(float)

    def __call__(self, weights: Integers) -> dict[str, float]:
        return {
            "bleu": bleu(weights @ self._bleu),
            "chrf": float(chrf(weights @ self._chrf)),
        }
