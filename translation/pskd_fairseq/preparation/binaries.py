"""Pieces -> fairseq binaries with one joined dictionary, and what is in them."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterable
from pathlib import Path

from pskd_fairseq.preparation.job import Job
from pskd_fairseq.programs import ToolError

# <s> <pad> </s> <unk>: in the dictionary, but not in dict.*.txt
SPECIALS = 4


def binarise(job: Job, text: Path, data: Path) -> None:
    """Turn the pieces under `text` into fairseq binaries and one joined dictionary in `data`."""
    from fairseq import options
    from fairseq_cli import preprocess  # type: ignore[import-untyped]

    flags = ["--joined-dictionary", "--workers", str(job.workers)]
    flags += ["--source-lang", job.source_lang, "--target-lang", job.target_lang]
    # Relative paths: fairseq splits --validpref at commas, and the log shows no temporary folder.
    flags += ["--trainpref", "train", "--validpref", "valid", "--testpref", "test"]
    flags += ["--destdir", os.path.relpath(data, text)]
    log = logging.getLogger(preprocess.__name__)
    log.propagate = False  # it has a file of its own
    try:
        with contextlib.chdir(text):
            preprocess.main(options.get_preprocessing_parser().parse_args(flags))
    except OSError:
        raise
    except Exception as error:
        raise ToolError(f"fairseq-preprocess failed: {type(error).__name__}: {error}") from error
    finally:
        log.handlers.clear()


def read_dictionary(path: Path) -> set[str]:
    """Return the pieces listed in a fairseq dictionary file."""
    with path.open(encoding="utf-8") as stream:
        return {line.rsplit(" ", 1)[0] for line in stream}


def count_pieces(text: Path, part: str, languages: Iterable[str], known: set[str]) -> dict:
    """Count pairs, pieces and pieces unknown to the dictionary, without ends of sentences."""
    counts: dict = {"pairs": 0, "pieces": {}, "unknown": {}}
    for language in languages:
        lines = (text / f"{part}.{language}").read_text(encoding="utf-8").split("\n")[:-1]
        pieces = [piece for line in lines for piece in line.split(" ")]
        counts["pairs"] = len(lines)
        counts["pieces"][language] = len(pieces)
        counts["unknown"][language] = sum(piece not in known for piece in pieces)
    return counts
