"""The command line of train.py, config files, and what is refused before anything is built."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path

from pskd.distributed import World
from pskd.files import shown
from pskd.schedule import SCHEDULES, check_alpha
from pskd.teachers import TEACHERS
from pskd_classification.data import Splits
from pskd_classification.label_noise import LabelNoise
from pskd_classification.precision import AMP
from pskd_classification.sources import DATASETS
from pskd_tools.files import read_yaml
from pskd_tools.options import TRAINING_RANGES, check_ranges

__all__ = ["PUBLISHED_ALPHA", "build_parser", "check", "parse", "recorded"]

PUBLISHED_ALPHA = 0.8
OPTIMIZERS = ("sgd", "adamw")
COMPILE_MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")
# name: (least, most), both allowed; of a list every entry.
RANGES = TRAINING_RANGES | {
    "lr_warmup_epochs": (0, math.inf),
    "eval_every": (1, math.inf),
    "checkpoint_every": (1, math.inf),
    "val_fraction": (0.0, 0.999),
    "image_size": (1, math.inf),
    "hflip": (0.0, 1.0),
    "split_seed": (0, 2**32 - 1),
    "mean": (0.0, 1.0),
    "std": (0.001, 1.0),
    "num_classes": (2, math.inf),
    "train_per_class": (1, math.inf),
    "label_noise_seed": (0, 2**32 - 1),
    "label_smoothing": (0.0, 1.0),
    "cutmix_alpha": (0.0, math.inf),
    "mixup_alpha": (0.0, math.inf),
    "mix_prob": (0.0, 1.0),
    "dropout": (0.0, 0.999),
    "stochastic_depth": (0.0, 0.999),
    "pskd_momentum": (0.0, 0.999),
    "pskd_top_k": (1, math.inf),
    "tf_kd_alpha": (0.0, 1.0),
    "tf_kd_correct": (0.0, 1.0),
}
# What a run that is resumed is compared with; the rest is about where and how it runs.
RECORDED = (
    "model", "dropout", "stochastic_depth", "dataset", "val_fraction", "split_seed", "num_classes",
    "train_per_class", "label_noise", "augment", "image_size", "hflip", "epochs", "batch_size",
    "opt", "lr", "momentum", "weight_decay", "lr_schedule", "lr_steps", "lr_gamma",
    "lr_warmup_epochs", "label_smoothing", "cutmix_alpha", "mixup_alpha", "mix_prob",
    "tf_kd_alpha", "amp", "seed",
)  # fmt: skip


def parse(
    description: str, argv: Sequence[str], *, parser: argparse.ArgumentParser | None = None
) -> argparse.Namespace:
    """Return the options: the defaults, over them the config's, over them the command line's.

    Args:
        description: of the program.
        argv: the command line.
        parser: `build_parser`'s with options of one's own.

    Raises:
        ValueError: for a config that cannot be read.
        SystemExit: for an option that is not known or cannot be converted.
    """
    parser = parser or build_parser(description)
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
            flags += [
                flag,
                *(str(entry) for entry in (value if isinstance(value, list) else [value])),
            ]
    unknown = parser.parse_known_args(flags)[1]
    if unknown:
        raise ValueError(f"{path}: expected options of this program, got {' '.join(unknown)}")
    before = _config_flags(parser, path.parent / base, (*above, path.resolve())) if base else []
    return [*before, *flags]


def build_parser(description: str) -> argparse.ArgumentParser:
    """Return the parser; names are those of torchvision's reference script where it has them."""
    parser = argparse.ArgumentParser(
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--config", metavar="FILE", help="YAML with these options; the command line goes over it")
    add(
        "--output-dir", "--experiments_dir", default="runs/classification",
        help="default: %(default)s",
    )  # fmt: skip
    add("--resume", action="store_true", help="go on from OUTPUT_DIR/checkpoint.pth, if it exists")
    add("--overwrite", action="store_true", help="replace a training that lies in OUTPUT_DIR")
    add("--test-only", action="store_true", help="evaluate --weights and train nothing")
    add(
        "--eval-test-every-epoch", action=argparse.BooleanOptionalAction, default=False,
        help="measure the test set too whenever the validation set is: results.json then tells "
        "best_by_test, as the paper's tables do; best.pth stays the best by validation",
    )  # fmt: skip
    add("--eval-every", type=int, default=1, metavar="N", help="epochs; default: every epoch")
    add(
        "--checkpoint-every", type=int, default=1, metavar="N",
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
    add = group.add_argument
    add(
        "--dataset", "--data_type", default="digits",
        help=f"{', '.join(DATASETS)}, or MODULE:FUNCTION; default: %(default)s",
    )  # fmt: skip
    add("--data-dir", metavar="DIR", help="of cifar10 and cifar100, or with train/ and test/")
    add("--download", action="store_true", help="fetch CIFAR if it is not there")
    add("--check-images", action="store_true", help="read every image once before the first step")
    add(
        "--val-fraction", type=float, default=0.1,
        help="of the training set, held out to choose the best checkpoint; default: %(default)s",
    )  # fmt: skip
    add(
        "--split-seed", type=int, default=0,
        help="of that division and of the two draws; default: %(default)s",
    )  # fmt: skip
    add("--num-classes", type=int, metavar="N", help="draw N classes; default: all")
    add(
        "--train-per-class", type=int, metavar="N",
        help="draw N training images of each class, of those not held out; default: all",
    )  # fmt: skip
    add(
        "--label-noise", metavar="RATE[:KIND]",
        help="share of the training labels to replace: symmetric, evenly by one of the other "
        "classes (default), or next, by the class after it; default: 0",
    )  # fmt: skip
    add("--label-noise-seed", type=int, default=0, help="of its draw; default: %(default)s")
    add(
        "--augment", choices=("crop", "resized-crop", "none"), default="crop",
        help="default: crop, padded by an eighth",
    )  # fmt: skip
    add("--image-size", type=int, help="side in pixels; default: that of the images")
    add("--hflip", type=float, help="probability of a flip; default: 0.5, of digits 0")
    add(
        "--mean", type=float, nargs=3, metavar="X",
        help="of the channels, from 0 to 1, that becomes 0; default: the data set's, or ImageNet's",
    )  # fmt: skip
    add(
        "--std", type=float, nargs=3, metavar="X",
        help="of the channels that becomes 1; default: as of --mean",
    )  # fmt: skip
    add("--workers", type=int, default=2, help="reading images, a process; default: %(default)s")
    add(
        "--data-on-device", action=argparse.BooleanOptionalAction, default=None,
        help="decode the images once and augment them on the device; default: if they have at most "
        "64x64 pixels and one size and fit; --resume goes on as the run began",
    )  # fmt: skip


def _add_training(group) -> None:
    add = group.add_argument
    add("--model", "--classifier_type", default="preact_resnet10_tiny", help="default: %(default)s")
    add("--epochs", "--end_epoch", type=int, default=20, help="default: %(default)s")
    add("--batch-size", type=int, default=128, help="images a process; default: %(default)s")
    add("--opt", choices=OPTIMIZERS, default="sgd", help="sgd with Nesterov's momentum (default)")
    add("--lr", type=float, default=0.1, help="default: %(default)s")
    add("--momentum", type=float, default=0.9, help="of sgd; default: %(default)s")
    add("--weight-decay", type=float, default=5e-4, help="default: %(default)s")
    add("--lr-schedule", choices=("steps", "cosine"), default="steps", help="default: steps")
    add(
        "--lr-steps", type=int, nargs="*",
        help="epochs after which the rate is multiplied by --lr-gamma; default: half and three "
        "quarters of the training",
    )  # fmt: skip
    add("--lr-gamma", type=float, default=0.1, help="default: %(default)s")
    add("--lr-warmup-epochs", type=int, default=0, help="default: %(default)s")
    add("--clip-grad-norm", type=float, help="default: none")
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
    add("--device", help="cpu or cuda; default: cuda if there is one")
    add("--seed", type=int, default=0, help="default: %(default)s")


def _add_regularisers(group) -> None:
    add = group.add_argument
    add("--label-smoothing", type=float, default=0.0, help="torch's, over all classes")
    add("--cutmix-alpha", type=float, default=0.0, help="of CutMix; default: 0, off")
    add("--mixup-alpha", type=float, default=0.0, help="of Mixup; default: 0, off")
    add(
        "--mix-prob", type=float, default=0.5,
        help="of a batch to be mixed, by CutMix, Mixup, or either; default: %(default)s",
    )  # fmt: skip
    add("--dropout", type=float, default=0.0, help="before the classifier; default: the model's")
    add(
        "--stochastic-depth", type=float, default=0.0,
        help="probability of the last branch to be left out; default: the model's",
    )  # fmt: skip
    add(
        "--tf-kd-alpha", type=float, default=0.0,
        help="weight of Tf-KD's virtual teacher, instead of PS-KD; default: 0, off",
    )  # fmt: skip
    add("--tf-kd-correct", type=float, default=0.99, help="its probability of the label")
    add("--tf-kd-temperature", type=float, default=20.0, help="that softens it")


def _add_pskd(group) -> None:
    add = group.add_argument
    add(
        "--pskd-alpha-final", "--alpha_T", type=float, default=0.0,
        help="weight of the teacher at the end of training (the paper's alpha_T); default: 0, off",
    )  # fmt: skip
    add(
        "--PSKD", dest="pskd_alpha_final", action="store_const", const=PUBLISHED_ALPHA,
        help=f"the published alpha_T, {PUBLISHED_ALPHA}",
    )  # fmt: skip
    add("--pskd-alpha-schedule", choices=list(SCHEDULES), default="linear", help="default: linear")
    add("--pskd-teacher", choices=TEACHERS, default="memory", help="default: memory (published)")
    add("--pskd-top-k", type=int, help="classes that the memory keeps of a row; default: all")
    add(
        "--pskd-momentum", type=float, default=0.0,
        help="weight of the past in what the memory keeps; default: 0 (published)",
    )  # fmt: skip


def check(args: argparse.Namespace) -> None:
    """Refuse what could not run, and fill in what depends on other options.

    Raises:
        ValueError: naming the option, what was expected and what came.
    """
    check_ranges(args, RANGES)
    check_alpha(args.pskd_alpha_final, "--pskd-alpha-final")
    for name in ("tf_kd_temperature", "clip_grad_norm"):
        value = getattr(args, name)
        if value is not None and not 0.0 < value < math.inf:
            raise ValueError(f"--{name.replace('_', '-')}: expected above 0, got {value}")
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
