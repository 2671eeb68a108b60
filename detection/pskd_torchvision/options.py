"""The command line of train_torchvision.py, and what of it is refused before anything is built."""

from __future__ import annotations

import argparse
import math

from pskd_detection import DetectionDataset, add_dataset_arguments

from pskd.distributed import World
from pskd.schedule import SCHEDULES, check_alpha
from pskd_tools.options import TRAINING_RANGES, check_ranges

__all__ = ["build_parser", "check", "recorded"]

OPTIMIZERS = ("sgd", "adamw")
# name: (least, most), both allowed; of a list every entry.
RANGES = TRAINING_RANGES | {
    "warmup_iters": (0, math.inf),
    "hflip": (0.0, 1.0),
    "min_size": (1, math.inf),
    "max_size": (1, math.inf),
    "anchor_sizes": (1, math.inf),
    "rois_per_image": (1, math.inf),
    "print_freq": (1, math.inf),
    "eval_period": (0, math.inf),
    "pskd_label_smoothing": (0.0, 1.0),
}
# What a run that is resumed is compared with; the rest is about where and how it runs.
RECORDED = (
    "model", "min_size", "max_size", "anchor_sizes", "rois_per_image", "frozen_bn", "epochs",
    "batch_size", "opt", "lr", "momentum", "weight_decay", "lr_steps", "lr_gamma", "warmup_iters",
    "hflip", "amp", "seed",
)  # fmt: skip


def build_parser(description: str) -> argparse.ArgumentParser:
    """Return the parser; names are those of torchvision's reference script where it has them."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_dataset_arguments(parser, required=False)
    add = parser.add_argument
    add("--check-images", action="store_true", help="read every image once before the first step")
    add("--output-dir", default="runs/torchvision", help="default: %(default)s")
    add("--resume", action="store_true", help="go on from OUTPUT_DIR/checkpoint.pth, if it exists")
    add("--overwrite", action="store_true", help="replace a training that lies in OUTPUT_DIR")
    add(
        "--test-only", "--eval-only", action="store_true",
        help="evaluate --weights, or with --resume the checkpoint, and train nothing",
    )  # fmt: skip
    _add_model(parser.add_argument_group("model"))
    _add_training(parser.add_argument_group("training"))
    _add_pskd(parser.add_argument_group("PS-KD; without these the run is torchvision's baseline"))
    return parser


def _add_model(group) -> None:
    add = group.add_argument
    add("--model", default="fasterrcnn_resnet50_fpn", help="builder; default: %(default)s")
    add("--weights", metavar="FILE", help="local state dict of the detector or of its ResNet")
    add("--frozen-bn", action="store_true", help="batch norm of the backbone stays as loaded")
    add("--min-size", type=int, nargs="+", help="shorter side in pixels; of several one is drawn")
    add("--max-size", type=int, help="longer side in pixels")
    add("--anchor-sizes", type=int, nargs="+", help="in pixels, for the builder's own one by one")
    add("--rois-per-image", type=int, help="that the box head is trained on")


def _add_training(group) -> None:
    add = group.add_argument
    add("--epochs", type=int, default=26, help="default: %(default)s")
    add("--batch-size", type=int, default=2, help="images a process; default: %(default)s")
    add("--opt", choices=OPTIMIZERS, default="sgd", help="default: %(default)s")
    add(
        "--lr", type=float, default=0.0025,
        help="default: %(default)s, for one process of 2 images (torchvision: 0.02 for 8 of them)",
    )  # fmt: skip
    add("--momentum", type=float, default=0.9, help="of sgd; default: %(default)s")
    add("--weight-decay", type=float, default=1e-4, help="default: %(default)s")
    add(
        "--lr-steps", type=int, nargs="*", default=[16, 22],
        help="epochs after which the rate is multiplied by --lr-gamma; default: 16 22",
    )  # fmt: skip
    add("--lr-gamma", type=float, default=0.1, help="default: %(default)s")
    add(
        "--warmup-iters", type=int, default=1000,
        help="ends with the first epoch at the latest; default: %(default)s",
    )  # fmt: skip
    add("--hflip", type=float, default=0.5, help="probability of a flip; default: %(default)s")
    add("--amp", action="store_true", help="mixed precision: float16 on a GPU, bfloat16 on a CPU")
    add("--device", help="cpu or cuda; default: cuda if there is one")
    add("--workers", type=int, default=2, help="reading images, a process; default: %(default)s")
    add("--seed", type=int, default=0, help="default: %(default)s")
    add("--print-freq", type=int, default=20, help="in iterations; default: %(default)s")
    add("--eval-period", type=int, default=0, help="in epochs; default: 0, after training only")


def _add_pskd(group) -> None:
    add = group.add_argument
    add(
        "--pskd-alpha-final", type=float, default=0.0,
        help="weight of the teacher at the end of training (the paper's alpha_T); default: 0, off",
    )  # fmt: skip
    add("--pskd-alpha-schedule", choices=list(SCHEDULES), default="linear", help="default: linear")
    add(
        "--pskd-foreground-only", action="store_true", help="background ROIs keep their hard target"
    )
    add(
        "--pskd-label-smoothing", type=float, default=0.0,
        help="torch's, of the hard part of the target, over all K + 1 classes; default: 0",
    )  # fmt: skip
    add(
        "--pskd-allow-schedule-change", action="store_true",
        help="resume with another alpha, schedule or length than the checkpoint's",
    )  # fmt: skip


def check(args: argparse.Namespace) -> None:
    """Refuse what could not run.

    Raises:
        ValueError: naming the option, what was expected and what came.
    """
    check_ranges(args, RANGES)
    check_alpha(args.pskd_alpha_final, "--pskd-alpha-final")
    if not args.test_only and not args.train:
        raise ValueError("--train: expected a training set, got none")
    if args.test_only and not args.test:
        raise ValueError("--test: expected a test set with --test-only, got none")
    if args.eval_period and not args.test:
        raise ValueError("--test: expected a test set with --eval-period, got none")
    if args.test_only and not (args.weights or args.resume):
        raise ValueError("--test-only: expected --weights FILE or --resume, got neither")


def recorded(
    args: argparse.Namespace, world: World, train: DetectionDataset | None
) -> dict[str, object]:
    """Return the options that a checkpoint keeps, so that a resumed run can be compared."""
    options: dict[str, object] = {name: getattr(args, name) for name in RECORDED}
    fingerprint = train.fingerprint if train else None
    return options | {"processes": world.size, "fingerprint": fingerprint}
