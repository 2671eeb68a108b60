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
import platform
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
from _loss_bandwidth import copy_bandwidth, shares
from _loss_forms import (
    ALPHA,
    BASE,
    COMPILED,
    KEPT,
    Case,
    Form,
    Step,
    check,
    forms_of,
    peers_of,
    steps_of,
)
from _loss_memory import Wanted, memory
from _loss_report import bandwidth_table, memory_table, plot, time_table
from _timing import at_least, medians, new_file, quartiles, ratios_to, seconds

from pskd.kernels import Rows, backend_of
from pskd_tools.files import write_json

SHAPES = ("128x100", "512x81", "256x1000", "4096x6000", "2048x32000", "1024x128000")
CHECKED_ROWS = 8
SAMPLE_SECONDS = 0.02  # at least, of the base; shorter ones tell of the clock
MEASURABLE_BYTES = 1 << 24  # of logits; what a process allocates by the way is 0.2 MB
MANY_CLASSES = 1000
#: What pskd's loss may cost: on a CPU time over cross-entropy's, memory over the logits'; and the
#: least share of the copy bandwidth on a GPU, of logits that no cache holds.
LIMITS = {"ratio": 1.0, "ratio_few_classes": 1.5, "memory": 1.05, "memory_in_place": 0.05}
LIMITS |= {"of_copy": 0.8}
UNCACHED_BYTES = 1 << 28


def repeat(step: Step, calls: int) -> None:
    for _ in range(calls):
        step()


def calls_a_sample(step: Step, device: str) -> int:
    calls = 1
    while seconds(partial(repeat, step, calls), device) < SAMPLE_SECONDS:
        calls *= 2
    return calls


def measure(steps: dict[str, Step], rounds: int, device: str) -> dict:
    """Return seconds a call of each form, and their ratios to cross-entropy.

    The order is turned round after each round, so that no form always comes after the same other.
    """
    for step in steps.values():
        step()
    calls = calls_a_sample(steps[BASE], device)
    found: dict[str, list[float]] = {name: [] for name in steps}
    order = list(steps)
    for _ in range(rounds):
        for name in order:
            taken = seconds(partial(repeat, steps[name], calls), device)
            found[name].append(taken / calls)
        order.reverse()
    ratios = ratios_to(BASE, found)
    return {
        "calls": calls,
        "seconds": medians(found),
        "ratio_median": medians(ratios),
        "ratio_quartiles": quartiles(ratios),
    }


def checked_forms(case: Case, *, compiled: bool) -> dict[str, Form]:
    """Return the forms of a case, after a look at its first rows: without ``compiled`` if it fails.

    Raises:
        AssertionError: if a form computes something else.
    """
    few = case.first(CHECKED_ROWS)
    forms = forms_of(few, compiled=compiled)
    inductor = forms.pop(COMPILED, None)
    check(few, forms)
    if inductor is None:
        return forms_of(case, compiled=False)
    try:
        check(few, {COMPILED: inductor})
    except AssertionError:
        raise
    except Exception as error:  # of any kind: what is missing is a compiler, headers, Triton, ...
        print(f"torch.compile does not work here, left out: {error}", file=sys.stderr)
        return forms_of(case, compiled=False)
    return forms_of(case, compiled=True)


def run_shape(shape: str, args: argparse.Namespace, bandwidth: float | None) -> dict:
    rows, classes = map(int, shape.split("x"))
    case = Case.made_up(rows, classes, getattr(torch, args.dtype), args.device)
    forms = checked_forms(case, compiled=not args.without_compile)
    steps = steps_of(case, forms | peers_of(case))
    found = {"rows": rows, "classes": classes, "logits_bytes": case.values.nbytes}
    found |= {"threads": {}, "memory": None, "of_copy": None}
    for threads in args.threads:
        torch.set_num_threads(threads)  # also where OMP_NUM_THREADS says otherwise
        times = found["threads"][str(threads)] = measure(steps, args.rounds, args.device)
    if bandwidth is not None:
        found["of_copy"] = shares(case, times["seconds"], bandwidth)
    return found


def run(args: argparse.Namespace) -> dict:
    """Return all figures, with what they were taken on."""
    torch.manual_seed(1)
    bandwidth = copy_bandwidth(args.device) if is_gpu(args.device) else None
    result = {
        "machine": hardware(args.device),
        "torch": torch.__version__,
        "device": args.device,
        "dtype": args.dtype,
        "backend": backend(args),
        "alpha": ALPHA,
        "top_k": KEPT,
        "rounds": args.rounds,
        "copy_bandwidth": bandwidth,
        "limits": LIMITS,
        "shapes": [],
    }
    for shape in args.shapes:
        print(f"{shape} ...", file=sys.stderr, flush=True)
        result["shapes"].append(run_shape(shape, args, bandwidth))
    add_memory(result["shapes"], args)
    result["missed"] = missed(result["shapes"])
    return result


def add_memory(shapes: list[dict], args: argparse.Namespace) -> None:
    """Note the forms' memory of shapes that are large enough for it."""
    large = [found for found in shapes if found["logits_bytes"] >= MEASURABLE_BYTES]
    names = [list(found["threads"][str(args.threads[0])]["seconds"]) for found in large]
    wanted = [
        Wanted(found["rows"], found["classes"], args.dtype, forms)
        for found, forms in zip(large, names, strict=True)
    ]
    if not wanted:
        return
    multiples = memory(wanted, max(args.threads), args.device)
    for found, multiple in zip(large, multiples, strict=True):
        found["memory"] = multiple


def backend(args: argparse.Namespace) -> str:
    """Return the name of what computes pskd's loss: native, triton or torch."""
    case = Case.made_up(1, 2, getattr(torch, args.dtype), args.device)
    rows = Rows(case.values, case.target, case.probs, None, None, ALPHA, -100, 0.0)
    return backend_of(rows)


def is_gpu(device: str) -> bool:
    return torch.device(device).type == "cuda"


def hardware(device: str) -> str:
    """Return the name of the GPU or of the processor."""
    if is_gpu(device):
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def missed(shapes: list[dict]) -> list[str]:
    """Return a line for each figure of pskd's loss that is outside its limit."""
    figures = [figure for found in shapes for figure in _limited(found)]
    over = [
        f"{name}: {value:.2f} of {what}, limit {limit}"
        for name, value, what, limit in figures
        if not value <= limit  # NaN is over it too
    ]
    least = LIMITS["of_copy"]
    shares = [(found, name, share) for found in shapes for name, share in _large_shares(found)]
    return over + [
        f"{name}, {_shape(found)}: {share:.2f} of the copy bandwidth, at least {least}"
        for found, name, share in shares
        if not share >= least
    ]


def _shape(found: dict) -> str:
    return f"{found['rows']}x{found['classes']}"


def _limited(found: dict) -> Iterator[tuple[str, float, str, float]]:
    """Give each figure that must not be larger: its name, itself, what it is of, its limit."""
    shape = _shape(found)
    if found["of_copy"] is None:  # on a GPU the bandwidth has a limit, and launches take their time
        limit = LIMITS["ratio" if found["classes"] >= MANY_CLASSES else "ratio_few_classes"]
        for threads, times in found["threads"].items():
            for form, ratio in times["ratio_median"].items():
                if form.startswith("pskd"):
                    yield f"{form}, {shape}, {threads} thread(s)", ratio, f"{BASE}'s time", limit
    for form, multiple in (found["memory"] or {}).items():
        if form.startswith("pskd"):
            limit = LIMITS["memory_in_place" if form.endswith("in place") else "memory"]
            yield f"{form}, {shape}", multiple, "the logits' memory", limit


def _large_shares(found: dict) -> list[tuple[str, float]]:
    large = found["of_copy"] is not None and found["logits_bytes"] >= UNCACHED_BYTES
    return list(found["of_copy"].items()) if large else []


def shape_name(text: str) -> str:
    parts = text.split("x")
    if len(parts) != 2 or not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise argparse.ArgumentTypeError(f"expected ROWSxCLASSES, as 256x1000, got {text}")
    return text


def flags(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--shapes", nargs="+", type=shape_name, default=SHAPES, help="rows x classes"
    )
    parser.add_argument(
        "--threads", nargs="+", type=at_least(1), default=[1], help="CPU threads, each in turn"
    )
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--rounds", type=at_least(3), default=9, help="3 or more")
    parser.add_argument("--without-compile", action="store_true", help="leave out torch.compile")
    parser.add_argument("--json", type=new_file, help="a file for the figures")
    parser.add_argument(
        "--plot", type=new_file, help="a file for a picture; its suffix is the format"
    )
    return parser.parse_args(argv)


def told(result: dict) -> str:
    """Return all that is printed of the figures."""
    shapes, by = result["shapes"], f"pskd by {result['backend']}"
    parts = [f"{result['machine']}, torch {result['torch']}, {result['dtype']}, {by}"]
    for threads in shapes[0]["threads"]:
        parts.append(f"{threads} thread(s): time over {BASE}'s (quartiles over the rounds)")
        parts.append(time_table(shapes, threads))
    if result["copy_bandwidth"]:
        copied = result["copy_bandwidth"] / 1e12
        parts.append(f"Share of the bandwidth of a copy ({copied:.2f} TB/s)")
        parts.append(bandwidth_table(shapes))
    parts += ["Extra peak memory over the logits' size", memory_table(shapes)]
    within = ["All of pskd's figures are within the limits."]
    return "\n\n".join([*parts, "\n".join(result["missed"] or within)])


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
