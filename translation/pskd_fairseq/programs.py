"""What the programs `prepare` and `evaluate` share: their errors, log and exit status."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable


class UserError(ValueError):
    """The user can mend it: the message names the file or option, without a traceback."""


class ToolError(RuntimeError):
    """A process that we started failed; the message ends with its last lines."""


def exit_status(program: str, work: Callable[[], object]) -> int:
    """Do a program's work and return its exit status.

    Returns:
        0, 2 where the user can mend it, 1 where a tool or the disk failed.
    """
    # force: importing fairseq configures the root logger, at DEBUG.
    logging.basicConfig(
        level=logging.INFO,
        format="%(asctime)s | %(levelname)s | %(name)s | %(message)s",
        force=True,
    )
    try:
        work()
    except (UserError, ToolError, OSError) as error:
        print(f"{program}: error: {error}", file=sys.stderr)
        return 2 if isinstance(error, UserError) else 1
    return 0
