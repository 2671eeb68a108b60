"""Raw sentences -> Moses tokens -> pieces of a joint BPE, on several processes."""

from __future__ import annotations

import functools
import io
import logging
import signal
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import redirect_stderr
from pathlib import Path

from pskd_fairseq.preparation.folder import write_lines
from pskd_fairseq.preparation.job import Job
from pskd_fairseq.preparation.text import Bitext
from pskd_fairseq.programs import ToolError, UserError

logger = logging.getLogger("prepare")

CODES = "bpe.codes"
SEPARATOR = "@@"
# What sacremoses is asked for, and what fairseq's moses tokenizer asks for by default.
MOSES = {"aggressive_dash_splits": True, "escape": True}


# Each process makes its own tokenisers: they do not travel by pickle.
@functools.cache
def _moses(language: str):
    from sacremoses import MosesTokenizer

    return MosesTokenizer(language)


@functools.lru_cache(maxsize=1)
def _bpe(codes: Path):
    from subword_nmt.apply_bpe import BPE

    with codes.open(encoding="utf-8") as stream:
        return BPE(stream, separator=SEPARATOR)


def moses_tokens(language: str, lowercase: bool, sentence: str) -> str:
    """Return the Moses tokens of a raw sentence, joined by spaces."""
    # Lower-casing comes first, since Moses knows abbreviations by their case.
    sentence = sentence.lower() if lowercase else sentence
    return _moses(language).tokenize(sentence, return_str=True, **MOSES)


def bpe_pieces(codes: Path, tokens: str) -> str:
    """Return the BPE pieces of Moses tokens, both joined by spaces."""
    return _bpe(codes).process_line(tokens)


def encode_lines(lines: Sequence[str], encode: Callable[[str], str], workers: int = 1) -> list[str]:
    """Apply a function to every line, in order, on so many processes."""
    if workers == 1:
        return [*map(encode, lines)]
    # A forked worker inherits our handler, which is there to clean up and not for it to run.
    default = signal.SIGTERM, signal.SIG_DFL
    try:
        with ProcessPoolExecutor(workers, initializer=signal.signal, initargs=default) as pool:
            return [*pool.map(encode, lines, chunksize=1000)]
    except BrokenProcessPool:
        raise ToolError(
            "a worker process was killed; is there memory for so many --workers?"
        ) from None


def learn_codes(lines: Iterable[str], size: int, path: Path) -> int:
    """Learn BPE merges of tokenised lines, write them to a file and return how many there are."""
    from subword_nmt.learn_bpe import learn_bpe

    words = Counter(word for line in lines for word in line.split(" ") if word)
    learned = 0
    if any(len(word) > 1 for word in words):
        counted = (f"{word} {count}" for word, count in words.items())
        # learn_bpe draws a progress bar on stderr; what it has to say is in the file.
        with (
            path.open("w", encoding="utf-8", newline="\n") as codes,
            redirect_stderr(io.StringIO()),
        ):
            learn_bpe(counted, codes, size, is_dict=True)
        learned = path.read_text(encoding="utf-8").count("\n") - 1
    if learned == 0:
        raise UserError("the training text is too small for BPE: no two symbols meet twice")
    if learned < size:
        logger.warning("the training text gives only %d of %d BPE merges", learned, size)
    return learned


def segment(job: Job, parts: dict[str, Bitext], text: Path, data: Path) -> int:
    """Tokenise all parts, learn BPE on the training part, and write the pieces.

    ``text`` gets the files `{train,valid,test}.{source,target language}`, ``data`` `bpe.codes`.
    Returns the number of BPE merges learned.
    """
    tokens: dict[tuple[str, str], list[str]] = {}
    for side, language in enumerate(job.languages):
        encode = functools.partial(moses_tokens, language, job.lowercase)
        for part, pairs in parts.items():
            lines = [pair[side] for pair in pairs]
            tokens[part, language] = encode_lines(lines, encode, job.workers)
    logger.info("tokenised %d sentences", sum(map(len, tokens.values())))
    train = (line for language in job.languages for line in tokens["train", language])
    learned = learn_codes(train, job.bpe_size, data / CODES)
    logger.info("learned %d BPE merges on the training part", learned)
    for (part, language), lines in tokens.items():
        pieces = encode_lines(lines, functools.partial(bpe_pieces, data / CODES), job.workers)
        write_lines(text / f"{part}.{language}", pieces)
    logger.info("split all parts into BPE pieces")
    return learned
