"""What is known about an environment, and how it is gathered: versions, and code that is tried."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib import metadata
from typing import IO

from pskd_tools.doctor.parts import PACKAGES, PARTS, STEPS, code_of

__all__ = ["UNSAFE_LOAD", "Attempt", "Environment", "Probe", "gather", "release", "run_probes"]

UNSAFE_LOAD = "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"
_LONGEST_ERROR = 400


@dataclass(frozen=True)
class Attempt:
    """One thing that was tried: whether it worked, and what it said or how it failed."""

    ok: bool
    detail: str = ""


@dataclass(frozen=True)
class Probe:
    """What one part's process tried; ``failure`` is set where the process itself did not finish.

    Where it was stopped because it took too long, ``limit`` is the time in seconds that it had.
    """

    attempts: Mapping[str, Attempt]
    failure: str = ""
    limit: float | None = None


@dataclass(frozen=True)
class Environment:
    """Everything the rules look at.

    Attributes:
        python: the interpreter's version, (major, minor, micro).
        versions: distribution name -> version, for those of `PACKAGES` that are installed.
        variables: the environment variables that matter here, where set.
        probes: part -> what happened when it was tried; its keys are the parts under check.
        asked: the parts that the user named; they must be present.
    """

    python: tuple[int, ...]
    versions: Mapping[str, str]
    variables: Mapping[str, str]
    probes: Mapping[str, Probe]
    asked: frozenset[str] = frozenset()

    def attempt(self, name: str) -> Attempt | None:
        """Return what became of an attempt of any part, or None where it was not made."""
        return next((p.attempts[name] for p in self.probes.values() if name in p.attempts), None)

    def said(self, name: str) -> str | None:
        """Return the detail of an attempt that succeeded, or else None."""
        attempt = self.attempt(name)
        return attempt.detail if attempt is not None and attempt.ok else None

    def lacks(self, module: str) -> bool:
        """Return whether trying ``module`` failed because there is no such module."""
        missing = Attempt(False, f"ModuleNotFoundError: No module named '{module}'")
        return self.attempt(module) == missing

    def release_of(self, package: str) -> tuple[int, ...]:
        """Return the release of ``package``; (), below every other, if absent or unreadable."""
        try:
            return release(self.versions[package])
        except (KeyError, ValueError):
            return ()

    @property
    def torch_build(self) -> str:
        """Which CUDA torch was built for and whether a device is there, or "unknown"."""
        return self.said("torch") or "unknown"


def release(version: str) -> tuple[int, ...]:
    """Return the numbers of a version's release: ``"2.6.0rc1+cu124"`` -> ``(2, 6, 0)``.

    Pre-releases count as their release, as pip counts them against an upper bound. The result
    compares rightly with any tuple that does not end in 0.

    Raises:
        ValueError: if ``version`` does not begin with a release, or has an epoch (``1!2.0``).
    """
    match = re.match(r"\d+(?:\.\d+)*", version)
    if match is None or "!" in version:
        raise ValueError(f"version: expected one that begins with a release, got {version!r}")
    return tuple(int(number) for number in match.group().split("."))


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
    code = {part: {name: code_of(name) for name in STEPS[part]} for part in chosen}
    return Environment(
        python=tuple(sys.version_info[:3]),
        versions=dict(_installed(PACKAGES)),
        variables={name: os.environ[name] for name in (UNSAFE_LOAD,) if name in os.environ},
        probes=run_probes(code, timeout),
        asked=named,
    )


def _installed(names: Iterable[str]) -> Iterable[tuple[str, str]]:
    """Give name and version of those distributions that are installed, importing none of them."""
    for name in names:
        try:
            # Broken metadata may lack the field; that is reported, not hidden.
            yield name, str(metadata.version(name))
        except metadata.PackageNotFoundError:
            continue


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


def run_probes(steps: Mapping[str, Mapping[str, str]], timeout: float) -> dict[str, Probe]:
    """Run the steps of several parts at the same time, each part in a process of its own.

    Args:
        steps: part -> name -> Python code; a step may set ``value``, which becomes its detail.
        timeout: seconds for all of them together.

    Returns:
        Part -> what happened. A part that crashed or took too long has a ``failure``.
    """
    with ThreadPoolExecutor(len(steps)) as pool:
        probes = pool.map(lambda code: _run_probe(code, timeout), steps.values())
        return dict(zip(steps, probes, strict=True))


def _run_probe(steps: Mapping[str, str], timeout: float) -> Probe:
    command = [sys.executable, "-c", _RUNNER, json.dumps(list(steps.items()))]
    limit, ended = None, ""
    # Files and not pipes: whatever a killed probe leaves running could hold a pipe open for ever.
    with tempfile.TemporaryFile() as reports, tempfile.TemporaryFile() as noise:
        try:
            status = subprocess.run(
                command, stdin=subprocess.DEVNULL, stdout=reports, stderr=noise, timeout=timeout
            ).returncode
            known = {-number: number.name for number in signal.Signals}
            if status > 0:
                ended = f"ended with status {status}"
            elif status < 0:
                ended = f"was ended by {known.get(status, f'signal {-status}')}"
        except subprocess.TimeoutExpired:
            limit, ended = timeout, f"did not end within {timeout:g} seconds"
        told, printed = _text(reports), _text(noise)
    attempts, current = {}, ""
    for line in told.split("\n")[:-1]:  # after the last newline: a line that was cut off
        name, state, detail = json.loads(line)
        current = name if state == "started" else ""
        if not current:
            attempts[name] = Attempt(state == "ok", _one_line(detail))
    if ended:
        ended += f" (while trying {current})" if current else ""
        ended += "".join(f": {line}" for line in printed.strip().splitlines()[-1:])
    return Probe(attempts, _one_line(ended), limit)


def _text(file: IO[bytes]) -> str:
    file.seek(0)
    return file.read().decode("utf-8", "replace")


def _one_line(text: str) -> str:
    line = " ".join(text.split())
    half = _LONGEST_ERROR // 2
    return line if len(line) <= _LONGEST_ERROR else f"{line[:half]} ... {line[-half:]}"
