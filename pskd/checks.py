"""What tensors and weights must be, looked at once, where a user gives them.

Each check raises ValueError, naming the argument, what was expected and what came. Values on a GPU
are not looked at: that would wait for the device.

Shapes: N rows (samples, tokens or boxes), C classes, k kept classes of a sparse prediction.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from pskd.files import shown
from pskd.schedule import check_alpha

if TYPE_CHECKING:
    from pskd.targets import TopK

__all__ = [
    "PLAIN",
    "check_batch",
    "check_class_weights",
    "check_epoch",
    "check_ignore_index",
    "check_keys",
    "check_label_form",
    "check_labels",
    "check_listed",
    "check_listed_once",
    "check_memory",
    "check_row_weights",
    "check_tensors",
    "check_top_k",
    "check_unit_range",
    "check_weights",
    "is_soft",
    "is_traced",
    "rounding",
]

#: The types of tensors that are no more than what is in their memory.
PLAIN = (Tensor, torch.nn.Parameter)
# Units in the last place: a few sums and a division.
_ROUNDING = 4


def is_traced(tensor: Tensor) -> bool:
    """Return whether operators are watched, or computed without values: of these memory tells none.

    Whoever watches would not see what is written into memory, and on the meta device there is none.
    """
    return _is_watched() or tensor.is_meta or type(tensor) not in PLAIN


def _is_watched() -> bool:
    return bool(torch.compiler.is_compiling() or is_in_torch_dispatch_mode())


def check_tensors(**values: object) -> None:
    """Raise ValueError unless each named argument is a tensor, dense and in memory if any is."""
    # Not every operator of torch looks before it reads.
    looks = not (_is_watched() or torch._C._are_functorch_transforms_active())
    for name, value in values.items():
        if not isinstance(value, Tensor):
            raise ValueError(f"{name}: expected a tensor, got {type(value).__name__}")
        if looks and type(value) in PLAIN and not value.is_meta:
            check_memory(name, value)


def check_memory(name: str, tensor: Tensor) -> None:
    """Raise ValueError if a tensor is not dense, or its memory was freed, as sharding does."""
    if tensor.layout is not torch.strided:
        raise ValueError(f"{name}: expected a dense tensor, got the layout {tensor.layout}")
    needed, storage = _extent(tensor), tensor.untyped_storage()
    is_fake = type(tensor) not in PLAIN and storage.device.type == "meta"
    if storage.nbytes() < needed or (needed and (is_fake or not tensor.data_ptr())):
        raise ValueError(f"{name}: expected a tensor in memory ({needed} bytes), got a freed one")


def _extent(tensor: Tensor) -> int:
    """Return up to which byte of its storage a tensor reaches."""
    count = tensor.numel()
    if count and not tensor.is_contiguous():
        steps = zip(tensor.shape, tensor.stride(), strict=True)
        count = 1 + sum((size - 1) * step for size, step in steps)
    return int(tensor.storage_offset() + count) * tensor.itemsize if count else 0


def is_soft(target: Tensor) -> bool:
    """Return whether a target is (N, C) probabilities, and not (N,) labels."""
    return target.dim() == 2 and target.dtype.is_floating_point


def check_batch(logits: Tensor, target: Tensor) -> None:
    """Raise ValueError unless they are (N, C) logits with N labels or (N, C) probabilities.

    Whether a label is one of the classes is not looked at.
    """
    check_tensors(logits=logits, target=target)
    if logits.dim() != 2 or not logits.dtype.is_floating_point:
        raise ValueError(
            f"logits: expected a floating-point tensor of shape (N, C), got {logits.dtype} of "
            f"shape {tuple(logits.shape)}"
        )
    if is_soft(target):
        if target.shape != logits.shape:
            raise ValueError(
                f"target: expected probabilities of shape {tuple(logits.shape)} as the logits, got "
                f"{tuple(target.shape)}"
            )
        return
    if target.dim() == 1 and target.size(0) != logits.size(0):
        raise ValueError(f"target: expected {logits.size(0)} labels, got {target.size(0)}")
    check_label_form(target)


def check_label_form(target: Tensor) -> None:
    """Raise ValueError unless labels are integers of shape (N,)."""
    if target.dim() != 1 or not _holds_classes(target):
        raise ValueError(
            f"target: expected integer labels of shape (N,), got {target.dtype} of shape "
            f"{tuple(target.shape)}"
        )


def check_labels(target: Tensor, num_classes: int, ignore_index: int | None) -> None:
    """Raise ValueError unless each label is one of C classes, or ``ignore_index``."""
    target = target.long()  # torch finds no extremes of wide unsigned integers
    labels = target if ignore_index is None else target[target != ignore_index]
    if not labels.numel():
        return
    low, high = (int(value) for value in labels.aminmax())
    if low < 0 or high >= num_classes:
        raise ValueError(f"target: expected labels in [0, {num_classes - 1}], got [{low}, {high}]")


def check_ignore_index(ignore_index: int) -> int:
    """Return a label that does not count as an int.

    Raises:
        ValueError: if it is no integer of 64 bits, of which labels are.
    """
    try:
        label = operator.index(ignore_index)
    except TypeError:
        raise ValueError(f"ignore_index: expected an integer, got {ignore_index!r}") from None
    if not -(1 << 63) <= label < 1 << 63:
        raise ValueError(f"ignore_index: expected an integer of 64 bits, got {label}")
    return label


def check_weights(alpha: float | Tensor, label_smoothing: float, rows: int) -> float | Tensor:
    """Return alpha as a float, or as it is when it holds one weight a row.

    Raises:
        ValueError: if a weight is NaN or outside [0, 1], but for the rows of a tensor.
    """
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"label_smoothing: expected a number in [0, 1], got {label_smoothing}")
    if isinstance(alpha, Tensor):
        check_tensors(alpha=alpha)
    if not isinstance(alpha, Tensor) or alpha.dim() == 0:
        return check_alpha(alpha)
    if tuple(alpha.shape) != (rows,):
        raise ValueError(f"alpha: expected a number or shape ({rows},), got {tuple(alpha.shape)}")
    return alpha


def check_row_weights(alpha: float | Tensor) -> None:
    """Raise ValueError unless each row's alpha is in [0, 1]; checked on the CPU only."""
    if not isinstance(alpha, Tensor) or alpha.device.type != "cpu":
        return
    if not bool(((alpha >= 0) & (alpha <= 1)).all()):
        raise ValueError("alpha: expected every row in [0, 1], got a row outside of it or NaN")


def check_class_weights(
    weight: Tensor, logits: Tensor, target: Tensor, label_smoothing: float
) -> None:
    """Raise ValueError unless there is a weight for each class, and each row has one label."""
    check_tensors(weight=weight)
    if tuple(weight.shape) != (logits.size(1),) or not weight.dtype.is_floating_point:
        raise ValueError(
            f"weight: expected a floating-point tensor of shape ({logits.size(1)},), got "
            f"{weight.dtype} of shape {tuple(weight.shape)}"
        )
    if is_soft(target) or label_smoothing:
        got = "probabilities" if is_soft(target) else f"label_smoothing {label_smoothing}"
        raise ValueError(f"weight: expected labels without smoothing, got {got}")


def check_top_k(name: str, given: TopK, rows: int, num_classes: int) -> None:
    """Raise ValueError unless it is of N rows of 1 to C classes; which ones is not looked at."""
    indices, probs = given
    check_tensors(**{f"{name}.indices": indices, f"{name}.probs": probs})
    if indices.shape != probs.shape or indices.dim() != 2 or indices.size(0) != rows:
        raise ValueError(
            f"{name}: expected TopK of two tensors of shape ({rows}, k), got "
            f"{tuple(indices.shape)} and {tuple(probs.shape)}"
        )
    if not 0 < indices.size(1) <= num_classes or not _holds_classes(indices):
        raise ValueError(
            f"{name}: expected 1 to {num_classes} integer classes a row, got "
            f"{indices.size(1)} of {indices.dtype}"
        )


def _holds_classes(tensor: Tensor) -> bool:
    kind = tensor.dtype
    return not (kind.is_floating_point or kind.is_complex or kind == torch.bool)


def check_listed(name: str, indices: Tensor, num_classes: int) -> None:
    """Raise ValueError unless the listed classes are in [0, C); checked on the CPU only."""
    if indices.device.type != "cpu" or not indices.numel():
        return
    low, high = (int(value) for value in indices.long().aminmax())
    if low < 0 or high >= num_classes:
        raise ValueError(
            f"{name}: expected TopK of classes in [0, {num_classes - 1}], got [{low}, {high}]"
        )


def check_listed_once(name: str, indices: Tensor, alpha: float | Tensor = 1.0) -> None:
    """Raise ValueError if a row whose alpha is not 0 lists a class twice; as `check_listed`."""
    if indices.device.type != "cpu":
        return
    ordered = indices.long().sort(dim=1).values
    twice = ordered[:, 1:] == ordered[:, :-1]
    twice &= (alpha != 0)[:, None] if isinstance(alpha, Tensor) else alpha != 0
    if bool(twice.any()):
        got = int(ordered[:, 1:][twice][0])
        raise ValueError(f"{name}: expected TopK of distinct classes in a row, got {got} twice")


def check_keys(name: str, state: object, keys: Iterable[str]) -> None:
    """Raise ValueError unless a state is a dict that has at least these keys."""
    if not isinstance(state, dict) or not state.keys() >= set(keys):
        expected = " and ".join(map(repr, keys)) or "named values"
        got = shown(sorted(map(str, state))) if isinstance(state, dict) else type(state).__name__
        raise ValueError(f"expected {name} with {expected}, got {got}")


def check_epoch(epoch: object, last: int | None = None) -> None:
    """Raise ValueError unless a state's epoch is an integer from 0 to the last, if there is one."""
    if type(epoch) is not int or epoch < 0 or (last is not None and epoch > last):
        end = "on" if last is None else f"to {last}"
        raise ValueError(f"epoch: expected a state of epoch 0 {end}, got {shown(epoch)}")


def rounding(dtype: torch.dtype | np.dtype[np.floating]) -> float:
    """Return by how much a probability of this dtype may exceed 1, or fall below 0.

    At least what float32 needs: float64 values, as lists are, have often been rounded before.
    """
    info = torch.finfo(dtype) if isinstance(dtype, torch.dtype) else np.finfo(dtype)
    return _ROUNDING * max(float(info.eps), torch.finfo(torch.float32).eps)


def check_unit_range(name: str, low: float, high: float, tolerance: float) -> None:
    """Raise ValueError unless values from ``low`` to ``high`` lie in [0, 1], but for rounding."""
    if not (low >= -tolerance and high <= 1.0 + tolerance):  # also true of NaN
        raise ValueError(
            f"{name}: expected values in [0, 1], got values in [{low:.9g}, {high:.9g}]"
        )
