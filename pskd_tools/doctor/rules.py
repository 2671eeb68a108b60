"""Judging: each rule a pure function from an environment to findings, and what they add up to."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

from pskd_tools.doctor.environment import (
    PACKAGES,
    SEVERITIES,
    UNSAFE_LOAD,
    Environment,
    Finding,
    Report,
)
from pskd_tools.doctor.installs import (
    INSTALL_CONFIG_PAIR,
    INSTALL_PSKD,
    INSTALL_SETUPTOOLS,
    REPLACE_FAIRSEQ,
)
from pskd_tools.doctor.steps import STEPS, WAYS, Way


def diagnose(env: Environment) -> Report:
    """Judge an environment.

    Args:
        env: what `gather` returned, or one made by hand.

    Returns:
        The state of each part under check and what was found about it. What is wrong with a part
        that is absent is an error only where that part was asked for, and else a warning.
    """
    absent = {part for part in env.probes if not _present(env, part)}
    found = [finding for rule in RULES for finding in rule(env) if finding.part in env.probes]
    found = [
        replace(f, severity="warning")
        if f.severity == "error" and f.part in absent - env.asked
        else f
        for f in found
    ]
    found.sort(key=lambda finding: SEVERITIES.index(finding.severity))
    broken = {finding.part for finding in found if finding.severity == "error"} - absent
    unknown = {part for part, probe in env.probes.items() if probe.limit is not None}
    states = dict.fromkeys(env.probes, "works") | dict.fromkeys(unknown, "timed out")
    states |= dict.fromkeys(broken, "broken") | dict.fromkeys(absent, "absent")
    return Report(env, states, tuple(found))


def _present(env: Environment, part: str) -> bool:
    ways = WAYS[part]
    return not ways or any(
        _installed(env, way.framework)
        and not env.lacks(way.adapter)
        and not any(env.lacks(module) for module in way.beside)
        for way in ways
    )


def _installed(env: Environment, module: str) -> bool:
    """Whether a module is there or its distribution claims that it is."""
    ways = [way for ways in WAYS.values() for way in ways if way.framework == module]
    packages = [package for way in ways for package in way.packages] or [module]
    return any(package in env.versions for package in packages) or not env.lacks(module)


def _unreadable_versions(env: Environment) -> Iterator[Finding]:
    for name, version in env.versions.items():
        if env.release_of(name) is None:
            message = f"{name} is installed with the version {version!r}, which cannot be compared."
            yield Finding("warning", "core", message, f"pip install --force-reinstall {name}")


def _torch_is_too_old(env: Environment) -> Iterator[Finding]:
    if env.below("torch", 2, 4):
        message = f"torch {env.versions['torch']} is older than 2.4, the first that pskd supports."
        yield Finding("error", "core", message, "pip install --upgrade 'torch>=2.4'")


def _python_does_not_fit_fairseq(env: Environment) -> Iterator[Finding]:
    wanted = _installed(env, "fairseq") or "translation" in env.asked
    if wanted and not (3, 11) <= env.python[:2] <= (3, 12):
        message = (
            f"Python {'.'.join(map(str, env.python))} is not one of those that fairseq-fixed is "
            "made for, 3.11 and 3.12."
        )
        tried = env.attempt("fairseq")
        severity = "error" if tried is not None and not tried.ok else "warning"
        yield Finding(severity, "translation", message, "python3.12 -m venv .venv")


def _fairseq_is_the_old_one(env: Environment) -> Iterator[Finding]:
    version = env.versions.get("fairseq")
    if version is None:
        return
    if "fairseq-fixed" in env.versions:
        message = f"fairseq {version} and fairseq-fixed are both installed and share their files."
        yield Finding("error", "translation", message, REPLACE_FAIRSEQ)
    elif env.python >= (3, 11) and not env.from_("fairseq", 0, 12, 3):
        message = (
            f"fairseq {version} does not run on Python 3.11 and later (mutable dataclass "
            "defaults); fairseq-fixed does."
        )
        yield Finding("error", "translation", message, REPLACE_FAIRSEQ)


def _config_packages_do_not_fit(env: Environment) -> Iterator[Finding]:
    old = [
        f"{name} {env.versions[name]} is older than {'.'.join(map(str, bound))}"
        for name, bound in {"hydra-core": (1, 1), "omegaconf": (2, 1)}.items()
        if env.below(name, *bound)
    ]
    for package, part in {"fairseq-fixed": "translation", "detectron2": "detection"}.items():
        if package not in env.versions:
            continue
        if old:
            message = f"{' and '.join(old)}, which {package} needs at least."
            yield Finding("error", part, message, INSTALL_CONFIG_PAIR)
        elif env.from_("omegaconf", 2, 4):
            version = env.versions["omegaconf"]
            message = f"omegaconf {version} is newer than what {package} allows, below 2.4."
            yield Finding("warning", part, message, INSTALL_CONFIG_PAIR)


def _probes_did_not_finish(env: Environment) -> Iterator[Finding]:
    for part, probe in env.probes.items():
        if probe.limit is not None:
            message = f"Whether this part works is not known: trying it {probe.failure}."
            mend = f"pskd doctor {part} --timeout {5 * probe.limit:g}"
            yield Finding("warning", part, message, mend)
        elif probe.failure:
            message = f"Trying this part {probe.failure}."
            yield Finding("error", part, message, f"pskd doctor {part} --timeout 600")


def _steps_failed(env: Environment) -> Iterator[Finding]:
    versions = {n.replace("-", "_"): env.versions.get(n, "(not installed)") for n in PACKAGES}
    for part, probe in env.probes.items():
        for name, attempt in probe.attempts.items():
            step = STEPS[part][name]
            explained = bool(step.needs) and _counts_as_failure(env, part, step.needs)
            if _counts_as_failure(env, part, name) and not explained:
                problem = step.problem.format(build=env.torch_build, **versions)
                error = attempt.detail
                yield Finding("error", part, f"{problem}: {error}", step.mend_of(error))


def _counts_as_failure(env: Environment, part: str, name: str) -> bool:
    """Whether a step failed, and not for want of a framework or adapter that may be absent."""
    attempt, framework = env.attempt(name), STEPS[part][name].framework
    absent = env.lacks(name) and name in {way.adapter for way in WAYS[part]}
    if attempt is None or attempt.ok or absent:
        return False
    return not framework or _installed(env, framework)


def _parts_are_absent(env: Environment) -> Iterator[Finding]:
    for part in env.probes:
        wanted = part in env.asked and not _present(env, part)
        for way in WAYS[part]:
            if not _installed(env, way.framework):
                yield _framework_is_absent(env, part, way, "error" if wanted else "note")
            elif env.lacks(way.adapter):
                message = (
                    f"{way.framework} is there, but this installation of pskd has no {way.adapter}."
                )
                yield Finding("error" if wanted else "warning", part, message, INSTALL_PSKD)
            for package in (way.beside[module] for module in way.beside if env.lacks(module)):
                severity = "error" if wanted else "note"
                yield Finding(severity, part, f"{package} is not installed.", way.install)


def _framework_is_absent(env: Environment, part: str, way: Way, severity: str) -> Finding:
    if way.framework != "detectron2":
        return Finding(severity, part, f"{way.packages[0]} is not installed.", way.install)
    if env.worked("torchvision") and env.worked("pskd_torchvision"):
        other = "works"
    elif env.attempt("pskd_torchvision") is None:
        other = "was not tried"
    else:
        other = "does not work either" if _present(env, part) else "is not there either"
    message = f"Detectron2 is absent; the torchvision adapter {other}."
    return Finding("warning", part, message, way.install)


def _loss_is_not_compiled(env: Environment) -> Iterator[Finding]:
    if env.said("pskd", "") == "not compiled":
        message = (
            "The loss was not compiled when pskd was installed, and runs on torch's operators: on "
            "a CPU slower and with the same results. A C++ compiler (g++, clang++) mends that."
        )
        yield Finding("note", "core", message, INSTALL_PSKD)


def _unsafe_load_is_forced(env: Environment) -> Iterator[Finding]:
    if env.variables.get(UNSAFE_LOAD, "").lower() in ("1", "y", "yes", "true"):
        message = (
            f"{UNSAFE_LOAD} is set, so torch.load runs whatever code a checkpoint holds; fairseq's "
            "checkpoints load without it where the command carries --user-dir with pskd_fairseq."
        )
        yield Finding("warning", "core", message, f"unset {UNSAFE_LOAD}")


def _pkg_resources_is_gone(env: Environment) -> Iterator[Finding]:
    fits = "setuptools" in env.versions and not env.from_("setuptools", 82)
    if "detectron2" in env.versions and not fits:
        message = (
            f"setuptools ({env.versions.get('setuptools', 'not installed')}) brings no "
            "pkg_resources, which detectron2.model_zoo imports; the rest of Detectron2 does "
            "without."
        )
        yield Finding("warning", "detection", message, INSTALL_SETUPTOOLS)


def _fairseq_checkpoints(env: Environment) -> Iterator[Finding]:
    if _installed(env, "fairseq") and env.from_("torch", 2, 6):
        path = env.said("pskd_fairseq", "translation/pskd_fairseq")
        message = (
            "From torch 2.6 on, torch.load refuses fairseq's checkpoints unless pskd_fairseq is "
            "loaded, which allow-lists what they hold; so every command that reads one (resumed "
            "fairseq-train, fairseq-generate, -interactive, -validate) must carry --user-dir."
        )
        yield Finding("note", "translation", message, f"fairseq-generate ... --user-dir {path}")


#: In the order of mending: what a later rule finds may be explained by an earlier one.
RULES: tuple[Callable[[Environment], Iterator[Finding]], ...] = (
    _unreadable_versions,
    _torch_is_too_old,
    _python_does_not_fit_fairseq,
    _fairseq_is_the_old_one,
    _config_packages_do_not_fit,
    _probes_did_not_finish,
    _steps_failed,
    _parts_are_absent,
    _loss_is_not_compiled,
    _unsafe_load_is_forced,
    _pkg_resources_is_gone,
    _fairseq_checkpoints,
)
