"""What samples are read from: the data sets that come with a name, folders, and a user's own.

A *source* is a map-style data set of ``(image, label)``, the image in PIL, with ``classes`` (names)
and ``targets`` (labels); optionally ``ids``, a name for each sample, as torchvision's data sets
have or nearly so.
"""

from __future__ import annotations

import importlib
import math
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
import torchvision
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from pskd_tools.digits import last_of_each_class
from pskd_tools.images import named, read_rgb, to_rgb

__all__ = ["DATASETS", "Source", "check_source", "load_sources", "read_image"]

DATASETS = ("digits", "cifar10", "cifar100", "folder")
DIGITS_TEST_SHARE = 0.3


class Source(Protocol):
    """What samples are read from."""

    @property
    def classes(self) -> Sequence[object]: ...

    @property
    def targets(self) -> Sequence[int] | np.ndarray | Tensor: ...

    def __len__(self) -> int: ...

    def __getitem__(self, row: int, /) -> tuple[Image.Image, int]: ...


class Digits(Dataset):
    """scikit-learn's 1797 handwritten digits of 8x8 pixels; the last of each class are for test."""

    classes = tuple("0123456789")

    def __init__(self, is_test: bool) -> None:
        from sklearn.datasets import load_digits

        data = load_digits()
        for_test = last_of_each_class(data.target, lambda n: math.floor(DIGITS_TEST_SHARE * n))
        chosen = np.flatnonzero(for_test == is_test)
        self.targets = data.target[chosen]
        self.ids = [f"digit {i}" for i in chosen]
        self._images = (data.images[chosen] * (255 / 16)).astype(np.uint8)

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, i: int) -> tuple[Image.Image, int]:
        return Image.fromarray(self._images[i]), int(self.targets[i])


def load_sources(name: str, root: str | Path | None, download: bool) -> dict[str, Source]:
    """Return the sources ``train``, ``test`` and perhaps ``val`` of a data set, as `load_splits`.

    Raises:
        ValueError: for an unknown name, or a folder without the data.
    """
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
        return {
            part: torchvision.datasets.ImageFolder(path, loader=read_rgb)
            for part, path in found.items()
        }
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


def check_source(part: str, source: Source, class_names: Sequence[str]) -> list[str]:
    """Return a name for each sample of a source.

    Raises:
        ValueError: for samples that cannot be told apart or classified, naming the part.
    """
    for attribute in ("classes", "targets"):
        if not hasattr(source, attribute):
            raise ValueError(f"{part}: expected a data set with {attribute!r}, got none")
    if [str(c) for c in source.classes] != list(class_names):
        theirs, ours = ({str(c) for c in source.classes}, set(class_names))
        odd = ", ".join(sorted(theirs ^ ours)[:5]) or "another order"
        raise ValueError(f"{part}: expected the classes of the training set, differs in: {odd}")
    if len(source) == 0:
        raise ValueError(f"{part}: expected at least one sample, got none")
    targets = torch.as_tensor(source.targets, device="cpu")
    if targets.dtype.is_floating_point or targets.dim() != 1:
        raise ValueError(
            f"{part}: expected integer labels of shape ({len(source)},), got {targets.dtype} of "
            f"{tuple(targets.shape)}"
        )
    if len(targets) != len(source):
        raise ValueError(f"{part}: expected a label a sample, got {len(targets)} of {len(source)}")
    low, high = int(targets.min()), int(targets.max())
    classes = len(class_names)
    if low < 0 or high >= classes:
        where = int(((targets < 0) | (targets >= classes)).nonzero()[0])
        raise ValueError(
            f"{part}: expected labels in [0, {classes - 1}] ({classes} classes), got "
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


def read_image(source: Source, row: int, name: str) -> Image.Image:
    """Return an image of a source as `pskd_tools.images.to_rgb` converts it.

    Raises:
        ValueError: with its name, for an image that cannot be read, or what is no image of PIL.
    """
    # What a source's own code raises is not caught: its traceback tells more.
    with named(name, (OSError, SyntaxError, Image.DecompressionBombError)):
        image = source[row][0]
    if not isinstance(image, Image.Image):
        raise ValueError(f"{name}: expected an image of PIL, got {type(image).__name__}")
    with named(name):  # it may not be decoded yet
        return to_rgb(image)
