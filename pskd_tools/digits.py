"""Which samples of a data set without a division of its own are for the test, as of the digits."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

__all__ = ["last_of_each_class"]


def last_of_each_class(labels: np.ndarray, count: Callable[[int], int]) -> np.ndarray:
    """Return which samples are the last of their class, in the order of the data set.

    Args:
        labels: (M,) integers.
        count: from the number of samples of a class to the number of its last ones.

    Returns:
        (M,) bool.
    """
    is_last = np.zeros(len(labels), dtype=bool)
    for label in np.unique(labels):
        own = np.flatnonzero(labels == label)
        is_last[own[len(own) - count(len(own)) :]] = True
    return is_last
