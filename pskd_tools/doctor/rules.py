"""Judging: a pure function from an environment to the state of each part, and to findings."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from pskd_tools.doctor import parts
from pskd_tools.doctor.environment import UNSAFE_LOAD, Environment

__all__ = ["SEVERITIES", "Finding", "Report", "diagnose"]

SEVERITIES = ("error", "warning", "note")


@dataclass(frozen=True)
class Finding:
    """Something that does not fit, the part that it concerns, and what mends it."""

    severity: str
    part: str
    message: str
    mend: str


@dataclass(frozen=True)
class Report:
    """The judged environment.

    Attributes:
        environment: what was judged.
        parts: part -> "works", "broken", "absent" or "timed out", of which nothing is known.
        findings: errors first, then warnings, then notes.
    """

    environment: Environment
    parts: Mapping[str, str]
    findings: tuple[Finding, ...]

    @property
    def ok(self) -> bool:
        """Whether the core, every present part and every asked part are known to work."""
        errors = any(finding.severity == "error" for finding in self.findings)
        return not errors and "timed out" not in self.parts.values()

    def as_dict(self) -> dict[str, Any]:
        """Return the report as plain JSON types."""
        env = self.environment
        return {
            "ok": self.ok,
            "python": ".".join(map(str, env.python)),
            "torch_build": env.torch_build,
            "packages": {
                name: {"version": env.versions.get(name), "needed_by": needed_by}
                for name, needed_by in parts.PACKAGES.items()
            },
            "parts": dict(self.parts),
            "findings": [asdict(finding) for finding in self.findings],
            "probes": {part: asdict(probe) for part, probe in env.probes.items()},
        }


def diagnose(env: Environment) -> Report:
    """Judge an environment.

    Args:
        env: what `gather` returned, or one made by hand.

    Returns:
        The state of each part under check and what was found about it. What is wrong with a part
        that is absent is an error only where that part was asked for, and else a warning.
    """
    absent = {part for part in env.probes if not env.has_part(part)}
    # In the order of mending: what a later rule finds may be explained by an earlier one.
    rules = (_versions, _probes, _absences, _surroundings)
    found = [finding for rule in rules for finding in rule(env) if finding.part in env.probes]
    for i, finding in enumerate(found):
        if finding.severity == "error" and finding.part in absent - env.asked:
            found[i] = replace(finding, severity="warning")
    found.sort(key=lambda finding: SEVERITIES.index(finding.severity))
    broken = {finding.part for finding in found if finding.severity == "error"} - absent
    unknown = {part for part, probe in env.probes.items() if probe.limit is not None}
    states = dict.fromkeys(env.probes, "works") | dict.fromkeys(unknown, "timed out")
    states |= dict.fromkeys(broken, "broken") | dict.fromkeys(absent, "absent")
    return Report(env, states, tuple(found))


def _versions(env: Environment) -> Iterator[Finding]:
    """Find versions that do not fit."""
    versions, python = env.versions, ".".join(map(str, env.python))
    for name, version in versions.items():
        if not env.release_of(name):
            message = f"{name} is installed with the version {version!r}, which cannot be compared."
            yield Finding("warning", "core", message, f"pip install --force-reinstall {name}")
    if () < env.release_of("torch") < (2, 4):
        message = f"torch {versions['torch']} is older than 2.4, the first that pskd supports."
        yield Finding("error", "core", message, "pip install --upgrade 'torch>=2.4'")

    wanted = env.has("fairseq") or "translation" in env.asked
    if wanted and not (3, 11) <= env.python[:2] <= (3, 12):
        message = (
            f"Python {python} is not one of those that fairseq-fixed is made for, 3.11 and 3.12."
        )
        works = env.attempt("fairseq") is None or env.said("fairseq") is not None
        severity = "warning" if works else "error"
        yield Finding(severity, "translation", message, "python3.12 -m venv .venv")

    message = ""
    if {"fairseq", "fairseq-fixed"} <= versions.keys():
        message = "fairseq {fairseq} and fairseq-fixed are both installed and share their files."
    elif env.python >= (3, 11) and () < env.release_of("fairseq") < (0, 12, 3):
        message = (
            "fairseq {fairseq} does not run on Python 3.11 and later (mutable dataclass defaults); "
            "fairseq-fixed does."
        )
    if message:
        message = message.format(fairseq=versions["fairseq"])
        yield Finding("error", "translation", message, parts.REPLACE_FAIRSEQ)

    old = [
        f"{name} {versions[name]} is older than {'.'.join(map(str, bound))}"
        for name, bound in {"hydra-core": (1, 1), "omegaconf": (2, 1)}.items()
        if () < env.release_of(name) < bound
    ]
    for package, part in {"fairseq-fixed": "translation", "detectron2": "detection"}.items():
        if package in versions and old:
            message = f"{' and '.join(old)}, which {package} needs at least."
            yield Finding("error", part, message, parts.INSTALL_CONFIG_PAIR)
        elif package in versions and env.release_of("omegaconf") >= (2, 4):
            omegaconf = versions["omegaconf"]
            message = f"omegaconf {omegaconf} is newer than what {package} allows, below 2.4."
            yield Finding("warning", part, message, parts.INSTALL_CONFIG_PAIR)


def _probes(env: Environment) -> Iterator[Finding]:
    """Find processes that did not finish, and steps that failed."""
    for part, probe in env.probes.items():
        again = f"pskd doctor {part} --timeout"
        if probe.limit is not None:
            message = f"Whether this part works is not known: trying it {probe.failure}."
            yield Finding("warning", part, message, f"{again} {5 * probe.limit:g}")
        elif probe.failure:
            yield Finding("error", part, f"Trying this part {probe.failure}.", f"{again} 600")
    versions = {n.replace("-", "_"): env.versions.get(n, "(not installed)") for n in parts.PACKAGES}
    for part, probe in env.probes.items():
        for name, attempt in probe.attempts.items():
            step = parts.STEPS[part][name]
            explained = bool(step.needs) and _counts_as_failure(env, part, step.needs)
            if _counts_as_failure(env, part, name) and not explained:
                problem = step.problem or f"{name} does not load"
                problem = problem.format(build=env.torch_build, **versions)
                message = f"{problem}: {attempt.detail}"
                yield Finding("error", part, message, _mend_of(step, attempt.detail))


def _counts_as_failure(env: Environment, part: str, name: str) -> bool:
    """Whether a step failed, and not for want of a framework or adapter that may be absent."""
    attempt, framework = env.attempt(name), parts.STEPS[part][name].framework
    absent = env.lacks(name) and name in {way.adapter for way in parts.WAYS[part]}
    if attempt is None or attempt.ok or absent:
        return False
    return not framework or env.has(framework)


def _mend_of(step: parts.Step, error: str) -> str:
    """Return the command that mends a failure: for a dependency known by name, its own."""
    missing = re.search(r"No module named '(\w+)", error)
    if missing is None or missing.group(1) == step.framework:
        return step.mend
    return parts.DEPENDENCIES.get(missing.group(1), step.mend)


def _absences(env: Environment) -> Iterator[Finding]:
    """Find frameworks, adapters and packages that are not there."""
    for part in env.probes:
        wanted = part in env.asked and not env.has_part(part)
        serious = "error" if wanted else "note"
        for way in parts.WAYS[part]:
            if not env.has(way.framework):
                if way.framework == "detectron2":
                    yield _detectron2_is_absent(env, way)
                else:
                    package, *_ = parts.DISTRIBUTIONS.get(way.framework, (way.framework,))
                    message = f"{package} is not installed."
                    yield Finding(serious, part, message, way.install)
            elif env.lacks(way.adapter):
                message = (
                    f"{way.framework} is there, but this installation of pskd has no {way.adapter}."
                )
                yield Finding("error" if wanted else "warning", part, message, parts.INSTALL_PSKD)
            for module, package in way.beside.items():
                if env.lacks(module):
                    yield Finding(serious, part, f"{package} is not installed.", way.install)


def _detectron2_is_absent(env: Environment, way: parts.Way) -> Finding:
    other = "is not there either"
    if None not in (env.said("torchvision"), env.said("pskd_torchvision")):
        other = "works"
    elif env.attempt("pskd_torchvision") is None:
        other = "was not tried"
    elif env.has_part("detection"):
        other = "does not work either"
    message = f"Detectron2 is absent; the torchvision adapter {other}."
    return Finding("warning", "detection", message, way.install)


def _surroundings(env: Environment) -> Iterator[Finding]:
    """Find what works, and is to be known."""
    if env.said("pskd") == "not compiled":
        message = (
            "The loss was not compiled when pskd was installed, and runs on torch's operators: on "
            "a CPU slower and with the same results. A C++ compiler (g++, clang++) mends that."
        )
        yield Finding("note", "core", message, parts.INSTALL_PSKD)
    if env.unsafe_load.lower() in ("1", "y", "yes", "true"):
        message = (
            f"{UNSAFE_LOAD} is set, so torch.load runs whatever code a checkpoint holds; fairseq's "
            "checkpoints load without it where the command carries --user-dir with pskd_fairseq."
        )
        yield Finding("warning", "core", message, f"unset {UNSAFE_LOAD}")
    setuptools = env.versions.get("setuptools", "not installed")
    missing = setuptools == "not installed" or env.release_of("setuptools") >= (82,)
    if "detectron2" in env.versions and missing:
        message = (
            f"setuptools ({setuptools}) brings no pkg_resources, which detectron2.model_zoo "
            "imports; the rest of Detectron2 does without."
        )
        yield Finding("warning", "detection", message, parts.INSTALL_SETUPTOOLS)
    if env.has("fairseq") and env.release_of("torch") >= (2, 6):
        path = env.said("pskd_fairseq") or "translation/pskd_fairseq"
        message = (
            "From torch 2.6 on, torch.load refuses fairseq's checkpoints unless pskd_fairseq is "
            "loaded, which allow-lists what they hold; so every command that reads one (resumed "
            "fairseq-train, fairseq-generate, -interactive, -validate) must carry --user-dir."
        )
        yield Finding("note", "translation", message, f"fairseq-generate ... --user-dir {path}")
