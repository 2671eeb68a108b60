"""Train or evaluate an image classifier with PS-KD.

    python classification/train.py --pskd-alpha-final 0.8
    python classification/train.py --config configs/classification/cifar100_pskd.yaml \\
        --data-dir data --output-dir runs/cifar100_pskd
    torchrun --nproc-per-node 8 classification/train.py --dataset folder --data-dir imagenet \\
        --model resnet50 --augment resized-crop --image-size 224 --pskd-alpha-final 0.3

Without the --pskd options it trains with cross-entropy. OUTPUT_DIR gets results.json,
metrics.json and .csv, checkpoint.pth at each epoch's end and best.pth, chosen on held-out training
data; `pskd report OUTPUT_DIR ...` compares runs. Without a checkout of the project the program is
`pskd-classify`, or python -m pskd_classification.train.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from statistics import median
from typing import Any

from pskd.calibration.temperature import fit_temperature
from pskd.distributed import World
from pskd_classification.evaluation import measure, rows_of
from pskd_classification.job import ClassifierJob, build_trainer, prepare
from pskd_classification.options import build_parser, parse
from pskd_classification.results import (
    read_epochs,
    write_confidence,
    write_csv,
    write_examples,
    write_test_pictures,
)
from pskd_classification.training import Trainer
from pskd_tools.checkpoint import load_weights, read_checkpoint
from pskd_tools.files import write_json
from pskd_tools.program import run_program
from pskd_tools.training import every, run_epochs

PROGRAM = "train"
TEST = "test/"  # before a figure of the test set, in metrics.json
logger = logging.getLogger(PROGRAM)


def train(job: ClassifierJob) -> dict:
    """Train on from the checkpoint, if there is one; return what is known at the end."""
    args, trainer = job.args, build_trainer(job)
    criterion = trainer.objective.criterion

    def load(saved: dict) -> None:
        criterion.load_state_dict(saved["criterion"])
        job.best = saved["best"]

    run_epochs(
        trainer,
        job.begin(trainer, load),
        evaluate=lambda epoch: evaluate(job, epoch),
        evaluated=every(args.eval_every, args.epochs),
        save=lambda epoch: save(job, trainer, epoch),
        saved=every(args.checkpoint_every, args.epochs),
    )
    trainer.log.close()
    job.epoch = args.epochs
    assert criterion.examples is not None  # a job's criterion has them
    statistics = criterion.examples.compute()
    if not job.world.is_first:
        return {}
    write_examples(job.folder, job.data.splits, statistics)
    results = {"seconds_per_epoch": median(epoch["seconds"] for epoch in read_epochs(job.folder))}
    if args.eval_test_every_epoch:
        results["best_by_test"] = best_by_test(job)
    return results


def evaluate(job: ClassifierJob, epoch: int) -> dict[str, float]:
    """Return the validation set's figures, and the test set's if they are asked for.

    The weights with the least error on the validation set are kept, and the test set's rows with
    the least error there.
    """
    figures: dict[str, float] = {}
    found = job.predict("validation")
    if found is not None:
        numbers = measure(rows_of(*found))
        job.keep_best(epoch, numbers["top1_error"])
        names = ("top1_error", "nll", "ece", "aurc")
        figures |= {f"val/{name}": numbers[name] for name in names}
    tested = job.predict("test") if job.args.eval_test_every_epoch else None
    if tested is None:
        return figures
    rows, earlier = rows_of(*tested), best_by_test(job)
    figures |= {f"{TEST}{name}": value for name, value in measure(rows).items()}
    if not earlier or figures[f"{TEST}top1_error"] < earlier["top1_error"]:
        folder = job.folder / "best_by_test"
        folder.mkdir(exist_ok=True)
        write_confidence(folder, rows, job.data.splits)
        write_test_pictures(folder, rows, job.data.splits.test)
    return figures


def best_by_test(job: ClassifierJob) -> dict:
    """Return the figures of the first epoch with the least error on the test set; or nothing."""
    epochs = [epoch for epoch in read_epochs(job.folder) if f"{TEST}top1_error" in epoch]
    if not epochs:
        return {}
    best = min(epochs, key=lambda epoch: epoch[f"{TEST}top1_error"])
    figures = {k.removeprefix(TEST): v for k, v in best.items() if k.startswith(TEST)}
    return figures | {"epoch": best["epoch"]}


def save(job: ClassifierJob, trainer: Trainer, epoch: int) -> None:
    """Write the state at an epoch's end, and the figures so far as a table; a collective."""
    criterion = trainer.objective.criterion.state_dict()
    job.save(trainer, epoch, {"criterion": criterion, "best": job.best})
    if job.world.is_first:
        write_csv(job.folder)


def test(job: ClassifierJob) -> dict:
    """Return the test set's figures, with temperature scaling fitted on the validation set."""
    validation, tested = job.predict("validation"), job.predict("test")
    if tested is None:
        return {}
    rows, scaled, temperature = rows_of(*tested), None, None
    if validation is not None:
        temperature = fit_temperature(*validation)
        scaled = rows_of(*tested, temperature)
    write_confidence(job.folder, rows, job.data.splits, scaled, temperature)
    write_test_pictures(job.folder, rows, job.data.splits.test)
    results: dict[str, Any] = {"last": measure(rows) | {"epoch": job.epoch}}
    if scaled is not None:
        results |= {"temperature": temperature, "scaled": measure(scaled)}
    return results


def test_best(job: ClassifierJob) -> dict:
    """Return the test set's figures of the checkpoint that was best on the validation set."""
    if job.data.splits.validation is None:
        return {}
    content = read_checkpoint(job.best_path, {"model", "epoch"})
    load_weights(job.best_path, job.model, content["model"])
    tested = job.predict("test")
    if tested is None:
        return {}
    return {"best": measure(rows_of(*tested)) | {"epoch": content["epoch"]}}


def run(args: argparse.Namespace, world: World) -> None:
    """Do what the command line asks for."""
    job = prepare(args, world)
    results = {"task": "classification", "command": sys.argv, "seed": args.seed}
    results |= {"dataset": args.dataset, "model": args.model, "options": job.options}
    if world.is_first:
        job.folder.mkdir(parents=True, exist_ok=True)
    if not args.test_only:
        results |= train(job)
    results |= test(job)
    if not args.test_only:
        results |= test_best(job)
    if world.is_first:
        name = "evaluation.json" if args.test_only else "results.json"
        path = write_json(job.folder / name, results, indent=2)
        shown = "  ".join(f"{k} {v:.4g}" for k, v in results["last"].items())
        logger.info("%s\ntest: %s", path, shown)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status."""
    words = sys.argv[1:] if argv is None else list(argv)
    return run_program(PROGRAM, lambda: parse(build_parser(__doc__), words), run)


if __name__ == "__main__":
    sys.exit(main())
