"""Pieces -> fairseq binaries with one joined dictionary, and what is in them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from pskd_fairseq.preparation.job import Job
from pskd_fairseq.programs import ToolError

# <s> <pad> </s> <unk>: in the dictionary, but not in dict.*.txt
SPECIALS = 4


def run_quietly(command: Sequence[str], cwd: Path) -> None:
    """Run a command to its end; if we are stopped meanwhile, it and its children are too."""
    with subprocess.Popen(
        command,
        cwd=cwd,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    ) as process:
        try:
            output, _ = process.communicate()
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            raise
    if process.returncode:
        last = "\n".join(output.strip().splitlines()[-5:])
        raise ToolError(f"{command[2]} failed with exit status {process.returncode}:\n{last}")


def binarise(job: Job, text: Path, data: Path) -> None:
    """Turn the pieces under `text` into fairseq binaries and one joined dictionary in `data`."""
    command = [sys.executable, "-m", "fairseq_cli.preprocess", "--joined-dictionary"]
    command += ["--source-lang", job.source_lang, "--target-lang", job.target_lang]
    # Relative paths: fairseq splits --validpref at commas, and the log shows no temporary folder.
    command += ["--trainpref", "train", "--validpref", "valid", "--testpref", "test"]
    command += ["--destdir", os.path.relpath(data, text), "--workers", str(job.workers)]
    run_quietly(command, cwd=text)


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
