"""Image data sets: what is trained on, validated on and tested on, and which sample is which."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms.v2.functional import pil_to_tensor

from pskd_classification.label_noise import LabelNoise
from pskd_classification.sources import Source, check_source, load_sources, read_image
from pskd_classification.transforms import Fit, View, eval_transform, stats_of, train_transform

__all__ = ["Images", "OddSizeError", "Splits", "load_splits"]


class Images(Dataset):
    """Some samples of a source, seen through a transform.

    Args:
        source, ids: of the whole data set.
        indices: of the samples.
        transform: from an image of PIL to a tensor.
        targets: (M,) labels of the samples in place of the source's.

    Attributes:
        targets: (M,) int64 labels.
        ids: (M,) a name for each sample, stable from run to run.
    """

    def __init__(
        self,
        source: Source,
        ids: Sequence[str],
        indices: Iterable[int],
        transform,
        targets: np.ndarray | None = None,
    ):
        self._source, self._indices, self._transform = source, list(indices), transform
        if targets is None:
            targets = np.asarray(source.targets)[self._indices]
        self.targets = torch.as_tensor(targets, device="cpu").long()
        self.ids = [ids[i] for i in self._indices]

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, row: int) -> tuple[Tensor, int]:
        return self._transform(self.picture(row)), int(self.targets[row])

    def picture(self, row: int) -> Image.Image:
        """Return an image without augmentation, upright and in mode RGB."""
        return read_image(self._source, self._indices[row], self.ids[row])

    def decode(self, size: int, *, resize: bool) -> Tensor:
        """Return all images without augmentation, (M, 3, size, size) uint8 on the CPU.

        Raises:
            OddSizeError: for an image of another size, unless it may be resized.
        """
        shape = (len(self), 3, size, size)
        pixels, fit = torch.empty(shape, dtype=torch.uint8, device="cpu"), Fit(size)
        for row, place in enumerate(pixels):
            image = self.picture(row)
            if image.size != (size, size) and not resize:
                width, height = image.size
                raise OddSizeError(
                    f"{self.ids[row]}: expected {size}x{size} pixels, got {width}x{height}"
                )
            place.copy_(fit(pil_to_tensor(image)))
        return pixels


class OddSizeError(ValueError):
    """An image has another size than the others."""


@dataclass(frozen=True)
class Splits:
    """What a run works on.

    Attributes:
        class_names: a label is a place in them.
        train: augmented.
        validation: held out of the training set, not augmented; None if nothing is.
        test: not augmented; looked at when training is over.
        fingerprint: of the ids and labels that are trained on, in their order.
        noisy: (M,) bool, which labels of ``train`` were replaced by wrong ones.
        view: how the images are seen.
    """

    class_names: tuple[str, ...]
    train: Images
    validation: Images | None
    test: Images
    fingerprint: str
    noisy: np.ndarray
    view: View


def load_splits(
    name: str,
    root: str | Path | None,
    *,
    val_fraction: float,
    split_seed: int = 0,
    augment: str = "crop",
    image_size: int | None = None,
    hflip: float | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    download: bool = False,
    num_classes: int | None = None,
    train_per_class: int | None = None,
    label_noise: LabelNoise | None = None,
) -> Splits:
    """Read a data set and divide it; everything that could not be trained on is refused here.

    Args:
        name: ``digits`` (scikit-learn's, 8x8 pixels), ``cifar10``, ``cifar100``, ``folder`` (an
            ImageFolder with ``train`` and ``test`` or ``val``; with all three ``val`` is the
            validation set), or ``MODULE:FUNCTION``, which is called with ``root`` and returns a
            mapping of ``train``, ``test`` and perhaps ``val`` to sources.
        root: the data set's folder.
        val_fraction: share of each class's training samples that is held out for validation, in
            [0, 1); 0 for none. Not used where the data set brings a validation set.
        split_seed: of the division, apart from the training's seed.
        augment: ``crop`` (padded by an eighth), ``resized-crop`` (as for ImageNet) or ``none``.
        image_size: side in pixels; None for that of the images.
        hflip: probability of a flip; None for 0.5, and 0 for digits.
        mean, std: of the channels, of pixels from 0 to 1; None for those of the data set, or
            ImageNet's.
        download: fetch CIFAR if it is not there.
        num_classes: so many classes are drawn by ``split_seed``, with all their samples; None for
            all.
        train_per_class: so many training samples of each class are drawn by ``split_seed``, after
            validation is held out; a larger draw holds a smaller one. None for all.
        label_noise: of the training labels; those of validation and test stay right.

    Raises:
        ValueError: naming the part, what was expected and what came.
    """
    sources = load_sources(name, root, download)
    class_names = tuple(str(c) for c in sources["train"].classes)
    parts = {part: _Part.of(part, source, class_names) for part, source in sources.items()}
    if num_classes is not None:
        chosen = _drawn_classes(class_names, num_classes, split_seed)
        class_names = tuple(class_names[c] for c in chosen)
        parts = {part: own.of_classes(chosen) for part, own in parts.items()}
    if "val" not in parts and val_fraction:
        held_out = _stratified(parts["train"].targets, val_fraction, split_seed)
        parts["val"] = parts["train"].rows(held_out)
        parts["train"] = parts["train"].rows(~held_out)
    if train_per_class is not None:
        targets = parts["train"].targets
        drawn = _drawn_of_each(targets, class_names, train_per_class, split_seed)
        parts["train"] = parts["train"].rows(drawn)
    clean = parts["train"].targets
    if label_noise is not None:
        parts["train"] = parts["train"]._replace(targets=label_noise.apply(clean, len(class_names)))
    size = image_size or _size_of(parts["train"])
    hflip = (0.0 if name == "digits" else 0.5) if hflip is None else hflip
    own_mean, own_std = stats_of(name)
    view = View(augment, size, hflip, tuple(mean or own_mean), tuple(std or own_std))
    train = parts["train"].seen(train_transform(view))
    held = {part: own.seen(eval_transform(view)) for part, own in parts.items() if part != "train"}
    fingerprint, noisy = _fingerprint(class_names, train), parts["train"].targets != clean
    return Splits(class_names, train, held.get("val"), held["test"], fingerprint, noisy, view)


class _Part(NamedTuple):
    """Some samples of a source: their numbers in it, (M,), their labels, (M,), and all its ids."""

    source: Source
    ids: Sequence[str]
    indices: np.ndarray
    targets: np.ndarray

    @classmethod
    def of(cls, part: str, source: Source, class_names: Sequence[str]) -> _Part:
        """Return all samples of a source, which is checked."""
        ids = check_source(part, source, class_names)
        return cls(source, ids, np.arange(len(source)), np.asarray(source.targets, np.int64))

    def rows(self, chosen: np.ndarray) -> _Part:
        """Return some of the samples, by numbers or (M,) bool."""
        return self._replace(indices=self.indices[chosen], targets=self.targets[chosen])

    def of_classes(self, chosen: np.ndarray) -> _Part:
        """Return the samples of some classes, which are counted anew."""
        some = self.rows(np.isin(self.targets, chosen))
        return some._replace(targets=np.searchsorted(chosen, some.targets))

    def seen(self, transform: Callable[[Image.Image], Tensor]) -> Images:
        """Return the samples through a transform."""
        return Images(self.source, self.ids, self.indices, transform, self.targets)


def _fingerprint(class_names: Sequence[str], train: Images) -> str:
    digest = hashlib.sha256("\n".join(class_names).encode("utf-8", "surrogateescape"))
    for name, label in zip(train.ids, train.targets.tolist(), strict=True):
        digest.update(f"\n{name}\t{label}".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()[:16]


def _drawn_classes(class_names: Sequence[str], count: int, seed: int) -> np.ndarray:
    """Return some classes in their order."""
    if count > len(class_names):
        raise ValueError(
            f"--num-classes: expected at most {len(class_names)}, which there are, got {count}"
        )
    return np.sort(np.random.default_rng(seed).permutation(len(class_names))[:count])


def _drawn_of_each(
    targets: np.ndarray, class_names: Sequence[str], count: int, seed: int
) -> np.ndarray:
    """Return the places of as many samples of each class, in their order."""
    random, drawn = np.random.default_rng(seed), []
    for label, name in enumerate(class_names):
        own = random.permutation(np.flatnonzero(targets == label))
        if len(own) < count:
            raise ValueError(
                f"--train-per-class: expected at most {len(own)}, which class {name} has, got "
                f"{count}"
            )
        drawn.append(own[:count])
    return np.sort(np.concatenate(drawn))


def _stratified(targets: np.ndarray, fraction: float, seed: int) -> np.ndarray:
    """Return which samples are held out, (M,) bool."""
    from sklearn.model_selection import train_test_split

    try:
        _, held_out = train_test_split(
            np.arange(len(targets)), test_size=fraction, random_state=seed, stratify=targets
        )
    except ValueError as error:
        raise ValueError(
            f"--val-fraction: expected a share that leaves samples of every class on both sides, "
            f"got {fraction}: {error}"
        ) from error
    return np.isin(np.arange(len(targets)), held_out)


def _size_of(part: _Part) -> int:
    width, height = read_image(part.source, 0, part.ids[0]).size
    if width != height:
        raise ValueError(
            f"--image-size: expected a number for images that are not square, got none "
            f"(the first has {width}x{height} pixels)"
        )
    return width
