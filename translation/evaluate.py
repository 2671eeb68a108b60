"""Measure a fairseq checkpoint, PS-KD or not: how well it translates and how well it knows it.

    python translation/evaluate.py CHECKPOINT --data DIR --out OUT

DIR is a folder that translation/prepare.py made, or any other that fairseq-preprocess did.
Translations (beam search, every sentence of the split) are detokenised and scored against the raw
reference with sacreBLEU and chrF; beside them stands the tokenised BLEU that fairseq-generate
prints. Without prepare.json there is no raw reference, and only the tokenised BLEU is told.
Confidence is that of the next token when the reference is read along (teacher forcing): NLL, ECE
and AURC over every target token, the end of the sentence included, as raw fractions. On the test
split they are also given after temperature scaling: one number, fitted on at most 4096 tokens,
evenly spread over the validation split. OUT gets evaluation.json, translations.txt, generate.log,
confidence.npz (confidence, correctness and NLL of every token, also after temperature scaling) and
two plots; it is a run of `pskd report`.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pskd_fairseq  # noqa: F401  torch's allow-list for fairseq checkpoints
import sacrebleu
import torch
from fairseq import checkpoint_utils, utils
from fairseq.data import Dictionary
from fairseq.models import BaseFairseqModel
from fairseq.tasks import FairseqTask
from omegaconf import DictConfig
from sacremoses import MosesDetokenizer
from torch import Tensor

from pskd.calibration import ConfidenceAccumulator
from pskd.plots import reliability_diagram, risk_coverage_plot
from pskd.run.files import write_json, written_aside
from pskd.temperature import fit_temperature

logger = logging.getLogger("evaluate")

# fairseq-generate with torch's allow-list in place, whatever other plugin --user-dir names.
_GENERATE = "import pskd_fairseq; from fairseq_cli.generate import cli_main; cli_main()"


# What is read of prepare.json.
_PREPARED = {"source_lang", "target_lang", "lowercase"}
# Of a vocabulary of 32,000 types these are 0.5 GB of log-probabilities.
_TEMPERATURE_TOKENS = 4096
_LEAST_LPROB = -1e4


class UserError(ValueError):
    """Something the user gave is wrong; shown without a traceback."""


def read_preparation(data: Path) -> dict | None:
    """Return what prepare.py wrote of its steps, or None for data that another program prepared.

    Raises:
        UserError: if the folder holds no data of fairseq, or a prepare.json that is none.
    """
    path = data / "prepare.json"
    if not path.is_file():
        if not any(data.glob("dict.*.txt")):
            raise UserError(
                f"{data}: expected a folder that translation/prepare.py or fairseq-preprocess "
                f"made, got no {path.name} and no dict.*.txt"
            )
        return None
    try:
        preparation = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path}: expected JSON, got {error}") from error
    if not isinstance(preparation, dict) or not preparation.keys() >= _PREPARED:
        got = sorted(preparation) if isinstance(preparation, dict) else type(preparation).__name__
        raise UserError(f"{path}: expected an object with {sorted(_PREPARED)}, got {got}")
    return preparation


def load(args: argparse.Namespace) -> tuple[BaseFairseqModel, DictConfig, FairseqTask]:
    """Return the checkpoint's model, configuration and task, with the dictionaries of the data.

    Raises:
        UserError: if the file is no whole checkpoint or does not fit the data.
        OSError: if a file cannot be read.
    """
    try:
        models, config, task = checkpoint_utils.load_model_ensemble_and_task(
            [str(args.checkpoint)], arg_overrides={"data": str(args.data)}
        )
    except OSError:
        raise
    except Exception as error:  # a damaged pickle can fail in any way
        reason = str(error).partition("\n")[0]
        raise UserError(
            f"{args.checkpoint}: expected a whole fairseq checkpoint that fits {args.data}, got "
            f"{type(error).__name__}: {reason}"
        ) from error
    return models[0].eval(), config, task


def languages(args: argparse.Namespace, config: DictConfig, task: FairseqTask) -> tuple[str, str]:
    """Return source and target language, as the task found them in the data's names.

    Raises:
        UserError: if the task is not one that translates from one language to another.
    """
    own = getattr(task, "cfg", None) or config.task
    found = getattr(own, "source_lang", None), getattr(own, "target_lang", None)
    if not all(found):
        raise UserError(
            f"{args.checkpoint}: expected a model of one source and one target language, got the "
            f"task {type(task).__name__}"
        )
    return found


def subwords_of(dictionary: Dictionary) -> str | None:
    """Return fairseq's name of how a dictionary's words are cut; None where they are whole."""
    types = dictionary.symbols[dictionary.nspecial :]
    if any(word.endswith("@@") for word in types):
        return "subword_nmt"
    return "sentencepiece" if any(word.startswith("\u2581") for word in types) else None


def generate(
    args: argparse.Namespace, pair: tuple[str, str], subwords: str | None
) -> tuple[list[str], str]:
    """Translate the split with fairseq-generate.

    Args:
        pair: source and target language.
        subwords: how words are put together again (``--post-process``); None: they are whole.

    Returns:
        the tokenised translations in the order of the reference, and fairseq's own BLEU line.

    Raises:
        UserError: if fairseq fails, naming its log.
    """
    log = args.out / "generate.log"
    command = [sys.executable, "-c", _GENERATE, str(args.data)]
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
        raise UserError(f"fairseq-generate failed ({code}), see {log}: {_last_line(lines)}")
    found = [re.match(r"H-(\d+)\t[^\t]*\t(.*)", line) for line in lines]
    numbered = sorted((int(match[1]), match[2]) for match in found if match)
    bleu_line = next(line for line in lines if line.startswith("Generate "))
    return [text for _, text in numbered], bleu_line


def _last_line(lines: list[str]) -> str:
    return next((line for line in reversed(lines) if line.strip()), "no output")


def detokenised(tokenised: list[str], preparation: dict) -> list[str]:
    detokenizer = MosesDetokenizer(preparation["target_lang"])
    return [detokenizer.detokenize(line.split()) for line in tokenised]


def raw_reference(args: argparse.Namespace, preparation: dict) -> Path:
    return args.data / "raw" / f"{args.split}.{preparation['target_lang']}"


def score(translations: list[str], args: argparse.Namespace, preparation: dict) -> dict:
    """Return BLEU and chrF of the detokenised translations, with their sacreBLEU signatures.

    Raises:
        UserError: if the reference is of another length.
    """
    lowercase, reference_file = preparation["lowercase"], raw_reference(args, preparation)
    references = reference_file.read_text(encoding="utf-8").split("\n")[:-1]
    if len(translations) != len(references):
        raise UserError(
            f"{reference_file}: expected as many sentences as were translated, "
            f"{len(translations)}, got {len(references)}"
        )
    # A model of lower-cased text is scored without case; the signature says so.
    bleu = sacrebleu.BLEU(lowercase=lowercase)
    chrf = sacrebleu.CHRF(lowercase=lowercase)
    return {
        "sentences": len(translations),
        "bleu": bleu.corpus_score(translations, [references]).score,
        "bleu_signature": str(bleu.get_signature()),
        "chrf": chrf.corpus_score(translations, [references]).score,
        "chrf_signature": str(chrf.get_signature()),
    }


@torch.no_grad()
def scored_tokens(
    args: argparse.Namespace,
    split: str,
    model: BaseFairseqModel,
    config: DictConfig,
    task: FairseqTask,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Give the log-probabilities (n, V) and labels (n,) of each batch, under teacher forcing."""
    use_cuda = torch.cuda.is_available() and not args.cpu
    model = model.cuda() if use_cuda else model
    task.load_dataset(split, task_cfg=config.task)
    batches = task.get_batch_iterator(
        task.dataset(split), max_tokens=args.max_tokens, required_batch_size_multiple=1
    ).next_epoch_itr(shuffle=False)
    for sample in batches:
        sample = utils.move_to_cuda(sample) if use_cuda else sample
        net_output = model(**sample["net_input"])
        lprobs = model.get_normalized_probs(net_output, log_probs=True, sample=sample)
        target = model.get_targets(sample, net_output)
        keep = target != task.target_dictionary.pad()
        yield lprobs[keep], target[keep]


def fit_temperature_on_valid(
    args: argparse.Namespace, model: BaseFairseqModel, config: DictConfig, task: FairseqTask
) -> float:
    """Return the temperature that fits tokens of the validation split best."""
    kept_lprobs, kept_target, seen = [], [], 0
    task.load_dataset("valid", task_cfg=config.task)
    step = math.ceil(np.sum(task.dataset("valid").tgt_sizes) / _TEMPERATURE_TOKENS)
    for lprobs, target in scored_tokens(args, "valid", model, config, task):
        # Evenly over all batches: these come in order of their sentences' lengths.
        chosen = torch.arange(-seen % step, len(target), step, device=target.device)
        # A model may forbid a word by minus infinity.
        kept_lprobs.append(lprobs[chosen].clamp(min=_LEAST_LPROB).cpu())
        kept_target.append(target[chosen].cpu())
        seen += len(target)
    return fit_temperature(torch.cat(kept_lprobs), torch.cat(kept_target))


def measure_confidence(
    args: argparse.Namespace,
    model: BaseFairseqModel,
    config: DictConfig,
    task: FairseqTask,
    temperature: float | None = None,
) -> dict[str, np.ndarray]:
    """Score every reference token of ``args.split``.

    Returns:
        ``confidence`` (N,), ``correct`` (N,) and ``nll`` (N,) nats; with a temperature also it and
        ``scaled_confidence`` (N,) and ``scaled_nll`` (N,).
    """
    parts = []
    for lprobs, target in scored_tokens(args, args.split, model, config, task):
        part = _confidence(lprobs, target)
        part["correct"] = (lprobs.argmax(dim=-1) == target).cpu().numpy()
        if temperature is not None:
            scaled = _confidence(torch.log_softmax(lprobs / temperature, dim=-1), target)
            part |= {f"scaled_{name}": values for name, values in scaled.items()}
        parts.append(part)
    tokens = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    return tokens if temperature is None else tokens | {"temperature": np.array(temperature)}


def _confidence(lprobs: Tensor, target: Tensor) -> dict[str, np.ndarray]:
    confidence = lprobs.amax(dim=-1).exp().clamp(max=1.0)
    nll = -lprobs.gather(1, target[:, None]).squeeze(1)
    # Rounding may leave the log-probability of a certain token a little above 0.
    return {"confidence": confidence.cpu().numpy(), "nll": nll.clamp(min=0.0).cpu().numpy()}


def summary(tokens: dict[str, np.ndarray], prefix: str = "") -> dict[str, float]:
    """Return NLL, ECE, AURC, E-AURC and accuracy of tokens, those of scaled ones by a prefix."""
    rows = ConfidenceAccumulator()
    rows.update_from(tokens[f"{prefix}confidence"], tokens["correct"], tokens[f"{prefix}nll"])
    return rows.compute()


def evaluate(args: argparse.Namespace) -> dict:
    """Measure one checkpoint and write everything to ``args.out``; returns evaluation.json.

    Raises:
        UserError: if something that the user gave is wrong.
        OSError: if a file cannot be read or written; none is left half written but the log.
    """
    preparation = read_preparation(args.data)
    if not args.checkpoint.is_file():
        raise UserError(f"{args.checkpoint}: expected a checkpoint, got no such file")
    if preparation is not None:  # the reference is read when all is translated
        reference_file = raw_reference(args, preparation)
        if not reference_file.is_file():
            raise UserError(f"{reference_file}: expected the raw reference, got no such file")
    if args.user_dir:
        utils.import_user_module(argparse.Namespace(user_dir=args.user_dir))
    model, config, task = load(args)
    if preparation is not None:
        pair, subwords = (preparation["source_lang"], preparation["target_lang"]), "subword_nmt"
    else:
        pair, subwords = languages(args, config, task), subwords_of(task.target_dictionary)
    args.out.mkdir(parents=True, exist_ok=True)
    logger.info("scoring the reference tokens of %s under teacher forcing", args.split)
    # What is reported of the validation split itself would be fitted to it.
    fitted = args.split == "test"
    temperature = fit_temperature_on_valid(args, model, config, task) if fitted else None
    tokens = measure_confidence(args, model, config, task, temperature)
    translations, bleu_line = generate(args, pair, subwords)
    if preparation is not None:
        translations = detokenised(translations, preparation)
        scores = score(translations, args, preparation)
    else:
        logger.info("%s has no prepare.json: no BLEU and chrF of detokenised text", args.data)
        scores = {"sentences": len(translations)}
    confidence = summary(tokens)
    result = {
        "task": "translation",
        "checkpoint": str(args.checkpoint),
        "split": args.split,
        "beam": args.beam,
        "lenpen": args.lenpen,
        **scores,
        "tokenised_bleu_line": bleu_line,
        "tokenised_bleu": float(re.search(r"BLEU4 = ([\d.]+)", bleu_line)[1]),
        "tokens": confidence.pop("count"),
        "nll_bits": confidence["nll"] / np.log(2.0),
        **confidence,
    }
    if fitted:
        result |= {"temperature": temperature, "scaled": summary(tokens, "scaled_")}
    _write_outputs(args, result, translations, tokens)
    return result


def _write_outputs(
    args: argparse.Namespace,
    result: dict,
    translations: list[str],
    tokens: dict[str, np.ndarray],
) -> None:
    with written_aside(args.out / "translations.txt") as aside:
        aside.write_text("\n".join(translations) + "\n", encoding="utf-8")
    with written_aside(args.out / "confidence.npz") as aside:
        np.savez_compressed(aside, **tokens)
    runs = {args.name or args.checkpoint.parent.name: (tokens["confidence"], tokens["correct"])}
    reliability_diagram(runs, args.out / "reliability.png")
    risk_coverage_plot(runs, args.out / "risk_coverage.png")
    path = args.out / "evaluation.json"
    write_json(path, result, indent=2)
    logger.info("wrote %s", path)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="evaluate.py", description=__doc__.split("\n")[0], epilog=__doc__.split("\n\n", 2)[2]
    )
    parser.add_argument("checkpoint", type=Path, help="any fairseq translation checkpoint")
    parser.add_argument(
        "--data",
        type=Path,
        required=True,
        help="folder of translation/prepare.py, or of fairseq-preprocess",
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for the results")
    parser.add_argument(
        "--split", choices=("test", "valid"), default="test", help="default: %(default)s"
    )
    parser.add_argument("--name", help="of the run in plots (default: the checkpoint's folder)")
    parser.add_argument("--beam", type=int, default=5, help="beam size (default: 5)")
    parser.add_argument("--lenpen", type=float, default=1.0, help="length penalty (default: 1)")
    parser.add_argument("--max-tokens", type=int, default=4000, help="in a batch (default: 4000)")
    parser.add_argument("--user-dir", help="the plugin of your own model or task, if it has one")
    parser.add_argument("--cpu", action="store_true", help="do not use a GPU")
    args = parser.parse_args(argv)
    for option in ("beam", "max_tokens"):
        if (number := getattr(args, option)) < 1:
            parser.error(f"--{option.replace('_', '-')}: expected at least 1, got {number}")
    if not math.isfinite(args.lenpen):
        parser.error(f"--lenpen: expected a finite number, got {args.lenpen}")
    return args


def main(argv: list[str] | None = None) -> int:
    """Run the command line.

    Returns:
        The exit status: 0, 2 where the user can mend it, 1 where the disk failed.
    """
    args = parse(argv)
    # force: importing fairseq configures the root logger, at DEBUG.
    logging.basicConfig(
        level=logging.INFO,
        format="%(asctime)s | %(levelname)s | %(name)s | %(message)s",
        force=True,
    )
    try:
        result = evaluate(args)
    except UserError as error:
        print(f"evaluate.py: error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"evaluate.py: error: {error}", file=sys.stderr)
        return 1
    keys = ("bleu", "chrf", "tokenised_bleu", "nll", "ece", "aurc", "accuracy")
    told = [f"{key}={result[key]:.4g}" for key in keys if key in result]
    print(*told, *([result["bleu_signature"]] if "bleu_signature" in result else []))
    return 0


if __name__ == "__main__":
    sys.exit(main())
