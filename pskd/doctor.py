"""What `pskd doctor` knows: what is installed, what really loads, what does not fit together.

Gathering and judging are apart. `gather` reads versions through `importlib.metadata` and tries each
part in a Python process of its own, since importing a framework takes seconds and can crash the
interpreter; `diagnose` is a pure function from that `Environment` to a `Report`.

A part is *present* where its framework and pskd's adapter for it are both found; for detection,
Detectron2 or torchvision is enough.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from importlib import metadata
from types import MappingProxyType
from typing import IO

__all__ = [
    "PACKAGES",
    "PARTS",
    "Attempt",
    "Environment",
    "Finding",
    "Probe",
    "Report",
    "diagnose",
    "gather",
    "release",
]

PARTS = ("core", "translation", "detection", "plots")
SEVERITIES = ("error", "warning", "note")
UNSAFE_LOAD = "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"

#: Distribution -> what needs it, in the order of the table.
PACKAGES: Mapping[str, str] = MappingProxyType(
    {
        "pskd": "every part",
        "torch": "core",
        "numpy": "core",
        "fairseq-fixed": "translation",
        "fairseq": "translation (fairseq-fixed replaces it)",
        "torchaudio": "translation (fairseq-fixed's metadata only)",
        "sacrebleu": "translation",
        "sacremoses": "translation",
        "subword-nmt": "translation",
        "hydra-core": "translation, detection",
        "omegaconf": "translation, detection",
        "torchvision": "detection",
        "detectron2": "detection",
        "pycocotools": "detection (COCO data and evaluation)",
        "setuptools": "detection (pkg_resources)",
        "matplotlib": "plots",
    }
)

_BUILD_TOOLS = "pip install torch numpy cython 'setuptools<82' wheel"
_FAIRSEQ = f"{_BUILD_TOOLS} && pip install --no-build-isolation fairseq-fixed==0.12.3.1"
# Uninstalled first and not forced: a forced installation would replace torch and numpy, too.
# No cache where a build is at fault, since pip keeps the wheel that it once built.
_REBUILD_FAIRSEQ = "pip uninstall -y fairseq-fixed && " + _FAIRSEQ.replace(
    "--no-build-isolation", "--no-build-isolation --no-cache-dir"
)
_REPLACE_FAIRSEQ = f"pip uninstall -y fairseq fairseq-fixed && {_FAIRSEQ}"
_DETECTRON2 = (
    "pip install --no-build-isolation 'git+https://github.com/facebookresearch/detectron2.git'"
)
_REBUILD_DETECTRON2 = "pip uninstall -y detectron2 && " + _DETECTRON2.replace(
    "--no-build-isolation", "--no-build-isolation --no-cache-dir"
)
_TORCH_PAIR = "pip uninstall -y torch torchvision && pip install torch torchvision"
_CONFIG_PAIR = "pip install 'hydra-core==1.3.2' 'omegaconf==2.3.0'"
_SETUPTOOLS = "pip install 'setuptools<82'"
_PSKD = "pip install --no-deps --force-reinstall .  # in a checkout of pskd"

# Modules that frameworks import -> what brings them. A list, since advice to install whatever name
# an error mentions could name a stranger's package.
_SAME_NAME = (
    "bitarray cffi cloudpickle fvcore iopath matplotlib pycocotools regex tabulate termcolor "
    "torchaudio torchvision tqdm yacs"
)
_DEPENDENCIES: Mapping[str, str] = MappingProxyType(
    {name: f"pip install {name}" for name in _SAME_NAME.split()}
    | {
        "PIL": "pip install pillow",
        "cv2": "pip install opencv-python",
        "hydra": _CONFIG_PAIR,
        "omegaconf": _CONFIG_PAIR,
        "pkg_resources": _SETUPTOOLS,
        "sklearn": "pip install scikit-learn",
        "yaml": "pip install PyYAML",
    }
)


# -- What is known about an environment ------------------------------------------------------------


@dataclass(frozen=True)
class Attempt:
    """One thing that was tried: whether it worked, and what it said or how it failed."""

    ok: bool
    detail: str = ""


@dataclass(frozen=True)
class Probe:
    """What one part's process tried; ``failure`` is set where the process itself did not finish."""

    attempts: Mapping[str, Attempt]
    failure: str = ""


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

    def worked(self, name: str) -> bool:
        """Return whether an attempt was made and succeeded."""
        attempt = self.attempt(name)
        return attempt is not None and attempt.ok

    def lacks(self, module: str) -> bool:
        """Return whether trying ``module`` failed because there is no such module."""
        attempt = self.attempt(module)
        return attempt is not None and not attempt.ok and attempt.detail == _no_module(module)

    def below(self, package: str, *bound: int) -> bool:
        """Return whether ``package`` is installed in a release before ``bound``."""
        installed = _release_or_none(self.versions.get(package))
        return installed is not None and installed < bound

    def from_(self, package: str, *bound: int) -> bool:
        """Return whether ``package`` is installed in release ``bound`` or later."""
        installed = _release_or_none(self.versions.get(package))
        return installed is not None and installed >= bound


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
        parts: part -> "works", "broken" or "absent".
        findings: errors first, then warnings, then notes.
    """

    environment: Environment
    parts: Mapping[str, str]
    findings: tuple[Finding, ...]

    @property
    def ok(self) -> bool:
        """Whether no error was found: the core, every present part and every asked part work."""
        return all(finding.severity != "error" for finding in self.findings)

    def as_dict(self) -> dict:
        """Return the report as plain JSON types."""
        env = self.environment
        packages = {
            name: {"version": env.versions.get(name), "needed_by": needed_by}
            for name, needed_by in PACKAGES.items()
        }
        return {
            "ok": self.ok,
            "python": ".".join(map(str, env.python)),
            "torch_build": torch_build(env),
            "packages": packages,
            "parts": dict(self.parts),
            "findings": [asdict(finding) for finding in self.findings],
            "probes": {part: asdict(probe) for part, probe in env.probes.items()},
        }


def torch_build(env: Environment) -> str:
    """Return which CUDA torch was built for and whether a device is there, or "unknown"."""
    attempt = env.attempt("torch")
    return attempt.detail if attempt is not None and attempt.ok else "unknown"


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


def _release_or_none(version: str | None) -> tuple[int, ...] | None:
    # An unreadable version is no reason to stop: `_unreadable_versions` reports it.
    try:
        return None if version is None else release(version)
    except ValueError:
        return None


# -- What is tried, each part in a process of its own ----------------------------------------------


@dataclass(frozen=True)
class _Step:
    """Code that is run, and what its failure means.

    ``framework`` is the module without which the step is moot (its absence is judged elsewhere);
    ``needs`` is a step whose failure explains this one's. ``problem`` may name any package of
    `PACKAGES` (with underscores) for its version, and ``error``.
    """

    code: str
    problem: str
    mend: str
    framework: str = ""
    needs: str = ""


_TRY_TORCH = """
import torch
cuda = torch.version.cuda or torch.version.hip
value = f"built for CUDA {cuda}" if cuda else "built without CUDA"
if torch.cuda.is_available():
    value += f", {torch.cuda.device_count()} device(s), first: {torch.cuda.get_device_name(0)}"
elif cuda:
    value += ", no device available"
"""

_TRY_NUMPY = """
import numpy, torch
if not numpy.array_equal(torch.arange(3).numpy(), torch.from_numpy(numpy.arange(3)).numpy()):
    raise RuntimeError("torch and numpy read different numbers from the same memory")
"""

_TRY_PSKD = """
import torch, pskd
logits = torch.tensor([[0.5, -0.5, 0.0]], requires_grad=True)
teacher_probs = torch.tensor([[0.6, 0.3, 0.1]])
loss = pskd.pskd_cross_entropy(logits, torch.tensor([0]), teacher_probs, 0.5)
loss.backward()
expected = logits.detach().softmax(1) - torch.tensor([[0.8, 0.15, 0.05]])
if not torch.allclose(logits.grad, expected, atol=1e-6):
    raise ArithmeticError(f"gradient {logits.grad.tolist()}, expected {expected.tolist()}")
"""

_TRY_PLUGIN = """
import argparse, importlib.util
spec = importlib.util.find_spec("pskd_fairseq")
if spec is None:
    raise ModuleNotFoundError("No module named 'pskd_fairseq'")
value = list(spec.submodule_search_locations)[0]
from fairseq import utils
from fairseq.criterions import CRITERION_REGISTRY
utils.import_user_module(argparse.Namespace(user_dir=value))
if "pskd" not in CRITERION_REGISTRY:
    raise LookupError("its import registers no criterion called pskd")
"""

_TRY_TORCHVISION = """
import torchvision, torch
boxes, scores = torch.tensor([[0.0, 0.0, 2.0, 2.0], [0.0, 0.0, 2.0, 1.9]]), torch.tensor([0.9, 0.8])
if torchvision.ops.nms(boxes, scores, 0.5).tolist() != [0]:
    raise RuntimeError("nms kept a box that it should have dropped")
torchvision.ops.roi_align(torch.zeros(1, 1, 4, 4), [boxes], output_size=2)
import torchvision.models.detection
"""

_TRY_PYCOCOTOOLS = """
import pycocotools.mask, numpy
mask = numpy.asfortranarray(numpy.eye(3, dtype=numpy.uint8))
if int(pycocotools.mask.area(pycocotools.mask.encode(mask))) != 3:
    raise RuntimeError("a mask of 3 pixels was measured wrongly")
"""

_TRY_PLOT = """
import io
from matplotlib.figure import Figure
Figure().savefig(io.BytesIO(), format="png")
"""


def _needs_fairseq(code: str, problem: str, mend: str) -> _Step:
    return _Step(code, problem, mend, framework="fairseq", needs="fairseq")


def _translation_tool(module: str, package: str) -> _Step:
    # Their failures are their own, also where fairseq itself does not load.
    problem = f"{package} does not load: {{error}}"
    return _Step(f"import {module}", problem, f"pip install {package}", framework="fairseq")


#: Part -> name -> step, in the order of trying. A step that tries a module is called like it.
STEPS: Mapping[str, Mapping[str, _Step]] = MappingProxyType(
    {
        "core": {
            "torch": _Step(
                _TRY_TORCH, "torch does not load: {error}", "pip install --force-reinstall torch"
            ),
            "numpy": _Step(
                _TRY_NUMPY,
                "numpy {numpy} does not work with torch {torch} (numpy 2 needs torch 2.3): {error}",
                "pip install --upgrade torch numpy",
                needs="torch",
            ),
            "pskd": _Step(
                _TRY_PSKD, "one step of pskd_cross_entropy fails: {error}", _PSKD, needs="torch"
            ),
        },
        "translation": {
            "fairseq": _Step(
                "import fairseq",
                "fairseq does not load: {error}",
                _REBUILD_FAIRSEQ,
                framework="fairseq",
            ),
            "fairseq.data.data_utils_fast": _needs_fairseq(
                "import fairseq.data.data_utils_fast, fairseq.data.token_block_utils_fast",
                "fairseq's compiled batching does not load, as in a build without Cython or in "
                "fairseq's source folder: {error}",
                _REBUILD_FAIRSEQ,
            ),
            "fairseq.libbleu": _needs_fairseq(
                "import fairseq.libbleu",
                "fairseq's compiled BLEU does not load, as in a build without a C++ compiler or in "
                "fairseq's source folder: {error}",
                _REBUILD_FAIRSEQ,
            ),
            "fairseq_cli.train": _needs_fairseq(
                "import fairseq_cli.train", "fairseq-train does not load: {error}", _REBUILD_FAIRSEQ
            ),
            "sacrebleu": _translation_tool("sacrebleu", "sacrebleu"),
            "sacremoses": _translation_tool("sacremoses", "sacremoses"),
            "subword_nmt": _translation_tool("subword_nmt.apply_bpe", "subword-nmt"),
            "pskd_fairseq": _needs_fairseq(
                _TRY_PLUGIN, "fairseq cannot load pskd_fairseq: {error}", _PSKD
            ),
        },
        "detection": {
            "torchvision": _Step(
                _TRY_TORCHVISION,
                "torchvision {torchvision} does not load beside torch {torch} ({build}); the two "
                "must be of one release and both CPU-only or both for CUDA: {error}",
                _TORCH_PAIR,
                framework="torchvision",
            ),
            "pycocotools": _Step(
                _TRY_PYCOCOTOOLS,
                "pycocotools {pycocotools} does not work beside numpy {numpy} (wheels before 2.0.8 "
                "were built for numpy 1): {error}",
                "pip install --no-cache-dir --no-deps --force-reinstall 'pycocotools>=2.0.8'",
                framework="pycocotools",
            ),
            "detectron2": _Step(
                "import detectron2, detectron2.engine",
                "Detectron2 does not load: {error}",
                _REBUILD_DETECTRON2,
                framework="detectron2",
                needs="torchvision",
            ),
            "detectron2._C": _Step(
                "import torch, detectron2._C",
                "Detectron2's compiled operators do not load, as in its source folder or after "
                "torch was replaced: {error}",
                _REBUILD_DETECTRON2,
                framework="detectron2",
                needs="detectron2",
            ),
            "pskd_torchvision": _Step(
                "import pskd_torchvision",
                "pskd_torchvision does not load: {error}",
                _PSKD,
                framework="torchvision",
                needs="torchvision",
            ),
            "pskd_detectron2": _Step(
                "import pskd_detectron2",
                "pskd_detectron2 does not load: {error}",
                _PSKD,
                framework="detectron2",
                needs="detectron2",
            ),
        },
        "plots": {
            "matplotlib": _Step(
                _TRY_PLOT,
                "matplotlib {matplotlib} cannot draw: {error}",
                "pip install --force-reinstall matplotlib",
                framework="matplotlib",
            ),
            "pskd.plots": _Step(
                "import pskd.plots",
                "pskd.plots does not load: {error}",
                _PSKD,
                framework="matplotlib",
                needs="matplotlib",
            ),
        },
    }
)


@dataclass(frozen=True)
class _Way:
    """A framework that a part can stand on, with pskd's adapter for it."""

    framework: str
    packages: tuple[str, ...]
    adapter: str
    install: str


_WAYS: Mapping[str, tuple[_Way, ...]] = MappingProxyType(
    {
        "core": (),
        "translation": (
            _Way(
                "fairseq",
                ("fairseq-fixed", "fairseq"),
                "pskd_fairseq",
                f"{_FAIRSEQ} && pip install sacrebleu sacremoses subword-nmt",
            ),
        ),
        "detection": (
            _Way("detectron2", ("detectron2",), "pskd_detectron2", _DETECTRON2),
            _Way("torchvision", ("torchvision",), "pskd_torchvision", "pip install torchvision"),
        ),
        "plots": (_Way("matplotlib", ("matplotlib",), "pskd.plots", "pip install matplotlib"),),
    }
)


def _no_module(name: str) -> str:
    return f"ModuleNotFoundError: No module named '{name}'"


def _installed(env: Environment, module: str) -> bool:
    """Whether a module is there or its distribution claims that it is."""
    ways = [way for ways in _WAYS.values() for way in ways if way.framework == module]
    packages = [package for way in ways for package in way.packages] or [module]
    return any(package in env.versions for package in packages) or not env.lacks(module)


def _present(env: Environment, part: str) -> bool:
    ways = _WAYS[part]
    return not ways or any(_installed(env, w.framework) and not env.lacks(w.adapter) for w in ways)


# -- Rules: each a pure function from an environment to findings -----------------------------------


def _torch_is_too_old(env: Environment) -> list[Finding]:
    if not env.below("torch", 2, 1):
        return []
    message = f"torch {env.versions['torch']} is older than 2.1, the first that pskd supports."
    return [Finding("error", "core", message, "pip install --upgrade 'torch>=2.1'")]


def _unsafe_load_is_forced(env: Environment) -> list[Finding]:
    if env.variables.get(UNSAFE_LOAD, "").lower() not in ("1", "y", "yes", "true"):
        return []
    message = (
        f"{UNSAFE_LOAD} is set, so torch.load runs whatever code a checkpoint holds; fairseq's "
        "checkpoints load without it where the command carries --user-dir with pskd_fairseq."
    )
    return [Finding("warning", "core", message, f"unset {UNSAFE_LOAD}")]


def _unreadable_versions(env: Environment) -> list[Finding]:
    return [
        Finding(
            "warning",
            "core",
            f"{name} is installed with the version {version!r}, which cannot be compared.",
            f"pip install --force-reinstall {name}",
        )
        for name, version in env.versions.items()
        if _release_or_none(version) is None
    ]


def _python_does_not_fit_fairseq(env: Environment) -> list[Finding]:
    wanted = _installed(env, "fairseq") or "translation" in env.asked
    if not wanted or (3, 11) <= env.python[:2] <= (3, 12):
        return []
    message = (
        f"Python {'.'.join(map(str, env.python))} is not one of those that fairseq-fixed is made "
        "for, 3.11 and 3.12."
    )
    severity = "warning" if env.worked("fairseq") else "error"
    return [Finding(severity, "translation", message, "python3.12 -m venv .venv")]


def _fairseq_is_the_old_one(env: Environment) -> list[Finding]:
    if "fairseq" not in env.versions:
        return []
    version = env.versions["fairseq"]
    if "fairseq-fixed" in env.versions:
        message = f"fairseq {version} and fairseq-fixed are both installed and share their files."
    elif env.python >= (3, 11) and not env.from_("fairseq", 0, 12, 3):
        message = (
            f"fairseq {version} does not run on Python 3.11 and later (mutable dataclass "
            "defaults); fairseq-fixed does."
        )
    else:
        return []
    return [Finding("error", "translation", message, _REPLACE_FAIRSEQ)]


def _config_packages_do_not_fit(env: Environment) -> list[Finding]:
    old = [
        f"{name} {env.versions[name]} is older than {'.'.join(map(str, bound))}"
        for name, bound in {"hydra-core": (1, 1), "omegaconf": (2, 1)}.items()
        if env.below(name, *bound)
    ]
    found = []
    for package, part in {"fairseq-fixed": "translation", "detectron2": "detection"}.items():
        if package not in env.versions:
            continue
        if old:
            message = f"{' and '.join(old)}, which {package} needs at least."
            found.append(Finding("error", part, message, _CONFIG_PAIR))
        elif env.from_("omegaconf", 2, 4):
            version = env.versions["omegaconf"]
            message = f"omegaconf {version} is newer than what {package} allows, below 2.4."
            found.append(Finding("warning", part, message, _CONFIG_PAIR))
    return found


def _pkg_resources_is_gone(env: Environment) -> list[Finding]:
    fits = "setuptools" in env.versions and not env.from_("setuptools", 82)
    if "detectron2" not in env.versions or fits:
        return []
    message = (
        f"setuptools ({env.versions.get('setuptools', 'not installed')}) brings no pkg_resources, "
        "which detectron2.model_zoo imports; the rest of Detectron2 does without."
    )
    return [Finding("warning", "detection", message, _SETUPTOOLS)]


def _fairseq_checkpoints(env: Environment) -> list[Finding]:
    if not _installed(env, "fairseq") or not env.from_("torch", 2, 6):
        return []
    plugin = env.attempt("pskd_fairseq")
    path = plugin.detail if plugin is not None and plugin.ok else "translation/pskd_fairseq"
    message = (
        "From torch 2.6 on, torch.load refuses fairseq's checkpoints unless pskd_fairseq is "
        "loaded, which allow-lists what they hold; so every command that reads one (resumed "
        "fairseq-train, fairseq-generate, -interactive, -validate) must carry --user-dir."
    )
    return [Finding("note", "translation", message, f"fairseq-generate ... --user-dir {path}")]


def _probes_did_not_finish(env: Environment) -> list[Finding]:
    return [
        Finding(
            "error", part, f"Trying this part {probe.failure}.", f"pskd doctor {part} --timeout 600"
        )
        for part, probe in env.probes.items()
        if probe.failure
    ]


def _steps_failed(env: Environment) -> list[Finding]:
    found = []
    for part, probe in env.probes.items():
        for name, attempt in probe.attempts.items():
            step = STEPS[part][name]
            explained = bool(step.needs) and _counts_as_failure(env, part, step.needs)
            if _counts_as_failure(env, part, name) and not explained:
                message = step.problem.format(error=attempt.detail, **_versions_by_name(env))
                found.append(Finding("error", part, message, _mend(step, attempt.detail)))
    return found


def _counts_as_failure(env: Environment, part: str, name: str) -> bool:
    """Whether a step failed, and not for want of a framework or adapter that may be absent."""
    attempt, framework = env.attempt(name), STEPS[part][name].framework
    if attempt is None or attempt.ok or _is_absent(env, name):
        return False
    return not framework or _installed(env, framework)


def _mend(step: _Step, error: str) -> str:
    missing = re.search(r"No module named '(\w+)", error)
    if missing is None or missing.group(1) == step.framework:
        return step.mend
    return _DEPENDENCIES.get(missing.group(1), step.mend)


def _is_absent(env: Environment, name: str) -> bool:
    adapters = [way.adapter for ways in _WAYS.values() for way in ways]
    return name in adapters and env.lacks(name)


def _versions_by_name(env: Environment) -> dict[str, str]:
    versions = {n.replace("-", "_"): env.versions.get(n, "(not installed)") for n in PACKAGES}
    return versions | {"build": torch_build(env)}


def _parts_are_absent(env: Environment) -> list[Finding]:
    found = []
    for part in env.probes:
        severity = "error" if part in env.asked and not _present(env, part) else "note"
        for way in _WAYS[part]:
            if way.framework == "detectron2" and not _installed(env, "detectron2"):
                found.append(_detectron2_is_absent(env))
            elif not _installed(env, way.framework):
                found.append(
                    Finding(severity, part, f"{way.packages[0]} is not installed.", way.install)
                )
            elif env.lacks(way.adapter):
                message = (
                    f"{way.framework} is there, but this installation of pskd has no {way.adapter}."
                )
                worse = "warning" if severity == "note" else severity
                found.append(Finding(worse, part, message, _PSKD))
    return found


def _detectron2_is_absent(env: Environment) -> Finding:
    if env.worked("torchvision") and env.worked("pskd_torchvision"):
        other = "works"
    else:
        other = "does not work either" if _present(env, "detection") else "is not there either"
    message = f"Detectron2 is absent; the torchvision adapter {other}."
    return Finding("warning", "detection", message, _DETECTRON2)


#: In the order of mending: what a later rule finds may be explained by an earlier one.
RULES: tuple[Callable[[Environment], list[Finding]], ...] = (
    _unreadable_versions,
    _torch_is_too_old,
    _python_does_not_fit_fairseq,
    _fairseq_is_the_old_one,
    _config_packages_do_not_fit,
    _probes_did_not_finish,
    _steps_failed,
    _parts_are_absent,
    _unsafe_load_is_forced,
    _pkg_resources_is_gone,
    _fairseq_checkpoints,
)


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
    found = [_softened(f) if f.part in absent - env.asked else f for f in found]
    found.sort(key=lambda finding: SEVERITIES.index(finding.severity))
    broken = {finding.part for finding in found if finding.severity == "error"} - absent
    states = dict.fromkeys(env.probes, "works")
    states |= dict.fromkeys(broken, "broken") | dict.fromkeys(absent, "absent")
    return Report(env, states, tuple(found))


def _softened(finding: Finding) -> Finding:
    return replace(finding, severity="warning") if finding.severity == "error" else finding


# -- Gathering -------------------------------------------------------------------------------------

# What a framework prints while it is imported goes to stderr, so that stdout carries the reports.
_RUNNER = """
import json, os, sys
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

_LONGEST_ERROR = 400


@dataclass(frozen=True)
class _Running:
    process: subprocess.Popen
    stdout: IO[bytes]
    stderr: IO[bytes]


def _start(steps: Mapping[str, str], stack: ExitStack) -> _Running:
    # Files and not pipes: whatever a killed probe leaves running could hold a pipe open for ever.
    stdout = stack.enter_context(tempfile.TemporaryFile())
    stderr = stack.enter_context(tempfile.TemporaryFile())
    command = [sys.executable, "-c", _RUNNER, json.dumps(list(steps.items()))]
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=stdout, stderr=stderr)
    stack.callback(process.wait)
    stack.callback(process.kill)
    return _Running(process, stdout, stderr)


def _text(file: IO[bytes]) -> str:
    file.seek(0)
    return file.read().decode("utf-8", "replace")


def _one_line(text: str) -> str:
    line = " ".join(text.split())
    half = _LONGEST_ERROR // 2
    return line if len(line) <= _LONGEST_ERROR else f"{line[:half]} ... {line[-half:]}"


def _finish(running: _Running, seconds: float, timeout: float) -> Probe:
    """Wait for a probe and read what it reported."""
    try:
        ended = _describe_end(running.process.wait(max(seconds, 0.0)))
    except subprocess.TimeoutExpired:
        running.process.kill()
        running.process.wait()
        ended = f"did not end within {timeout:g} seconds"
    attempts, current = _read_reports(_text(running.stdout))
    if not ended:
        return Probe(attempts)
    where = f" (while trying {current})" if current else ""
    last = _text(running.stderr).strip().splitlines()[-1:]
    return Probe(attempts, _one_line(f"{ended}{where}{': ' if last else ''}{''.join(last)}"))


def _describe_end(status: int) -> str:
    if status == 0:
        return ""
    if status > 0:
        return f"ended with status {status}"
    known = {int(number): number.name for number in signal.Signals}
    return f"was ended by {known.get(-status, f'signal {-status}')}"


def _read_reports(text: str) -> tuple[dict[str, Attempt], str]:
    """Return the attempts that were finished, and the name of the one that was not, if any."""
    attempts, current = {}, ""
    for line in text.split("\n")[:-1]:  # after the last newline: a line that was cut off
        name, state, detail = json.loads(line)
        current = name if state == "started" else ""
        if not current:
            attempts[name] = Attempt(state == "ok", _one_line(detail))
    return attempts, current


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
        return {
            part: _finish(probe, deadline - time.monotonic(), timeout)
            for part, probe in running.items()
        }


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


def gather(asked: Iterable[str] = (), *, timeout: float = 120.0) -> Environment:
    """Look at the running interpreter's environment.

    Args:
        asked: the parts of `PARTS` to try, and the core, on which they stand; none: every part.
        timeout: seconds for all the trying together.

    Returns:
        What there is. The processes start in the current directory, which is importable in them.

    Raises:
        ValueError: if a part is not one of `PARTS`.
    """
    named = frozenset(asked)
    unknown = sorted(named.difference(PARTS))
    if unknown:
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
