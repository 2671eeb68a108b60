"""What is known about an environment, and the report that is made of it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

PARTS = ("core", "translation", "detection", "classification", "integrations", "plots")
SEVERITIES = ("error", "warning", "note")
UNSAFE_LOAD = "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"

#: Distribution -> what needs it, in the order of the table.
PACKAGES: Mapping[str, str] = {
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
    "torchvision": "detection, classification",
    "detectron2": "detection",
    "pycocotools": "detection (COCO data and evaluation)",
    "setuptools": "detection (pkg_resources)",
    "scikit-learn": "classification",
    "pyyaml": "classification",
    "tqdm": "classification",
    "tensorboard": "classification, detection",
    "lightning": "integrations",
    "transformers": "integrations",
    "accelerate": "integrations (transformers)",
    "matplotlib": "plots",
}


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

    def worked(self, name: str) -> bool:
        """Return whether an attempt was made and succeeded."""
        attempt = self.attempt(name)
        return attempt is not None and attempt.ok

    def said(self, name: str, default: str) -> str:
        """Return the detail of an attempt that succeeded, else ``default``."""
        attempt = self.attempt(name)
        return attempt.detail if attempt is not None and attempt.ok else default

    def lacks(self, module: str) -> bool:
        """Return whether trying ``module`` failed because there is no such module."""
        return self.attempt(module) == Attempt(
            False, f"ModuleNotFoundError: No module named '{module}'"
        )

    def below(self, package: str, *bound: int) -> bool:
        """Return whether ``package`` is installed in a release before ``bound``."""
        installed = self.release_of(package)
        return installed is not None and installed < bound

    def from_(self, package: str, *bound: int) -> bool:
        """Return whether ``package`` is installed in release ``bound`` or later."""
        installed = self.release_of(package)
        return installed is not None and installed >= bound

    def release_of(self, package: str) -> tuple[int, ...] | None:
        """Return the release of ``package``; None where it is not installed or is unreadable."""
        try:
            return release(self.versions[package])
        except (KeyError, ValueError):
            return None

    @property
    def torch_build(self) -> str:
        """Which CUDA torch was built for and whether a device is there, or "unknown"."""
        return self.said("torch", "unknown")


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
                for name, needed_by in PACKAGES.items()
            },
            "parts": dict(self.parts),
            "findings": [asdict(finding) for finding in self.findings],
            "probes": {part: asdict(probe) for part, probe in env.probes.items()},
        }


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
