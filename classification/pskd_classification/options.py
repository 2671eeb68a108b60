"""The command line of train.py, config files, and what is refused before anything is built."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from pskd.distributed import World
from pskd.files import shown
from pskd.teachers import TEACHERS
from pskd_classification.data import Splits
from pskd_classification.label_noise import LabelNoise
from pskd_classification.sources import DATASETS
from pskd_tools.files import read_yaml
from pskd_tools.options import add_pskd_options, add_run_options, add_training_options, in_range
from pskd_tools.training import AMP

__all__ = ["PUBLISHED_ALPHA", "build_parser", "check", "parse", "recorded"]

PUBLISHED_ALPHA = 0.8
COMPILE_MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")
# What a run that is resumed is compared with; the rest is about where and how it runs.
RECORDED = (
    "model", "dropout", "dataset", "val_fraction", "split_seed", "num_classes", "train_per_class",
    "label_noise", "augment", "image_size", "hflip", "epochs", "batch_size", "opt", "lr",
    "momentum", "weight_decay", "lr_schedule", "lr_steps", "lr_gamma", "label_smoothing",
    "cutmix_alpha", "mixup_alpha", "mix_prob", "tf_kd_alpha", "amp", "seed",
)  # fmt: skip


def parse(parser: argparse.ArgumentParser, argv: Sequence[str]) -> argparse.Namespace:
    """Return the options: the defaults, over them the config's, over them the command line's.

    Raises:
        ValueError: for a config that cannot be read.
        SystemExit: for an option that is not known or cannot be converted.
    """
    first = argparse.ArgumentParser(add_help=False)
    first.add_argument("--config")
    config = first.parse_known_args(argv)[0].config
    return parser.parse_args([*(_config_flags(parser, Path(config)) if config else []), *argv])


def _config_flags(
    parser: argparse.ArgumentParser, path: Path, above: tuple[Path, ...] = ()
) -> list[str]:
    """Return a config file's options, those of its ``base`` first, as a command line has them."""
    if path.resolve() in above:
        raise ValueError(f"{path}: expected a base that does not lead back to it, got one")
    options = read_yaml(path) or {}
    if not isinstance(options, dict):
        raise ValueError(f"{path}: expected options as KEY: VALUE, got {type(options).__name__}")
    base = options.pop("base", None)
    if not isinstance(base, str | None):
        raise ValueError(f"{path}: base: expected the name of a config, got {shown(base)}")
    if "config" in options:
        raise ValueError(f"{path}: expected base: FILE for another config, got config: FILE")
    flags: list[str] = []
    for key, value in options.items():
        flag = "--" + str(key).replace("_", "-")
        if isinstance(value, bool):
            flags.append(flag if value else f"--no-{flag[2:]}")
        else:
            flags += [flag, *map(str, value if isinstance(value, list) else [value])]
    unknown = parser.parse_known_args(flags)[1]
    if unknown:
        raise ValueError(f"{path}: expected options of this program, got {' '.join(unknown)}")
    before = _config_flags(parser, path.parent / base, (*above, path.resolve())) if base else []
    return [*before, *flags]


def build_parser(description: str | None) -> argparse.ArgumentParser:
    """Return the parser; names are those of torchvision's reference script where it has them."""
    parser = argparse.ArgumentParser(
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--config", metavar="FILE", help="YAML with these options; the command line goes over it")
    test_only = ["evaluate --weights and train nothing"]
    add_run_options(parser, "runs/classification", "--experiments_dir", test_only=test_only)
    add(
        "--eval-test-every-epoch", action=argparse.BooleanOptionalAction, default=False,
        help="measure the test set too whenever the validation set is: results.json then tells "
        "best_by_test, as the paper's tables do; best.pth stays the best by validation",
    )  # fmt: skip
    add(
        "--eval-every", type=in_range(int, 1), default=1, metavar="N",
        help="epochs, and the last; default: every epoch",
    )  # fmt: skip
    add(
        "--checkpoint-every", type=in_range(int, 1), default=1, metavar="N",
        help="epochs, and the last; default: every epoch",
    )  # fmt: skip
    add(
        "--weights", metavar="FILE", help="a checkpoint of this script to start from or to evaluate"
    )
    _add_data(parser.add_argument_group("data"))
    _add_training(parser.add_argument_group("model and training"))
    _add_regularisers(parser.add_argument_group("regularisers; each goes with every other"))
    _add_pskd(parser.add_argument_group("PS-KD; without these the run is cross-entropy"))
    return parser


def _add_data(group) -> None:
    add, seed = group.add_argument, in_range(int, 0, 2**32 - 1)
    add(
        "--dataset", "--data_type", default="digits",
        help=f"{', '.join(DATASETS)}, or MODULE:FUNCTION; default: %(default)s",
    )  # fmt: skip
    add("--data-dir", metavar="DIR", help="of cifar10 and cifar100, or with train/ and test/")
    add("--download", action="store_true", help="fetch CIFAR if it is not there")
    add(
        "--val-fraction", type=in_range(float, 0.0, 0.999), default=0.1,
        help="of the training set, held out to choose the best checkpoint; default: %(default)s",
    )  # fmt: skip
    add(
        "--split-seed", type=seed, default=0,
        help="of that division and of the two draws; default: %(default)s",
    )  # fmt: skip
    add("--num-classes", type=in_range(int, 2), metavar="N", help="draw N classes; default: all")
    add(
        "--train-per-class", type=in_range(int, 1), metavar="N",
        help="draw N training images of each class, of those not held out; default: all",
    )  # fmt: skip
    add(
        "--label-noise", metavar="RATE[:KIND]",
        help="share of the training labels to replace: symmetric, evenly by one of the other "
        "classes (default), or next, by the class after it; default: 0",
    )  # fmt: skip
    add("--label-noise-seed", type=seed, default=0, help="of its draw; default: %(default)s")
    add(
        "--augment", choices=("crop", "resized-crop", "none"), default="crop",
        help="default: crop, padded by an eighth",
    )  # fmt: skip
    add("--image-size", type=in_range(int, 1), help="side in pixels; default: that of the images")
    add(
        "--hflip", type=in_range(float, 0.0, 1.0),
        help="probability of a flip; default: 0.5, of digits 0",
    )  # fmt: skip
    add(
        "--mean", type=in_range(float, 0.0, 1.0), nargs=3, metavar="X",
        help="of the channels, from 0 to 1, that becomes 0; default: the data set's, or ImageNet's",
    )  # fmt: skip
    add(
        "--std", type=in_range(float, 0.001, 1.0), nargs=3, metavar="X",
        help="of the channels that becomes 1; default: as of --mean",
    )  # fmt: skip
    add(
        "--data-on-device", action=argparse.BooleanOptionalAction, default=None,
        help="decode the images once and augment them on the device; default: if they have at most "
        "64x64 pixels and one size and fit; --resume goes on as the run began",
    )  # fmt: skip


def _add_training(group) -> None:
    add = group.add_argument
    add("--model", "--classifier_type", default="preact_resnet10_tiny", help="default: %(default)s")
    add_training_options(
        group,
        {
            "--epochs": 20, "--batch-size": 128, "--opt": "sgd", "--lr": 0.1, "--momentum": 0.9,
            "--weight-decay": 5e-4, "--lr-gamma": 0.1, "--workers": 2, "--seed": 0,
        },
        aliases={"--epochs": "--end_epoch"},
        notes={
            "--opt": ", with Nesterov's momentum",
            "--lr-steps": "half and three quarters of the training",
        },
    )  # fmt: skip
    add("--lr-schedule", choices=("steps", "cosine"), default="steps", help="default: steps")
    add(
        "--amp", nargs="?", choices=list(AMP), const=True, default=False,
        help="mixed precision; alone fp16 on a GPU, bf16 on a CPU",
    )  # fmt: skip
    add("--no-amp", dest="amp", action="store_false", help="the default")
    add(
        "--compile", action=argparse.BooleanOptionalAction, default=False,
        help="torch.compile; a smaller last batch runs without",
    )  # fmt: skip
    add(
        "--compile-mode", choices=COMPILE_MODES,
        help="of torch.compile, which it turns on; reduce-overhead replays CUDA graphs",
    )  # fmt: skip
    add("--channels-last", action=argparse.BooleanOptionalAction, default=False)


def _add_regularisers(group) -> None:
    share, above_0 = in_range(float, 0.0, 1.0), in_range(float, 0.0)
    for flag, kind, default, told in (
        ("--label-smoothing", share, 0.0, "torch's, over all classes; default: 0"),
        ("--cutmix-alpha", above_0, 0.0, "of CutMix; default: 0, off"),
        ("--mixup-alpha", above_0, 0.0, "of Mixup; default: 0, off"),
        (
            "--mix-prob", share, 0.5,
            "of a batch to be mixed, by CutMix, Mixup, or either; default: %(default)s",
        ),
        (
            "--dropout", in_range(float, 0.0, 0.999), 0.0,
            "before the classifier; default: the model's",
        ),
        (
            "--tf-kd-alpha", share, 0.0,
            "weight of Tf-KD's virtual teacher, instead of PS-KD; default: 0, off",
        ),
    ):  # fmt: skip
        group.add_argument(flag, type=kind, default=default, help=told)


def _add_pskd(group) -> None:
    add_pskd_options(group, "--alpha_T")
    add = group.add_argument
    add(
        "--PSKD", dest="pskd_alpha_final", action="store_const", const=PUBLISHED_ALPHA,
        help=f"the published alpha_T, {PUBLISHED_ALPHA}",
    )  # fmt: skip
    add("--pskd-teacher", choices=TEACHERS, default="memory", help="default: memory (published)")
    add(
        "--pskd-top-k", type=in_range(int, 1),
        help="classes that the memory keeps of a row; default: all",
    )  # fmt: skip
    add(
        "--pskd-momentum", type=in_range(float, 0.0, 0.999), default=0.0,
        help="weight of the past in what the memory keeps; default: 0 (published)",
    )  # fmt: skip


def check(args: argparse.Namespace) -> None:
    """Refuse options that do not go together, and fill in what depends on others.

    Raises:
        ValueError: naming the option, what was expected and what came.
    """
    if args.tf_kd_alpha and args.pskd_alpha_final:
        raise ValueError("--tf-kd-alpha: expected 0 with PS-KD, which has a teacher, got both")
    if args.test_only and not args.weights:
        raise ValueError("--weights: expected a checkpoint to evaluate with --test-only, got none")
    if args.resume and args.weights:
        raise ValueError("--weights: expected none with --resume, got both")
    mixes = args.cutmix_alpha or args.mixup_alpha
    if args.pskd_alpha_final and args.pskd_teacher == "memory" and mixes and args.mix_prob == 1:
        raise ValueError(
            "--mix-prob: expected below 1 with the memory teacher, which learns from batches that "
            "are not mixed (or --pskd-teacher snapshot), got 1"
        )
    noise = LabelNoise.parse(args.label_noise, args.label_noise_seed)
    args.label_noise = None if noise is None else str(noise)
    args.compile = args.compile or args.compile_mode is not None
    if args.lr_steps is None:
        args.lr_steps = [args.epochs // 2, args.epochs * 3 // 4]


def recorded(args: argparse.Namespace, world: World, splits: Splits) -> dict[str, object]:
    """Return the options that a checkpoint keeps, so that a resumed run can be compared."""
    options: dict[str, object] = {name: getattr(args, name) for name in RECORDED}
    data = {"fingerprint": splits.fingerprint, "samples": len(splits.train)}
    data |= {"noisy_samples": int(splits.noisy.sum()), "noisy_share": float(splits.noisy.mean())}
    data |= {"mean": list(splits.view.mean), "std": list(splits.view.std)}
    data["label_noise_seed"] = args.label_noise_seed if args.label_noise else None
    return options | data | {"processes": world.size}
