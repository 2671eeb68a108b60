"""The `pskd` command; also ``python -m pskd_tools.cli``.

    pskd doctor [PART ...] [--json] [--timeout SECONDS]
    pskd report RUN [RUN ...] [--out FOLDER] [--preset paper|guo]

``pskd doctor`` tries the core and every other part, and exits with 0 if the core and all parts that
are present work. With parts named it tries those (and the core, on which they stand) and exits
with 0 exactly if they are present and work; otherwise with 1, and with 2 for a wrong command line.
A part whose trial takes too long is "timed out" and counts as not working (status 1);
``--timeout`` gives it more time.

``pskd report`` compares runs of any task on one page, and exits with 0, with 2 for what the user
can mend, or with 1 if a file cannot be read or written. ``pskd --version`` says which pskd this is.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import textwrap
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version

from pskd_tools import doctor
from pskd_tools.table import text_table

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status.

    Args:
        argv: the arguments without the program's name; None: those of the process.

    Returns:
        0 if all is well, 1 if the command found something broken or did not end trying.

    Raises:
        SystemExit: with status 2 if the arguments are wrong, 0 after ``--help`` and ``--version``.
    """
    args = _parser().parse_args(argv)
    status: int = args.run(args)
    return status


def _parser() -> argparse.ArgumentParser:
    try:
        # Importing pskd would import torch, and the doctor must start where torch does not load.
        own = version("pskd")
    except PackageNotFoundError:  # a checkout on the PYTHONPATH
        own = "(not installed)"
    parser = argparse.ArgumentParser(
        prog="pskd", description="Progressive self-knowledge distillation."
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {own}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    command = commands.add_parser(
        "doctor",
        help="say what is installed, what does not fit, and what mends it",
        description="Say what is installed, what does not fit, and the command that mends it. "
        "Exit status: without PART, 0 if the core and every part that is present work; with PART, "
        "0 if the core and all parts named are present and work; otherwise 1, also for a part that "
        "timed out, of which nothing is known.",
    )
    command.add_argument(
        "parts",
        metavar="PART",
        nargs="*",
        type=_part,
        help=f"what must work: {', '.join(doctor.PARTS)} (default: whatever is present)",
    )
    command.add_argument("--json", action="store_true", help="print one JSON object")
    command.add_argument(
        "--timeout",
        metavar="SECONDS",
        type=_seconds,
        default=120.0,
        help="for trying all parts together (default: %(default)g); more for a part that timed out",
    )
    command.set_defaults(run=_doctor)
    command = commands.add_parser(
        "report",
        help="compare runs of any task on one page",
        description="Compare runs on one page: metrics, plots and the examples that PS-KD "
        "re-weighted. Writes report.html, report.json and report.csv. docs/report.md says what a "
        "run's folder holds.",
    )
    command.add_argument(
        "runs",
        metavar="RUN",
        nargs="+",
        help="a run's folder, NAME=FOLDER, or NAME=FOLDER,FOLDER for the seeds of one method; the "
        "first name is the baseline",
    )
    command.add_argument("--out", default="report", help="folder to write to (default: report)")
    command.add_argument(
        "--preset",
        choices=("paper", "guo"),
        default="paper",
        help="paper: as the PS-KD paper's tables, ECE over 10 bins; guo: 15 bins and raw fractions "
        "(default: %(default)s)",
    )
    command.set_defaults(run=_report)
    return parser


def _part(text: str) -> str:
    if text not in doctor.PARTS:
        raise argparse.ArgumentTypeError(f"expected one of {', '.join(doctor.PARTS)}, got {text!r}")
    return text


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise argparse.ArgumentTypeError(f"expected a number of seconds above 0, got {text!r}")
    return seconds


def _doctor(args: argparse.Namespace) -> int:
    report = doctor.diagnose(doctor.gather(args.parts, timeout=args.timeout))
    text = json.dumps(report.as_dict(), indent=2) if args.json else report_text(report)
    # Errors of frameworks may hold any character; not every terminal or log does.
    print(text.encode("ascii", "backslashreplace").decode())
    return 0 if report.ok else 1


def _report(args: argparse.Namespace) -> int:
    try:
        from pskd_tools.report import write_report  # needs torch, of which the doctor is to tell

        print(write_report(args.runs, args.out, preset=args.preset))
    except (ImportError, ValueError, OSError) as error:
        print(f"pskd report: error: {error}", file=sys.stderr)
        return 1 if isinstance(error, OSError) else 2
    return 0


def report_text(report: doctor.Report) -> str:
    """Return a doctor's report as plain text: packages, parts, findings, a count."""
    told = report.as_dict()
    packages = [
        (name, package["version"] or "not installed", package["needed_by"])
        for name, package in told["packages"].items()
    ]
    lines = [
        f"python {told['python']}, torch {told['torch_build']}",
        "",
        text_table(("package", "version", "needed by"), packages, numbers=False),
        "",
        text_table(("part", "state"), report.parts.items(), numbers=False),
    ]
    for finding in report.findings:
        lines += [
            "",
            textwrap.fill(
                f"{finding.severity} ({finding.part}): {finding.message}",
                width=100,
                subsequent_indent="    ",
                break_long_words=False,
                break_on_hyphens=False,
            ),
            f"    mend: {finding.mend}",
        ]
    severities = [finding.severity for finding in report.findings]
    counts = [f"{severities.count(name)} {name}(s)" for name in doctor.SEVERITIES]
    return "\n".join([*lines, "", ", ".join(counts)])


if __name__ == "__main__":
    sys.exit(main())
