"""What is to be prepared, and what of it can be refused before a text is read."""

from __future__ import annotations

import importlib.metadata
import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from pskd_fairseq.programs import UserError

HELD_OUT = ("valid", "test")


@dataclass(frozen=True)
class Job:
    """What to prepare, from what, and where to; ``prepare.py --help`` explains each field.

    ``texts`` holds training texts, source and target in turn; of ``valid`` and ``test`` None means
    that they are drawn from these.
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
        """Return the texts that the user gave for `valid` or `test`, or None."""
        return getattr(self, part)


def check_job(job: Job) -> None:
    """Refuse what can be refused before a text is read."""
    if not job.texts or len(job.texts) % 2:
        raise UserError(
            f"texts come in pairs SRC_TEXT TGT_TEXT, but {len(job.texts)} "
            f"{'was' if len(job.texts) == 1 else 'were'} given"
        )
    for language in job.languages:
        if not re.fullmatch(r"[A-Za-z0-9_]+", language):
            raise UserError(
                f"language code {language!r} must be letters, digits and _ only: "
                "fairseq builds file names from it"
            )
    if job.source_lang == job.target_lang:
        raise UserError(f"source and target language are both {job.source_lang!r}")
    for option in ("bpe_size", "workers", "max_train", "valid_size", "test_size"):
        value = getattr(job, option)
        if value is not None and value < 1:
            raise UserError(f"--{option.replace('_', '-')} must be at least 1, not {value}")
    for part in HELD_OUT:
        if job.given(part) and getattr(job, f"{part}_size") is not None:
            raise UserError(f"--{part}-size has no meaning beside --{part}")


def installed_versions() -> dict[str, str]:
    """Return the versions of the packages that made the data, by distribution name."""
    versions = {}
    for package in ("sacremoses", "subword-nmt", "fairseq-fixed", "fairseq"):
        with suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return versions
