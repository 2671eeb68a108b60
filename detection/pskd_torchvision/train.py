"""Train or evaluate torchvision's Faster or Mask R-CNN with PS-KD.

    python detection/train_torchvision.py --train voc:BCCD:train --test voc:BCCD:test \\
        --model fasterrcnn_resnet50_fpn --pskd-alpha-final 0.7 --output-dir runs/bccd
    torchrun --nproc-per-node 8 detection/train_torchvision.py --lr 0.02 \\
        --train coco:train.json:train2017 --test coco:val.json:val2017 --pskd-alpha-final 0.7

Without the --pskd options it trains torchvision's baseline. OUTPUT_DIR gets results.json,
metrics.json, checkpoint.pth at each epoch's end, and the detections in inference/. Nothing is
downloaded. Without a checkout of the project the program is `pskd-detect-torchvision`, or
python -m pskd_torchvision.train.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Mapping, Sequence

from pskd_detection import write_results

from pskd.distributed import World
from pskd.schedule import check_unchanged
from pskd_tools.program import run_program
from pskd_tools.training import run_epochs
from pskd_torchvision.evaluation import evaluate
from pskd_torchvision.job import DetectorJob, build_trainer, prepare
from pskd_torchvision.options import build_parser

PROGRAM = "train_torchvision"
#: Options of a training, beside those that shape the weights; others may change, which is logged.
FIXED = ("opt", "fingerprint")
logger = logging.getLogger(PROGRAM)


def train(job: DetectorJob) -> dict:
    """Train on from the checkpoint, if there is one; return what is known at the end."""
    args, trainer = job.args, build_trainer(job)
    epochs, period = trainer.epochs, args.eval_period or args.epochs

    def load(saved: dict) -> None:
        check_unchanged(saved["options"], {name: job.options[name] for name in FIXED})
        epochs.load_state_dict(saved["pskd"], allowed_by="--pskd-allow-schedule-change")

    run_epochs(
        trainer,
        job.begin(trainer, load),
        evaluate=lambda _epoch: flat(test(job)),
        evaluated=range(period, args.epochs, period),
        # The model in the checkpoint is the teacher of the next epoch.
        save=lambda epoch: job.save(trainer, epoch, {"pskd": epochs.state_dict()}),
        saved=range(1, args.epochs + 1),
        saves_first=True,
    )
    results = test(job)
    trainer.write(args.epochs, flat(results))
    trainer.log.close()
    return {"seconds_per_iteration": trainer.seconds_per_iteration()} | results


def test(job: DetectorJob) -> dict:
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
        output_dir=job.folder / "inference",
    )
    return results or {}


def flat(results: Mapping[str, Mapping]) -> dict[str, float]:
    """Return the numbers of a test set as ``part/name``."""
    return {f"{part}/{k}": v for part, values in results.items() for k, v in values.items()}


def run(args: argparse.Namespace, world: World) -> None:
    """Do what the command line asks for."""
    job = prepare(args, world)
    results = {"command": sys.argv, "seed": args.seed}
    found = test(job) if args.test_only else train(job)
    results |= found
    if world.is_first:
        path = write_results(args.output_dir, results, evaluation=args.test_only)
        if args.test_only:  # a training has logged them
            numbers = flat(found).items()
            logger.info("  ".join(f"{k} {v:.4g}" for k, v in numbers if v is not None))
        logger.info("results: %s", path)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status."""
    return run_program(PROGRAM, lambda: build_parser(__doc__).parse_args(argv), run)


if __name__ == "__main__":
    sys.exit(main())
