"""What is to be prepared, and what of it can be refused before a text is read."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

HELD_OUT = ("valid", "test")
PACKAGES = {
    "sacremoses": ("sacremoses",),
    "subword_nmt": ("subword-nmt",),
    "fairseq_cli": ("fairseq-fixed", "fairseq"),
}


class PrepareError(ValueError):
    """What the user gave cannot be prepared; the message names the file and the line."""


class ToolError(RuntimeError):
    """A process that we started failed; the message ends with what it said last."""


@dataclass(frozen=True)
class Job:
    """What to prepare, from what, and where to.

    Args:
        texts: training texts, source and target in turn.
        source_lang: language code of the source side, as Moses and the file names use it.
        target_lang: language code of the target side.
        out: the folder to make.
        valid: raw source and target text of the valid part; None draws it from the training text.
        test: likewise the test part.
        valid_size: sentence pairs to draw; None is 5 % of the text, at most 1000.
        test_size: likewise for the test part.
        seed: of the drawing.
        bpe_size: merges to learn, jointly over both languages.
        lowercase: lower-case the raw text before the tokeniser.
        max_train: keep only the first so many training pairs, after the held-out parts are drawn.
        workers: processes.
        overwrite: replace a folder that an earlier run made.
    """

    texts: Sequence[Path]
    source_lang: str
    target_lang: str
    out: Path
    valid: Sequence[Path] | None = None
    test: Sequence[Path] | None = None
    valid_size: int | None = None
    test_size: int | None = None
    seed: int = 1
    bpe_size: int = 6000
    lowercase: bool = False
    max_train: int | None = None
    workers: int = 1
    overwrite: bool = False

    @property
    def languages(self) -> tuple[str, str]:
        """Source and target language, in this order everywhere."""
        return self.source_lang, self.target_lang

    def given(self, part: str) -> Sequence[Path] | None:
        """The texts that the user gave for `valid` or `test`, or None."""
        return getattr(self, part)


def check_job(job: Job) -> None:
    """Refuse what can be refused before a text is read.

    Raises:
        PrepareError: an option or the installation does not fit.
    """
    if not job.texts or len(job.texts) % 2:
        raise PrepareError(
            f"texts come in pairs SRC_TEXT TGT_TEXT, but {len(job.texts)} "
            f"{'was' if len(job.texts) == 1 else 'were'} given"
        )
    for language in job.languages:
        if not re.fullmatch(r"[A-Za-z0-9_]+", language):
            raise PrepareError(
                f"language code {language!r} must be letters, digits and _ only: "
                "fairseq builds file names from it"
            )
    if job.source_lang == job.target_lang:
        raise PrepareError(f"source and target language are both {job.source_lang!r}")
    for option in ("bpe_size", "workers", "max_train", "valid_size", "test_size"):
        value = getattr(job, option)
        if value is not None and value < 1:
            raise PrepareError(f"--{option.replace('_', '-')} must be at least 1, not {value}")
    for part in HELD_OUT:
        if job.given(part) and getattr(job, f"{part}_size") is not None:
            raise PrepareError(f"--{part}-size has no meaning beside --{part}")
    for module, packages in PACKAGES.items():
        if importlib.util.find_spec(module) is None:
            raise PrepareError(
                f"the package {packages[0]} is not installed: "
                f"{sys.executable} -m pip install {packages[0]}"
            )


def installed_versions() -> dict[str, str]:
    """The versions of the packages that made the data, by distribution name."""
    versions = {}
    for package in sum(PACKAGES.values(), ()):
        with suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return versions
