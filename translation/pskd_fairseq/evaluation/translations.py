"""Translates a split with fairseq-generate and scores the translations."""

from __future__ import annotations

import argparse
import logging
import re
import subprocess
import sys
from pathlib import Path

from sacremoses import MosesDetokenizer

from pskd_fairseq.evaluation.metrics import comet_score, corpus_metrics, language_of
from pskd_fairseq.programs import UserError

logger = logging.getLogger("evaluate")

# fairseq-generate with torch's allow-list in place, whatever other plugin --user-dir names. As of
# its own command, and unlike of -c alone, modules of the current folder are not found (-P).
_GENERATE = "import pskd_fairseq; from fairseq_cli.generate import cli_main; cli_main()"


def generate(
    args: argparse.Namespace, pair: tuple[str, str], subwords: str | None
) -> tuple[list[str], str]:
    """Translate the split with fairseq-generate, from one language of the pair to the other.

    ``subwords`` tells how words are put together again; None: they are whole. Returns the tokenised
    translations in the order of the reference, and fairseq's own BLEU line.
    """
    log = args.out / "generate.log"
    command = [sys.executable, "-P", "-c", _GENERATE, str(args.data)]
    command += ["--source-lang", pair[0], "--target-lang", pair[1]]
    command += ["--path", str(args.checkpoint), "--gen-subset", args.split]
    command += ["--beam", str(args.beam), "--lenpen", str(args.lenpen)]
    command += ["--max-len-a", "1.5", "--max-len-b", "10"]
    command += ["--post-process", subwords] if subwords else []
    # By default fairseq drops the last batch where its size is no multiple of 8.
    command += ["--required-batch-size-multiple", "1", "--max-tokens", str(args.max_tokens)]
    command += ["--user-dir", args.user_dir] if args.user_dir else []
    command += ["--cpu"] if args.cpu else []
    logger.info("translating %s with beam %d, log file: %s", args.split, args.beam, log)
    with log.open("w", encoding="utf-8") as output:
        code = subprocess.run(command, stdout=output, stderr=subprocess.STDOUT).returncode
    lines = log.read_text(encoding="utf-8").split("\n")
    if code:
        last = next((line for line in reversed(lines) if line.strip()), "no output")
        raise UserError(f"fairseq-generate failed ({code}), see {log}: {last}")
    found = [re.match(r"H-(\d+)\t[^\t]*\t(.*)", line) for line in lines]
    numbered = sorted((int(match[1]), match[2]) for match in found if match)
    bleu_line = next(line for line in lines if line.startswith("Generate "))
    return [text for _, text in numbered], bleu_line


def detokenised(tokenised: list[str], preparation: dict) -> list[str]:
    detokenizer = MosesDetokenizer(language_of(preparation["target_lang"]))
    return [detokenizer.detokenize(line.split()) for line in tokenised]


def raw_reference(args: argparse.Namespace, preparation: dict) -> Path:
    return args.data / "raw" / f"{args.split}.{preparation['target_lang']}"


def score(
    translations: list[str], args: argparse.Namespace, preparation: dict
) -> tuple[dict, dict[str, list]]:
    """Score the detokenised translations against the raw reference.

    Returns BLEU and chrF with their sacreBLEU signatures, COMET as `comet_score`, and what `pskd
    report` reads of each sentence: its texts and sacreBLEU's counts, of which the scores of any
    part of the corpus can be made (sacreBLEU has no public way to the counts of chrF).
    """
    lowercase, reference_file = preparation["lowercase"], raw_reference(args, preparation)
    references = _lines(reference_file)
    if len(translations) != len(references):
        raise UserError(
            f"{reference_file}: expected as many sentences as were translated, "
            f"{len(translations)}, got {len(references)}"
        )
    # A model of lower-cased text is scored without case; the signature says so.
    bleu, chrf = corpus_metrics(preparation["target_lang"], lowercase)
    scores = {
        "sentences": len(translations),
        "bleu": bleu.corpus_score(translations, [references]).score,
        "bleu_signature": str(bleu.get_signature()),
        "chrf": chrf.corpus_score(translations, [references]).score,
        "chrf_signature": str(chrf.get_signature()),
    }
    source_file = reference_file.with_suffix(f".{preparation['source_lang']}")
    sources = _lines(source_file) if source_file.is_file() else []
    if sources:
        scores |= comet_score(sources, translations, references, cpu=args.cpu)
    sentences = {
        "source": sources,
        "reference": references,
        "translation": translations,
        "bleu": bleu._extract_corpus_statistics(translations, [references]),
        "chrf": chrf._extract_corpus_statistics(translations, [references]),
    }
    return scores, sentences


def _lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").split("\n")[:-1]
