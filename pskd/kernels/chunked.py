"""The loss by torch's operators, in chunks of rows: for any device and dtype.

With z the logits, y the label, p the teacher's distribution, eps the label smoothing and
``hard = (1 - eps) * one_hot(y) + eps / C``, the loss of a row is

    -(1 - alpha) * <hard, log_softmax(z)> - alpha * <p, log_softmax(z)>

and its gradient on z ``mass * softmax(z) - (1 - alpha) * hard - alpha * p`` with
``mass = 1 - alpha + alpha * sum(p)``: neither a one-hot nor a mixture is built. A sparse prediction
is made dense a chunk at a time.

Shapes: N rows, n of them in a chunk, C classes.
"""

from __future__ import annotations

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

    ``grad`` may be the logits. On the CPU what is out of range is a ValueError, before any writing.
    """
    check_values(rows)
    logits, classes = rows.logits, rows.logits.size(1)
    values = RowValues(*(logits.new_empty(len(logits), dtype=sum_dtype(logits)) for _ in range(3)))
    step = max(1, _CHUNK_ELEMENTS // max(1, classes))
    for start in range(0, len(logits), step):
        part = slice(start, start + step)
        chunk = _Chunk(rows.part(part))
        for whole, made in zip(values, chunk.values(), strict=True):
            whole[part] = made
        if grad is not None:
            chunk.write_gradient(scale, grad[part])
    return values


class _Chunk:
    """Some of the rows, with their log-probabilities, and the past prediction as (n, C).

    Log-probabilities and not logits: with large logits the terms of the loss would cancel.
    """

    def __init__(self, rows: Rows) -> None:
        dtype = sum_dtype(rows.logits)
        self.classes, self.smoothing = rows.logits.size(1), rows.label_smoothing
        self.valid = rows.target != rows.ignore_index
        self.label = torch.where(self.valid, rows.target, 0)[:, None]
        alpha = torch.as_tensor(rows.alpha, dtype=dtype, device=self.label.device)
        self.alpha = alpha.expand(len(rows.target))
        self.lprobs = rows.logits.to(dtype).log_softmax(dim=1)
        self.past = rows.past()

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
            # Not a dot product: in autocast that would be of half precision.
            loss = loss - _times(self.alpha, _times(self.past, self.lprobs).sum(dim=1))
            teacher = self.past.gather(1, self.label).squeeze(1)
        ignored = ~self.valid
        return (
            loss.masked_fill_(ignored, 0.0),
            (-at_label).masked_fill_(ignored, 0.0),
            teacher.masked_fill_(ignored, 1.0),
        )

    def write_gradient(self, scale: Tensor | float, grad: Tensor) -> None:
        """Write ``scale`` times the gradient of the rows; the log-probabilities are lost."""
        alpha, g = self.alpha[:, None], self.lprobs.exp_()
        hard = 1.0 - alpha
        if self.past is None:
            g.mul_(hard)
        else:
            g.mul_(hard + _times(alpha, self.past.sum(dim=1, keepdim=True)))
            g.sub_(_times(alpha, self.past))
        if self.smoothing:
            g.sub_(hard * (self.smoothing / self.classes))
        g.scatter_add_(1, self.label, hard * (self.smoothing - 1.0))
        if _may_be_ignored(self.valid):
            # Such a row may hold anything, NaN included: filled, not multiplied by 0.
            g.masked_fill_(~self.valid[:, None], 0.0)
        grad.copy_(g.mul_(scale))


def _times(weight: Tensor | float, value: Tensor) -> Tensor:
    """Return ``weight * value``, 0 where the weight is 0, whatever the value is."""
    if isinstance(weight, Tensor):
        return torch.where(weight == 0, 0.0, weight * value)
    return weight * value if weight else torch.zeros_like(value)


def _may_be_ignored(valid: Tensor) -> bool:
    # Only the CPU can tell without waiting for the device.
    return valid.device.type != "cpu" or not bool(valid.all())
