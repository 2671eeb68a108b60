"""What chance in the training does to a metric: intervals over seeds."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

__all__ = ["interval_over_seeds", "student_t"]


def student_t(freedom: float, level: float = 0.95) -> float:
    """Return the quantile t with P(|T| <= t) = level of Student's distribution.

    With T = sqrt(freedom) * tan(angle) the density of the angle is proportional to
    ``cos(angle) ** (freedom - 1)``, which is integrated on a grid.

    Args:
        freedom: degrees of freedom, at least 1.
        level: in (0, 1).
    """
    angle = np.linspace(0.0, np.pi / 2, 100_001)
    density = np.cos(angle) ** (freedom - 1)
    mass = np.append(0.0, np.cumsum(density[1:] + density[:-1]))
    return float(np.sqrt(freedom) * np.tan(np.interp(level * mass[-1], mass, angle)))


def interval_over_seeds(
    first: Sequence[float], second: Sequence[float], *, paired: bool
) -> tuple[float, float] | None:
    """Return the 95 % interval of ``mean(second) - mean(first)``; None if a value is not finite.

    Args:
        first: a value of each seed, two at least.
        second: likewise.
        paired: whether the i-th values are of the same seed: then Student's t over the
            differences, or else Welch's t.
    """
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
    reach = student_t(total**2 / within) * np.sqrt(total)
    return float(middle - reach), float(middle + reach)
