"""The compiled form of the loss for CPUs, where it was built when pskd was installed.

Shapes: N rows, C classes, k kept classes of a sparse prediction.
"""

from __future__ import annotations

import ctypes
import logging
from functools import cache
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import torch
from torch import Tensor

from pskd.kernels.rows import Records, Rows, RowValues, check_values
from pskd.rows import check_distinct, check_range

__all__ = ["is_built", "native_rows", "serves"]

_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
# Fewer logits than this for each thread are done before a second thread has woken up.
_LOGITS_A_THREAD = 1 << 14
_REDUCTIONS = {"none": 0, "sum": 1, "mean": 2}
_VERSION = 5  # kVersion of native_rows.cpp
_NO_MEMORY, _BAD_CALL = 4, 5

logger = logging.getLogger(__name__)


class _Call(ctypes.Structure):
    """``PSKDRows`` of native_rows.cpp, field by field."""

    _fields_ = [
        ("size", ctypes.c_int64),
        ("version", ctypes.c_int64),
        ("rows", ctypes.c_int64),
        ("classes", ctypes.c_int64),
        ("logits", ctypes.c_void_p),
        ("logits_stride", ctypes.c_int64),
        ("target", ctypes.c_void_p),
        ("teacher", ctypes.c_void_p),
        ("teacher_stride", ctypes.c_int64),
        ("indices", ctypes.c_void_p),
        ("indices_stride", ctypes.c_int64),
        ("kept", ctypes.c_int64),
        ("alpha_rows", ctypes.c_void_p),
        ("alpha", ctypes.c_double),
        ("label_smoothing", ctypes.c_double),
        ("ignore_index", ctypes.c_int64),
        ("grad", ctypes.c_void_p),
        ("grad_stride", ctypes.c_int64),
        ("loss", ctypes.c_void_p),
        ("nll", ctypes.c_void_p),
        ("teacher_at_label", ctypes.c_void_p),
        ("logits_type", ctypes.c_int32),
        ("teacher_type", ctypes.c_int32),
        ("teacher_is_logits", ctypes.c_int32),
        ("threads", ctypes.c_int32),
        ("reduction", ctypes.c_int32),
        ("gradient_is_of_mean", ctypes.c_int32),
        ("numbers", ctypes.c_void_p),
        ("past", ctypes.c_void_p),
        ("present", ctypes.c_void_p),
        ("records", ctypes.c_int64),
        ("spare", ctypes.c_int64),
        ("record_bytes", ctypes.c_int64),
        ("record_width", ctypes.c_int64),
        ("record_type", ctypes.c_int32),
        ("index_bytes", ctypes.c_int32),
        ("has_spare", ctypes.c_int32),
        ("unused", ctypes.c_int32),
        ("alphas", ctypes.c_void_p),
        ("effect", ctypes.c_void_p),
    ]


_SIZE = ctypes.sizeof(_Call)


@cache
def _library() -> ctypes.CDLL | None:
    # It holds a C function and is no Python module: loaded, not imported.
    for suffix in EXTENSION_SUFFIXES:
        path = Path(__file__).with_name(f"_native_rows{suffix}")
        if path.exists():
            return _loaded(path)
    return None


def _loaded(path: Path) -> ctypes.CDLL | None:
    try:
        library = ctypes.CDLL(str(path))
    except OSError:  # made for another machine
        return None
    # An editable install keeps its library when the sources change.
    version = library.pskd_rows_version() if hasattr(library, "pskd_rows_version") else 1
    if version == _VERSION:
        return library
    logger.warning(
        "%s: expected the compiled loss in version %d, got %d; install pskd again. Until then "
        "torch's operators compute the loss",
        path,
        _VERSION,
        version,
    )
    return None


def is_built() -> bool:
    """Return whether the compiled form was built at install from these sources, and loads."""
    return _library() is not None


def serves(rows: Rows) -> bool:
    """Return whether the compiled form is there and takes these rows: on the CPU, no float64."""
    teacher = rows.teacher_logits if rows.probs is None else rows.probs
    return (
        rows.logits.is_cpu
        and rows.logits.dtype in _TYPES
        and (teacher is None or teacher.dtype in _TYPES)
        and is_built()
    )


def native_rows(
    rows: Rows, reduction: str, grad: Tensor | None, *, of_mean: bool, with_stats: bool
) -> RowValues:
    """As `pskd.kernels.compute`, of readable rows that `serves` accepts; ``grad`` is contiguous."""
    logits, target = _with_dense_rows(rows.logits), rows.target.contiguous()
    count, classes = logits.shape
    # On the CPU as the logits, whatever torch's default device is.
    loss = logits.new_empty(count if reduction == "none" else (), dtype=torch.float32)
    nll = at_label = _NOTHING
    if with_stats:
        nll, at_label = (logits.new_empty(count, dtype=torch.float32) for _ in range(2))
    call = _Call(
        size=_SIZE,
        version=_VERSION,
        rows=count,
        classes=classes,
        logits=logits.data_ptr(),
        logits_stride=logits.stride(0),
        logits_type=_TYPES[logits.dtype],
        target=target.data_ptr(),
        label_smoothing=rows.label_smoothing,
        ignore_index=rows.ignore_index,
        loss=loss.data_ptr(),
        reduction=_REDUCTIONS[reduction],
        gradient_is_of_mean=of_mean,
        threads=max(1, min(torch.get_num_threads(), count * classes // _LOGITS_A_THREAD)),
    )
    # What the call points to has to live until it is over: hence the names.
    given = rows.teacher_logits if rows.probs is None else rows.probs
    teacher = None if given is None else _with_dense_rows(given)
    if teacher is not None:
        call.teacher, call.teacher_stride = teacher.data_ptr(), teacher.stride(0)
        call.teacher_type = _TYPES[teacher.dtype]
        call.teacher_is_logits = rows.probs is None
    indices = None if rows.indices is None else _with_dense_rows(rows.indices.long())
    if indices is not None:
        call.indices, call.indices_stride = indices.data_ptr(), indices.stride(0)
        call.kept = indices.size(1)
    alpha = rows.alpha
    if isinstance(alpha, Tensor):
        alpha = alpha.float().contiguous()
        call.alpha_rows = alpha.data_ptr()
    else:
        call.alpha = alpha
    if grad is not None:
        call.grad, call.grad_stride = grad.data_ptr(), grad.stride(0)
    if with_stats:
        call.nll, call.teacher_at_label = nll.data_ptr(), at_label.data_ptr()
    if rows.records is not None:
        _point_at(call, rows.records)
    if rows.effect is not None:
        call.effect = rows.effect.data_ptr()
    library = _library()
    assert library is not None, "not built: see serves"
    problem = library.pskd_rows(ctypes.byref(call))
    if problem == _NO_MEMORY:
        raise MemoryError(f"pskd: no memory for rows of {classes} classes")
    if problem:
        assert problem != _BAD_CALL, "pskd: the compiled form has another struct than _Call"
        check_values(rows)  # says which it is
        if rows.records is not None:
            _check_records(rows.records, classes)
        raise AssertionError(f"pskd: the compiled form refused what is good ({problem})")
    return RowValues(loss, nll, at_label)


def _check_records(records: Records, classes: int) -> None:
    numbers = records.numbers
    if records.spare is not None:
        numbers = numbers[numbers != records.spare]
    check_range(numbers, len(records.present))
    check_distinct(numbers)
    raise ValueError(f"memory: expected records of classes in [0, {classes - 1}], got others")


def _point_at(call: _Call, records: Records) -> None:
    assert records.numbers.shape == (call.rows,), "a record for each row"
    table = records.present
    call.present, call.numbers = table.data_ptr(), records.numbers.data_ptr()
    call.records, call.record_bytes = table.shape
    if records.spare is not None:
        call.has_spare, call.spare = True, records.spare
    call.record_width, call.record_type = records.width, _TYPES[records.dtype]
    call.index_bytes = records.index_bytes
    if records.past is not None:
        call.past = records.past.data_ptr()
    if records.alphas is not None:
        call.alphas = records.alphas.data_ptr()


_NOTHING = torch.empty(0, dtype=torch.float32, device="cpu")


def _with_dense_rows(matrix: Tensor) -> Tensor:
    # Rows may lie apart, their elements may not.
    return matrix if matrix.stride(1) == 1 or matrix.size(1) <= 1 else matrix.contiguous()
