"""From an image of PIL to the tensor that a network sees, in training and in evaluation."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torchvision.transforms import v2

__all__ = ["Fit", "View", "eval_transform", "stats_of", "train_transform"]

CIFAR10_STATS = ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))
CIFAR100_STATS = ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762))
# Also that of every folder: it is what torchvision's and Detectron2's users of a backbone expect.
IMAGENET_STATS = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
DIGITS_STATS = ((0.3, 0.3, 0.3), (0.37, 0.37, 0.37))
_STATS = {"digits": DIGITS_STATS, "cifar10": CIFAR10_STATS, "cifar100": CIFAR100_STATS}


def stats_of(name: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return mean and deviation of a data set's channels, of pixels from 0 to 1."""
    return _STATS.get(name, IMAGENET_STATS)


@dataclass(frozen=True)
class View:
    """How a network sees the images.

    Attributes:
        augment: ``crop``, ``resized-crop`` or ``none``, as of `pskd_classification.load_splits`.
        size: side of the square that comes out, in pixels.
        hflip: probability of a flip in training.
        mean, std: of the three channels, of pixels from 0 to 1: what is normalised to 0 and 1.
    """

    augment: str
    size: int
    hflip: float
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @property
    def padding(self) -> int:
        """Black pixels on each side before a random crop; 0 without one."""
        return max(1, self.size // 8) if self.augment == "crop" else 0


def train_transform(view: View) -> v2.Compose:
    """Return the augmentations of training and the normalisation."""
    steps = [v2.ToImage()]
    if view.augment == "resized-crop":
        steps.append(v2.RandomResizedCrop(view.size, antialias=True))
    else:
        steps.append(Fit(view.size))
    if view.padding:
        steps.append(v2.RandomCrop(view.size, padding=view.padding))
    if view.hflip:
        steps.append(v2.RandomHorizontalFlip(view.hflip))
    return v2.Compose([*steps, *_normalisation(view)])


def eval_transform(view: View) -> v2.Compose:
    """Return what evaluation sees after training with `train_transform`."""
    fit = [Fit(view.size)]
    if view.augment == "resized-crop":  # ImageNet's 224 of 256
        fit = [v2.Resize(round(view.size * 256 / 224), antialias=True), v2.CenterCrop(view.size)]
    return v2.Compose([v2.ToImage(), *fit, *_normalisation(view)])


def _normalisation(view: View) -> list[v2.Transform]:
    return [v2.ToDtype(torch.float32, scale=True), v2.Normalize(view.mean, view.std)]


class Fit(torch.nn.Module):
    """Resizes to a square where an image is not one already: most are, and resizing costs."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self._resize = v2.Resize((size, size), antialias=True)
        self._size = (size, size)

    def forward(self, image: Tensor) -> Tensor:
        return image if tuple(image.shape[-2:]) == self._size else self._resize(image)
