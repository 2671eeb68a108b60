"""Train fairseq's baseline and PS-KD side by side and print what PS-KD changed.

    python -m demo.translation                          the embedded corpus (German from English)
    python -m demo.translation --src FILE --tgt FILE    your own parallel text, plain or .gz

The embedded corpus has few pairs, a third of them misaligned, as crawled text has, and is trained
on for long: label smoothing learns the wrong pairs by heart.

Everything lies in runs/demo/translation afterwards: the data folder, both models with their logs
and evaluations, results.json, reliability.png and risk_coverage.png.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import numpy as np

from demo.locale_pairs import write_pairs
from demo.noise import misaligned
from demo.report import Report, show
from demo.steps import (
    ROOT,
    Step,
    check_folder,
    folder_of,
    fresh_folder,
    run_all,
)
from pskd_tools.files import write_json
from pskd_tools.plots import reliability_diagram, risk_coverage_plot

OUT = Path("runs/demo/translation")
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
    "seconds_per_epoch": ("s/epoch", ".1f"),
}


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
        mixed = misaligned(targets.read_text(encoding="utf-8").splitlines(), MISALIGNED, seed=0)
        targets.write_text("".join(f"{line}\n" for line in mixed), encoding="utf-8")
        for split in ("train", "valid", "test"):
            command += [f"--{split}"] if split != "train" else []
            command += [out / "text" / f"{split}.en", out / "text" / f"{split}.de"]
    command += ["--source-lang", args.source_lang, "--target-lang", args.target_lang]
    command += ["--bpe-size", str(args.bpe_size), "--out", data, "--overwrite"]
    say(1, f"text to fairseq data, log file {out / 'prepare.log'}")
    run_all([Step("prepare.py", command, out / "prepare.log")])
    return data


def epoch_records(log: Path) -> list[dict]:
    """Return the end-of-epoch lines of a fairseq json log, which may still be written."""
    records = []
    for line in log.read_text(encoding="utf-8").split("\n")[:-1]:
        _, mark, record = line.partition("| train | ")
        if mark and record.startswith("{"):
            records.append(json.loads(record))
    return records


class EpochPrinter:
    """Prints a line for each epoch, or each tenth of many, that a training has finished."""

    def __init__(self) -> None:
        self._seen: dict[str, int] = {}

    def __call__(self, step: Step) -> None:
        records = epoch_records(step.log)
        for record in records[self._seen.get(step.name, 0) :]:
            if record["epoch"] > 10 and record["epoch"] % 10:
                continue
            alpha = f"  alpha {record['train_alpha']}" if "train_alpha" in record else ""
            print(
                f"    {step.name:<9} epoch {record['epoch']}  training NLL "
                f"{record['train_nll_loss']} bits  {float(record['train_wall']):.0f} s{alpha}",
                flush=True,
            )
        self._seen[step.name] = len(records)


def train(args: argparse.Namespace, data: Path, out: Path) -> None:
    """Train baseline and PS-KD side by side, from the same seed."""
    steps = []
    runs = {name: fresh_folder(folder_of(out, name)) for name in RECIPES}
    for name, run in runs.items():
        command = [ROOT / "configs" / "translation" / RECIPES[name], data, run]
        if not args.src:
            command += EPOCHS + (AGAINST_NOISE if name == "PS-KD" else [])
        steps.append(Step(name, [*command, *args.train_flags], run / "train.log"))
    logs = " and ".join(str(step.log) for step in steps)
    say(2, f"training both side by side, one thread each, log files {logs}")
    run_all(steps, EpochPrinter())


def evaluate(args: argparse.Namespace, data: Path, out: Path) -> dict[str, dict]:
    """Measure both last checkpoints on the test set."""
    steps = []
    for name in RECIPES:
        run = folder_of(out, name)
        command: list[str | Path] = [sys.executable, ROOT / "translation" / "evaluate.py"]
        command += [run / "checkpoint_last.pt", "--data", data, "--out", run / "evaluation"]
        steps.append(Step(name, [*command, "--name", name], run / "evaluate.log"))
    logs = " and ".join(str(step.log) for step in steps)
    say(3, f"translating and scoring the test set, log files {logs}")
    run_all(steps)
    results = {}
    for name in RECIPES:
        run = folder_of(out, name)
        results[name] = json.loads((run / "evaluation" / "evaluation.json").read_text())
        results[name]["seconds_per_epoch"] = seconds_per_epoch(epoch_records(run / "train.log"))
    return results


def seconds_per_epoch(records: list[dict]) -> float:
    """Return the mean training time of an epoch, without validation.

    The first epoch has no teacher and is left out if there are others. fairseq rounds its wall
    times to seconds, so the time comes from its updates per second.
    """
    updates = [0, *(int(record["train_num_updates"]) for record in records)]
    seconds = [
        (end - start) / float(record["train_ups"])
        for start, end, record in zip(updates, updates[1:], records, strict=False)
    ]
    return float(np.mean(seconds[1:] or seconds))


def write_results(results: dict[str, dict], out: Path) -> None:
    """Write results.json and the two plots, both runs in each."""
    runs = {}
    for name in RECIPES:
        tokens = np.load(folder_of(out, name) / "evaluation" / "confidence.npz")
        runs[name] = (tokens["confidence"], tokens["correct"])
    say(4, f"plots and {out / 'results.json'}")
    reliability_diagram(runs, out / "reliability.png")
    risk_coverage_plot(runs, out / "risk_coverage.png")
    write_json(out / "results.json", results, indent=2)


def report(results: dict[str, dict], out: Path) -> Report:
    signature = next(iter(results.values()))["bleu_signature"]
    note = (
        f"BLEU: sacreBLEU {signature}.\nNLL (nats), ECE (15 bins) and AURC: of every reference "
        "token under teacher forcing. Lower is better, except for BLEU."
    )
    folders = {name: folder_of(out, name) / "evaluation" for name in RECIPES}
    return Report("translation, fairseq", COLUMNS, results, note, folders)


def say(number: int, text: str) -> None:
    print(f"[translation {number}/4] {text}", flush=True)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m demo.translation", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--src", type=Path, help="your source text, a sentence a line")
    parser.add_argument("--tgt", type=Path, help="its translation, line by line")
    parser.add_argument("--source-lang", default="en", help="code of the source (default: en)")
    parser.add_argument("--target-lang", default="de", help="code of the target (default: de)")
    parser.add_argument("--bpe-size", type=int, default=2000, help="joint BPE merges")
    parser.add_argument(
        "--pairs",
        type=int,
        default=1000,
        help="training pairs of the embedded corpus (default: %(default)s)",
    )
    parser.add_argument(
        "--held-out",
        type=int,
        default=1000,
        help="validation and test pairs of it, each (default: %(default)s)",
    )
    parser.add_argument("--out", type=Path, default=OUT, help="default: %(default)s")
    parser.add_argument(
        "train_flags",
        nargs="*",
        metavar="-- FLAG ...",
        help="after --: flags for both fairseq-train calls, such as --max-epoch 3",
    )
    args = parser.parse_args(argv)
    if bool(args.src) != bool(args.tgt):
        parser.error("expected --src and --tgt together, got one of them")
    for option in ("bpe_size", "pairs", "held_out"):
        if (number := getattr(args, option)) < 1:
            parser.error(f"--{option.replace('_', '-')}: expected at least 1, got {number}")
    return args


def run(args: argparse.Namespace) -> Report:
    """Prepare, train, evaluate, and write all files.

    Raises:
        StepFailed: naming the step and its log.
        OSError: if the output folder cannot be made or written.
        ValueError: if the output folder holds what the demo would delete, or the embedded corpus
            is too small.
    """
    out = args.out.resolve()
    for name in RECIPES:
        check_folder(folder_of(out, name))
    out.mkdir(parents=True, exist_ok=True)
    data = prepare(args, out)
    train(args, data, out)
    results = evaluate(args, data, out)
    write_results(results, out)
    return report(results, out)


def main(argv: list[str] | None = None) -> int:
    return show(run, parse(argv))


if __name__ == "__main__":
    sys.exit(main())
