"""Runs fairseq's commands one after another, each in a fork of a process that has imported fairseq.

Importing fairseq takes seconds, a tiny training a fraction of one. A job is a line of JSON on the
standard input, with the keys module, flags, output and limit_s; the answer is a line with the exit
code. The child is what ``python -m MODULE FLAGS`` would be, short of its imports: it has not read
the plugin, parsed a flag, opened a file or set up a log before.
"""

import json
import logging
import os
import runpy
import signal
import sys


def wait_for_job() -> dict | None:
    """Return a job in a child of its own; in the server, None when there is no more input."""
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            return json.loads(line)
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)
    return None


def become(job: dict) -> None:
    """Take on a job's input, output, arguments and time limit."""
    with open(os.devnull, "rb") as nothing, open(job["output"], "wb") as output:
        os.dup2(nothing.fileno(), 0)
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    sys.argv = [job["module"], *job["flags"]]
    signal.setitimer(signal.ITIMER_REAL, job["limit_s"])  # its signal ends a process at once


if __name__ == "__main__":
    import fairseq  # noqa: F401
    import fairseq.checkpoint_utils
    import fairseq.sequence_generator
    import fairseq.trainer  # noqa: F401

    logging.root.handlers.clear()  # left by an import; fairseq sets up the log before its imports
    job = wait_for_job()
    if job is not None:
        become(job)
        runpy.run_module(job["module"], run_name="__main__", alter_sys=True)
