"""What the demo's parts share: options, trainings side by side, pictures, a table, a verdict.

Every part takes a folder, and flags for its trainings after two dashes:

    python -m demo.classification --out runs/short -- --epochs 10
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from demo.steps import StepFailed, check_folder, fresh_folder, run_all
from pskd_tools.files import write_json
from pskd_tools.plots import reliability_diagram, risk_coverage_plot
from pskd_tools.presets import PRESETS
from pskd_tools.report.compare import compare
from pskd_tools.report.runs import Run, read_run
from pskd_tools.report.tables import make_tables
from pskd_tools.report.verdict import LEADS, sentences
from pskd_tools.table import text_table

Commands = Mapping[str, Sequence[str | Path]]  # command lines by run

# ---- options -------------------------------------------------------------------------------------


def parser_of(name: str, doc: str, flags: str) -> argparse.ArgumentParser:
    """Return a parser with the options of every part; ``flags`` says what its trainings take."""
    parser = argparse.ArgumentParser(prog=f"python -m demo.{name}", description=doc.split("\n")[0])
    out = Path("runs/demo", name)
    parser.add_argument("--out", type=Path, default=out, help="default: %(default)s")
    parser.add_argument("train_flags", nargs="*", metavar="-- FLAG ...", help=f"after --: {flags}")
    return parser


def parse_checked(
    parser: argparse.ArgumentParser,
    argv: Sequence[str] | None,
    together: tuple[str, str],
    positive: Sequence[str],
) -> argparse.Namespace:
    """Read a command line with two options that come together, and some of at least 1."""
    args = parser.parse_args(argv)
    if len({bool(getattr(args, name)) for name in together}) > 1:
        parser.error(f"expected --{' and --'.join(together)} together, got one of them")
    for name in positive:
        if (number := getattr(args, name)) < 1:
            parser.error(f"--{name.replace('_', '-')}: expected at least 1, got {number}")
    return args


# ---- trainings -----------------------------------------------------------------------------------


def say(head: str, text: str) -> None:
    print(f"[{head}] {text}", flush=True)


def run_steps(head: str, text: str, commands: Commands, logs: Mapping[str, Path], *watch) -> None:
    """Say what is done and where its logs are, and do it, as `demo.steps.run_all`."""
    say(head, f"{text}, log file{'s' * (len(logs) > 1)} {', '.join(map(str, logs.values()))}")
    run_all(commands, logs, *watch)


def folder_of(out: Path, run: str) -> Path:
    """Return the folder of a run of the demo."""
    return out / run.lower().replace("-", "")


def output_folder(out: Path, runs: Sequence[str]) -> Path:
    """Make the folder of all that a part writes.

    Raises:
        OSError: if it cannot be made.
        ValueError: if it holds what the demo would delete.
    """
    out = out.resolve()
    for run in runs:
        check_folder(folder_of(out, run))
    out.mkdir(parents=True, exist_ok=True)
    return out


def train(head: str, text: str, out: Path, commands: Commands, *shown: Callable) -> None:
    """Train all runs side by side, each in a fresh folder; print records as `printer`."""
    logs = {run: fresh_folder(folder_of(out, run)) / "train.log" for run in commands}
    run_steps(head, text, commands, logs, printer(*shown))


def printer(
    read: Callable[[Path], list[dict]], line: Callable[[dict, dict], str | None]
) -> Callable[[str, Path], None]:
    """Return what prints a line for some of the records that a training has logged, each once.

    Args:
        read: gives the records of a log file, which may still be written.
        line: gives the text for a record, from it and the one before it (``{}``: none); None for
            one that is not shown.
    """
    seen: dict[str, int] = {}

    def watch(name: str, log: Path) -> None:
        records = [{}, *read(log)]
        done = seen.get(name, 0)
        for last, record in zip(records[done:], records[done + 1 :], strict=False):
            if text := line(record, last):
                print(f"    {name:<13} {text}", flush=True)
        seen[name] = len(records) - 1

    return watch


def read_metrics(log: Path) -> list[dict]:
    """Return the whole lines of the metrics.json next to a log, which may still be written."""
    path = log.with_name("metrics.json")
    lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.exists() else []
    return [json.loads(line) for line in lines]


# ---- results -------------------------------------------------------------------------------------


def read_results(out: Path, names: Sequence[str]) -> list[Run]:
    return [read_run(folder_of(out, name), name) for name in names]


def write_results(out: Path, runs: Sequence[Run], results: Mapping[str, Mapping]) -> None:
    """Write results.json and the two plots, all runs in each; no plots without a detection."""
    pairs = {run.name: (run.rows["confidence"], run.rows["correct"]) for run in runs if run.rows}
    if len(pairs) == len(runs):
        reliability_diagram(pairs, out / "reliability.png")
        risk_coverage_plot(pairs, out / "risk_coverage.png")
    write_json(out / "results.json", results, indent=2)


class Report(NamedTuple):
    """The results of one part.

    Attributes:
        title: names the task, the framework and the test set.
        columns: key of a result -> title and format of its column.
        results: run -> its numbers by key; None where a number is missing.
        note: what the columns are.
        runs: as `pskd report` reads them; the first is the baseline.
    """

    title: str
    columns: Mapping[str, tuple[str, str]]
    results: Mapping[str, Mapping]
    note: str
    runs: Sequence[Run]

    def text(self) -> str:
        """Return the table, a line a run, and the verdict."""
        head, lines = ["", *(title for title, _ in self.columns.values())], []
        for name, result in self.results.items():
            values = [(result[key], form) for key, (_, form) in self.columns.items()]
            lines.append([name, *("-" if v is None else format(v, form) for v, form in values)])
        return "\n".join([self.title, text_table(head, lines), self.note, "", self.verdict()])

    def verdict(self) -> str:
        """Return what `pskd report` says of each run against the baseline."""
        (table,) = make_tables(self.runs, PRESETS["guo"])
        lines = []
        for pair in compare(table, PRESETS["guo"]):
            lines.append(f"{pair.method.name} against {pair.baseline.name}:")
            said = sentences(pair, table.columns)
            lines += [f"  {LEADS[effect]} {text}" for effect, text in said.items()]
        return "\n".join(lines)


def show(run: Callable[[argparse.Namespace], Report], args: argparse.Namespace) -> int:
    """Run a part by itself, print what it ends with, and return the exit status.

    A part raises StepFailed, naming the step and its log; OSError if its folder cannot be written;
    ValueError for data that cannot be used, or a folder with files that the demo would delete.
    """
    try:
        print(f"\n{run(args).text()}")
    except (StepFailed, OSError, ValueError) as error:
        print(f"demo: error: {error}", file=sys.stderr)
        return 1
    return 0
