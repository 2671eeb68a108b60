"""Compare cross-entropy, label smoothing and PS-KD in a given time.

    python classification/compare.py --seconds 540 --data-dir data --download

The three are trained as the paper's code trains on CIFAR-100 (cifar100_published.yaml; on a GPU in
bfloat16), but for as many epochs as fit: two epochs of each are timed first. The methods take
turns by epochs, from the same weights and with the same order of images, so that a run that is
stopped has a comparison to show. After each epoch OUTPUT_DIR/compare.json is written and a table
of the test set printed, in the paper's units; `pskd report OUTPUT_DIR/*/` reads the last epoch.
Options are those of train.py; --label-smoothing and --pskd-alpha-final are 0.1 and 0.8 here.
"""

from __future__ import annotations

import argparse
import copy
import logging
import math
import platform
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from pskd.distributed import World
from pskd_classification.evaluation import rows_of
from pskd_classification.job import ClassifierJob, build_trainer, prepare, read_data
from pskd_classification.options import PUBLISHED_ALPHA, build_parser, check, parse, recorded
from pskd_classification.results import write_confidence
from pskd_tools.files import write_json
from pskd_tools.options import in_range
from pskd_tools.presets import PRESETS
from pskd_tools.program import run_program

PROGRAM = "compare"
#: What configs/classification/cifar100_published.yaml has beside the defaults of train.py.
RECIPE = {
    "dataset": "cifar100",
    "model": "preact_resnet18_published",
    "epochs": 300,
    "mean": [0.4914, 0.4822, 0.4465],
    "std": [0.2023, 0.1994, 0.2010],
    "val_fraction": 0.0,
    "eval_test_every_epoch": True,
}
ON_GPU = {"amp": "bf16", "channels_last": True}
LEAST_EPOCHS = 4  # of which the rate drops after two and three
RESERVE = 0.1  # of the time that is left after the timing
COLUMNS = ("top1_error", "top5_error", "nll", "ece", "aurc")
PAPER = PRESETS["paper"]
logger = logging.getLogger(PROGRAM)


class Method:
    """A method and its training so far; the job's model has the weights of the start."""

    def __init__(self, job: ClassifierJob) -> None:
        self.job = job
        self.history: list[dict[str, float]] = []
        self._start = copy.deepcopy(job.model.state_dict())

    def begin(self, epochs: int) -> None:
        """Go back to the start, of a training of so many epochs."""
        # The model stays the same one: what is compiled of it is not compiled again.
        self.job.model.load_state_dict(self._start)
        self.job.args.epochs = epochs
        self.job.args.lr_steps = [epochs // 2, epochs * 3 // 4]
        self.history = []
        self._trainer = build_trainer(self.job)

    def train_epoch(self, folder: Path) -> None:
        """Train the next epoch and measure the test set, whose rows the folder gets."""
        start, epoch = time.perf_counter(), len(self.history) + 1
        record = {"epoch": epoch} | self._trainer.train_epoch(epoch)
        found = self.job.predict("test")
        assert found is not None  # of one process
        rows = rows_of(*found)
        figures = PAPER.table(rows.confidence, rows.correct, nll=rows.nll, in_top5=rows.in_top5)
        folder.mkdir(parents=True, exist_ok=True)
        write_confidence(folder, rows, self.job.data.splits)
        self.history.append(record | figures | {"seconds_with_test": time.perf_counter() - start})

    def record(self, world: World) -> dict[str, object]:
        """Return the options, and the figures of each epoch."""
        options = recorded(self.job.args, world, self.job.data.splits)
        options["pskd_alpha_final"] = self.job.args.pskd_alpha_final
        return {"options": options, "history": self.history}


def round_seconds(methods: dict[str, Method]) -> float:
    """Return what the last epoch of all methods took, with the test set."""
    return sum(method.history[-1]["seconds_with_test"] for method in methods.values())


def build_methods(args: argparse.Namespace, world: World) -> dict[str, Method]:
    """Return the methods by name, all on the same data."""
    options = {
        "cross_entropy": {"label_smoothing": 0.0, "pskd_alpha_final": 0.0},
        "label_smoothing": {
            "label_smoothing": args.label_smoothing or 0.1,
            "pskd_alpha_final": 0.0,
        },
        "pskd": {
            "label_smoothing": 0.0,
            "pskd_alpha_final": args.pskd_alpha_final or PUBLISHED_ALPHA,
        },
    }
    check(args)
    data = read_data(args, world, args.data_on_device)
    return {
        name: Method(prepare(argparse.Namespace(**vars(args) | changed), world, data))
        for name, changed in options.items()
    }


def longest(methods: dict[str, Method], folder: Path, most: int, left: float) -> int:
    """Return how many epochs of all methods fit, at most ``most``, after two epochs of each.

    These take their part of the seconds that are left.

    Raises:
        ValueError: if too few fit for the schedule.
    """
    start = time.perf_counter()
    for name, method in methods.items():
        method.begin(2)
        for _ in range(2):  # the first warms up, the second reads the memory
            method.train_epoch(folder / name)
    taken, cost = time.perf_counter() - start, round_seconds(methods) / (1.0 - RESERVE)
    epochs = min(most, math.floor((left - taken) / cost))
    if epochs < LEAST_EPOCHS:
        needed = taken + LEAST_EPOCHS * cost
        raise ValueError(
            f"--seconds: expected {needed:.0f} s after the reading of the data, for {LEAST_EPOCHS} "
            f"epochs of each method, got {left:.0f} s"
        )
    logger.info("%.1f s an epoch of all methods: %d epochs", round_seconds(methods), epochs)
    return epochs


def table(methods: dict[str, Method], epochs: int) -> str:
    """Return the test set's figures after the last epoch, and each method's least error so far."""
    done = len(next(iter(methods.values())).history)
    heads = [f"{PAPER.metrics[key].title} ({PAPER.metrics[key].unit})" for key in COLUMNS]
    heads += ["least Top-1 error by test, epoch", "s an epoch"]
    lines = [f"| epoch {done} of {epochs} | {' | '.join(heads)} |", "| --- " * 8 + "|"]
    for name, method in methods.items():
        last = method.history[-1]
        best = min(method.history, key=lambda record: record["top1_error"])
        cells = [f"{last[key]:.{PAPER.metrics[key].digits}f}" for key in COLUMNS]
        cells += [f"{best['top1_error']:.2f}, {best['epoch']}", f"{last['seconds']:.2f}"]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def run(args: argparse.Namespace, world: World) -> None:
    start, folder, most = time.perf_counter(), Path(args.output_dir), args.epochs
    if most < LEAST_EPOCHS:
        raise ValueError(f"--epochs: expected {LEAST_EPOCHS} or more, got {most}")
    if world.size > 1:
        raise ValueError(f"expected one process, got {world.size}")
    if args.resume or args.test_only:
        raise ValueError("expected a comparison from its beginning, got --resume or --test-only")
    methods = build_methods(args, world)
    epochs = longest(methods, folder, most, args.seconds - (time.perf_counter() - start))
    for method in methods.values():
        method.begin(epochs)
    on_gpu = world.device.type == "cuda"
    record = {
        "task": "comparison",
        "command": sys.argv,
        "machine": torch.cuda.get_device_name() if on_gpu else platform.machine(),
        "torch": torch.__version__,
        "seconds": args.seconds,
        "epochs": epochs,
        "preset": PAPER.name,
    }
    for epoch in range(1, epochs + 1):
        for name, method in methods.items():
            method.train_epoch(folder / name)
        record |= {"epochs_done": epoch, "seconds_passed": time.perf_counter() - start}
        record["methods"] = {name: method.record(world) for name, method in methods.items()}
        write_json(folder / "compare.json", record, indent=2)
        print(table(methods, epochs), flush=True)
        if epoch < epochs and record["seconds_passed"] + round_seconds(methods) > args.seconds:
            logger.warning("stopped after epoch %d of %d: out of time", epoch, epochs)
            break


def options(words: Sequence[str]) -> argparse.Namespace:
    """Return the options, of which those of the recipe and of a GPU are the defaults."""
    parser = build_parser(__doc__)
    parser.add_argument(
        "--seconds", type=in_range(float, 0.0), default=540.0,
        help="that all may take, counted from the reading of the data; default: %(default)g",
    )  # fmt: skip
    parser.set_defaults(output_dir="runs/compare", **RECIPE)
    device = parse(parser, words).device
    if torch.cuda.is_available() if device is None else device.startswith("cuda"):
        parser.set_defaults(**ON_GPU)
    return parse(parser, words)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status."""
    words = sys.argv[1:] if argv is None else list(argv)
    return run_program(PROGRAM, lambda: options(words), run)


if __name__ == "__main__":
    sys.exit(main())
