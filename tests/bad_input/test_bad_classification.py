"""Bad input to classification/train.py: its config files, options, data and checkpoints."""

from __future__ import annotations

import contextlib
import functools
import os
import tempfile
from pathlib import Path

import numpy as np
from bad_input import Part, as_command, check, every_case, loaded

NEEDS = ("torchvision", "yaml")
CONFIGS = Part(
    "Classification: config files",
    "`classification/train.py --config config.yaml`",
    NEEDS,
)
OPTIONS = Part(
    "Classification: options",
    "`classification/train.py`, before anything is built.",
    (*NEEDS, "sklearn"),
)
DATA = Part(
    "Classification: data and checkpoints",
    "Images of the classes `a` and `b` in the folders `train` and `test`; `run` holds a training "
    "of two epochs.",
    (*NEEDS, "sklearn"),
)
PARTS = [CONFIGS, OPTIONS, DATA]
RUN = "--workers 0 --device cpu --output-dir run"


def train(line: str) -> object:
    main = loaded("classification/train.py").main
    return as_command(main, "train.py", *RUN.split(), *line.split())


def configured(tried: str, text: str | bytes, says: str, *, ends: int = 1, others=()) -> None:
    """Add a case of a config file that is refused; ``others`` are written beside it."""

    def run():
        content = text.encode() if isinstance(text, str) else text
        Path("config.yaml").write_bytes(content)
        for name, other in others:
            Path(name).write_text(other)
        yield None
        return train("--config config.yaml")

    CONFIGS.add(tried, run, says, ends=ends)


CONFIGS.add(
    "a config that is not there",
    lambda: train("--config none.yaml"),
    "train: [Errno 2] No such file or directory: 'none.yaml'",
    ends=1,
)
configured(
    "a config in Latin-1",
    b"model: r\xe9seau\n",
    "train: config.yaml: expected YAML, got 'utf-8' codec can't decode byte 0xe9 in position 8...",
)
configured(
    "a list for a config",
    "- epochs\n- 3\n",
    "train: config.yaml: expected options as KEY: VALUE, got list",
)
configured(
    "an unknown key",
    "learning_rate: 0.1\n",
    "train: config.yaml: expected options of this program, got --learning-rate 0.1",
)
configured(
    "an unknown key in the base",
    "base: other.yaml\nlr: 0.1\n",
    "train: other.yaml: expected options of this program, got --rate 0.1",
    others=[("other.yaml", "rate: 0.1\n")],
)
configured(
    "two numbers where one is expected",
    "lr: [0.1, 0.2]\n",
    "train: config.yaml: expected options of this program, got 0.2",
)
configured(
    "another config that is not its base",
    "config: other.yaml\n",
    "train: config.yaml: expected base: FILE for another config, got config: FILE",
)
configured(
    "a base that is a number",
    "base: 5\n",
    "train: config.yaml: base: expected the name of a config, got 5",
)
configured(
    "a base that is not there",
    "base: none.yaml\n",
    "train: [Errno 2] No such file or directory: 'none.yaml'",
)
configured(
    "bases in a circle",
    "base: other.yaml\n",
    "train: config.yaml: expected a base that does not lead back to it, got one",
    others=[("other.yaml", "base: config.yaml\n")],
)


def refused(tried: str, line: str, says: str, ends: int = 1) -> None:
    OPTIONS.add(tried, lambda: train(line), says, ends=ends)


for _line, _says in (
    ("--lr nan", "--lr: expected 0 or more, got nan"),
    ("--epochs 0", "--epochs/--end_epoch: expected 1 or more, got 0"),
    ("--val-fraction 1", "--val-fraction: expected 0 to 0.999, got 1.0"),
    ("--mean 125.3 123 113.9", "--mean: expected 0 to 1, got 125.3"),
    ("--pskd-alpha-final 1.5", "--pskd-alpha-final/--alpha_T: expected 0 to 1, got 1.5"),
):
    refused(f"`{_line}`", _line, f"train.py: error: argument {_says}", ends=2)
for _line, _says in (
    (
        "--train-per-class 500",
        "train: --train-per-class: expected at most ..., which class 0 has, got 500",
    ),
    ("--num-classes 11", "train: --num-classes: expected at most 10, which there are, got 11"),
    ("--device tpu", "train: --device: expected cpu, cuda or cuda:NUMBER, got 'tpu'"),
    ("--device cuda:99", "train: --device: expected one that torch finds, got cuda:99 of ... GPUs"),
    (
        "--dataset mnist",
        "train: --dataset: expected one of digits, cifar10, cifar100, folder or MODULE:FUNCTION, "
        "got 'mnist'",
    ),
    (
        "--dataset nowhere:build",
        "train: --dataset: expected MODULE:FUNCTION, got 'nowhere:build': No module named "
        "'nowhere'",
    ),
    ("--dataset cifar10", "train: --data-dir: expected the folder of cifar10, got none"),
    (
        "--dataset cifar10 --data-dir here",
        "train: --data-dir: expected cifar10 in here, got none (--download fetches it)...",
    ),
    (
        "--model alexnet2",
        "train: --model: expected one of preact_resnet18, preact_resnet10_tiny, "
        "preact_resnet18_published, preact_resnet101_published, a classifier of torchvision or "
        "timm:NAME, got 'alexnet2'",
    ),
    (
        "--pskd-alpha-final 0.8 --pskd-top-k 11",
        "train: top_k: expected 1 to 10 classes, got 11",
    ),
    (
        "--pskd-alpha-final 0.8 --tf-kd-alpha 0.5",
        "train: --tf-kd-alpha: expected 0 with PS-KD, which has a teacher, got both",
    ),
    (
        "--pskd-alpha-final 0.8 --cutmix-alpha 1 --mix-prob 1",
        "train: --mix-prob: expected below 1 with the memory teacher, which learns from batches "
        "that are not mixed (or --pskd-teacher snapshot), got 1",
    ),
    (
        "--test-only",
        "train: --weights: expected a checkpoint to evaluate with --test-only, got none",
    ),
    (
        "--resume --weights best.pth",
        "train: --weights: expected none with --resume, got both",
    ),
    ("--weights none.pth", "train: none.pth: expected a checkpoint of this program, got File..."),
):
    refused(f"`{_line}`", _line, _says)
refused(
    "`--alpha 0.8`, which is no option",
    "--alpha 0.8",
    "train.py: error: unrecognized arguments: --alpha 0.8",
    ends=2,
)


@OPTIONS.case("a file for `--output-dir`", "train: [Errno 17] File exists: 'run'", ends=1)
def _output_is_a_file():
    Path("run").write_text("notes")
    yield None
    return train("--dataset digits --epochs 1")


# ---- data and checkpoints ------------------------------------------------------------------------


def write_images(count: int = 6, classes: str = "ab", parts=("train", "test")) -> None:
    from PIL import Image

    rng = np.random.default_rng(0)
    for part in parts:
        for label in classes:
            folder = Path(part, label)
            folder.mkdir(parents=True)
            for number in range(count):
                pixels = rng.integers(0, 255, (8, 8, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{number}.png")


FOLDER = "--dataset folder --data-dir . --batch-size 4 --val-fraction 0 --lr 0.01 --epochs 2"
PSKD = f"{FOLDER} --pskd-alpha-final 0.8"


@functools.cache
def _trained() -> dict[str, bytes]:
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        write_images()
        assert train(PSKD) == 0
        return {path.name: path.read_bytes() for path in Path("run").iterdir() if path.is_file()}


def write_run() -> None:
    """Write the images and what a training of them left."""
    files = _trained()
    write_images()
    Path("run").mkdir()
    for name, content in files.items():
        Path("run", name).write_bytes(content)


def going_on(tried: str, line: str, says: str, spoil=lambda: None, **options) -> None:
    """Add a case of a training that cannot be gone on with, or of weights that do not fit."""

    def run():
        write_run()
        spoil()
        yield None
        return train(line)

    DATA.add(tried, run, f"train: {says}", ends=1, **options)


CHECKPOINT = Path("run/checkpoint.pth")
going_on(
    "a training over another one",
    FOLDER,
    "--output-dir: expected a folder without a training, got run/checkpoint.pth (--resume goes on "
    "with it, --overwrite replaces it)",
)
going_on(
    "`--resume` from a checkpoint cut off",
    f"{PSKD} --resume",
    "run/checkpoint.pth: expected a checkpoint of this program, got ...",
    lambda: os.truncate(CHECKPOINT, CHECKPOINT.stat().st_size // 2),
)
going_on(
    "`--resume` with another alpha",
    f"{PSKD} --resume --pskd-alpha-final 0.5",
    "run/checkpoint.pth: alpha_final: expected 0.8, with which the checkpoint was trained, got 0.5",
)
going_on(
    "`--resume` with another network",
    f"{PSKD} --resume --model preact_resnet18",
    "run/checkpoint.pth: model: expected 'preact_resnet10_tiny', with which the checkpoint was "
    "trained, got 'preact_resnet18'",
)
going_on(
    "`--resume` with another label",
    f"{PSKD} --resume",
    "run/checkpoint.pth: fingerprint: expected '...', with which the checkpoint was trained, "
    "got '...'",
    lambda: [
        Path("train/a/0.png").rename("train/b/9.png"),
        Path("train/b/0.png").rename("train/a/9.png"),
    ],
)
going_on(
    "`--resume` with an image less",
    f"{PSKD} --resume",
    "run/checkpoint.pth: samples: expected 12, with which the checkpoint was trained, got 11",
    lambda: Path("train/a/0.png").unlink(),
)
going_on(
    "weights of other classes",
    f"{FOLDER} --test-only --weights run/checkpoint.pth",
    "run/checkpoint.pth: expected the classes a, c, got a, b",
    lambda: [Path(part, "b").rename(Path(part, "c")) for part in ("train", "test")],
)
going_on(
    "weights of another network",
    f"{FOLDER} --test-only --weights run/checkpoint.pth --model preact_resnet18",
    "run/checkpoint.pth: expected the weights of this model: size mismatch for ...",
)


def imaged(tried: str, says: str, spoil, line: str = FOLDER, **options) -> None:
    """Add a case of images that cannot be trained on."""

    def run():
        write_images()
        spoil()
        yield None
        return train(line)

    DATA.add(tried, run, f"train: {says}", ends=1, **options)


imaged(
    "no folder `test`",
    "--data-dir: expected the folders train and test (or val) in ., got train",
    lambda: Path("test").rename("elsewhere"),
)
imaged(
    "a class without an image",
    "--data-dir: Found no valid file for the classes c...",
    lambda: Path("train/c").mkdir(),
)
imaged(
    "test images of another class",
    "test: expected the classes of the training set, differs in: b, c",
    lambda: Path("test/b").rename("test/c"),
)
imaged(
    "more held out than a class has",
    "--val-fraction: expected a share that leaves samples of every class on both sides, got "
    "0.05: ...",
    lambda: None,
    f"{FOLDER} --val-fraction 0.05",
)
imaged(
    "a file that is not an image",
    "train/a/3.png: expected an image, got cannot identify image file ...train/a/3.png...",
    lambda: Path("train/a/3.png").write_text("a picture"),
)
imaged(
    "a learning rate that is too high",
    "epoch ..., iteration ...: expected a finite loss, got ... (often --lr is too high)",
    lambda: None,
    f"{FOLDER} --lr 1e30",
    leaves=("run/*",),
)


@every_case(*PARTS)
def test_what_the_user_sees(case, tmp_path):
    check(case, tmp_path)
