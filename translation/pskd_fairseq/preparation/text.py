"""Reads parallel text and draws the held-out parts from it."""

from __future__ import annotations

import gzip
import logging
import random
import re
import zlib
from pathlib import Path

from pskd_fairseq.preparation.job import HELD_OUT, Job
from pskd_fairseq.programs import UserError

logger = logging.getLogger("prepare")

# Moses drops control characters, so a line of nothing else is an empty sentence too.
EMPTY = re.compile(r"[\s\x00-\x1f]*")

Bitext = list[tuple[str, str]]


def read_lines(path: Path) -> list[str]:
    """Return the sentences of one text file, plain or .gz, without line ends.

    Carriage returns inside a sentence become spaces: a reader of the output could take them for
    line ends.
    """
    lines: list[str] = []
    offset = 0
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as stream:
            for raw in stream:
                lines.append(raw.decode())
                offset += len(raw)
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path}:{len(lines) + 1}: not UTF-8: byte 0x{raw[error.start]:02x} at byte offset "
            f"{error.start} of the line, {offset + error.start} of the (unpacked) file"
        ) from None
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UserError(f"{path}:{len(lines) + 1}: damaged .gz: {error}") from None
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from None
    if not lines:
        raise UserError(f"{path}: empty file")
    lines[0] = lines[0].removeprefix("\ufeff")
    return [line.removesuffix("\n").removesuffix("\r").replace("\r", " ") for line in lines]


def read_bitext(source: Path, target: Path, *, drop_empty: bool) -> tuple[Bitext, int]:
    """Return the sentence pairs of two aligned text files, and how many were left out.

    With ``drop_empty`` pairs with an empty side are left out, with a warning, else refused.
    """
    sides = read_lines(source), read_lines(target)
    if len(sides[0]) != len(sides[1]):
        raise UserError(
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
            raise UserError(f"{blank[0]}:{number}: empty sentence in text to be scored against")
    if empty:
        logger.warning(
            "dropped %d training pairs with an empty side (first: %s)", len(empty), empty[0]
        )
    return pairs, len(empty)


def sentence_key(sentence: str) -> str:
    """Return what makes two source sentences the same: all but white space and case."""
    return "".join(sentence.split()).casefold()


def source_keys(pairs: Bitext) -> set[str]:
    """Return the keys of all source sentences."""
    return {sentence_key(source) for source, _ in pairs}


def hold_out(
    pairs: Bitext, sizes: dict[str, int | None], seed: int, taken: set[str]
) -> tuple[dict[str, Bitext], Bitext]:
    """Draw held-out parts whose source sentences are distinct and do not stay in the rest.

    A size of None is 5 % of the distinct sources, at most 1000; keys in ``taken`` are not drawn.
    Returns the parts, in text order, and the pairs that stay for training.
    """
    first: dict[str, int] = {}
    for index, (source, _) in enumerate(pairs):
        first.setdefault(sentence_key(source), index)
    candidates = [key for key in first if key not in taken]
    default = max(1, min(1000, len(candidates) // 20))
    wanted = {part: default if size is None else size for part, size in sizes.items()}
    if sum(wanted.values()) >= len(candidates):
        asked = " and ".join(f"{size} {part}" for part, size in wanted.items())
        raise UserError(
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
    """Return the train, valid and test pairs of a job, given or drawn, and notes about them."""
    pairs: Bitext = []
    dropped = 0
    for source, target in zip(job.texts[::2], job.texts[1::2], strict=True):
        some, empty = read_bitext(source, target, drop_empty=True)
        pairs += some
        dropped += empty
    given = {
        part: read_bitext(*texts, drop_empty=False)[0]
        for part in HELD_OUT
        if (texts := job.given(part))
    }
    if not pairs:
        raise UserError(f"{job.texts[0]}: no training pair is left: all have an empty side")
    sizes = {"valid": job.valid_size, "test": job.test_size}
    missing = {part: sizes[part] for part in HELD_OUT if part not in given}
    drawn: dict[str, Bitext] = {}
    if missing:
        before = len(pairs)
        taken = {key for part in given.values() for key in source_keys(part)}
        drawn, pairs = hold_out(pairs, missing, job.seed, taken)
        logger.info(
            "drew %s from the training text with seed %d; %d pairs left it",
            " and ".join(f"{len(drawn[part])} {part}" for part in drawn),
            job.seed,
            before - len(pairs),
        )
    held_out, train = given | drawn, pairs[: job.max_train]
    train_keys = source_keys(train)
    notes: dict[str, dict] = {"train": {"dropped_empty": dropped}}
    for part in HELD_OUT:
        shared = len(source_keys(held_out[part]) & train_keys)
        if shared:
            logger.warning(
                "%d source sentences of the %s text are in the training text too", shared, part
            )
        notes[part] = {"from": "given" if part in given else "drawn", "also_in_train": shared}
    return {"train": train, **{part: held_out[part] for part in HELD_OUT}}, notes
