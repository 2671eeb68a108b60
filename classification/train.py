#!/usr/bin/env python
"""Train or evaluate an image classifier with PS-KD.

    python classification/train.py --pskd-alpha-final 0.8
    python classification/train.py --config configs/classification/cifar100_pskd.yaml \\
        --data-dir data --output-dir runs/cifar100_pskd
    torchrun --nproc-per-node 8 classification/train.py --dataset folder --data-dir imagenet \\
        --model resnet50 --augment resized-crop --image-size 224 --pskd-alpha-final 0.3

Without the --pskd options it trains with cross-entropy. OUTPUT_DIR gets results.json,
metrics.json and .csv, checkpoint.pth at each epoch's end and best.pth, chosen on held-out training
data; `pskd report OUTPUT_DIR ...` compares runs.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from statistics import median

from pskd_classification.evaluation import measure, rows_of
from pskd_classification.job import BEST, Job, build_trainer, keep_best, predict_part, prepare, save
from pskd_classification.options import parse
from pskd_classification.results import (
    read_epochs,
    write_confidence,
    write_csv,
    write_examples,
    write_test_pictures,
)

from pskd.calibration.temperature import fit_temperature
from pskd.distributed import World
from pskd_tools.checkpoint import load_weights, read_checkpoint
from pskd_tools.files import write_json
from pskd_tools.log import MetricsLog
from pskd_tools.program import run_program

PROGRAM = "train"
TEST = "test/"  # before a figure of the test set, in metrics.json
logger = logging.getLogger(PROGRAM)


def train(job: Job) -> dict:
    """Train on from the checkpoint, if there is one; return what is known at the end."""
    trainer, done = build_trainer(job)
    log = MetricsLog(job.folder if job.world.is_first else None, done)
    for epoch in range(done + 1, job.args.epochs + 1):
        record, is_last = trainer.train_epoch(epoch), epoch == job.args.epochs
        if is_last or epoch % job.args.eval_every == 0:
            keep_best(job, epoch, validate(job, record))
            if job.args.eval_test_every_epoch:
                watch_test(job, record)
        log.write({"epoch": epoch, "iteration": epoch * trainer.iterations - 1} | record)
        if is_last or epoch % job.args.checkpoint_every == 0:
            save(job, trainer, epoch)
        if job.world.is_first:
            write_csv(job.folder)
    log.close()
    job.epoch = job.args.epochs
    statistics = trainer.objective.criterion.examples.compute()
    if not job.world.is_first:
        return {}
    write_examples(job.folder, job.splits, statistics)
    results = {"seconds_per_epoch": median(epoch["seconds"] for epoch in read_epochs(job.folder))}
    if job.args.eval_test_every_epoch:
        results["best_by_test"] = best_by_test(job)
    return results


def validate(job: Job, record: dict) -> float | None:
    """Add the validation set's figures to an epoch's; return its error in the first process."""
    found = predict_part(job, "validation")
    if found is None:
        return None
    numbers = measure(rows_of(*found))
    record |= {f"val/{name}": numbers[name] for name in ("top1_error", "nll", "ece", "aurc")}
    return numbers["top1_error"]


def watch_test(job: Job, record: dict) -> None:
    """Add the test set's figures to an epoch's, and keep its rows if it has the least error yet."""
    found = predict_part(job, "test")
    if found is None:
        return
    rows, earlier = rows_of(*found), best_by_test(job)
    record |= {f"{TEST}{name}": value for name, value in measure(rows).items()}
    if not earlier or record[f"{TEST}top1_error"] < earlier["top1_error"]:
        folder = job.folder / "best_by_test"
        folder.mkdir(exist_ok=True)
        write_confidence(folder, rows, job.splits)
        write_test_pictures(folder, rows, job.splits.test)


def best_by_test(job: Job) -> dict:
    """Return the figures of the first epoch with the least error on the test set; or nothing."""
    epochs = [epoch for epoch in read_epochs(job.folder) if f"{TEST}top1_error" in epoch]
    if not epochs:
        return {}
    best = min(epochs, key=lambda epoch: epoch[f"{TEST}top1_error"])
    figures = {k.removeprefix(TEST): v for k, v in best.items() if k.startswith(TEST)}
    return figures | {"epoch": best["epoch"]}


def test(job: Job) -> dict:
    """Return the test set's figures, with temperature scaling fitted on the validation set."""
    validation, tested = predict_part(job, "validation"), predict_part(job, "test")
    if tested is None:
        return {}
    rows, scaled, temperature = rows_of(*tested), None, None
    if validation is not None:
        temperature = fit_temperature(*validation)
        scaled = rows_of(*tested, temperature)
    write_confidence(job.folder, rows, job.splits, scaled, temperature)
    write_test_pictures(job.folder, rows, job.splits.test)
    results = {"last": measure(rows) | {"epoch": job.epoch}}
    if scaled is not None:
        results |= {"temperature": temperature, "scaled": measure(scaled)}
    return results


def test_best(job: Job) -> dict:
    """Return the test set's figures of the checkpoint that was best on the validation set."""
    if job.splits.validation is None:
        return {}
    path = job.folder / BEST
    content = read_checkpoint(path, {"model", "epoch"})
    load_weights(path, job.model, content["model"])
    tested = predict_part(job, "test")
    if tested is None:
        return {}
    return {"best": measure(rows_of(*tested)) | {"epoch": content["epoch"]}}


def run(args: argparse.Namespace, world: World) -> None:
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
    return run_program(PROGRAM, lambda: parse(__doc__, words), run)


if __name__ == "__main__":
    sys.exit(main())
