"""What chance in the training does to a metric: intervals over seeds."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

__all__ = ["interval_over_seeds"]


def interval_over_seeds(
    first: Sequence[float], second: Sequence[float], *, paired: bool
) -> tuple[float, float] | None:
    """Return the 95 % interval of ``mean(second) - mean(first)``; None if a value is not finite.

    Args:
        first: a value of each seed, two at least.
        second: likewise.
        paired: whether the i-th values are of the same seed: then Student's t over the
            differences, or else Welch's t.

    Raises:
        ImportError: scipy is missing.
    """
    try:
        from scipy.special import stdtrit
    except ImportError as error:
        raise ImportError(
            "intervals over seeds need scipy, which could not be imported: pip install scipy"
        ) from error
    one, other = np.asarray(first, float), np.asarray(second, float)
    if not (np.isfinite(one).all() and np.isfinite(other).all()):
        return None
    middle = other.mean() - one.mean()
    parts = [other - one] if paired else [one, other]
    variances = np.array([part.var(ddof=1) / len(part) for part in parts])
    total = variances.sum()
    if total == 0.0:
        return float(middle), float(middle)
    within = sum(v**2 / (len(part) - 1) for v, part in zip(variances, parts, strict=True))
    reach = stdtrit(total**2 / within, 0.975) * np.sqrt(total)
    return float(middle - reach), float(middle + reach)
