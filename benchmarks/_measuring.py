"""What the benchmarks share: options, the clock, memory, and how figures are shown.

A figure belongs to a form, one of what is compared. Forms take turns, so that a machine whose speed
drifts slows all. Options of the same name mean the same everywhere:

    python benchmarks/linear_loss.py --device cuda --dtype bfloat16 --rounds 9 --json loss.json
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import multiprocessing
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch

from pskd_tools.files import write_json
from pskd_tools.table import text_table

Step = Callable[[], object]

# ---- options -------------------------------------------------------------------------------------


def options(doc: str, *common: str, rounds: int | None = None) -> argparse.ArgumentParser:
    """Return a parser with those of the common options that are named, and ``--rounds``."""
    parser = argparse.ArgumentParser(description=doc.split("\n")[0])
    if rounds:
        parser.add_argument("--rounds", type=at_least(2), default=rounds, help="2 or more")
    for name in common:
        parser.add_argument(f"--{name}", **_COMMON[name])
    return parser


def at_least(least: int) -> Callable[[str], int]:
    """Return a type of options: integers from ``least`` on."""

    def number(text: str) -> int:
        if not text.removeprefix("-").isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"expected an integer of at least {least}, got {text}")
        return int(text)

    return number


def _new_file(text: str) -> Path:
    path = Path(text)
    if not path.parent.is_dir() or path.is_dir():
        raise argparse.ArgumentTypeError(f"expected a file in a folder that is there, got {text}")
    return path


def _device(text: str) -> str:
    if text.partition(":")[0] not in ("cpu", "cuda"):
        raise argparse.ArgumentTypeError(f"expected cpu or cuda, got {text}")
    return text


_COMMON: dict[str, dict[str, Any]] = {
    "device": {"type": _device, "default": "cpu", "help": "cpu or cuda"},
    "dtype": {"choices": ("float32", "bfloat16", "float16"), "default": "float32"},
    "json": {"type": _new_file, "help": "a file for the figures"},
    "plot": {"type": _new_file, "help": "a file for a picture; its suffix is the format"},
    "threads": {"type": at_least(1), "default": 1, "help": "CPU threads"},
}

# ---- time ----------------------------------------------------------------------------------------


def is_gpu(device: torch.device | str) -> bool:
    return torch.device(device).type == "cuda"


def hardware(device: torch.device | str) -> str:
    """Return the name of the GPU or of the processor."""
    if is_gpu(device):
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def machine(device: torch.device | str) -> str:
    """Return what a figure was taken on."""
    return f"{hardware(device)}, {torch.get_num_threads()} thread(s)"


def conditions(args: argparse.Namespace, device: torch.device | str, *settings: str) -> dict:
    """Return what figures depend on: the machine, torch, and some of the options."""
    told = {"machine": machine(device), "torch": torch.__version__}
    return told | {name: getattr(args, name) for name in settings}


def seconds(function: Step, device: torch.device | str) -> float:
    """Return the seconds of a call, until the device has finished it."""
    start = time.perf_counter()
    function()
    if is_gpu(device):
        torch.cuda.synchronize()
    return time.perf_counter() - start


def repeat(step: Step, calls: int) -> None:
    for _ in range(calls):
        step()


def measure(
    forms: Mapping[str, Step],
    base: str,
    rounds: int,
    device: torch.device | str,
    *,
    calls: int = 1,
    warmup: int = 1,
    clock: Callable[[Step, torch.device | str], float] = seconds,
) -> dict[str, dict]:
    """Return seconds a call of each form and its ratio to one of them: median and quartiles.

    The order is reversed after each round, so that no form always follows the same other.

    Args:
        forms: what is timed.
        base: the form that the others are compared with, round by round.
        rounds: that count.
        device: where the forms compute.
        calls: of a form in a round, in a row.
        warmup: rounds before those that count.
        clock: gives the seconds of a function on a device.
    """
    found: dict[str, list[float]] = {name: [] for name in forms}
    order = list(forms)
    for number in range(warmup + rounds):
        for name in order:
            taken = clock(partial(repeat, forms[name], calls), device)
            if number >= warmup:
                found[name].append(taken / calls)
        order.reverse()
    ratios = {
        name: [b / a for a, b in zip(found[base], values, strict=True)]
        for name, values in found.items()
        if name != base
    }
    return {
        "seconds": {name: statistics.median(values) for name, values in found.items()},
        "ratio_median": {name: statistics.median(values) for name, values in ratios.items()},
        "ratio_quartiles": {
            name: statistics.quantiles(values, n=4)[::2] for name, values in ratios.items()
        },
    }


# ---- memory --------------------------------------------------------------------------------------

_M_MMAP_THRESHOLD, _MAPPED_BYTES = -3, 1 << 16  # the first of glibc's malloc.h


def in_fresh_process(function: Callable, *args: object, prepare: Step | None = None) -> Any:
    """Return what a function of a module gives in a process of its own."""
    fresh = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=fresh, initializer=prepare) as process:
        return process.submit(function, *args).result()


def alone(threads: int, device: str, function: Callable, *args: object) -> Any:
    """Return what a function gives that calls `extra_peak`.

    On a CPU it has a process of its own, in which the C library maps each block apart and gives it
    back when it is freed: in one that has long been running freed blocks lie about between others,
    and a form's figure would depend on who came before it.
    """
    if is_gpu(device):
        return function(*args)
    return in_fresh_process(function, *args, prepare=partial(_map_blocks_apart, threads))


def _map_blocks_apart(threads: int) -> None:
    torch.set_num_threads(threads)
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, _MAPPED_BYTES)


def extra_peak(step: Step, device: str) -> int | None:
    """Return the most bytes that a step adds to those in use before it; None where none can tell.

    On a CPU the allocator first gives back what it holds free, and the kernel forgets its last
    peak.
    """
    step()  # what is made only once is not part of a step
    gc.collect()
    if is_gpu(device):
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
    before = resident_bytes()
    step()
    return resident_bytes("VmHWM") - before


def resident_bytes(name: str = "VmRSS") -> int:
    """Return one of Linux's figures of this process; getrusage's would have the parent's peak."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith(name))


# ---- what is printed -----------------------------------------------------------------------------


#: A table whose first column is text.
markdown = partial(text_table, markdown=True)


def ratio(found: dict[str, dict], name: str, digits: int = 2) -> str:
    """Return a form's ratio of `measure` with its quartiles, and a dash for one without."""
    if name not in found["ratio_median"]:
        return "-"
    low, high = found["ratio_quartiles"][name]
    return f"{found['ratio_median'][name]:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def judged(what: str, ratio: float, result: dict, file: Path | None) -> int:
    """Print whether a ratio keeps the limit of a result, write all, and return the exit status."""
    result["within_limit"] = ratio <= result["limit"]
    verdict = "within" if result["within_limit"] else "ABOVE"
    print(f"{what}: {ratio:.3f}, {verdict} the limit of {result['limit']}")
    if file:
        write_json(file, result, indent=2)
    return 0 if result["within_limit"] else 1
