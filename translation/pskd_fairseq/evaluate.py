"""Measure a fairseq checkpoint, PS-KD or not: how well it translates and how well it knows it.

    python translation/evaluate.py CHECKPOINT --data DIR --out OUT
    python translation/evaluate.py compare OUT OUT...

DIR is a folder that translation/prepare.py made, or any other that fairseq-preprocess did.
Translations (beam search, every sentence of the split) are detokenised and scored against the raw
reference with sacreBLEU and chrF; beside them stands the tokenised BLEU that fairseq-generate
prints. sacreBLEU's tokeniser is that of the target language. With unbabel-comet installed, and its
model on this machine, the COMET score is added.
Without prepare.json there is no raw reference, and only the tokenised BLEU is told.
Confidence is that of the next token when the reference is read along (teacher forcing): NLL, ECE
and AURC over every target token, the end of the sentence included, as raw fractions. On the test
split they are also given after temperature scaling: one number, fitted on at most 4096 tokens,
evenly spread over the validation split. OUT gets evaluation.json, translations.txt, generate.log,
sentences.json (texts and sacreBLEU's counts), confidence.npz (confidence, correctness and NLL of
every token, also after temperature scaling) and two plots; it is a run of `pskd report`.
``compare`` is sacreBLEU's paired bootstrap of such folders against the first.
"""

from __future__ import annotations

import argparse
import logging
import math
import sys
from pathlib import Path

import numpy as np
from fairseq import utils

from pskd_fairseq.evaluation.confidence import fit_temperature_on_valid, measure_confidence, summary
from pskd_fairseq.evaluation.inputs import languages, load, read_preparation, subwords_of
from pskd_fairseq.evaluation.metrics import corpus_metrics
from pskd_fairseq.evaluation.significance import compare
from pskd_fairseq.evaluation.translations import detokenised, generate, raw_reference, score
from pskd_fairseq.programs import UserError, exit_status
from pskd_tools.files import write_json, written_aside
from pskd_tools.plots import reliability_diagram, risk_coverage_plot

logger = logging.getLogger("evaluate")

PROGRAM = "evaluate.py"


def evaluate(args: argparse.Namespace) -> dict:
    """Measure one checkpoint and write everything to ``args.out``; returns evaluation.json.

    Raises:
        UserError: if something that the user gave is wrong.
        OSError: if a file cannot be read or written; none is left half written but the log.
    """
    preparation = read_preparation(args.data)
    _check_files(args, preparation)
    if args.user_dir:
        utils.import_user_module(argparse.Namespace(user_dir=args.user_dir))
    model, config, task = load(args)
    if preparation is not None:
        pair = preparation["source_lang"], preparation["target_lang"]
        subwords: str | None = "subword_nmt"
    else:
        pair, subwords = languages(args, config, task), subwords_of(task.target_dictionary)
    args.out.mkdir(parents=True, exist_ok=True)
    logger.info("scoring the reference tokens of %s under teacher forcing", args.split)
    # What is reported of the validation split itself would be fitted to it.
    fitted = args.split == "test"
    temperature = fit_temperature_on_valid(args, model, config, task) if fitted else None
    tokens = measure_confidence(args, model, config, task, temperature)
    translations, scores, sentences = _translated(args, preparation, pair, subwords)
    confidence = summary(tokens)
    result = {
        "task": "translation",
        "checkpoint": str(args.checkpoint),
        "split": args.split,
        "beam": args.beam,
        "lenpen": args.lenpen,
        **scores,
        "tokens": confidence.pop("count"),
        "nll_bits": confidence["nll"] / np.log(2.0),
        **confidence,
    }
    if fitted:
        result |= {"temperature": temperature, "scaled": summary(tokens, "scaled_")}
    _write_outputs(args, result, translations, sentences, tokens)
    return result


def _check_files(args: argparse.Namespace, preparation: dict | None) -> None:
    """Raise UserError if something is missing that is needed only after minutes."""
    if not args.checkpoint.is_file():
        raise UserError(f"{args.checkpoint}: expected a checkpoint, got no such file")
    if preparation is not None:
        reference_file = raw_reference(args, preparation)
        if not reference_file.is_file():
            raise UserError(f"{reference_file}: expected the raw reference, got no such file")
        corpus_metrics(preparation["target_lang"], preparation["lowercase"])


def _translated(
    args: argparse.Namespace,
    preparation: dict | None,
    pair: tuple[str, str],
    subwords: str | None,
) -> tuple[list[str], dict, dict[str, list]]:
    """Return the split's translations, detokenised where possible, and what `score` does."""
    translations, bleu_line = generate(args, pair, subwords)
    if preparation is not None:
        translations = detokenised(translations, preparation)
        scores, sentences = score(translations, args, preparation)
    else:
        logger.info("%s has no prepare.json: no BLEU and chrF of detokenised text", args.data)
        scores, sentences = {"sentences": len(translations)}, {}
    tokenised_bleu = float(bleu_line.partition("BLEU4 = ")[2].partition(",")[0])
    scores |= {"tokenised_bleu_line": bleu_line, "tokenised_bleu": tokenised_bleu}
    return translations, scores, sentences


def _write_outputs(
    args: argparse.Namespace,
    result: dict,
    translations: list[str],
    sentences: dict[str, list],
    tokens: dict[str, np.ndarray],
) -> None:
    with written_aside(args.out / "translations.txt") as aside:
        aside.write_text("\n".join(translations) + "\n", encoding="utf-8")
    with written_aside(args.out / "confidence.npz") as aside:
        np.savez_compressed(aside, **tokens)  # type: ignore[arg-type]  # no option of numpy
    if sentences:
        write_json(args.out / "sentences.json", sentences)
    else:
        (args.out / "sentences.json").unlink(missing_ok=True)  # of an earlier evaluation
    runs = {args.name or args.checkpoint.parent.name: (tokens["confidence"], tokens["correct"])}
    reliability_diagram(runs, args.out / "reliability.png")
    risk_coverage_plot(runs, args.out / "risk_coverage.png")
    path = args.out / "evaluation.json"
    write_json(path, result, indent=2)
    logger.info("wrote %s", path)


def parse(argv: list[str] | None) -> argparse.Namespace:
    words = sys.argv[1:] if argv is None else argv
    if words[:1] == ["compare"]:
        comparison = argparse.ArgumentParser(
            prog=f"{PROGRAM} compare", description="sacreBLEU's paired bootstrap."
        )
        told = "folders of evaluations, or NAME=FOLDER; the first is the baseline"
        comparison.add_argument("runs", nargs="+", metavar="OUT", help=told)
        return comparison.parse_args(words[1:])
    description, _, epilog = __doc__.split("\n\n", 2)
    parser = argparse.ArgumentParser(prog=PROGRAM, description=description, epilog=epilog)
    add = parser.add_argument
    add("checkpoint", type=Path, help="any fairseq translation checkpoint")
    data = "folder of translation/prepare.py, or of fairseq-preprocess"
    add("--data", type=Path, required=True, help=data)
    add("--out", type=Path, required=True, help="folder for the results")
    add("--split", choices=("test", "valid"), default="test", help="default: %(default)s")
    add("--name", help="of the run in plots (default: the checkpoint's folder)")
    add("--beam", type=int, default=5, help="beam size (default: %(default)s)")
    add("--lenpen", type=float, default=1.0, help="length penalty (default: 1)")
    add("--max-tokens", type=int, default=4000, help="in a batch (default: %(default)s)")
    add("--user-dir", help="the plugin of your own model or task, if it has one")
    add("--cpu", action="store_true", help="do not use a GPU")
    args = parser.parse_args(words)
    for option in ("beam", "max_tokens"):
        if (number := getattr(args, option)) < 1:
            parser.error(f"--{option.replace('_', '-')}: expected at least 1, got {number}")
    if not math.isfinite(args.lenpen):
        parser.error(f"--lenpen: expected a finite number, got {args.lenpen}")
    return args


def main(argv: list[str] | None = None) -> int:
    """Run the command line; return the exit status, as `exit_status` does."""
    args = parse(argv)
    return exit_status(
        PROGRAM,
        lambda: print(compare(args.runs) if "runs" in args else summary_line(evaluate(args))),
    )


def summary_line(result: dict) -> str:
    """Return the main figures of an evaluation.json in a line."""
    keys = ("bleu", "chrf", "comet", "tokenised_bleu", "nll", "ece", "aurc", "accuracy")
    told = [f"{key}={result[key]:.4g}" for key in keys if key in result]
    return " ".join([*told, *([result["bleu_signature"]] if "bleu_signature" in result else [])])


if __name__ == "__main__":
    sys.exit(main())
