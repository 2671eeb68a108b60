#!/usr/bin/env python
"""Train or evaluate torchvision's Faster or Mask R-CNN with PS-KD.

    python detection/train_torchvision.py --train voc:BCCD:train --test voc:BCCD:test \\
        --model fasterrcnn_resnet50_fpn --pskd-alpha-final 0.7 --output-dir runs/bccd
    torchrun --nproc-per-node 8 detection/train_torchvision.py --lr 0.02 \\
        --train coco:train.json:train2017 --test coco:val.json:val2017 --pskd-alpha-final 0.7

Without the --pskd options it trains torchvision's baseline. OUTPUT_DIR gets results.json,
metrics.json, checkpoint.pth at each epoch's end, and the detections in inference/. Nothing is
downloaded.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from pskd_detection import format_table, write_results
from pskd_torchvision import checkpoint, evaluate
from pskd_torchvision.job import Job, build_trainer, prepare
from pskd_torchvision.options import build_parser

from pskd.distributed import World
from pskd_tools.program import run_program

PROGRAM = "train_torchvision"
logger = logging.getLogger(PROGRAM)


def train(job: Job) -> dict:
    """Train on from the checkpoint, if there is one; return what is known at the end."""
    args = job.args
    trainer, done = build_trainer(job)
    for epoch in range(done + 1, args.epochs + 1):
        trainer.train_epoch(epoch)
        if job.world.is_first:
            checkpoint.write(job.path, trainer, epoch, job.recorded, job.class_names)
        if args.eval_period and epoch % args.eval_period == 0 and epoch < args.epochs:
            trainer.report_test(epoch, test(job))
    results = test(job)
    trainer.report_test(args.epochs, results)
    trainer.log.close()
    return {"seconds_per_iteration": trainer.seconds_per_iteration()} | results


def test(job: Job) -> dict:
    """Return the numbers of the test set; nothing without one, and in all but the first process."""
    if job.test is None:
        return {}
    args = job.args
    results = evaluate(
        job.model,
        job.test,
        job.world,
        batch_size=args.batch_size,
        workers=args.workers,
        output_dir=Path(args.output_dir) / "inference",
    )
    return results or {}


def run(args: argparse.Namespace, world: World) -> None:
    job = prepare(args, world)
    results = {"command": sys.argv, "seed": args.seed}
    results |= test(job) if args.test_only else train(job)
    if world.is_first:
        path = write_results(args.output_dir, results, evaluation=args.test_only)
        row = results.get("bbox", {}) | results.get("confidence", {})
        logger.info("%s\n%s", path, format_table({args.model: row}))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status."""
    return run_program(PROGRAM, lambda: build_parser(__doc__).parse_args(argv), run)


if __name__ == "__main__":
    sys.exit(main())
