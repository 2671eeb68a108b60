"""Wrong training labels, made as the literature on noisy labels makes them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

__all__ = ["LabelNoise"]

KINDS = ("symmetric", "next")


@dataclass(frozen=True)
class LabelNoise:
    """A share of the training labels that is replaced by wrong ones.

    ``symmetric`` draws the new label evenly from the *other* C - 1 classes, so that the share of
    wrong labels is ``rate`` itself; the other convention draws from all C classes and leaves a C-th
    of the drawn labels right. ``next`` turns class c into c + 1, and the last into the first (pair
    flip).

    Attributes:
        rate: the share of the samples, in (0, 1); ``round(rate * M)`` of M samples are drawn
            evenly, whatever their class.
        kind: ``symmetric`` or ``next``.
        seed: of the draw.

    Source: Patrini et al. 2017 (both kinds); Han et al. 2018 (pair flip).
    """

    rate: float
    kind: str
    seed: int

    @classmethod
    def parse(cls, text: str | None, seed: int) -> LabelNoise | None:
        """Return what ``RATE[:KIND]`` says; None where no label is replaced.

        Raises:
            ValueError: for a rate outside [0, 1) or another kind.
        """
        word, _, kind = ("0" if text is None else text).partition(":")
        kind = kind or KINDS[0]
        try:
            rate = float(word)
        except ValueError:
            rate = math.nan
        if kind not in KINDS or not 0.0 <= rate < 1.0:
            raise ValueError(
                f"--label-noise: expected a rate in [0, 1), perhaps with :{' or :'.join(KINDS)} "
                f"after it, got {text}"
            )
        return cls(rate, kind, seed) if rate else None

    def __str__(self) -> str:
        return f"{self.rate}:{self.kind}"

    def apply(self, labels: np.ndarray, num_classes: int) -> np.ndarray:
        """Return a copy of (M,) int64 labels in [0, C) with the drawn ones replaced.

        Raises:
            ValueError: for a single class.
        """
        if num_classes < 2:
            raise ValueError(f"--label-noise: expected two classes or more, got {num_classes}")
        random = np.random.default_rng(self.seed)
        drawn = random.choice(len(labels), round(self.rate * len(labels)), replace=False)
        noisy = labels.copy()
        step = 1 if self.kind == "next" else random.integers(1, num_classes, len(drawn))
        noisy[drawn] = (labels[drawn] + step) % num_classes
        return noisy
