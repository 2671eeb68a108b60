"""The loss by torch's operators, in chunks of rows: for any device and dtype.

With z the logits, y the label, p the teacher's distribution, eps the label smoothing and
``hard = (1 - eps) * one_hot(y) + eps / C``, the loss of a row is

    -(1 - alpha) * <hard, log_softmax(z)> - alpha * <p, log_softmax(z)>

and its gradient on z ``mass * softmax(z) - (1 - alpha) * hard - alpha * p`` with
``mass = 1 - alpha + alpha * sum(p)``: neither a one-hot nor a mixture is built.

Shapes: N rows, n of them in a chunk, C classes, k kept classes of a sparse prediction.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from pskd.kernels.rows import Rows, RowValues, check_values, sum_dtype

__all__ = ["torch_rows"]

# Rows are worked on in chunks of about this many logits (2 MiB of float32): the passes over a chunk
# find it in cache, and temporaries are small and reused where one of the logits' size would be
# mapped anew, page by page, in every step.
_CHUNK_ELEMENTS = 1 << 19


def torch_rows(rows: Rows, scale: Tensor | float, grad: Tensor | None) -> RowValues:
    """Return the values of each row; write ``scale`` times the gradient into ``grad``.

    Args:
        rows: on any device.
        scale: factor of the gradient; a number or a 0-dim tensor.
        grad: (N, C) as the logits, which it may be; None: not wanted.

    Raises:
        ValueError: on the CPU, if a label, a class of a sparse prediction or an alpha is out of
            range; nothing has been written then.
    """
    check_values(rows)
    logits, classes = rows.logits, rows.logits.size(1)
    values = RowValues(*(logits.new_empty(len(logits), dtype=sum_dtype(logits)) for _ in range(3)))
    step = max(1, _CHUNK_ELEMENTS // max(1, classes))
    for start in range(0, len(logits), step):
        part = slice(start, start + step)
        chunk = _Chunk(rows, part)
        for whole, made in zip(values, chunk.values(), strict=True):
            whole[part] = made
        if grad is not None:
            chunk.write_gradient(scale, grad[part])
    return values


class _Chunk:
    """Some of the rows, with their log-probabilities.

    Log-probabilities and not logits: with large logits the terms of the loss would cancel.
    """

    def __init__(self, rows: Rows, part: slice) -> None:
        dtype = sum_dtype(rows.logits)
        self.classes, self.smoothing = rows.logits.size(1), rows.label_smoothing
        self.valid = rows.target[part] != rows.ignore_index
        self.label = torch.where(self.valid, rows.target[part], 0)[:, None]
        alpha = torch.as_tensor(rows.alpha, dtype=dtype, device=self.label.device)
        self.alpha = alpha.expand(len(rows.target))[part]
        self.lprobs = rows.logits[part].to(dtype).log_softmax(dim=1)
        self.past = _past(rows, part, self.lprobs)

    def values(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return loss, NLL and the teacher's probability of the label, (n,) each."""
        at_label = self.lprobs.gather(1, self.label).squeeze(1)
        hard = at_label
        if self.smoothing:
            spread = self.lprobs.mean(dim=1)
            hard = _times(1.0 - self.smoothing, hard) + self.smoothing * spread
        loss = -_times(1.0 - self.alpha, hard)
        teacher = torch.zeros_like(loss)
        if self.past is not None:
            loss = loss - _times(self.alpha, _expectation(self.past, self.lprobs))
            teacher = _at_label(self.past, self.label)
        ignored = ~self.valid
        return (
            loss.masked_fill_(ignored, 0.0),
            (-at_label).masked_fill_(ignored, 0.0),
            teacher.masked_fill_(ignored, 1.0),
        )

    def write_gradient(self, scale: Tensor | float, grad: Tensor) -> None:
        """Write ``scale`` times the gradient of the rows; the log-probabilities are lost."""
        past, alpha = self.past, self.alpha[:, None]
        masked = self.lprobs == -torch.inf if isinstance(past, _Sparse) else None
        g = self.lprobs.exp_()
        hard = 1.0 - alpha
        if past is None:
            g.mul_(hard)
        else:
            g.mul_(hard + _times(alpha, _mass(past)[:, None]))
            _subtract(g, past, alpha, masked)
        if self.smoothing:
            g.sub_(hard * (self.smoothing / self.classes))
        g.scatter_add_(1, self.label, hard * (self.smoothing - 1.0))
        if _may_be_ignored(self.valid):
            # Such a row may hold anything, NaN included: filled, not multiplied by 0.
            g.masked_fill_(~self.valid[:, None], 0.0)
        grad.copy_(g.mul_(scale))


class _Sparse(NamedTuple):
    """The k listed classes of a past prediction, and what each of the others has.

    Attributes:
        indices, probs: (n, k) of a `pskd.TopK`.
        tail: (n,) probability of each class that is not listed and whose logit is not -inf.
        others: (n,) how many these are.
    """

    indices: Tensor
    probs: Tensor
    tail: Tensor
    others: Tensor


def _past(rows: Rows, part: slice, lprobs: Tensor) -> Tensor | _Sparse | None:
    """Return the past prediction of some rows as probabilities, dense or sparse."""
    if rows.teacher_logits is not None:
        return rows.teacher_logits[part].to(lprobs.dtype).softmax(dim=1)
    if rows.probs is None:
        return None
    probs = rows.probs[part].to(lprobs.dtype)
    if rows.indices is None:
        return probs
    indices = rows.indices[part].long()
    others = _finite(lprobs) - _finite(lprobs.gather(1, indices))
    rest = (1.0 - probs.sum(dim=1)).clamp_min(0.0)
    tail = torch.where(others > 0, rest / others.clamp_min(1), 0.0)
    return _Sparse(indices, probs, tail, others)


def _times(weight: Tensor | float, value: Tensor) -> Tensor:
    """Return ``weight * value``, 0 where the weight is 0, whatever the value is."""
    if isinstance(weight, Tensor):
        return torch.where(weight == 0, 0.0, weight * value)
    return weight * value if weight else torch.zeros_like(value)


def _mass(p: Tensor | _Sparse) -> Tensor:
    """Return ``sum(p)`` a row: what is given as probabilities may sum to a little off 1."""
    if isinstance(p, Tensor):
        return p.sum(dim=1)
    return p.probs.sum(dim=1) + p.tail * p.others


def _expectation(p: Tensor | _Sparse, lprobs: Tensor) -> Tensor:
    """Return ``<p, lprobs>`` a row; of a sparse p from its classes and the sum over all."""
    if isinstance(p, Tensor):
        return _times(p, lprobs).sum(dim=1)  # a dot product would be of half precision in autocast
    listed = lprobs.gather(1, p.indices)
    rest = _finite_sum(lprobs) - _finite_sum(listed)
    return _times(p.probs, listed).sum(dim=1) + _times(p.tail, rest)


def _finite_sum(lprobs: Tensor) -> Tensor:
    return lprobs.masked_fill(lprobs == -torch.inf, 0.0).sum(dim=1)


def _finite(lprobs: Tensor) -> Tensor:
    return (lprobs != -torch.inf).sum(dim=1)


def _at_label(p: Tensor | _Sparse, label: Tensor) -> Tensor:
    """Return ``p[y]`` a row; ``label`` is (n, 1)."""
    if isinstance(p, Tensor):
        return p.gather(1, label).squeeze(1)
    hit = p.indices == label
    return torch.where(hit.any(dim=1), (p.probs * hit).sum(dim=1), p.tail)


def _subtract(grad: Tensor, p: Tensor | _Sparse, alpha: Tensor, masked: Tensor | None) -> None:
    """Subtract ``alpha * p`` from ``grad`` in place.

    Args:
        grad: (n, C).
        p: the past prediction of the rows.
        alpha: (n, 1).
        masked: (n, C) which classes the student's logits exclude; of a sparse p.
    """
    if isinstance(p, Tensor):
        grad.sub_(_times(alpha, p))
        return
    assert masked is not None
    share = _times(alpha, p.tail[:, None])
    grad.sub_(torch.where(masked, 0.0, share))
    share = torch.where(masked.gather(1, p.indices), 0.0, share)
    grad.scatter_add_(1, p.indices, share - _times(alpha, p.probs))


def _may_be_ignored(valid: Tensor) -> bool:
    # Only the CPU can tell without waiting for the device.
    return valid.device.type != "cpu" or not bool(valid.all())
