#!/usr/bin/env python
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
import functools
import glob
import gzip
import hashlib
import importlib.metadata
import importlib.util
import io
import json
import logging
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

logger = logging.getLogger("prepare")

RECORD = "prepare.json"
CODES = "bpe.codes"
SEPARATOR = "@@"
HELD_OUT = ("valid", "test")
# What sacremoses is asked for, and what fairseq's moses tokenizer asks for by default.
MOSES = {"aggressive_dash_splits": True, "escape": True}
PACKAGES = {
    "sacremoses": ("sacremoses",),
    "subword_nmt": ("subword-nmt",),
    "fairseq_cli": ("fairseq-fixed", "fairseq"),
}
# Moses drops control characters, so a line of nothing else is an empty sentence too.
EMPTY = re.compile(r"[\s\x00-\x1f]*")
FAIRSEQ_SPECIALS = 4  # <s> <pad> </s> <unk>: in the dictionary, but not in dict.*.txt

Bitext = list[tuple[str, str]]


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


# ---- reading ------------------------------------------------------------------------------------


def decode_line(raw: bytes, path: Path, number: int, offset: int) -> str:
    """One line of a text file as a sentence.

    Args:
        raw: the bytes of the line, with its end.
        path, number, offset: file, line (from 1) and bytes before the line, for the error.

    Returns:
        The sentence without line end; carriage returns inside it become spaces, so that no
        reader of the output can take them for line ends.

    Raises:
        PrepareError: the bytes are not UTF-8.
    """
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise PrepareError(
            f"{path}:{number}: not UTF-8: byte 0x{raw[error.start]:02x} at byte offset "
            f"{error.start} of the line, {offset + error.start} of the (unpacked) file"
        ) from None
    if number == 1:
        text = text.removeprefix("\ufeff")
    return text.removesuffix("\n").removesuffix("\r").replace("\r", " ")


def read_lines(path: Path) -> list[str]:
    """The sentences of one text file, plain or .gz.

    Raises:
        PrepareError: the file is missing, empty, a damaged .gz or not UTF-8.
    """
    lines: list[str] = []
    offset = 0
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as stream:
            for number, raw in enumerate(stream, start=1):
                lines.append(decode_line(raw, path, number, offset))
                offset += len(raw)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise PrepareError(f"{path}:{len(lines) + 1}: damaged .gz: {error}") from None
    except OSError as error:
        raise PrepareError(f"{path}: {error.strerror or error}") from None
    if not lines:
        raise PrepareError(f"{path}: empty file")
    return lines


def read_bitext(source: Path, target: Path, *, drop_empty: bool) -> tuple[Bitext, int]:
    """The sentence pairs of two aligned text files.

    Args:
        source, target: the files; line n of one translates line n of the other.
        drop_empty: leave out pairs with an empty side (and say so) instead of refusing them.

    Returns:
        The pairs, and how many were left out.

    Raises:
        PrepareError: a file cannot be read, the line counts differ, or a side is empty.
    """
    sides = read_lines(source), read_lines(target)
    if len(sides[0]) != len(sides[1]):
        raise PrepareError(
            f"unequal line counts: {source} has {len(sides[0])}, {target} has {len(sides[1])}"
        )
    pairs: Bitext = []
    empty: list[str] = []
    for number, pair in enumerate(zip(*sides, strict=True), start=1):
        blank = [
            path for path, side in zip((source, target), pair, strict=True) if EMPTY.fullmatch(side)
        ]
        if not blank:
            pairs.append(pair)
        elif drop_empty:
            empty.append(f"{blank[0]}:{number}")
        else:
            raise PrepareError(f"{blank[0]}:{number}: empty sentence in text to be scored against")
    if empty:
        logger.warning(
            "dropped %d training pairs with an empty side (first: %s)", len(empty), empty[0]
        )
    return pairs, len(empty)


def sha256(path: Path) -> str:
    """The SHA-256 of a file's bytes as they lie on disk (packed, if it is .gz)."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


# ---- held-out parts -----------------------------------------------------------------------------


def sentence_key(sentence: str) -> str:
    """What makes two source sentences the same: all but white space and case."""
    return "".join(sentence.split()).casefold()


def source_keys(pairs: Bitext) -> set[str]:
    """The keys of all source sentences."""
    return {sentence_key(source) for source, _ in pairs}


def hold_out(
    pairs: Bitext, sizes: dict[str, int | None], seed: int, taken: set[str]
) -> tuple[dict[str, Bitext], Bitext]:
    """Draw held-out parts whose source sentences are distinct and do not stay in the rest.

    Args:
        pairs: all training pairs.
        sizes: pairs to draw for each part; None is 5 % of the distinct sources, at most 1000.
        seed: of the drawing.
        taken: sentence keys that must not be drawn.

    Returns:
        The parts, in text order, and the pairs that stay for training.

    Raises:
        PrepareError: nothing would stay for training.
    """
    first: dict[str, int] = {}
    for index, (source, _) in enumerate(pairs):
        first.setdefault(sentence_key(source), index)
    candidates = [key for key in first if key not in taken]
    default = max(1, min(1000, len(candidates) // 20))
    wanted = {part: default if size is None else size for part, size in sizes.items()}
    if sum(wanted.values()) >= len(candidates):
        asked = " and ".join(f"{size} {part}" for part, size in wanted.items())
        raise PrepareError(
            f"too few pairs: the training text has {len(candidates)} distinct source sentences, "
            f"from which {asked} pairs cannot be held out; give --valid and --test, or smaller "
            "--valid-size and --test-size"
        )
    random.Random(seed).shuffle(candidates)
    parts: dict[str, Bitext] = {}
    drawn: set[str] = set()
    for part, size in wanted.items():
        keys = candidates[len(drawn) : len(drawn) + size]
        parts[part] = [pairs[index] for index in sorted(first[key] for key in keys)]
        drawn.update(keys)
    rest = [pair for pair in pairs if sentence_key(pair[0]) not in drawn]
    return parts, rest


def read_parts(job: Job) -> tuple[dict[str, Bitext], dict[str, dict]]:
    """The train, valid and test pairs of a job, given or drawn, and what is to say about them.

    Raises:
        PrepareError: a text is at fault, or there are too few pairs.
    """
    pairs: Bitext = []
    dropped = 0
    for source, target in zip(job.texts[::2], job.texts[1::2], strict=True):
        some, empty = read_bitext(source, target, drop_empty=True)
        pairs += some
        dropped += empty
    parts = {
        part: read_bitext(*job.given(part), drop_empty=False)[0]
        for part in HELD_OUT
        if job.given(part)
    }
    if not pairs:
        raise PrepareError(f"{job.texts[0]}: no training pair is left: all have an empty side")
    given = set(parts)
    sizes = {"valid": job.valid_size, "test": job.test_size}
    missing = {part: sizes[part] for part in HELD_OUT if part not in parts}
    if missing:
        before = len(pairs)
        taken = set().union(*(source_keys(parts[part]) for part in given))
        drawn, pairs = hold_out(pairs, missing, job.seed, taken)
        parts.update(drawn)
        logger.info(
            "drew %s from the training text with seed %d; %d pairs left it",
            " and ".join(f"{len(drawn[part])} {part}" for part in drawn),
            job.seed,
            before - len(pairs),
        )
    parts["train"] = pairs[: job.max_train]
    train_keys = source_keys(parts["train"])
    notes = {"train": {"dropped_empty": dropped}}
    for part in HELD_OUT:
        shared = len(source_keys(parts[part]) & train_keys)
        if shared:
            logger.warning(
                "%d source sentences of the %s text are in the training text too", shared, part
            )
        notes[part] = {"from": "given" if part in given else "drawn", "also_in_train": shared}
    return {part: parts[part] for part in ("train", *HELD_OUT)}, notes


# ---- tokens and pieces --------------------------------------------------------------------------


def moses_encoder(language: str, lowercase: bool) -> Callable[[str], str]:
    """A function from a raw sentence to Moses tokens joined by spaces."""
    from sacremoses import MosesTokenizer

    tokenize = functools.partial(MosesTokenizer(language).tokenize, return_str=True, **MOSES)
    # Lower-casing comes first, since Moses knows abbreviations by their case.
    return (lambda sentence: tokenize(sentence.lower())) if lowercase else tokenize


def bpe_encoder(codes: Path) -> Callable[[str], str]:
    """A function from Moses tokens to BPE pieces, both joined by spaces."""
    from subword_nmt.apply_bpe import BPE

    with codes.open(encoding="utf-8") as stream:
        return BPE(stream, separator=SEPARATOR).process_line


# In a worker process, `_start_worker` puts its encoder here: closures do not travel by pickle.
_encode: Callable[[str], str]


def _start_worker(make: Callable[..., Callable[[str], str]], args: tuple) -> None:
    global _encode
    # A forked worker inherits our handler, which is there to clean up and not for it to run.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    _encode = make(*args)


def _work(line: str) -> str:
    return _encode(line)


def encode_lines(
    lines: Sequence[str], make: Callable[..., Callable[[str], str]], args: tuple, workers: int
) -> list[str]:
    """`make(*args)` applied to every line, in order, on so many processes.

    Raises:
        ToolError: a worker process was killed.
    """
    if workers == 1:
        return [*map(make(*args), lines)]
    try:
        with ProcessPoolExecutor(workers, initializer=_start_worker, initargs=(make, args)) as pool:
            return [*pool.map(_work, lines, chunksize=1000)]
    except BrokenProcessPool:
        raise ToolError(
            "a worker process was killed; is there memory for so many --workers?"
        ) from None


def learn_codes(lines: Iterable[str], size: int, path: Path) -> int:
    """Learn BPE merges and write them to a file.

    Args:
        lines: tokenised training text of both languages.
        size: merges to learn.
        path: the file to write.

    Returns:
        How many merges the text gave; fewer than `size` where no pair of symbols is left twice.

    Raises:
        PrepareError: it gave none.
    """
    from subword_nmt.learn_bpe import learn_bpe

    words = Counter(word for line in lines for word in line.split(" ") if word)
    learned = 0
    if any(len(word) > 1 for word in words):
        counted = (f"{word} {count}" for word, count in words.items())
        # learn_bpe draws a progress bar on stderr; what it has to say is in the file.
        with (
            path.open("w", encoding="utf-8", newline="\n") as codes,
            contextlib.redirect_stderr(io.StringIO()),
        ):
            learn_bpe(counted, codes, size, is_dict=True)
        learned = path.read_text(encoding="utf-8").count("\n") - 1
    if learned == 0:
        raise PrepareError("the training text is too small for BPE: no two symbols meet twice")
    if learned < size:
        logger.warning("the training text gives only %d of %d BPE merges", learned, size)
    return learned


def write_lines(path: Path, lines: Iterable[str]) -> None:
    """Write one sentence a line, UTF-8, with line feeds on every system."""
    path.parent.mkdir(exist_ok=True)
    with path.open("w", encoding="utf-8", newline="\n") as stream:
        stream.writelines(line + "\n" for line in lines)


def segment(job: Job, parts: dict[str, Bitext], text: Path, data: Path) -> int:
    """Tokenise all parts, learn BPE on the training part, and write the pieces.

    Args:
        job: languages, lower-casing, BPE size, workers.
        parts: sentence pairs by part.
        text: folder for `{train,valid,test}.{source,target language}`.
        data: folder for `bpe.codes`.

    Returns:
        The number of BPE merges learned.

    Raises:
        PrepareError: the training part is too small for BPE.
    """
    tokens: dict[tuple[str, str], list[str]] = {}
    for side, language in enumerate(job.languages):
        for part, pairs in parts.items():
            tokens[part, language] = encode_lines(
                [pair[side] for pair in pairs],
                moses_encoder,
                (language, job.lowercase),
                job.workers,
            )
    logger.info("tokenised %d sentences", sum(map(len, tokens.values())))
    train = (line for language in job.languages for line in tokens["train", language])
    learned = learn_codes(train, job.bpe_size, data / CODES)
    logger.info("learned %d BPE merges on the training part", learned)
    for (part, language), lines in tokens.items():
        pieces = encode_lines(lines, bpe_encoder, (data / CODES,), job.workers)
        write_lines(text / f"{part}.{language}", pieces)
    logger.info("split all parts into BPE pieces")
    return learned


# ---- fairseq ------------------------------------------------------------------------------------


def run_quietly(command: Sequence[str], cwd: Path) -> None:
    """Run a command to its end; if we are stopped meanwhile, it and its children are too.

    Raises:
        ToolError: it failed.
    """
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
    """Turn the pieces under `text` into fairseq binaries and one joined dictionary in `data`.

    Raises:
        ToolError: fairseq-preprocess failed.
    """
    # Relative paths: fairseq splits --validpref at commas, and the log shows no temporary folder.
    run_quietly(
        [
            sys.executable,
            "-m",
            "fairseq_cli.preprocess",
            "--source-lang",
            job.source_lang,
            "--target-lang",
            job.target_lang,
            "--trainpref",
            "train",
            "--validpref",
            "valid",
            "--testpref",
            "test",
            "--destdir",
            os.path.relpath(data, text),
            "--joined-dictionary",
            "--workers",
            str(job.workers),
        ],
        cwd=text,
    )


def read_dictionary(path: Path) -> set[str]:
    """The pieces listed in a fairseq dictionary file."""
    with path.open(encoding="utf-8") as stream:
        return {line.rsplit(" ", 1)[0] for line in stream}


def count_pieces(text: Path, part: str, languages: Iterable[str], known: set[str]) -> dict:
    """Pairs, pieces, and pieces that the dictionary does not know, of one part.

    Returns:
        `{"pairs": int, "pieces": {language: int}, "unknown": {language: int}}`; the end-of-sentence
        symbol that fairseq adds is not counted.
    """
    counts: dict = {"pairs": 0, "pieces": {}, "unknown": {}}
    for language in languages:
        lines = (text / f"{part}.{language}").read_text(encoding="utf-8").split("\n")[:-1]
        pieces = [piece for line in lines for piece in line.split(" ")]
        counts["pairs"] = len(lines)
        counts["pieces"][language] = len(pieces)
        counts["unknown"][language] = sum(piece not in known for piece in pieces)
    return counts


# ---- the folder ---------------------------------------------------------------------------------


def list_files(folder: Path) -> list[str]:
    """The files below a folder, as sorted relative paths with slashes."""
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if not p.is_dir())


def check_out(out: Path, overwrite: bool) -> None:
    """Refuse an output folder that holds anything but what `overwrite` allows to go.

    Raises:
        PrepareError: it holds a prepared set and `overwrite` is off, or files of somebody else.
    """
    if not out.exists():
        return
    if not out.is_dir():
        raise PrepareError(f"{out}: is a file, not a folder")
    if not any(out.iterdir()):
        return
    if not (out / RECORD).is_file():
        raise PrepareError(
            f"{out}: is not empty, and without {RECORD} not a prepared set; choose another --out"
        )
    if not overwrite:
        raise PrepareError(
            f"{out}: already holds a prepared set; choose another --out, or pass "
            "--overwrite to replace it"
        )
    try:
        written = json.loads((out / RECORD).read_text(encoding="utf-8"))["files"]
    except (ValueError, KeyError, TypeError):
        raise PrepareError(
            f"{out / RECORD}: cannot be read as a record of this program, so "
            "nothing is overwritten; remove the folder yourself"
        ) from None
    foreign = sorted(set(list_files(out)) - set(written))
    if foreign:
        raise PrepareError(
            f"{out}: holds files that are not part of the prepared set, such as "
            f"{foreign[0]}; --overwrite would delete them, move them away first"
        )


@contextlib.contextmanager
def staging(out: Path) -> Iterator[Path]:
    """A temporary folder beside `out` whose subfolder `data` becomes `out` if all goes well.

    Args:
        out: the folder to make, or to replace (the old one stays until the new one is complete).
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    for left in out.parent.glob(f".{glob.escape(out.name)}.*.partial"):
        logger.warning(
            "%s was left by a run that was killed (or still runs); it may be removed", left
        )
    folder = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".partial", dir=out.parent))
    old = folder / "old"
    try:
        (folder / "data").mkdir()
        (folder / "text").mkdir()
        yield folder
        if out.exists():
            out.rename(old)
        (folder / "data").rename(out)
    finally:
        if old.exists() and not out.exists():
            old.rename(out)
        shutil.rmtree(folder, ignore_errors=True)


# ---- all of it ----------------------------------------------------------------------------------


def check_job(job: Job) -> None:
    """Refuse what can be refused before a text is read.

    Raises:
        PrepareError: an option, the output folder or the installation does not fit.
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
    check_out(job.out, job.overwrite)


def installed_versions() -> dict[str, str]:
    """The versions of the packages that made the data, by distribution name."""
    versions = {}
    for package in sum(PACKAGES.values(), ()):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return versions


def describe_inputs(job: Job) -> list[dict[str, str]]:
    """Path as given, part and SHA-256 of every text."""
    texts = {"train": job.texts, **{part: job.given(part) or () for part in HELD_OUT}}
    return [
        {"part": part, "path": str(path), "sha256": sha256(path)}
        for part, paths in texts.items()
        for path in paths
    ]


def prepare(job: Job) -> dict:
    """Prepare a fairseq data folder from parallel text.

    Args:
        job: what to prepare, from what, and where to.

    Returns:
        What `prepare.json` in the new folder holds.

    Raises:
        PrepareError: a text, an option or the output folder is at fault; nothing was written.
        ToolError: fairseq-preprocess or a worker failed; nothing was left behind.
        OSError: the disk is full, or the folder cannot be written.
    """
    check_job(job)
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
        record = {
            "source_lang": job.source_lang,
            "target_lang": job.target_lang,
            "lowercase": job.lowercase,
            "tokenizer": {"name": "moses", **MOSES},
            "bpe": {
                "name": "subword_nmt",
                "separator": SEPARATOR,
                "codes": CODES,
                "merges_asked": job.bpe_size,
                "merges_learned": learned,
            },
            "seed": job.seed,
            "max_train": job.max_train,
            "dictionary_size": len(known) + FAIRSEQ_SPECIALS,
            "parts": notes,
            "inputs": describe_inputs(job),
            "versions": installed_versions(),
            "files": [*list_files(data), RECORD],
        }
        (data / RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    logger.info(
        "wrote %s: %s pairs, dictionary of %d",
        out,
        ", ".join(f"{notes[part]['pairs']} {part}" for part in notes),
        record["dictionary_size"],
    )
    return record


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="prepare.py",
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
    pair = {"nargs": 2, "type": Path, "metavar": ("SRC_TEXT", "TGT_TEXT")}
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
    parser.add_argument(
        "--valid",
        help="raw validation text; else drawn from the training text, "
        "which then keeps none of its source sentences",
        **pair,
    )
    parser.add_argument("--test", help="raw test text; else drawn likewise", **pair)
    for part in HELD_OUT:
        parser.add_argument(
            f"--{part}-size",
            type=int,
            metavar="N",
            help=f"{part} pairs to draw (default: 5 %% of the text, at most 1000)",
        )
    parser.add_argument(
        "--seed",
        type=int,
        default=Job.seed,
        metavar="N",
        help="of the drawing (default: %(default)s)",
    )
    parser.add_argument(
        "--bpe-size",
        type=int,
        default=Job.bpe_size,
        metavar="N",
        help="joint BPE merges, learned on the training part only (default: %(default)s)",
    )
    parser.add_argument(
        "--lowercase",
        action="store_true",
        help="lower-case the text before the tokeniser; raw/ keeps its case",
    )
    parser.add_argument(
        "--max-train",
        type=int,
        metavar="N",
        help="train on the first N pairs of the text only; they are counted after "
        "the held-out parts are drawn, so these are the same for every N",
    )
    parser.add_argument(
        "--workers",
        type=int,
        default=Job.workers,
        metavar="N",
        help="processes (default: %(default)s)",
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="replace a folder that this program made"
    )
    return parser


@contextlib.contextmanager
def unwinding_on_sigterm() -> Iterator[None]:
    """Let a polite kill clean up like an exception; only the main thread may ask for this."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Returns:
        The exit status: 0, 2 where the user can mend it, 1 where a tool or the disk failed.
    """
    parser = build_parser()
    job = Job(**vars(parser.parse_args(argv)))
    logging.basicConfig(
        stream=sys.stderr,
        level=logging.INFO,
        format="%(asctime)s | %(levelname)s | %(name)s | %(message)s",
    )
    try:
        with unwinding_on_sigterm():
            prepare(job)
    except PrepareError as error:
        sys.stderr.write(f"{parser.prog}: error: {error}\n")
        return 2
    except (ToolError, OSError) as error:
        sys.stderr.write(f"{parser.prog}: error: {error}\n")
        return 1
    except KeyboardInterrupt:
        sys.stderr.write(f"{parser.prog}: interrupted, nothing was written\n")
        return 128 + signal.SIGINT
    return 0


if __name__ == "__main__":
    sys.exit(main())
