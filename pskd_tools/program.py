"""What a train script does around its work: processes, console, errors and the exit status."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Callable

from pskd.distributed import World, join, leave

__all__ = ["exit_status", "run_program"]

logger = logging.getLogger(__name__)


def run_program(
    name: str,
    parse: Callable[[], argparse.Namespace],
    run: Callable[[argparse.Namespace, World], None],
) -> int:
    """Join the processes of torchrun and run; return the exit status, as `exit_status` does.

    Args:
        name: of the script, before an error.
        parse: returns its options, with ``device``.
        run: does the work.
    """

    def work() -> None:
        args = parse()
        world = join(args.device)
        logging.basicConfig(
            stream=sys.stdout,
            format="%(asctime)s %(levelname)s %(message)s",
            level=logging.INFO if world.is_first else logging.WARNING,
        )
        run(args, world)

    try:
        return exit_status(name, work)
    finally:
        leave()


def exit_status(name: str, work: Callable[[], object]) -> int:
    """Do the work of a program and return its exit status.

    What the user can mend (ValueError, OSError, FloatingPointError) is told in one line.

    Args:
        name: of the program, before an error.
        work: does it.
    """
    try:
        work()
    except (OSError, ValueError, FloatingPointError) as error:
        logger.debug("", exc_info=True)
        # A worker's error comes with its traceback; what it says is in the last line.
        lines = str(error).strip().splitlines() or [repr(error)]
        print(f"{name}: {lines[-1]}", file=sys.stderr)
        return 1
    return 0
