"""Image data sets: what is trained on, validated on and tested on, and which sample is which.

A *source* is a map-style data set of ``(image, label)``, the image in PIL, with ``classes`` (names)
and ``targets`` (labels); optionally ``ids``, a name for each sample, as torchvision's data sets
have or nearly so.
"""

from __future__ import annotations

import hashlib
import importlib
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
import torchvision
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms import v2

__all__ = ["DATASETS", "Images", "Splits", "check_source", "load_splits"]

CIFAR10_STATS = ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))
CIFAR100_STATS = ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762))
# Also that of every folder: it is what torchvision's and Detectron2's users of a backbone expect.
IMAGENET_STATS = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
DIGITS_STATS = ((0.3, 0.3, 0.3), (0.37, 0.37, 0.37))
DATASETS = ("digits", "cifar10", "cifar100", "folder")
DIGITS_TEST_SHARE = 0.3
_STATS = {"digits": DIGITS_STATS, "cifar10": CIFAR10_STATS, "cifar100": CIFAR100_STATS}


class Source(Protocol):
    """What samples are read from."""

    @property
    def classes(self) -> Sequence[object]: ...

    @property
    def targets(self) -> Sequence[int] | np.ndarray | Tensor: ...

    def __len__(self) -> int: ...

    def __getitem__(self, row: int, /) -> tuple[Image.Image, int]: ...


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
        return self._transform(_as_rgb(image)), int(label)

    def picture(self, row: int) -> Image.Image:
        """Return the image as it is in the source, for a report."""
        return _as_rgb(self._source[self._indices[row]][0])


@dataclass(frozen=True)
class Splits:
    """What a run works on.

    Attributes:
        classes: names; a label is a place in them.
        train: augmented.
        validation: held out of the training set, not augmented; None if nothing is.
        test: not augmented; looked at when training is over.
        fingerprint: of the ids and labels that are trained on, in their order.
    """

    classes: tuple[str, ...]
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
    sources = _sources(name, root, download)
    classes = tuple(str(c) for c in sources["train"].classes)
    ids = {part: check_source(part, source, classes) for part, source in sources.items()}
    indices = {part: np.arange(len(source)) for part, source in sources.items()}
    if "val" not in sources and val_fraction:
        labels = np.asarray(sources["train"].targets)
        held_out = _stratified(labels, val_fraction, split_seed)
        sources["val"], ids["val"] = sources["train"], ids["train"]
        indices["val"], indices["train"] = held_out, np.setdiff1d(indices["train"], held_out)
    size = image_size or _size_of(sources["train"])
    hflip = (0.0 if name == "digits" else 0.5) if hflip is None else hflip
    stats = _STATS.get(name, IMAGENET_STATS)
    seen = {"train": _train_transform(augment, size, hflip, stats)}
    seen["val"] = seen["test"] = _eval_transform(augment, size, stats)
    images = {
        part: Images(source, ids[part], indices[part], seen[part])
        for part, source in sources.items()
    }
    train = images["train"]
    fingerprint = _fingerprint(classes, train)
    return Splits(classes, train, images.get("val"), images["test"], fingerprint)


def check_source(part: str, source: Source, classes: Sequence[str]) -> list[str]:
    """Return a name for each sample of a source.

    Raises:
        ValueError: for labels outside of the classes, a number of labels or ids other than that of
            samples, an id that two samples have, no sample at all, or other classes than those of
            the training set.
    """
    for attribute in ("classes", "targets"):
        if not hasattr(source, attribute):
            raise ValueError(f"{part}: expected a data set with {attribute!r}, got none")
    if [str(c) for c in source.classes] != list(classes):
        theirs, ours = ({str(c) for c in source.classes}, set(classes))
        odd = ", ".join(sorted(theirs ^ ours)[:5]) or "another order"
        raise ValueError(f"{part}: expected the classes of the training set, differs in: {odd}")
    if len(source) == 0:
        raise ValueError(f"{part}: expected at least one sample, got none")
    targets = torch.as_tensor(source.targets)
    if targets.dtype.is_floating_point or targets.dim() != 1:
        raise ValueError(
            f"{part}: expected integer labels of shape ({len(source)},), got {targets.dtype} of "
            f"{tuple(targets.shape)}"
        )
    if len(targets) != len(source):
        raise ValueError(f"{part}: expected a label a sample, got {len(targets)} of {len(source)}")
    low, high = int(targets.min()), int(targets.max())
    if low < 0 or high >= len(classes):
        where = int(((targets < 0) | (targets >= len(classes))).nonzero()[0])
        raise ValueError(
            f"{part}: expected labels in [0, {len(classes) - 1}] ({len(classes)} classes), got "
            f"{int(targets[where])} for sample {where}"
        )
    ids = _ids(source)
    if len(ids) != len(source):
        raise ValueError(f"{part}: expected {len(source)} ids, got {len(ids)}")
    name, count = Counter(ids).most_common(1)[0]
    if count > 1:
        raise ValueError(f"{part}: expected an id of its own for each sample, got {name} {count}x")
    return ids


def _ids(source: Source) -> list[str]:
    if hasattr(source, "ids"):
        return [str(name) for name in source.ids]
    if hasattr(source, "samples") and hasattr(source, "root"):  # torchvision's folders
        return [Path(path).relative_to(source.root).as_posix() for path, _ in source.samples]
    return [str(i) for i in range(len(source))]


def _fingerprint(classes: Sequence[str], train: Images) -> str:
    digest = hashlib.sha256("\n".join(classes).encode())
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


# ---- sources -----------------------------------------------------------------------------------


class Digits(Dataset):
    """scikit-learn's 1797 handwritten digits of 8x8 pixels; the last of each class are for test."""

    classes = tuple("0123456789")

    def __init__(self, is_test: bool) -> None:
        from sklearn.datasets import load_digits

        data = load_digits()
        rank = np.array([(data.target[:i] == c).sum() for i, c in enumerate(data.target)])
        counts = np.bincount(data.target)[data.target]
        chosen = np.flatnonzero((rank >= (1 - DIGITS_TEST_SHARE) * counts) == is_test)
        self.targets = data.target[chosen]
        self.ids = [f"digit {i}" for i in chosen]
        self._images = (data.images[chosen] * (255 / 16)).astype(np.uint8)

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, i: int) -> tuple[Image.Image, int]:
        return Image.fromarray(self._images[i]), int(self.targets[i])


def _sources(name: str, root: str | Path | None, download: bool) -> dict[str, Source]:
    if name == "digits":
        return {"train": Digits(is_test=False), "test": Digits(is_test=True)}
    if ":" in name:
        return _own_sources(name, root)
    if name not in DATASETS:
        raise ValueError(
            f"--dataset: expected one of {', '.join(DATASETS)} or MODULE:FUNCTION, got {name!r}"
        )
    if root is None:
        raise ValueError(f"--data-dir: expected the folder of {name}, got none")
    if name == "folder":
        return _folders(Path(root))
    kind = {"cifar10": torchvision.datasets.CIFAR10, "cifar100": torchvision.datasets.CIFAR100}
    try:
        return {
            part: kind[name](root, train=part == "train", download=download)
            for part in ("train", "test")
        }
    except RuntimeError as error:
        raise ValueError(
            f"--data-dir: expected {name} in {root}, got none (--download fetches it): {error}"
        ) from error


def _folders(root: Path) -> dict[str, Source]:
    found = {part: root / part for part in ("train", "val", "test") if (root / part).is_dir()}
    if "train" not in found or len(found) < 2:
        raise ValueError(
            f"--data-dir: expected the folders train and test (or val) in {root}, got "
            f"{', '.join(found) or 'none'}"
        )
    if "test" not in found:
        found["test"] = found.pop("val")
    try:
        return {part: torchvision.datasets.ImageFolder(path) for part, path in found.items()}
    except FileNotFoundError as error:  # no class, or a class without an image
        raise ValueError(f"--data-dir: {error}") from error


def _own_sources(name: str, root: str | Path | None) -> dict[str, Source]:
    module, _, function = name.partition(":")
    sys.path.insert(0, "")  # modules beside the command, as with python -m
    try:
        build = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"--dataset: expected MODULE:FUNCTION, got {name!r}: {error}") from error
    finally:
        sys.path.remove("")
    sources = dict(build(root))
    if not {"train", "test"} <= sources.keys() <= {"train", "val", "test"}:
        raise ValueError(f"--dataset: expected train, test and perhaps val, got {sorted(sources)}")
    return sources


# ---- transforms --------------------------------------------------------------------------------


def _as_rgb(image: object) -> Image.Image:
    if not isinstance(image, Image.Image):
        raise ValueError(f"data set: expected an image of PIL, got {type(image).__name__}")
    return image.convert("RGB")


def _size_of(source: Source) -> int:
    width, height = _as_rgb(source[0][0]).size
    if width != height:
        raise ValueError(
            f"--image-size: expected a number for images that are not square, got none "
            f"(the first has {width}x{height} pixels)"
        )
    return width


def _train_transform(augment: str, size: int, hflip: float, stats: tuple) -> v2.Compose:
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


def _eval_transform(augment: str, size: int, stats: tuple) -> v2.Compose:
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
