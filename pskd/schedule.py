"""Alpha, the weight of the teacher, as a pure function of training progress.

``epoch`` counts from 1 to ``num_epochs``; any other unit of progress (updates, iterations) can be
given in its place, as long as both arguments use the same one.
"""

import math
from typing import SupportsFloat

__all__ = ["SCHEDULES", "check_alpha", "constant_alpha", "cosine_alpha", "linear_alpha"]


def check_alpha(alpha: SupportsFloat, name: str = "alpha") -> float:
    """Return ``alpha`` as a float if it is a weight, that is a number in [0, 1].

    Raises:
        ValueError: if it is not a number, NaN, or outside [0, 1].
    """
    try:
        value = float(alpha)
    except (TypeError, ValueError):
        raise ValueError(f"{name}: expected a number in [0, 1], got {alpha!r}") from None
    if not 0.0 <= value <= 1.0:  # NaN fails the comparison too
        raise ValueError(f"{name}: expected a number in [0, 1], got {value}")
    return value


def _check_progress(epoch: float, num_epochs: float) -> float:
    if not num_epochs > 0 or math.isinf(num_epochs):
        raise ValueError(f"num_epochs: expected a finite number above 0, got {num_epochs}")
    if not 0 <= epoch <= num_epochs:
        raise ValueError(f"epoch: expected a number in [0, {num_epochs}], got {epoch}")
    return epoch / num_epochs


def linear_alpha(epoch: float, num_epochs: float, alpha_final: float) -> float:
    """Alpha grows in proportion to progress: ``alpha_final * epoch / num_epochs``.

    Args:
        epoch: the current epoch, counted from 1.
        num_epochs: the number of epochs of the whole training.
        alpha_final: alpha of the last epoch, the paper's alpha_T, in [0, 1].

    Returns:
        alpha of this epoch, in [0, alpha_final].

    Raises:
        ValueError: if ``alpha_final`` is no weight or ``epoch`` lies outside the training.

    Source: Kim et al. 2021, section 3.1 (the published schedule).
    """
    return check_alpha(alpha_final, "alpha_final") * _check_progress(epoch, num_epochs)


def constant_alpha(epoch: float, num_epochs: float, alpha_final: float) -> float:
    """Alpha is ``alpha_final`` in every epoch; arguments and errors as `linear_alpha`."""
    _check_progress(epoch, num_epochs)
    return check_alpha(alpha_final, "alpha_final")


def cosine_alpha(epoch: float, num_epochs: float, alpha_final: float) -> float:
    """Alpha rises along half a cosine: ``alpha_final * (1 - cos(pi * epoch / num_epochs)) / 2``.

    Slower than `linear_alpha` while predictions are poor and faster in the middle of training;
    arguments and errors as there.
    """
    progress = _check_progress(epoch, num_epochs)
    return check_alpha(alpha_final, "alpha_final") * (1.0 - math.cos(math.pi * progress)) / 2.0


#: The schedules by the name that configs and flags use.
SCHEDULES = {"linear": linear_alpha, "constant": constant_alpha, "cosine": cosine_alpha}
