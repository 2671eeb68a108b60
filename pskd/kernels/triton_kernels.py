"""The loss of a row and its gradient as Triton kernels: one reading of the row, one writing.

Shapes: N rows (samples, tokens or boxes), C classes, k kept classes of a sparse prediction.

With z the logits, y the label, p the past prediction and ``m = max(z)``, a row needs
``s = sum(exp(z - m))``, ``<p, z - m>`` and ``sum(p)``; where every class has a share (by label
smoothing, or by the tail of a sparse p) also ``sum(z - m)``. One pass over blocks of classes
gathers them, each block rescaling what those before it left (online softmax: Milakov and
Gimelshein 2018); the softmax of teacher logits is taken in the same pass. What is summed are
differences to the maximum, so that large logits do not cancel. A second pass writes

    scale * (mass * softmax(z) - w_label * one_hot(y) - w_each - alpha * p)

with mass ``1 - alpha + alpha * sum(p)``, w_label ``(1 - alpha) * (1 - eps)`` of the label's class
and w_each ``(1 - alpha) * eps / C`` of each class.

Memory: reads the (N, C) logits and the (N, C) or (N, k) past prediction, writes the (N, C) gradient
and three numbers a row. A row that fits in one block is read once and held in registers. A longer
one is read again for its gradient, from its end to its start: the last block is still at hand, and
those before it are the likelier in cache the later they were read. A sparse prediction is never
made dense: every class that the logits do not exclude (-inf) is given the tail, and the k listed
ones are written over, as is the label's class. Nothing is read of ignored rows, nor of the past
prediction of a row whose alpha is 0.

The gradient may take the place of the logits: every position is written after its last reading.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

__all__ = ["rows_kernel", "scale_kernel"]

# Where a maximum starts: below any logit but -inf, and differences to it are not inf - inf.
_LOWEST = tl.constexpr(torch.finfo(torch.float32).min)


@triton.jit
def _weigh(weight, value):
    """Return ``weight * value``; 0 where the weight is 0, of a class at -inf too."""
    return tl.where(weight == 0, 0.0, weight * value)


@triton.jit
def _read(logits, teacher, cols, classes, valid, soft, FORM: tl.constexpr):
    """Return a block of the student's row and one of the teacher's, where that is dense."""
    inside = cols < classes
    z = tl.load(logits + cols, mask=inside & valid, other=float("-inf")).to(tl.float32)
    t = z
    if FORM == "probs":
        t = tl.load(teacher + cols, mask=inside & soft, other=0.0).to(tl.float32)
    if FORM == "logits":
        t = tl.load(teacher + cols, mask=inside & soft, other=float("-inf")).to(tl.float32)
    return z, t


@triton.jit
def _max_two(a, b, c, d):
    return tl.maximum(a, c), tl.maximum(b, d)


@triton.jit
def _add_two(a, b, c, d):
    return a + c, b + d


@triton.jit
def _add_three(a, b, c, d, e, f):
    return a + d, b + e, c + f


# What a row has gathered of the blocks before. Sums of one block are made together: each making
# waits for all threads.


@triton.jit
def _add_dense(z, t, m, s, top, mass, cross, FORM: tl.constexpr):
    """Add a block to ``max(z)``, ``sum(exp(z - m))``, ``max(t)``, ``sum(q)``, ``<q, z - m>``.

    q is t, or ``exp(t - top)`` of logits.
    """
    old = m
    q = t
    if FORM == "logits":
        last = top
        m, top = tl.reduce((z, t), 0, _max_two)
        m = tl.maximum(old, m)
        top = tl.maximum(last, top)
        q = tl.exp(t - top)
        fade = tl.exp(last - top)
    else:
        m = tl.maximum(old, tl.max(z, 0))
    block_s, block_mass, block_cross = tl.reduce(
        (tl.exp(z - m), q, _weigh(q, z - m)), 0, _add_three
    )
    s = s * tl.exp(old - m) + block_s
    cross += _weigh(mass, old - m)
    if FORM == "logits":
        mass *= fade
        cross = _weigh(fade, cross)
    return m, s, top, mass + block_mass, cross + block_cross


@triton.jit
def _add_student(z, m, s):
    """Add a block to ``max(z)`` and ``sum(exp(z - m))``."""
    old = m
    m = tl.maximum(old, tl.max(z, 0))
    return m, s * tl.exp(old - m) + tl.sum(tl.exp(z - m), 0)


@triton.jit
def _add_total(z, old, m, total, finite):
    """Add a block to the sum and the number of the finite ``z - m``, so far taken to ``old``.

    Of finite ones, so that the listed classes of a sparse p can be taken out of the sum.
    """
    is_finite = z != float("-inf")  # NaN is to go into the sum
    block, count = tl.reduce(
        (tl.where(is_finite, z - m, 0.0), tl.where(is_finite, 1, 0)), 0, _add_two
    )
    return total + _weigh(finite, old - m) + block, finite + count


@triton.jit
def _read_listed(indices, probs, logits, ks, kept, classes, soft):
    """Return the listed classes, their p and z, and which are real; -1, 0 and -inf in padding."""
    listed = (ks < kept) & soft
    index = tl.load(indices + ks, mask=listed, other=-1)
    is_class = (index >= 0) & (index < classes)
    index = tl.where(is_class, index, -1).to(tl.int32)
    p = tl.load(probs + ks, mask=listed, other=0.0).to(tl.float32)
    p = tl.where(listed & (is_class == 0), float("nan"), p)  # an index out of range is not read
    z = tl.load(logits + index, mask=is_class, other=float("-inf")).to(tl.float32)
    return index, p, z, is_class


@triton.jit
def _sum_listed(p, z, m, total, finite):
    """Return the tail of each other class at a finite logit, ``sum(p)`` and ``<p, z - m>``."""
    is_finite = z != float("-inf")
    others = (finite - tl.sum(tl.where(is_finite, 1, 0), 0)).to(tl.float32)
    listed_mass = tl.sum(p, 0)
    tail = tl.where(others > 0, tl.maximum(1.0 - listed_mass, 0.0) / others, 0.0)
    rest = total - tl.sum(tl.where(is_finite, z - m, 0.0), 0)
    cross = tl.sum(_weigh(p, z - m), 0) + _weigh(tail, rest)
    return tail, listed_mass + tail * others, cross


@triton.jit
def _write(grad, cols, classes, z, t, m, top, factor, w_past, w_each, w_tail, FORM: tl.constexpr):
    """Write ``factor * exp(z - m) - w_past * q - w_each``; q as in `_add_dense`, if p is dense.

    Of a sparse p, a class whose logit is not -inf has ``w_tail`` taken off too.
    """
    g = factor * tl.exp(z - m)
    if FORM == "probs":
        g -= w_past * t
    if FORM == "logits":
        g -= w_past * tl.exp(t - top)
    if FORM == "top_k":
        g -= tl.where(z == float("-inf"), 0.0, w_tail)
    if w_each is not None:
        g -= w_each
    tl.store(grad + cols, g.to(grad.dtype.element_ty), mask=cols < classes)


@triton.jit
def rows_kernel(
    logits,
    logits_stride,
    target,
    teacher,
    teacher_stride,
    indices,
    indices_stride,
    alpha,
    alpha_stride,
    scale,
    grad,
    grad_stride,
    loss,
    nll,
    teacher_at_label,
    classes,
    kept,
    ignore_index,
    FORM: tl.constexpr,
    SMOOTHING: tl.constexpr,
    BLOCK: tl.constexpr,
    IS_ONE_BLOCK: tl.constexpr,
    KEPT_BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)  # N * C may exceed 2**31
    logits += row * logits_stride
    label = tl.load(target + row)
    valid = label != ignore_index
    is_class = valid & (label >= 0) & (label < classes)
    label = tl.where(is_class, label, -1).to(tl.int32)
    # Weights are 0 in ignored rows, and NaN where the label is no class: a GPU cannot raise without
    # being waited for, and this must not go unnoticed.
    w_soft = tl.where(valid, tl.load(alpha + row * alpha_stride).to(tl.float32), 0.0)
    w_hard = tl.where(valid, tl.where(is_class, 1.0 - w_soft, float("nan")), 0.0)
    w_label = w_hard * (1.0 - SMOOTHING)
    w_each = w_hard * SMOOTHING / tl.cast(classes, tl.float32)
    soft = valid & (w_soft != 0)

    if FORM != "none":
        teacher += row * teacher_stride
    NEEDS_TOTAL: tl.constexpr = FORM == "top_k" or SMOOTHING > 0
    span = tl.arange(0, BLOCK)
    z = tl.full((BLOCK,), float("-inf"), tl.float32)
    t = z
    m = tl.full((), _LOWEST, tl.float32)
    top = m
    s = tl.full((), 0.0, tl.float32)
    total = s
    mass = s
    cross = s
    finite = tl.full((), 0, tl.int32)
    for start in range(0, BLOCK if IS_ONE_BLOCK else classes, BLOCK):
        z, t = _read(logits, teacher, start + span, classes, valid, soft, FORM)
        old = m
        if FORM == "probs" or FORM == "logits":
            m, s, top, mass, cross = _add_dense(z, t, m, s, top, mass, cross, FORM)
        else:
            m, s = _add_student(z, m, s)
        if NEEDS_TOTAL:
            total, finite = _add_total(z, old, m, total, finite)

    # Single classes are read now, which are at hand; the gradient may be written over them.
    z_label = tl.load(logits + label, mask=is_class, other=float("nan")).to(tl.float32)
    at_label = tl.full((), 0.0, tl.float32)
    if FORM == "probs" or FORM == "logits":
        at_label = tl.load(teacher + label, mask=is_class & soft, other=0.0).to(tl.float32)
    tail = tl.full((), 0.0, tl.float32)
    per_mass = tl.where(soft, 1.0, 0.0).to(tl.float32)
    if FORM == "logits":
        per_mass = tl.where(soft, 1.0 / mass, 0.0)
        mass = tl.where(soft, 1.0, 0.0).to(tl.float32)
        cross *= per_mass
        at_label = tl.exp(at_label - top) * per_mass
    if FORM == "top_k":
        ks = tl.arange(0, KEPT_BLOCK)
        index, p_listed, z_listed, is_listed = _read_listed(
            indices + row * indices_stride, teacher, logits, ks, kept, classes, soft
        )
        tail, mass, cross = _sum_listed(p_listed, z_listed, m, total, finite)
        is_label = index == label
        at_label = tl.sum(tl.where(is_label, p_listed, 0.0), 0)
        at_label = tl.where(tl.max(is_label.to(tl.int32), 0) > 0, at_label, tail)

    log_s = tl.log(s)
    log_p_label = z_label - m - log_s
    value = _weigh(w_label, log_p_label) + _weigh(w_soft, cross - _weigh(mass, log_s))
    if SMOOTHING > 0:
        value += _weigh(w_each, tl.where(finite < classes, float("-inf"), total - classes * log_s))
    tl.store(loss + row, tl.where(valid, -value, 0.0))
    tl.store(nll + row, tl.where(valid, -log_p_label, 0.0))
    at_label = tl.where(soft, at_label, 0.0)
    tl.store(teacher_at_label + row, tl.where(valid, at_label, 1.0))

    if grad is not None:
        grad += row * grad_stride
        scaled = tl.where(valid, tl.load(scale).to(tl.float32), 0.0)
        factor = tl.where(valid, scaled * (w_hard + w_soft * mass) / s, 0.0)
        w_soft *= scaled
        w_past = w_soft * per_mass
        w_each = w_each * scaled
        w_tail = w_soft * tail
        share = w_each if SMOOTHING > 0 else None
        cols = span
        if not IS_ONE_BLOCK:
            cols += (tl.cdiv(classes, BLOCK) - 1) * BLOCK
        tl.debug_barrier()  # all threads have read the single classes and the block at hand
        _write(grad, cols, classes, z, t, m, top, factor, w_past, share, w_tail, FORM)
        if not IS_ONE_BLOCK:
            for _ in range(1, tl.cdiv(classes, BLOCK)):
                cols -= BLOCK
                z, t = _read(logits, teacher, cols, classes, valid, soft, FORM)
                _write(grad, cols, classes, z, t, m, top, factor, w_past, share, w_tail, FORM)
        # Single classes are written over what they have been given as one of all.
        if FORM == "top_k":
            tl.debug_barrier()
            g = factor * tl.exp(z_listed - m) - w_each - w_soft * p_listed
            tl.store(grad + index, g.to(grad.dtype.element_ty), mask=is_listed)
        tl.debug_barrier()
        g = factor * tl.exp(z_label - m) - w_label * scaled - w_each - w_soft * at_label
        tl.store(grad + label, g.to(grad.dtype.element_ty), mask=is_class)


@triton.jit
def scale_kernel(grad, grad_stride, factor, factor_stride, classes, BLOCK: tl.constexpr):
    """Multiply a block of a row by its factor; nothing is read or written where that is 1."""
    row = tl.program_id(0).to(tl.int64)
    by = tl.load(factor + row * factor_stride)
    if by != 1.0:
        cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        places = grad + row * grad_stride + cols
        values = tl.load(places, mask=cols < classes)
        tl.store(places, (values * by).to(values.dtype), mask=cols < classes)
