"""Looking at the running environment: code tried in processes of its own, and versions."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from importlib import metadata
from typing import IO

from pskd_tools.doctor.environment import PACKAGES, PARTS, UNSAFE_LOAD, Attempt, Environment, Probe
from pskd_tools.doctor.steps import STEPS

_LONGEST_ERROR = 400

# What a framework prints while it is imported goes to stderr, so that stdout carries the reports.
# Python puts the current folder first in the path of -c, but not of an installed command: without
# that a checkout, or a clone of a framework, would be tried in place of what is installed.
_RUNNER = """
import sys
if sys.path[:1] == [""]:
    del sys.path[0]
import json, os
reports = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)
def report(*line):
    reports.write(json.dumps(line) + "\\n")
    reports.flush()
for name, code in json.loads(sys.argv[1]):
    report(name, "started", "")
    scope = {}
    try:
        exec(code, scope)
    except (Exception, SystemExit) as error:
        report(name, "failed", type(error).__name__ + ": " + str(error))
    else:
        report(name, "ok", str(scope.get("value", "")))
"""


def gather(asked: Iterable[str] = (), *, timeout: float = 120.0) -> Environment:
    """Look at the running interpreter's environment.

    Args:
        asked: the parts of `PARTS` to try, and the core, on which they stand; none: every part.
        timeout: seconds for all the trying together.

    Returns:
        What there is. In the processes modules are found as in an installed command: not in the
        current directory, unless PYTHONPATH names it.

    Raises:
        ValueError: if a part is not one of `PARTS`.
    """
    named = frozenset(asked)
    if unknown := sorted(named.difference(PARTS)):
        raise ValueError(f"asked: expected parts among {', '.join(PARTS)}, got {unknown}")
    chosen = [part for part in PARTS if not named or part in named or part == "core"]
    code = {part: {name: step.code for name, step in STEPS[part].items()} for part in chosen}
    return Environment(
        python=tuple(sys.version_info[:3]),
        versions=installed_versions(PACKAGES),
        variables={name: os.environ[name] for name in (UNSAFE_LOAD,) if name in os.environ},
        probes=run_probes(code, timeout),
        asked=named,
    )


def installed_versions(names: Iterable[str]) -> dict[str, str]:
    """Return name -> version of those distributions that are installed, importing none of them."""
    versions = {}
    for name in names:
        try:
            # Broken metadata may lack the field; that is reported, not hidden.
            versions[name] = str(metadata.version(name))
        except metadata.PackageNotFoundError:
            continue
    return versions


def run_probes(steps: Mapping[str, Mapping[str, str]], timeout: float) -> dict[str, Probe]:
    """Run the steps of several parts at the same time, each part in a process of its own.

    Args:
        steps: part -> name -> Python code; a step may set ``value``, which becomes its detail.
        timeout: seconds for all of them together.

    Returns:
        Part -> what happened. A part that crashed or took too long has a ``failure``.
    """
    deadline = time.monotonic() + timeout
    with ExitStack() as stack:
        running = {part: _start(code, stack) for part, code in steps.items()}
        probes = {}
        for part, (process, stdout, stderr) in running.items():
            limit = None
            try:
                ended = _describe_end(process.wait(max(deadline - time.monotonic(), 0.0)))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                ended, limit = f"did not end within {timeout:g} seconds", timeout
            probes[part] = _read_probe(ended, _text(stdout), _text(stderr), limit)
        return probes


def _start(
    steps: Mapping[str, str], stack: ExitStack
) -> tuple[subprocess.Popen[bytes], IO[bytes], IO[bytes]]:
    # Files and not pipes: whatever a killed probe leaves running could hold a pipe open for ever.
    stdout = stack.enter_context(tempfile.TemporaryFile())
    stderr = stack.enter_context(tempfile.TemporaryFile())
    command = [sys.executable, "-c", _RUNNER, json.dumps(list(steps.items()))]
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=stdout, stderr=stderr)
    stack.callback(process.wait)
    stack.callback(process.kill)
    return process, stdout, stderr


def _describe_end(status: int) -> str:
    if status >= 0:
        return f"ended with status {status}" if status else ""
    known = {int(number): number.name for number in signal.Signals}
    return f"was ended by {known.get(-status, f'signal {-status}')}"


def _read_probe(ended: str, reports: str, noise: str, limit: float | None) -> Probe:
    """Make a probe of what its process wrote; ``ended`` is empty where the process finished."""
    attempts, current = {}, ""
    for line in reports.split("\n")[:-1]:  # after the last newline: a line that was cut off
        name, state, detail = json.loads(line)
        current = name if state == "started" else ""
        if not current:
            attempts[name] = Attempt(state == "ok", _one_line(detail))
    if not ended:
        return Probe(attempts)
    where = f" (while trying {current})" if current else ""
    last = "".join(f": {line}" for line in noise.strip().splitlines()[-1:])
    return Probe(attempts, _one_line(f"{ended}{where}{last}"), limit)


def _text(file: IO[bytes]) -> str:
    file.seek(0)
    return file.read().decode("utf-8", "replace")


def _one_line(text: str) -> str:
    line = " ".join(text.split())
    half = _LONGEST_ERROR // 2
    return line if len(line) <= _LONGEST_ERROR else f"{line[:half]} ... {line[-half:]}"
