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
        UserError: it gave none.
    """
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

    Args:
        job: languages, lower-casing, BPE size, workers.
        parts: sentence pairs by part.
        text: folder for `{train,valid,test}.{source,target language}`.
        data: folder for `bpe.codes`.

    Returns:
        The number of BPE merges learned.

    Raises:
        UserError: the training part is too small for BPE.
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
