"""Small data for the tests of classification, and its train script."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pskd_classification import options
from pskd_classification import train as program
from torch.utils.data import Dataset

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "classification" / "train.py"
CLASSES = ("red", "green", "blue")
SIZE = 8


def parse(*flags: str):
    """Return train.py's options."""
    return options.parse(options.build_parser(""), flags)


class Colours(Dataset):
    """Noise in which one of three channels is a little brighter."""

    def __init__(self, count: int, seed: int) -> None:
        random = np.random.default_rng(seed)
        self.classes = CLASSES
        self.targets = [i % len(CLASSES) for i in range(count)]
        self._pixels = random.integers(0, 200, (count, SIZE, SIZE, 3), dtype=np.uint8)
        for pixels, label in zip(self._pixels, self.targets, strict=True):
            pixels[..., label] += 40

    def __len__(self) -> int:
        return len(self._pixels)

    def __getitem__(self, i: int) -> tuple[Image.Image, int]:
        return Image.fromarray(self._pixels[i]), self.targets[i]


def build(_root) -> dict[str, Colours]:
    """For --dataset classification_toys:build."""
    return {"train": Colours(42, 0), "test": Colours(21, 1)}


def build_with_validation(_root) -> dict[str, Colours]:
    return build(None) | {"val": Colours(9, 2)}


def write_folders(folder: Path, parts: dict[str, int]) -> Path:
    """Write an ImageFolder of each part."""
    for seed, (part, count) in enumerate(parts.items()):
        source = Colours(count, seed)
        for i in range(count):
            image, label = source[i]
            path = folder / part / CLASSES[label] / f"{i:03d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            image.save(path)
    return folder


FLAGS = (
    "--dataset classification_toys:build --epochs 4 --batch-size 8 --lr 0.02 --workers 0 "
    "--val-fraction 0.2 --seed 3 --device cpu"
).split()


def train(folder: Path, *flags: str) -> int:
    """Run train.py in this process; return its exit status."""
    argv = [*FLAGS, "--output-dir", str(folder), *flags]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [str(SCRIPT), *argv])
        return program.main(argv)


def checkpoint(folder: Path) -> dict:
    return torch.load(folder / "checkpoint.pth", weights_only=True)


def results(folder: Path, name: str = "results.json") -> dict:
    return json.loads((folder / name).read_text())


def same(one: object, other: object) -> bool:
    """Whether two nested values are equal bit for bit."""
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[k], other[k]) for k in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other
