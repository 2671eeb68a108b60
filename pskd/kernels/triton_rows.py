"""The loss and its gradient on a GPU: one Triton program a row, launched for all.

Shapes: N rows (samples, tokens or boxes), C classes, k kept classes of a sparse prediction.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from pskd.kernels.rows import Rows, RowValues
from pskd.kernels.triton_kernels import rows_kernel, scale_kernel

__all__ = ["triton_rows", "triton_scale"]

# The most of a row that is held in registers, and what a thread holds of it: the fastest of those
# tried on an H200. With sums in float32 no dense form spills registers there.
_BLOCK = 1 << 14
_ELEMENTS_PER_THREAD, _MANY_ELEMENTS_PER_THREAD = 16, 32
_SCALED_BLOCK = 1 << 13


def _on_device(value: Tensor | float, like: Tensor) -> Tensor:
    """Return a tensor as it is, and a number as one on the device, which is not waited for."""
    if isinstance(value, Tensor):
        return value
    return torch.full((), value, dtype=torch.float32, device=like.device)


def _unit_stride(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(1) == 1 else tensor.contiguous()


def _form(rows: Rows) -> str:
    if rows.teacher_logits is not None:
        return "logits"
    if rows.probs is None:
        return "none"
    return "probs" if rows.indices is None else "top_k"


def triton_rows(rows: Rows, scale: Tensor | float, grad: Tensor | None) -> RowValues:
    """Return the values of each row, and write ``scale * dloss/dlogits`` into ``grad``.

    Sums are made in float32; the past prediction may have another dtype than the logits. Nothing
    here waits for the device, so labels and listed classes are not checked: one that is not in
    [0, C) makes the loss and the gradient of its row NaN, and nothing is read or written for it.
    ``grad`` may be the logits; its classes lie side by side. In rows whose alpha is 0 the past
    prediction is not read, and its probability of the label is 0.
    """
    count = rows.logits.size(0)
    values = RowValues(*(rows.logits.new_empty(count, dtype=torch.float32) for _ in range(3)))
    if count:
        # Triton launches on the current device.
        with torch.cuda.device_of(rows.logits):
            _launch(rows, scale, grad, values)
    return values


def _launch(rows: Rows, scale: Tensor | float, grad: Tensor | None, values: RowValues) -> None:
    count, classes = rows.logits.shape
    form = _form(rows)
    logits = _unit_stride(rows.logits)
    given = rows.probs if rows.teacher_logits is None else rows.teacher_logits
    teacher = None if given is None else _unit_stride(given)
    indices = None if rows.indices is None else _unit_stride(rows.indices)
    alpha = _on_device(0.0 if form == "none" else rows.alpha, logits).expand(count)
    kept = 0 if indices is None else indices.size(1)
    block = min(triton.next_power_of_2(max(classes, 1)), _BLOCK)
    rows_kernel[(count,)](
        logits,
        logits.stride(0),
        rows.target.contiguous(),
        teacher,
        0 if teacher is None else teacher.stride(0),
        indices,
        0 if indices is None else indices.stride(0),
        alpha,
        alpha.stride(0),
        _on_device(scale, logits),
        grad,
        0 if grad is None else grad.stride(0),
        *values,
        classes,
        kept,
        rows.ignore_index,
        FORM=form,
        SMOOTHING=float(rows.label_smoothing),
        BLOCK=block,
        IS_ONE_BLOCK=classes <= block,
        KEPT_BLOCK=triton.next_power_of_2(max(kept, 1)),
        num_warps=_warps(form, block),
    )


def _warps(form: str, block: int) -> int:
    """Return the warps a row; at least one element a thread, so that no two read the same."""
    is_dense = form in ("probs", "logits")
    each = _ELEMENTS_PER_THREAD if is_dense and block < _BLOCK else _MANY_ELEMENTS_PER_THREAD
    return max(block // (32 * each), 1)


def triton_scale(grad: Tensor, factor: Tensor) -> None:
    """Multiply ``grad`` by ``factor`` in place, in the precision of the factor.

    A factor of 1, the usual case, costs no pass over the gradient, and is not waited for.
    """
    rows, classes = grad.shape
    if not grad.numel():
        return
    factor = factor.reshape(-1).expand(rows)
    with torch.cuda.device_of(grad):
        scale_kernel[(rows, triton.cdiv(classes, _SCALED_BLOCK))](
            grad, grad.stride(0), factor, factor.stride(0), classes, BLOCK=_SCALED_BLOCK
        )
