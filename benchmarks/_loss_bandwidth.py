"""At what share of a GPU's copy bandwidth pskd's forms of the loss move what they have to."""

from __future__ import annotations

import statistics

import torch
from _loss_forms import Case
from _timing import seconds

__all__ = ["copy_bandwidth", "shares"]

_COPIED_BYTES = 1 << 31  # many times what a GPU's cache holds
_COPIES = 20


def copy_bandwidth(device: str) -> float:
    """Return bytes a second of a copy on the device, counted when read and when written."""
    source = torch.randn(_COPIED_BYTES // 4, device=device)
    into = torch.empty_like(source)
    into.copy_(source)
    torch.cuda.synchronize()
    taken = [seconds(lambda: into.copy_(source), device) for _ in range(_COPIES)]
    return 2 * _COPIED_BYTES / statistics.median(taken)


def shares(case: Case, taken: dict[str, float], bandwidth: float) -> dict[str, float]:
    """Return for each of pskd's forms the bandwidth of its least bytes over that of a copy.

    Args:
        case: its rows.
        taken: seconds of each form.
        bandwidth: `copy_bandwidth` of the device.
    """
    ours = [name for name in taken if name.startswith("pskd")]
    return {name: _least_bytes(case, name) / taken[name] / bandwidth for name in ours}


def _least_bytes(case: Case, name: str) -> int:
    """Return the bytes of scores and past prediction, read once, and of the gradient, written."""
    past = case.teacher_logits.nbytes if "logits" in name else case.probs.nbytes
    if "top-k" in name:
        past = sum(part.nbytes for part in case.top_k)
    return 2 * case.values.nbytes + past
