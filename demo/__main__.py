"""The three parts of the demo, classification, translation and detection, and what they show.

    python -m demo    the same as: make demo

runs/demo/results.json holds all results afterwards.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from demo import classification, detection, translation
from demo.steps import StepFailed
from pskd_tools.files import write_json


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m demo",
        description=__doc__.split("\n")[0],
        epilog="Options: those of python -m demo.classification, demo.translation, demo.detection.",
    )
    parser.parse_args(argv)
    try:
        parts = (classification, translation, detection)
        reports = [part.run(part.parse([])) for part in parts]
    except (StepFailed, OSError, ValueError) as error:
        print(f"demo: error: {error}", file=sys.stderr)
        return 1
    results = Path("runs/demo/results.json")
    write_json(results, {report.title: report.results for report in reports}, indent=2)
    print("", *(report.text() for report in reports), sep="\n\n")
    print(f"\nAll of it, with pictures: {results.parent.resolve()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
