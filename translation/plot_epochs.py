#!/usr/bin/env python
"""The log of a fairseq-train run with PS-KD -> a plot of what the teacher did in each epoch.

    python translation/plot_epochs.py SAVE_DIR/train.log --out epochs.png

Reads what fairseq prints with --log-format simple or json; the recipes keep it in SAVE_DIR.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from pskd_tools.plots import epoch_plot
from pskd_tools.report.epochs import fairseq_epochs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("log", type=Path, help="what fairseq-train printed")
    parser.add_argument("--out", type=Path, required=True, help="the picture: .png, .pdf or .svg")
    args = parser.parse_args()
    try:
        records = fairseq_epochs(args.log.read_text(encoding="utf-8"))
    except OSError as error:
        sys.exit(str(error))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        sys.exit(f"{args.log}: expected a log of fairseq-train, got {error}")
    try:
        print(epoch_plot(records, args.out))
    except (OSError, ValueError) as error:
        sys.exit(f"{args.log}: {error}")


if __name__ == "__main__":
    main()
