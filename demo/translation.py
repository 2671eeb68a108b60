"""Train fairseq's baseline and PS-KD side by side and print what PS-KD changed.

    python -m demo.translation                          the embedded corpus (German from English)
    python -m demo.translation --src FILE --tgt FILE    your own parallel text, plain or .gz

The embedded corpus has few pairs, a third of them misaligned, as crawled text has, and is trained
on for long: label smoothing learns the wrong pairs by heart.

The data folder, both models with their logs and evaluations, results.json, reliability.png and
risk_coverage.png go to runs/demo/translation.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from demo import part
from demo.locale_pairs import write_pairs
from demo.noise import misaligned, write_lines
from demo.steps import ROOT
from pskd_tools.report.epochs import fairseq_epochs

RECIPES = {"baseline": "demo.sh", "PS-KD": "demo_pskd.sh"}
MISALIGNED = 1 / 3
# Of the embedded corpus; your own text is trained on as the recipes say.
EPOCHS = ["--max-epoch", "100"]
AGAINST_NOISE = "--pskd-teacher memory --pskd-alpha-schedule constant --label-smoothing 0".split()
COLUMNS = {
    "bleu": ("BLEU", ".2f"),
    "nll": ("NLL", ".4f"),
    "ece": ("ECE", ".4f"),
    "aurc": ("AURC", ".4f"),
}
NOTE = (
    "BLEU: sacreBLEU {bleu_signature}.\nNLL (nats), ECE (15 bins) and AURC: of every reference "
    "token under teacher forcing. Lower is better, except for BLEU."
)


def prepare(args: argparse.Namespace, out: Path) -> Path:
    """Make the fairseq data folder, from the user's text or the embedded corpus."""
    data = out / "data"
    command: list[str | Path] = [sys.executable, ROOT / "translation" / "prepare.py"]
    if args.src:
        command += [args.src.resolve(), args.tgt.resolve()]
    else:
        held_out = {"num_valid": args.held_out, "num_test": args.held_out}
        write_pairs(out / "text", num_train=args.pairs, **held_out)
        targets = out / "text" / "train.de"
        lines = targets.read_text(encoding="utf-8").splitlines()
        write_lines(targets, misaligned(lines, MISALIGNED, seed=0))
        for split in ("train", "valid", "test"):
            command += [f"--{split}"] if split != "train" else []
            command += [out / "text" / f"{split}.en", out / "text" / f"{split}.de"]
    command += ["--source-lang", args.source_lang, "--target-lang", args.target_lang]
    command += ["--bpe-size", str(args.bpe_size), "--out", data, "--overwrite"]
    log = {"prepare.py": out / "prepare.log"}
    part.run_steps("translation 1/4", "text to fairseq data", {"prepare.py": command}, log)
    return data


def training(args: argparse.Namespace, name: str, data: Path, run: Path) -> list[str | Path]:
    """Return the command line of one of the two trainings."""
    command = [ROOT / "configs" / "translation" / RECIPES[name], data, run]
    if not args.src:
        command += EPOCHS + (AGAINST_NOISE if name == "PS-KD" else [])
    return [*command, *args.train_flags]


def epoch_records(log: Path) -> list[dict]:
    """Return what fairseq's log says of each epoch; it may still be written."""
    return fairseq_epochs(log.read_text(encoding="utf-8").rpartition("\n")[0])


def progress(record: dict, _last: dict) -> str | None:
    """Return a line for each epoch, or each tenth of many."""
    if record["epoch"] > 10 and record["epoch"] % 10:
        return None
    alpha = f"  alpha {record['alpha']:g}" if "alpha" in record else ""
    return (
        f"epoch {record['epoch']}  training NLL {record['nll_loss']:.3f} bits  "
        f"{record['wall']:.0f} s{alpha}"
    )


def evaluate(data: Path, out: Path) -> None:
    """Measure both last checkpoints on the test set."""
    runs = {name: part.folder_of(out, name) for name in RECIPES}
    script = [sys.executable, ROOT / "translation" / "evaluate.py"]
    commands = {
        name: [*script, run / "checkpoint_last.pt", "--data", data, "--out", run / "evaluation",
               "--name", name]
        for name, run in runs.items()
    }  # fmt: skip
    logs = {name: run / "evaluate.log" for name, run in runs.items()}
    part.run_steps("translation 3/4", "translating and scoring the test set", commands, logs)


def parse(argv: list[str] | None) -> argparse.Namespace:
    flags = "flags for both fairseq-train calls, such as --max-epoch 3"
    parser = part.parser_of("translation", __doc__, flags)
    parser.add_argument("--src", type=Path, help="your source text, a sentence a line")
    parser.add_argument("--tgt", type=Path, help="its translation, line by line")
    parser.add_argument("--source-lang", default="en", help="code of the source (default: en)")
    parser.add_argument("--target-lang", default="de", help="code of the target (default: de)")
    parser.add_argument("--bpe-size", type=int, default=2000, help="joint BPE merges")
    for option, what in (("--pairs", "training"), ("--held-out", "validation and test")):
        text = f"{what} pairs of the embedded corpus (default: %(default)s)"
        parser.add_argument(option, type=int, default=1000, help=text)
    return part.parse_checked(parser, argv, ("src", "tgt"), ("bpe_size", "pairs", "held_out"))


def run(args: argparse.Namespace) -> part.Report:
    """Prepare, train, evaluate, and write all files."""
    out = part.output_folder(args.out, list(RECIPES))
    data = prepare(args, out)
    commands = {name: training(args, name, data, part.folder_of(out, name)) for name in RECIPES}
    text = "training both side by side, one thread each"
    part.train("translation 2/4", text, out, commands, epoch_records, progress)
    evaluate(data, out)
    part.say("translation 4/4", f"plots and {out / 'results.json'}")
    runs = part.read_results(out, list(RECIPES))
    results = {found.name: found.numbers for found in runs}
    part.write_results(out, runs, results)
    note = NOTE.format_map(results["baseline"])
    return part.Report("translation, fairseq", COLUMNS, results, note, runs)


def main(argv: list[str] | None = None) -> int:
    return part.show(run, parse(argv))


if __name__ == "__main__":
    sys.exit(main())
