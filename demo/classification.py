"""Train a classifier on digits of which 40 % are labelled wrong, by three methods.

    python -m demo.classification

The images are scikit-learn's scans of handwritten digits, 50 a digit for training; test images
are labelled right. Cross-entropy, label smoothing and PS-KD train from one seed. The runs,
with their logs, and results.json go to runs/demo/classification.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from demo.report import Report, show
from demo.steps import (
    ROOT,
    Step,
    check_folder,
    folder_of,
    fresh_folder,
    metrics,
    run_all,
)
from pskd_tools.files import write_json

OUT = Path("runs/demo/classification")
CONFIGS = ROOT / "configs" / "classification"
RUNS: dict[str, list[str | Path]] = {
    "cross-entropy": ["--config", CONFIGS / "digits_noisy.yaml"],
    "smoothing": ["--config", CONFIGS / "digits_noisy.yaml", "--label-smoothing", "0.1"],
    "PS-KD": ["--config", CONFIGS / "digits_noisy_pskd.yaml"],
}
COLUMNS = {
    "top1_error": ("error", ".4f"),
    "nll": ("NLL", ".4f"),
    "ece": ("ECE", ".4f"),
    "aurc": ("AURC", ".4f"),
    "scaled_nll": ("NLL, T", ".4f"),
    "scaled_ece": ("ECE, T", ".4f"),
}
NOTE = (
    "Error, ECE (15 bins) and AURC are fractions, NLL is in nats; T: after temperature scaling on\n"
    "held-out images with right labels. Lower is better."
)


class EpochPrinter:
    """Prints a line for every so many epochs that a training has finished."""

    EVERY = 60

    def __init__(self) -> None:
        self._printed: dict[str, int] = {}

    def __call__(self, step: Step) -> None:
        for record in metrics(step.log.parent):
            if record["epoch"] % self.EVERY or record["epoch"] <= self._printed.get(step.name, 0):
                continue
            self._printed[step.name] = record["epoch"]
            print(
                f"    {step.name:<13} epoch {record['epoch']:3d}  training loss "
                f"{record['train/loss']:.3f}  validation error {record['val/top1_error']:.3f}",
                flush=True,
            )


def train(args: argparse.Namespace, out: Path) -> None:
    """Train and evaluate all three side by side, from the same seed."""
    steps = []
    folders = {run: fresh_folder(folder_of(out, run)) for run in RUNS}
    for run, path in folders.items():
        script = [sys.executable, ROOT / "classification" / "train.py", *RUNS[run]]
        line = [*script, "--output-dir", path, *args.train_flags]
        steps.append(Step(run, line, path / "train.log"))
    logs = ", ".join(str(step.log) for step in steps)
    print(f"[classification 1/1] training side by side, log files {logs}", flush=True)
    run_all(steps, EpochPrinter())


def collect(out: Path) -> dict[str, dict]:
    """Read the test figures of all three and write results.json."""
    results = {}
    for run in RUNS:
        found = json.loads((folder_of(out, run) / "results.json").read_text(encoding="utf-8"))
        scaled = {f"scaled_{key}": found["scaled"][key] for key in ("nll", "ece")}
        results[run] = found["last"] | scaled
    write_json(out / "results.json", results, indent=2)
    return results


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m demo.classification", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--out", type=Path, default=OUT, help="default: %(default)s")
    parser.add_argument(
        "train_flags",
        nargs="*",
        metavar="-- FLAG ...",
        help="after --: flags for all trainings, such as --epochs 10",
    )
    return parser.parse_args(argv)


def run(args: argparse.Namespace) -> Report:
    """Train, evaluate, and write all files.

    Raises:
        StepFailed: naming the step and its log.
        OSError: if the output folder cannot be made or written.
        ValueError: if the output folder holds what the demo would delete.
    """
    out = args.out.resolve()
    for name in RUNS:
        check_folder(folder_of(out, name))
    out.mkdir(parents=True, exist_ok=True)
    train(args, out)
    title = "classification, digits of which 40 % of the training labels are wrong"
    folders = {run: folder_of(out, run) for run in RUNS}
    return Report(title, COLUMNS, collect(out), NOTE, folders)


def main(argv: list[str] | None = None) -> int:
    return show(run, parse(argv))


if __name__ == "__main__":
    sys.exit(main())
