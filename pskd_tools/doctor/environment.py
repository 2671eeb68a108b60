"""What is known about an environment, and how it is gathered: versions, and code that is tried."""

from __future__ import annotations

import contextlib
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

from pskd_tools.doctor.parts import DISTRIBUTIONS, PACKAGES, PARTS, STEPS, WAYS

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
        unsafe_load: the environment variable `UNSAFE_LOAD`; empty where it is not set.
        probes: part -> what happened when it was tried; its keys are the parts under check.
        asked: the parts that the user named; they must be present.
    """

    python: tuple[int, ...]
    versions: Mapping[str, str]
    unsafe_load: str
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

    def has(self, framework: str) -> bool:
        """Return whether a framework is there or its distribution claims that it is."""
        packages = DISTRIBUTIONS.get(framework, (framework,))
        return not self.versions.keys().isdisjoint(packages) or not self.lacks(framework)

    def has_part(self, part: str) -> bool:
        """Return whether a part has one of its frameworks, with the adapter for it."""
        return not WAYS[part] or any(
            self.has(way.framework) and not any(map(self.lacks, (way.adapter, *way.beside)))
            for way in WAYS[part]
        )

    def release_of(self, package: str) -> tuple[int, ...]:
        """Return the release of ``package``; (), below every other, if absent or unreadable."""
        return release(self.versions.get(package, ""))

    @property
    def torch_build(self) -> str:
        """Which CUDA torch was built for and whether a device is there, or "unknown"."""
        return self.said("torch") or "unknown"


def release(version: str) -> tuple[int, ...]:
    """Return the numbers of a version's release: ``"2.6.0rc1+cu124"`` -> ``(2, 6, 0)``.

    Pre-releases count as their release, as pip counts them against an upper bound. The result
    compares rightly with any tuple that does not end in 0. It is () for a version that does not
    begin with a release or has an epoch (``1!2.0``).
    """
    match = re.match(r"\d+(?:\.\d+)*(?!.*!)", version)
    return tuple(int(number) for number in match.group().split(".")) if match else ()


def gather(asked: Iterable[str] = (), *, timeout: float = 120.0) -> Environment:
    """Look at the running interpreter's environment.

    Args:
        asked: the parts of `PARTS` to try, and the core, on which they stand; none: every part.
        timeout: seconds for all the trying together.

    Returns:
        What there is. In the processes modules are found as in an installed command: not in the
        current directory, unless PYTHONPATH names it.
    """
    named, versions = frozenset(asked), {}
    for package in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            # Broken metadata may lack the field; that is reported, not hidden.
            versions[package] = str(metadata.version(package))
    chosen = [part for part in PARTS if not named or part in named or part == "core"]
    code = {part: {name: step.code for name, step in STEPS[part].items()} for part in chosen}
    return Environment(
        python=tuple(sys.version_info[:3]),
        versions=versions,
        unsafe_load=os.environ.get(UNSAFE_LOAD, ""),
        probes=run_probes(code, timeout),
        asked=named,
    )


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
        reports.seek(0)
        noise.seek(0)
        told, printed = reports.read().decode(), noise.read().decode("utf-8", "replace").strip()
    attempts, current = {}, ""
    for line in told.split("\n")[:-1]:  # after the last newline: a line that was cut off
        name, state, detail = json.loads(line)
        current = name if state == "started" else ""
        if not current:
            attempts[name] = Attempt(state == "ok", _one_line(detail))
    if ended and current:
        ended += f" (while trying {current})"
    if ended and printed:
        ended += f": {printed.splitlines()[-1]}"
    return Probe(attempts, _one_line(ended), limit)


def _one_line(text: str) -> str:
    line = " ".join(text.split())
    half = _LONGEST_ERROR // 2
    return line if len(line) <= _LONGEST_ERROR else f"{line[:half]} ... {line[-half:]}"
