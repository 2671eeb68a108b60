"""What the PS-KD loss costs over hard-label cross-entropy on the same logits.

A step is forward and backward to the gradient on the logits; the teacher is given ready. The forms
take turns in each round, in one process, and each round gives the ratio of each to cross-entropy.
Compared are: the mixed target, made and given to cross-entropy; the published implementation,
written from its description; the plain sum of two cross-entropies under torch.compile; and pskd's
loss from dense probabilities, from the teacher's logits (in the dtype of the student's) and from
its 16 largest classes, each also in place.

Extra peak memory is what a step adds to the memory in use before it, over the size of the logits;
the gradient counts. On a CPU it is read from Linux's /proc, which is too coarse for small logits.

On a GPU there are also Liger-Kernel's losses between two distributions, if it is installed, and the
share of a copy's bandwidth at which pskd's forms move what they have to: scores and past prediction
once in, the gradient once out.

The exit status says whether pskd's loss keeps to the limits below.

    python benchmarks/loss.py [--shapes 256x1000 ...] [--threads 1 2] [--json FILE] [--plot FILE]
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Iterator
from functools import partial

import torch
from _loss_forms import ALPHA, BASE, COMPILED, IN_PLACE, KEPT, Case, check, forms_of, steps_of
from _loss_report import plot, told
from _measuring import (
    alone,
    at_least,
    extra_peak,
    hardware,
    is_gpu,
    measure,
    options,
    repeat,
    seconds,
)

from pskd.kernels import Rows, backend_of
from pskd_tools.files import write_json

SHAPES = ("128x100", "512x81", "256x1000", "4096x6000", "2048x32000", "1024x128000")
CHECKED_ROWS = 8
SAMPLE_SECONDS = 0.02  # at least, of the base; shorter ones measure the clock
MEASURABLE_BYTES = 1 << 24  # of logits; a process allocates 0.2 MB for other things
MANY_CLASSES = 1000
#: What pskd's loss may cost: on a CPU time over cross-entropy's, memory over the logits'; and the
#: least share of the copy bandwidth on a GPU, of logits that no cache holds.
LIMITS = {"ratio": 1.0, "ratio_few_classes": 1.5, "memory": 1.05, "memory_in_place": 0.05}
LIMITS |= {"of_copy": 0.8}
UNCACHED_BYTES = 1 << 28
COPIED_BYTES, COPIES = 1 << 31, 20  # many times what a GPU's cache holds

# ---- figures -------------------------------------------------------------------------------------


def run(args: argparse.Namespace) -> dict:
    """Return all figures, with what they were taken on."""
    torch.manual_seed(1)
    result = {
        "machine": hardware(args.device),
        "torch": torch.__version__,
        "device": args.device,
        "dtype": args.dtype,
        "backend": backend(args),
        "alpha": ALPHA,
        "top_k": KEPT,
        "rounds": args.rounds,
        "copy_bandwidth": copy_bandwidth(args.device) if is_gpu(args.device) else None,
        "limits": LIMITS,
        "shapes": [],
    }
    for shape in args.shapes:
        print(f"{shape} ...", file=sys.stderr, flush=True)
        found = times(*shape, args, result["copy_bandwidth"])
        found["memory"] = None
        if found["logits_bytes"] >= MEASURABLE_BYTES:
            names = list(found["threads"][str(args.threads[0])]["seconds"])
            given = (*shape, args.dtype, args.device, names)
            found["memory"] = alone(max(args.threads), args.device, memory, *given)
        result["shapes"].append(found)
    result["missed"] = [line for found in result["shapes"] for line in missed(found)]
    return result


def backend(args: argparse.Namespace) -> str:
    """Return the name of what computes pskd's loss: native, triton or torch."""
    case = Case.made_up(1, 2, args.dtype, args.device)
    rows = Rows(case.values, case.target, case.probs, None, None, ALPHA, -100, 0.0)
    return backend_of(rows)


def copy_bandwidth(device: str) -> float:
    """Return bytes a second of a copy on the device, counted when read and when written."""
    source = torch.randn(COPIED_BYTES // 4, device=device)
    into = torch.empty_like(source)
    into.copy_(source)
    torch.cuda.synchronize()
    taken = [seconds(lambda: into.copy_(source), device) for _ in range(COPIES)]
    return 2 * COPIED_BYTES / statistics.median(taken)


def times(rows: int, classes: int, args: argparse.Namespace, bandwidth: float | None) -> dict:
    case = Case.made_up(rows, classes, args.dtype, args.device)
    compiled = checked(case, compiled=not args.without_compile)
    steps = steps_of(case, compiled=compiled)
    found = {"rows": rows, "classes": classes, "logits_bytes": case.values.nbytes}
    found |= {"threads": {}, "of_copy": None}
    for threads in args.threads:
        torch.set_num_threads(threads)  # also where OMP_NUM_THREADS is another number
        for step in steps.values():
            step()  # what is compiled is compiled for a number of threads
        calls = 1
        while seconds(partial(repeat, steps[BASE], calls), args.device) < SAMPLE_SECONDS:
            calls *= 2
        timed = measure(steps, BASE, args.rounds, args.device, calls=calls, warmup=0)
        found["threads"][str(threads)] = {"calls": calls, **timed}
    if bandwidth is not None:
        found["of_copy"] = {
            name: case.least_bytes(name) / taken / bandwidth
            for name, taken in timed["seconds"].items()
            if name.startswith("pskd")
        }
    return found


def checked(case: Case, *, compiled: bool) -> bool:
    """Compute the first rows of a case in all forms; return whether torch.compile works.

    Raises:
        AssertionError: if a form computes something else.
    """
    few = case.first(CHECKED_ROWS)
    forms = forms_of(few, compiled=compiled)
    inductor = {COMPILED: forms.pop(COMPILED)} if compiled else {}
    check(few, forms)
    try:
        check(few, inductor)
    except AssertionError:
        raise
    except Exception as error:  # of any kind: what is missing is a compiler, headers, Triton, ...
        print(f"torch.compile does not work here, left out: {error}", file=sys.stderr)
        return False
    return compiled


def memory(
    rows: int, classes: int, dtype: str, device: str, names: list[str]
) -> dict[str, float] | None:
    """Return each form's extra peak memory over the logits' size; None where none can tell."""
    torch.manual_seed(1)
    case = Case.made_up(rows, classes, dtype, device)
    steps = steps_of(case, compiled=COMPILED in names, names=names)
    peaks = {name: extra_peak(step, device) for name, step in steps.items()}
    found = {name: peak / case.values.nbytes for name, peak in peaks.items() if peak is not None}
    return found or None


# ---- limits --------------------------------------------------------------------------------------


def missed(found: dict) -> Iterator[str]:
    """Give a line for each figure of pskd's loss of a shape that is outside its limit."""
    shape = f"{found['rows']}x{found['classes']}"
    if found["of_copy"] is None:  # on a GPU the bandwidth has a limit, and launches take their time
        limit = LIMITS["ratio" if found["classes"] >= MANY_CLASSES else "ratio_few_classes"]
        for threads, timed in found["threads"].items():
            for name, ratio in _ours(timed["ratio_median"]):
                if not ratio <= limit:  # NaN is over it too
                    at = f"{name}, {shape}, {threads} thread(s)"
                    yield f"{at}: {ratio:.2f} of {BASE}'s time, limit {limit}"
    elif found["logits_bytes"] >= UNCACHED_BYTES:
        least = LIMITS["of_copy"]
        for name, share in _ours(found["of_copy"]):
            if not share >= least:
                yield f"{name}, {shape}: {share:.2f} of the copy bandwidth, at least {least}"
    for name, multiple in _ours(found["memory"] or {}):
        limit = LIMITS["memory_in_place" if name.endswith(IN_PLACE) else "memory"]
        if not multiple <= limit:
            yield f"{name}, {shape}: {multiple:.2f} of the logits' memory, limit {limit}"


def _ours(figures: dict[str, float]) -> list[tuple[str, float]]:
    return [(name, figure) for name, figure in figures.items() if name.startswith("pskd")]


# ---- command line --------------------------------------------------------------------------------


def shape_of(text: str) -> tuple[int, int]:
    rows, _, classes = text.partition("x")
    if not all(part.isdecimal() and int(part) > 0 for part in (rows, classes)):
        raise argparse.ArgumentTypeError(f"expected ROWSxCLASSES, as 256x1000, got {text}")
    return int(rows), int(classes)


def flags(argv: list[str] | None) -> argparse.Namespace:
    parser = options(__doc__, "dtype", "device", "json", "plot")
    shapes = [shape_of(text) for text in SHAPES]
    parser.add_argument("--shapes", nargs="+", type=shape_of, default=shapes, help="rows x classes")
    parser.add_argument(
        "--threads", nargs="+", type=at_least(1), default=[1], help="CPU threads, each in turn"
    )
    parser.add_argument("--rounds", type=at_least(3), default=9, help="3 or more")
    parser.add_argument("--without-compile", action="store_true", help="leave out torch.compile")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = flags(argv)
    result = run(args)
    print(told(result))
    if args.json:
        write_json(args.json, result, indent=2)
    if args.plot:
        plot(result, args.plot)
    return 1 if result["missed"] else 0


if __name__ == "__main__":
    sys.exit(main())
