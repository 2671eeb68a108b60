"""Both halves of the demo, translation and detection, and their results in one table.

    python -m demo    the same as: make demo

runs/demo/results.json holds both results afterwards.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from demo import detection, translation
from demo.steps import StepFailed
from pskd.run.files import write_json


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m demo",
        description=__doc__.split("\n")[0],
        epilog="Options: those of python -m demo.translation and python -m demo.detection.",
    )
    parser.parse_args(argv)
    try:
        reports = [half.run(half.parse([])) for half in (translation, detection)]
    except (StepFailed, OSError, ValueError) as error:
        print(f"demo: error: {error}", file=sys.stderr)
        return 1
    results = Path("runs/demo/results.json")
    write_json(results, {report.title: report.results for report in reports}, indent=2)
    print("", *(report.table() for report in reports), sep="\n\n")
    print(f"\nAll of it, with pictures: {results.parent.resolve()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
