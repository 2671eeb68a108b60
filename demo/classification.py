"""Train a classifier on digits of which 40 % are labelled wrong, by three methods.

    python -m demo.classification

The images are scikit-learn's scans of handwritten digits, 50 a digit for training; test images
are labelled right. Cross-entropy, label smoothing and PS-KD train from one seed. The runs,
with their logs, results.json, reliability.png and risk_coverage.png go to runs/demo/classification.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from demo import part
from demo.steps import ROOT

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
PRINT_EVERY = 60  # epochs


def progress(record: dict, _last: dict) -> str | None:
    if record["epoch"] % PRINT_EVERY:
        return None
    loss, error = record["train/loss"], record["val/top1_error"]
    return f"epoch {record['epoch']:3d}  training loss {loss:.3f}  validation error {error:.3f}"


def parse(argv: list[str] | None) -> argparse.Namespace:
    flags = "flags for all trainings, such as --epochs 10"
    return part.parser_of("classification", __doc__, flags).parse_args(argv)


def run(args: argparse.Namespace) -> part.Report:
    """Train and evaluate all three from the same seed, and write all files."""
    out = part.output_folder(args.out, list(RUNS))
    script = [sys.executable, ROOT / "classification" / "train.py"]
    commands = {
        name: [*script, *flags, "--output-dir", part.folder_of(out, name), *args.train_flags]
        for name, flags in RUNS.items()
    }
    heading = "classification 1/1", "training side by side"
    part.train(*heading, out, commands, part.read_metrics, progress)
    runs = part.read_results(out, list(RUNS))
    results = {}
    for found in runs:
        scaled = {f"scaled_{key}": found.numbers["scaled"][key] for key in ("nll", "ece")}
        results[found.name] = found.numbers["last"] | scaled
    part.write_results(out, runs, results)
    title = "classification, digits of which 40 % of the training labels are wrong"
    return part.Report(title, COLUMNS, results, NOTE, runs)


def main(argv: list[str] | None = None) -> int:
    return part.show(run, parse(argv))


if __name__ == "__main__":
    sys.exit(main())
