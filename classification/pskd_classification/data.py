"""Image data sets: what is trained on, validated on and tested on, and which sample is which."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from pskd_classification.sources import Source, as_rgb, check_source, load_sources
from pskd_classification.transforms import eval_transform, stats_of, train_transform

__all__ = ["Images", "Splits", "load_splits"]


class Images(Dataset):
    """Some samples of a source, seen through a transform.

    Attributes:
        targets: (M,) int64 labels.
        ids: (M,) a name for each sample, stable from run to run.
    """

    def __init__(self, source: Source, ids: Sequence[str], indices: Iterable[int], transform):
        self._source, self._indices, self._transform = source, list(indices), transform
        self.targets = torch.as_tensor(source.targets)[self._indices].long()
        self.ids = [ids[i] for i in self._indices]

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, row: int) -> tuple[Tensor, int]:
        try:
            image, label = self._source[self._indices[row]]
        except (OSError, SyntaxError) as error:  # what PIL raises for a damaged file
            raise ValueError(f"{self.ids[row]}: expected an image, got {error}") from error
        return self._transform(as_rgb(image)), int(label)

    def picture(self, row: int) -> Image.Image:
        """Return the image as it is in the source, for a report."""
        return as_rgb(self._source[self._indices[row]][0])


@dataclass(frozen=True)
class Splits:
    """What a run works on.

    Attributes:
        class_names: a label is a place in them.
        train: augmented.
        validation: held out of the training set, not augmented; None if nothing is.
        test: not augmented; looked at when training is over.
        fingerprint: of the ids and labels that are trained on, in their order.
    """

    class_names: tuple[str, ...]
    train: Images
    validation: Images | None
    test: Images
    fingerprint: str


def load_splits(
    name: str,
    root: str | Path | None,
    *,
    val_fraction: float,
    split_seed: int = 0,
    augment: str = "crop",
    image_size: int | None = None,
    hflip: float | None = None,
    download: bool = False,
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
        download: fetch CIFAR if it is not there.

    Raises:
        ValueError: naming the part, what was expected and what came.
    """
    sources = load_sources(name, root, download)
    class_names = tuple(str(c) for c in sources["train"].classes)
    ids = {part: check_source(part, source, class_names) for part, source in sources.items()}
    indices = {part: np.arange(len(source)) for part, source in sources.items()}
    if "val" not in sources and val_fraction:
        labels = np.asarray(sources["train"].targets)
        held_out = _stratified(labels, val_fraction, split_seed)
        sources["val"], ids["val"] = sources["train"], ids["train"]
        indices["val"], indices["train"] = held_out, np.setdiff1d(indices["train"], held_out)
    size = image_size or _size_of(sources["train"])
    hflip = (0.0 if name == "digits" else 0.5) if hflip is None else hflip
    stats = stats_of(name)
    seen = {"train": train_transform(augment, size, hflip, stats)}
    seen["val"] = seen["test"] = eval_transform(augment, size, stats)
    images = {
        part: Images(source, ids[part], indices[part], seen[part])
        for part, source in sources.items()
    }
    train = images["train"]
    fingerprint = _fingerprint(class_names, train)
    return Splits(class_names, train, images.get("val"), images["test"], fingerprint)


def _fingerprint(class_names: Sequence[str], train: Images) -> str:
    digest = hashlib.sha256("\n".join(class_names).encode())
    for name, label in zip(train.ids, train.targets.tolist(), strict=True):
        digest.update(f"\n{name}\t{label}".encode())
    return digest.hexdigest()[:16]


def _stratified(labels: np.ndarray, fraction: float, seed: int) -> np.ndarray:
    from sklearn.model_selection import train_test_split

    try:
        _, held_out = train_test_split(
            np.arange(len(labels)), test_size=fraction, random_state=seed, stratify=labels
        )
    except ValueError as error:
        raise ValueError(
            f"--val-fraction: expected a share that leaves samples of every class on both sides, "
            f"got {fraction}: {error}"
        ) from error
    return np.sort(held_out)


def _size_of(source: Source) -> int:
    width, height = as_rgb(source[0][0]).size
    if width != height:
        raise ValueError(
            f"--image-size: expected a number for images that are not square, got none "
            f"(the first has {width}x{height} pixels)"
        )
    return width
