"""Batches to try the loss on, and what it is compared with.

Shapes: N rows, C classes, k kept classes. Every comparison is one of values *and* gradients, under
an upstream gradient that is not 1, in chunks of one row, of two rows and a rest, and of all rows.

The loss is computed in `under_test`, which the fixture ``backend`` sets, and compared with what
float64 gives.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._pytree import tree_map

import pskd.kernels.chunked
from pskd import TopK, mix_targets, pskd_cross_entropy

torch.set_num_threads(1)  # tiny tensors: more threads would only wait for each other

few = settings(max_examples=16, deadline=None, derandomize=True)
weights = st.sampled_from([0.0, 0.5, 1.0]) | st.floats(0.0, 1.0)
smoothings = st.sampled_from([0.0, 0.1, 1.0])
reductions = st.sampled_from(["none", "mean", "sum"])

FORMS = ("probs", "logits", "top_k")
forms = st.sampled_from(FORMS)
every_form = pytest.mark.parametrize("form", FORMS)
HALVES = [torch.bfloat16, torch.float16]

#: What the loss is given its logits and its teacher in.
under_test = torch.float64


class Batch(NamedTuple):
    """Student and teacher of one batch in float64, and how many logits make a chunk.

    The loss is given both in ``dtype``.
    """

    logits: Tensor
    target: Tensor
    teacher_logits: Tensor
    chunk: int
    kept: int
    dtype: torch.dtype
    ignore_index: int = -100

    def rows(self, index) -> Batch:
        """Return the batch of some rows."""
        names = ("logits", "target", "teacher_logits")
        return self._replace(**{name: getattr(self, name)[index] for name in names})

    @property
    def classes(self) -> int:
        return self.logits.size(1)

    @property
    def valid(self) -> Tensor:
        return self.target != self.ignore_index

    def teacher(self, form: str) -> dict[str, Tensor | TopK | None]:
        """Return the arguments that give the teacher in one of its forms."""
        probs = self.teacher_logits.softmax(1)
        if form == "logits":
            return {"teacher_probs": None, "teacher_logits": self.teacher_logits}
        if form == "top_k":
            values, indices = probs.topk(self.kept, dim=1)
            return {"teacher_probs": TopK(indices, values)}
        return {"teacher_probs": probs}

    def dense(self, form: str) -> Tensor:
        """Return the same teacher as the matrix of its probabilities."""
        given_probs = self.teacher(form)["teacher_probs"]
        if isinstance(given_probs, TopK):
            return given_probs.dense(self.classes)
        return self.teacher_logits.softmax(1)


def make(rows: int, classes: int, seed=0, scale=3.0, chunk=1 << 18) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    # Of values that float32 has too.
    student, past = (torch.randn(2, rows, classes, generator=generator) * scale).double()
    target = torch.randint(classes, (rows,), generator=generator)
    return Batch(student, target, past, chunk, (classes + 1) // 2, under_test)


@st.composite
def batches(draw, min_rows: int = 0, min_classes: int = 1) -> Batch:
    """Batches of awkward shapes; a chunk is one row, two rows (and a rest), or everything."""
    rows = draw(st.sampled_from([n for n in (0, 1, 2, 5, 8) if n >= min_rows]))
    classes = draw(st.sampled_from([c for c in (1, 2, 3, 7, 130) if c >= min_classes]))
    chunk = draw(st.sampled_from([1, classes, 2 * classes + 1, 1 << 18]))
    made = make(rows, classes, draw(st.integers(0, 2**20)), chunk=chunk)
    return made._replace(kept=draw(st.integers(1, classes)))


@st.composite
def padded_batches(draw, **sizes) -> Batch:
    """Batches with ignored rows, by torch's default label or by a label that is a class."""
    made = draw(batches(**sizes))
    ignore_index = draw(st.sampled_from([-100] if made.classes == 1 else [-100, 1]))
    rows = len(made.target)
    ignored = torch.tensor(draw(st.lists(st.booleans(), min_size=rows, max_size=rows)), dtype=bool)
    target = made.target.masked_fill(ignored, ignore_index)
    return made._replace(target=target, ignore_index=ignore_index)


def loss_of(batch: Batch, form: str | None, alpha, **options) -> Callable[[Tensor], Tensor]:
    """Return the loss as a function of the logits; ``form`` None gives no teacher.

    Logits of another dtype than float64 are taken as they are.
    """
    teacher = {"teacher_probs": None} if form is None else batch.teacher(form)
    given = {"target": batch.target, "ignore_index": batch.ignore_index, **teacher, **options}
    given = tree_map(lambda value: in_dtype(value, batch.dtype), given)

    def loss(logits: Tensor) -> Tensor:
        with mock.patch.object(pskd.kernels.chunked, "_CHUNK_ELEMENTS", batch.chunk):
            return pskd_cross_entropy(in_dtype(logits, batch.dtype), alpha=alpha, **given)

    return loss


def in_dtype(value: object, dtype: torch.dtype) -> object:
    """Return float64 tensors in a dtype, and all else as it is."""
    is_exact = isinstance(value, Tensor) and value.dtype == torch.float64
    return value.to(dtype) if is_exact else value


def torch_loss(batch: Batch, label_smoothing=0.0, reduction="mean") -> Callable[[Tensor], Tensor]:
    """Return F.cross_entropy of the labels, but 0 for the mean of no row."""

    def loss(logits: Tensor) -> Tensor:
        return F.cross_entropy(
            logits,
            batch.target,
            ignore_index=batch.ignore_index,
            label_smoothing=label_smoothing,
            reduction=reduction if batch.valid.any() or reduction == "none" else "sum",
        )

    return loss


def mixture_loss(
    batch: Batch, soft: Tensor, alpha, label_smoothing=0.0, reduction="mean"
) -> Callable[[Tensor], Tensor]:
    """Return F.cross_entropy against the materialised mixture, of the rows that count."""
    valid = batch.valid
    alpha = alpha[valid] if isinstance(alpha, Tensor) and alpha.dim() else alpha
    mixed = mix_targets(batch.target[valid], soft[valid], alpha, label_smoothing=label_smoothing)

    def loss(logits: Tensor) -> Tensor:
        rows = logits.new_zeros(len(logits))
        rows[valid] = -(mixed * logits[valid].log_softmax(1)).sum(1)
        if reduction == "none":
            return rows
        return rows.sum() / (max(int(valid.sum()), 1) if reduction == "mean" else 1)

    return loss


def value_and_grad(loss: Callable[[Tensor], Tensor], logits: Tensor) -> tuple[Tensor, Tensor]:
    """Return the loss and the logits' gradient under an upstream gradient of 2, 3, 4, ..."""
    logits = logits.detach().clone().requires_grad_()
    value = loss(logits)
    upstream = torch.arange(2, 2 + value.numel(), dtype=value.dtype).reshape(value.shape)
    value.backward(upstream)
    return value.detach(), logits.grad


def assert_same(got, expected, times: float = 1.0) -> None:
    """Compare tensors, up to ``times`` what rounding may change."""
    tolerance = times * (1e-12 if under_test == torch.float64 else 2e-5)
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one.double(), other.double(), rtol=tolerance, atol=tolerance)
