"""The loss from hidden states, made of some rows of logits at a time.

Shapes: N rows (tokens), n of them in a chunk, C classes (types of a vocabulary), H hidden units of
the student, G of the teacher, k kept classes of a prediction.

Logits are made for some rows at a time, become their own gradient, and are multiplied back onto
hidden states and output embedding at once. What stays is of the size of these two.
"""

from __future__ import annotations

from typing import Any, NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from pskd.kernels import Rows, sum_dtype
from pskd.kernels.gradient import scaled, values_and_gradient, values_only
from pskd.targets import TopK

__all__ = [
    "LinearCrossEntropy",
    "LinearStats",
    "LinearTeacher",
    "Problem",
    "Teacher",
    "by_chunks",
]

# At least so many logits at a time (16 MiB of float32): with fewer rows a product of matrices is
# slow. More where the hidden states are larger anyway.
_CHUNK_ELEMENTS = 1 << 22


class LinearTeacher(NamedTuple):
    """A teacher whose prediction is ``softmax(hidden @ weight.T + bias)``.

    Attributes:
        hidden: (N, G) floating-point hidden states.
        weight: (C, G) output embedding.
        bias: (C,) or None.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None = None


Teacher: TypeAlias = LinearTeacher | TopK | Tensor | None


class LinearStats(NamedTuple):
    """What is learned of each row on the way, where no logits are left to look at.

    Attributes:
        nll: (N,) and
        teacher_probs_at_label: (N,) as of `pskd.PSKDStats`; the latter 0 without a teacher.
        student_top_k: (N, k) the student's prediction, its k largest classes in falling order.
        teacher_preferred: (N,) int64, the teacher's most likely class; -1 without a teacher.
    """

    nll: Tensor
    teacher_probs_at_label: Tensor
    student_top_k: TopK
    teacher_preferred: Tensor


class Problem(NamedTuple):
    """What a call is given beside the student."""

    target: Tensor
    teacher: Teacher
    alpha: float | Tensor
    ignore_index: int
    label_smoothing: float
    stats_top_k: int  # 0: no statistics

    def rows(self, part: slice, logits: Tensor) -> tuple[Rows, Tensor | None]:
        """Return a chunk, and the teacher's most likely class of its rows."""
        probs, scores, indices = None, None, None
        if isinstance(self.teacher, LinearTeacher):
            scores = F.linear(self.teacher.hidden[part], *self.teacher[1:])
        elif isinstance(self.teacher, TopK):
            indices, probs = (tensor[part] for tensor in self.teacher)
        elif self.teacher is not None:
            probs = self.teacher[part]
        alpha = self.alpha[part] if isinstance(self.alpha, Tensor) else self.alpha
        options = (alpha, self.ignore_index, self.label_smoothing)
        rows = Rows(logits, self.target[part], probs, scores, indices, *options)
        return rows, self._preferred(rows) if self.stats_top_k else None

    @staticmethod
    def _preferred(rows: Rows) -> Tensor:
        likely = rows.teacher_logits if rows.probs is None else rows.probs
        if likely is None:
            return torch.full_like(rows.target, -1)
        best = likely.argmax(dim=1)
        return best if rows.indices is None else rows.indices.gather(1, best[:, None])[:, 0].long()


class LinearCrossEntropy(torch.autograd.Function):
    """Summed loss, and the statistics of each row; leaves the gradients of the sum on the way."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, problem: Problem
    ) -> tuple[Tensor | None, ...]:
        grads = Gradients(hidden, weight, bias, ctx.needs_input_grad)
        loss, stats = by_chunks(hidden, weight, bias, problem, grads)
        ctx.save_for_backward(grads.hidden, grads.weight, grads.bias)
        ctx.dtypes = hidden.dtype, weight.dtype
        ctx.mark_non_differentiable(*(tensor for tensor in stats if tensor is not None))
        ctx.set_materialize_grads(False)
        return loss, *stats

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor, *_stats: None) -> tuple[Tensor | None, ...]:
        grads = [
            None if grad is None else scaled(grad, upstream).to(dtype)
            for grad, dtype in zip(ctx.saved_tensors, ctx.dtypes + ctx.dtypes[1:], strict=True)
        ]
        return *grads, None


class Gradients:
    """The gradients of the summed loss, as far as they are wanted, grown chunk by chunk."""

    def __init__(
        self, hidden: Tensor, weight: Tensor, bias: Tensor | None, wanted: tuple[bool, ...]
    ) -> None:
        self._weight = weight
        self.hidden = torch.empty_like(hidden) if wanted[0] else None
        # In half precision the last of many chunks would be too small to change the sum.
        dtype = sum_dtype(weight)
        self.weight = torch.zeros_like(weight, dtype=dtype) if wanted[1] else None
        self.bias = None
        if bias is not None and wanted[2]:
            self.bias = torch.zeros_like(bias, dtype=dtype)

    def add(self, part: slice, hidden: Tensor, grad: Tensor) -> None:
        """Add a chunk; ``grad`` is that on its (n, C) logits."""
        if self.hidden is not None:
            self.hidden[part] = grad @ self._weight
        if self.weight is not None:
            if grad.dtype == hidden.dtype == self.weight.dtype:
                self.weight.addmm_(grad.t(), hidden)
            else:
                self.weight += grad.t() @ hidden
        if self.bias is not None:
            self.bias += grad.sum(dim=0, dtype=self.bias.dtype)


def by_chunks(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    problem: Problem,
    grads: Gradients | None,
) -> tuple[Tensor, list[Tensor | None]]:
    """Return the summed loss and the fields of `LinearStats`, those of its top-k one by one."""
    step = max(1, max(_CHUNK_ELEMENTS, hidden.numel()) // weight.size(0))
    with_stats, chunks = problem.stats_top_k > 0, []
    for start in range(0, max(1, len(hidden)), step):  # of no rows one chunk: there is a sum then
        part = slice(start, start + step)
        logits = F.linear(hidden[part], weight, bias)
        rows, preferred = problem.rows(part, logits)
        top_k = TopK.from_logits(logits, problem.stats_top_k) if with_stats else (None, None)
        if grads is None:
            values = values_only(rows, "none", with_stats=with_stats)
        else:
            values, grad = values_and_gradient(rows, "none", with_stats=with_stats, inplace=True)
            grads.add(part, hidden[part], grad)
        chunks.append((*values, *top_k, preferred))
    loss, *stats = zip(*chunks, strict=True)
    joined = [None if column[0] is None else torch.cat(column) for column in stats]
    return torch.cat(loss).sum(), joined if with_stats else []
