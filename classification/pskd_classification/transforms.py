"""From an image of PIL to the tensor that a network sees, in training and in evaluation."""

from __future__ import annotations

import torch
from torch import Tensor
from torchvision.transforms import v2

__all__ = ["eval_transform", "stats_of", "train_transform"]

CIFAR10_STATS = ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))
CIFAR100_STATS = ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762))
# Also that of every folder: it is what torchvision's and Detectron2's users of a backbone expect.
IMAGENET_STATS = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
DIGITS_STATS = ((0.3, 0.3, 0.3), (0.37, 0.37, 0.37))
_STATS = {"digits": DIGITS_STATS, "cifar10": CIFAR10_STATS, "cifar100": CIFAR100_STATS}


def stats_of(name: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return mean and deviation of a data set's channels, of pixels from 0 to 1."""
    return _STATS.get(name, IMAGENET_STATS)


def train_transform(augment: str, size: int, hflip: float, stats: tuple) -> v2.Compose:
    """Return the augmentations of training and the normalisation.

    Args:
        augment: ``crop``, ``resized-crop`` or ``none``, as of `pskd_classification.load_splits`.
        size: side of the square that comes out, in pixels.
        hflip: probability of a flip.
        stats: as of `stats_of`.
    """
    steps = [v2.ToImage()]
    if augment == "resized-crop":
        steps.append(v2.RandomResizedCrop(size, antialias=True))
    else:
        steps.append(_Fit(size))
    if augment == "crop":
        steps.append(v2.RandomCrop(size, padding=max(1, size // 8)))
    if hflip:
        steps.append(v2.RandomHorizontalFlip(hflip))
    return v2.Compose([*steps, v2.ToDtype(torch.float32, scale=True), v2.Normalize(*stats)])


def eval_transform(augment: str, size: int, stats: tuple) -> v2.Compose:
    """Return what evaluation sees after training with `train_transform`'s options."""
    fit = [_Fit(size)]
    if augment == "resized-crop":  # ImageNet's 224 of 256
        fit = [v2.Resize(round(size * 256 / 224), antialias=True), v2.CenterCrop(size)]
    to_float = v2.ToDtype(torch.float32, scale=True)
    return v2.Compose([v2.ToImage(), *fit, to_float, v2.Normalize(*stats)])


class _Fit(torch.nn.Module):
    """Resizes to a square where an image is not one already: most are, and resizing costs."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self._resize = v2.Resize((size, size), antialias=True)
        self._size = (size, size)

    def forward(self, image: Tensor) -> Tensor:
        return image if tuple(image.shape[-2:]) == self._size else self._resize(image)
