"""The command line of train_torchvision.py, and what of it is refused before anything is built."""

from __future__ import annotations

import argparse

from pskd_detection import DetectionDataset, add_dataset_arguments

from pskd.distributed import World
from pskd.teachers import MODEL_TEACHERS
from pskd_tools.options import add_pskd_options, add_run_options, add_training_options, in_range

# What a run that is resumed is compared with; the rest is about where and how it runs.
RECORDED = (
    "model", "min_size", "max_size", "frozen_bn", "epochs", "batch_size", "opt", "lr", "momentum",
    "weight_decay", "lr_steps", "lr_gamma", "warmup_iters", "hflip", "amp", "seed",
)  # fmt: skip


def build_parser(description: str | None) -> argparse.ArgumentParser:
    """Return the parser; names are those of torchvision's reference script where it has them."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_dataset_arguments(parser, required=False)
    test_only = [
        "evaluate --weights, or with --resume the checkpoint, and train nothing", "--eval-only"
    ]  # fmt: skip
    add_run_options(parser, "runs/torchvision", test_only=test_only)
    _add_model(parser.add_argument_group("model"))
    _add_training(parser.add_argument_group("training"))
    _add_pskd(parser.add_argument_group("PS-KD; without these the run is torchvision's baseline"))
    return parser


def _add_model(group) -> None:
    add, pixels = group.add_argument, in_range(int, 1)
    add("--model", default="fasterrcnn_resnet50_fpn", help="builder; default: %(default)s")
    add("--weights", metavar="FILE", help="local state dict of the detector or of its ResNet")
    add("--frozen-bn", action="store_true", help="batch norm of the backbone stays as loaded")
    add(
        "--min-size", type=pixels, nargs="+", help="shorter side in pixels; of several one is drawn"
    )
    add("--max-size", type=pixels, help="longer side in pixels")


def _add_training(group) -> None:
    add_training_options(
        group,
        {
            "--epochs": 26, "--batch-size": 2, "--opt": "sgd", "--lr": 0.0025, "--momentum": 0.9,
            "--weight-decay": 1e-4, "--lr-steps": [16, 22], "--lr-gamma": 0.1, "--workers": 2,
            "--seed": 0,
        },
        notes={"--lr": ", for one process of 2 images (torchvision: 0.02 for 8 of them)"},
    )  # fmt: skip
    add = group.add_argument
    add(
        "--warmup-iters", type=in_range(int, 0), default=1000,
        help="ends with the first epoch at the latest; default: %(default)s",
    )  # fmt: skip
    add(
        "--hflip", type=in_range(float, 0.0, 1.0), default=0.5,
        help="probability of a flip; default: %(default)s",
    )  # fmt: skip
    add("--amp", action="store_true", help="mixed precision: float16 on a GPU, bfloat16 on a CPU")
    add(
        "--print-freq", type=in_range(int, 1), default=20,
        help="in iterations; default: %(default)s",
    )  # fmt: skip
    add(
        "--eval-period", type=in_range(int, 0), default=0,
        help="in epochs; default: 0, after training only",
    )  # fmt: skip


def _add_pskd(group) -> None:
    add_pskd_options(group)
    add = group.add_argument
    add(
        "--pskd-teacher", choices=list(MODEL_TEACHERS), default="snapshot", help="default: snapshot"
    )
    add(
        "--pskd-foreground-only", action="store_true", help="background ROIs keep their hard target"
    )
    add(
        "--pskd-label-smoothing", type=in_range(float, 0.0, 1.0), default=0.0,
        help="torch's, of the hard part of the target, over all K + 1 classes; default: 0",
    )  # fmt: skip
    add(
        "--pskd-allow-schedule-change", action="store_true",
        help="resume with another alpha, schedule or length than the checkpoint's",
    )  # fmt: skip


def check(args: argparse.Namespace) -> None:
    """Refuse options that do not go together."""
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
