#!/usr/bin/env python
"""The log of a fairseq-train run with PS-KD -> a plot of what the teacher did in each epoch.

    python translation/plot_epochs.py train.log --out epochs.png

Reads what fairseq writes with --log-format simple or json.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path

from pskd.plots import epoch_plot

SIMPLE = re.compile(r"INFO \| train \| epoch (\d+) \| (.*)$")
JSON = re.compile(r"INFO \| train \| (\{.*\})$")


def epoch_records(log: str) -> list[dict[str, float]]:
    """Return what a log says of each epoch of training; after a resume the later line counts."""
    records = {}
    for line in log.splitlines():
        if found := SIMPLE.search(line):
            pairs = (part.rsplit(" ", 1) for part in found[2].split(" | "))
            record = {name: float(value) for name, value in pairs}
            records[int(found[1])] = record
        elif found := JSON.search(line):
            values = json.loads(found[1])
            record = {name.removeprefix("train_"): float(value) for name, value in values.items()}
            records[int(record["epoch"])] = record
    return [record | {"epoch": epoch} for epoch, record in sorted(records.items())]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("log", type=Path, help="what fairseq-train printed")
    parser.add_argument("--out", type=Path, required=True, help="the picture: .png, .pdf or .svg")
    args = parser.parse_args()
    try:
        print(epoch_plot(epoch_records(args.log.read_text(encoding="utf-8")), args.out))
    except (OSError, ValueError) as error:
        sys.exit(f"{args.log}: {error}")


if __name__ == "__main__":
    main()
