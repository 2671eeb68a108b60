"""Runs fairseq's commands, each in a fork of a process that has imported what they import.

Importing torch and fairseq takes seconds, a tiny training a fraction of one. A line of JSON on the
standard input is a list of jobs that run side by side, as the ranks of a training do; the answer is
a line of JSON with their exit codes. A job has the keys module, flags, output and limit_s, and may
have host, the name of its machine, kill_at, what it logs of a checkpoint when it is killed, and
file_bytes, the size to which its files may grow. A child is what ``python -m MODULE FLAGS`` would
be, short of its imports: it has not read the plugin, parsed a flag, opened a file or set up a log
before.
"""

from __future__ import annotations

import gc
import json
import logging
import os
import resource
import runpy
import signal
import socket
import sys
from functools import partial


def wait_for_job() -> dict | None:
    """Return a job in a child of its own; in the server, None when there is no more input."""
    for line in sys.stdin:
        children = []
        for job in json.loads(line):
            child = os.fork()
            if child == 0:
                return job
            children.append(child)
        codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        print(json.dumps(codes), flush=True)
    return None


def become(job: dict) -> None:
    """Take on a job's input, output, arguments, host and limits."""
    with open(os.devnull, "rb") as nothing, open(job["output"], "wb") as output:
        os.dup2(nothing.fileno(), 0)
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    sys.argv = [job["module"], *job["flags"]]
    signal.setitimer(signal.ITIMER_REAL, job["limit_s"])  # its signal ends a process at once
    if "host" in job:
        socket.gethostname = lambda: job["host"]
    if "file_bytes" in job:
        resource.setrlimit(resource.RLIMIT_FSIZE, (job["file_bytes"],) * 2)
    if "kill_at" in job:
        logging.getLogger("fairseq.checkpoint_utils").addFilter(partial(kill, job["kill_at"]))


def kill(text: str, record: logging.LogRecord) -> bool:
    """End this process before it logs a text."""
    if text in record.getMessage():
        os.kill(os.getpid(), signal.SIGKILL)
    return True


if __name__ == "__main__":
    import fairseq  # noqa: F401
    import fairseq.checkpoint_utils
    import fairseq.sequence_generator
    import fairseq.trainer  # noqa: F401
    import hydra.core.override_parser.overrides_parser
    import hydra.experimental.initialize  # noqa: F401
    import torch._dynamo  # noqa: F401  of torch's optimizers, half of a tiny training

    logging.root.handlers.clear()  # left by an import; fairseq sets up the log before its imports
    gc.freeze()  # else each child copies and takes apart all that was imported, for a second
    job = wait_for_job()
    if job is not None:
        become(job)
        runpy.run_module(job["module"], run_name="__main__", alter_sys=True)
