"""The extra peak memory of the forms that benchmarks/loss.py compares.

On a CPU it is that of pages of a process of its own, in which the C library maps each block apart
and gives it back when it is freed: in one that has long been running freed blocks lie about between
others, and a form's figure would depend on who came before it.
"""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from _loss_forms import COMPILED, Case, Step, forms_of, peers_of, steps_of

__all__ = ["Wanted", "extra_peak", "memory", "start_measuring"]

Multiples = dict[str, float] | None  # of the logits' size by form; None where nothing can tell
_M_MMAP_THRESHOLD, _MAPPED_BYTES = -3, 1 << 16  # the first of glibc's malloc.h


class Wanted(NamedTuple):
    """The logits whose memory is wanted, and of which forms."""

    rows: int
    classes: int
    dtype: str
    names: list[str]


def memory(wanted: Sequence[Wanted], threads: int, device: str) -> list[Multiples]:
    """Return each form's extra peak memory over the size of the logits."""
    if torch.device(device).type == "cuda":
        return [_multiples(one, device) for one in wanted]
    fresh = multiprocessing.get_context("spawn")
    start = partial(start_measuring, threads)
    with ProcessPoolExecutor(1, mp_context=fresh, initializer=start) as process:
        return list(process.map(_multiples, wanted, [device] * len(wanted)))


def start_measuring(threads: int) -> None:
    """Prepare a process of its own: each block of memory is mapped apart from now on."""
    torch.set_num_threads(threads)
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, _MAPPED_BYTES)


def _multiples(wanted: Wanted, device: str) -> Multiples:
    torch.manual_seed(1)
    case = Case.made_up(wanted.rows, wanted.classes, getattr(torch, wanted.dtype), device)
    forms = forms_of(case, compiled=COMPILED in wanted.names) | peers_of(case)
    steps = steps_of(case, forms)
    peaks = {name: extra_peak(steps[name], device) for name in wanted.names}
    found = {name: peak / case.values.nbytes for name, peak in peaks.items() if peak is not None}
    return found or None


def extra_peak(step: Step, device: str) -> int | None:
    """Return the most bytes that a step adds to those in use before it; None where none can tell.

    On a CPU the allocator first gives back what it holds free, and the kernel forgets its last
    peak.
    """
    step()  # what is made only once is none of the step
    gc.collect()
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return torch.cuda.max_memory_allocated() - before
    try:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
    except (AttributeError, OSError):  # not glibc, not Linux, or not allowed
        return None
    before = _resident_bytes("VmRSS")
    step()
    return _resident_bytes("VmHWM") - before


def _resident_bytes(name: str) -> int:
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith(name))
