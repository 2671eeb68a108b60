"""Parallel text -> Moses tokens -> joint BPE -> fairseq binaries with one joined dictionary.

    python translation/prepare.py train.de.gz train.en.gz --source-lang de --target-lang en \\
        --valid val.de.gz val.en.gz --test test.de.gz test.en.gz --out data/de-en

A text is plain or .gz, UTF-8, one sentence a line; only a line feed (or CR LF) ends a line. The
folder that comes out is what fairseq-train reads, plus `bpe.codes`, the raw text of the held-out
parts under `raw/` (for scoring against text that nobody tokenised) and `prepare.json`, which
records how everything was made. All of it is written beside the folder first and moved into place
at the end, so an interrupted run leaves no half-made folder.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import logging
import signal
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from pskd_fairseq.preparation.binaries import SPECIALS, binarise, count_pieces, read_dictionary
from pskd_fairseq.preparation.folder import RECORD, check_out, list_files, staging, write_lines
from pskd_fairseq.preparation.job import HELD_OUT, Job, check_job, installed_versions
from pskd_fairseq.preparation.pieces import CODES, MOSES, SEPARATOR, segment
from pskd_fairseq.preparation.text import read_parts
from pskd_fairseq.programs import exit_status
from pskd_tools.files import write_json

logger = logging.getLogger("prepare")

PROGRAM = "prepare.py"


def prepare(job: Job) -> dict:
    """Prepare a fairseq data folder from parallel text.

    Args:
        job: what to prepare, from what, and where to.

    Returns:
        What `prepare.json` in the new folder holds.

    Raises:
        UserError: a text, an option or the output folder is at fault; nothing was written.
        ToolError: fairseq-preprocess or a worker failed; nothing was left behind.
        OSError: the disk is full, or the folder cannot be written.
    """
    check_job(job)
    check_out(job.out, job.overwrite)
    out = job.out.resolve()
    parts, notes = read_parts(job)
    logger.info("read %s", ", ".join(f"{len(parts[part])} {part}" for part in parts) + " pairs")
    with staging(out) as folder:
        data, text = folder / "data", folder / "text"
        learned = segment(job, parts, text, data)
        logger.info("running fairseq-preprocess, log file: %s", out / "preprocess.log")
        binarise(job, text, data)
        known = read_dictionary(data / f"dict.{job.source_lang}.txt")
        for part, note in notes.items():
            note.update(count_pieces(text, part, job.languages, known))
        for part in HELD_OUT:
            for side, language in enumerate(job.languages):
                sentences = [pair[side] for pair in parts[part]]
                write_lines(data / "raw" / f"{part}.{language}", sentences)
        record = describe(job, notes, learned, len(known) + SPECIALS)
        record["files"] = [*list_files(data), RECORD]
        write_json(data / RECORD, record, indent=2)
    logger.info(
        "wrote %s: %s pairs, dictionary of %d",
        out,
        ", ".join(f"{notes[part]['pairs']} {part}" for part in notes),
        record["dictionary_size"],
    )
    return record


def describe(job: Job, notes: dict[str, dict], merges_learned: int, dictionary_size: int) -> dict:
    """Return how a folder was made, and what is in its parts."""
    texts = {"train": job.texts, **{part: job.given(part) or () for part in HELD_OUT}}
    return {
        "source_lang": job.source_lang,
        "target_lang": job.target_lang,
        "lowercase": job.lowercase,
        "tokenizer": {"name": "moses", **MOSES},
        "bpe": {
            "name": "subword_nmt",
            "separator": SEPARATOR,
            "codes": CODES,
            "merges_asked": job.bpe_size,
            "merges_learned": merges_learned,
        },
        "seed": job.seed,
        "max_train": job.max_train,
        "dictionary_size": dictionary_size,
        "parts": notes,
        "inputs": [
            {"part": part, "path": str(path), "sha256": _sha256(path)}
            for part, paths in texts.items()
            for path in paths
        ],
        "versions": installed_versions(),
    }


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def build_parser() -> argparse.ArgumentParser:
    """Return the command line, whose options are the fields of `Job`."""
    parser = argparse.ArgumentParser(
        prog=PROGRAM,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Turn parallel text into a fairseq data folder: Moses tokens, joint BPE, one "
        "joined dictionary.",
        epilog="""\
To translate raw text with a model trained on the folder, give fairseq the same steps:

  fairseq-interactive DIR --source-lang SRC --target-lang TGT --path checkpoint_best.pt \\
      --tokenizer moses --bpe subword_nmt --bpe-codes DIR/bpe.codes

It then prints detokenised text on its D- lines. With --lowercase here, lower-case the text that
you feed to it yourself: fairseq-interactive does not.""",
    )
    parser.add_argument(
        "texts",
        nargs="*",
        type=Path,
        metavar="SRC_TEXT TGT_TEXT",
        help="training text, plain or .gz, UTF-8, a sentence a line; several pairs "
        "are joined; pairs with an empty side are dropped with a warning",
    )
    parser.add_argument("--source-lang", required=True, metavar="CODE", help="such as de")
    parser.add_argument("--target-lang", required=True, metavar="CODE", help="such as en")
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="folder to make")
    for part, drawn in (
        (
            "valid",
            "drawn from the training text, which then keeps none of its source sentences",
        ),
        ("test", "drawn likewise"),
    ):
        parser.add_argument(
            f"--{part}",
            nargs=2,
            type=Path,
            metavar=("SRC_TEXT", "TGT_TEXT"),
            help=f"raw {part} text; else {drawn}",
        )
    numbers = {
        "valid-size": "valid pairs to draw (default: 5 %% of the text, at most 1000)",
        "test-size": "test pairs to draw (default: 5 %% of the text, at most 1000)",
        "seed": "of the drawing (default: %(default)s)",
        "bpe-size": "joint BPE merges, learned on the training part only (default: %(default)s)",
        "max-train": "train on the first N pairs of the text only; they are counted after the "
        "held-out parts are drawn, so these are the same for every N",
        "workers": "processes (default: %(default)s)",
    }
    for name, told in numbers.items():
        default = getattr(Job, name.replace("-", "_"))
        parser.add_argument(f"--{name}", type=int, default=default, metavar="N", help=told)
    parser.add_argument(
        "--lowercase",
        action="store_true",
        help="lower-case the text before the tokeniser; raw/ keeps its case",
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="replace a folder that this program made"
    )
    return parser


@contextlib.contextmanager
def unwinding_on_sigterm() -> Iterator[None]:
    """Let a polite kill clean up like an exception."""
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status, as `exit_status` does."""
    job = Job(**vars(build_parser().parse_args(argv)))
    try:
        with unwinding_on_sigterm():
            return exit_status(PROGRAM, lambda: prepare(job))
    except KeyboardInterrupt:
        print(f"{PROGRAM}: interrupted, nothing was written", file=sys.stderr)
        return 128 + signal.SIGINT


if __name__ == "__main__":
    sys.exit(main())
