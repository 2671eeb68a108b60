"""Small images that are decoded once and stay on the device, where they are augmented by batches.

A DataLoader decodes and augments each image in Python, by which a GPU waits for a small network.

Shapes: M images of S x S pixels, P = S + 2 * padding; N images of a batch.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Sampler
from torchvision.transforms.v2 import functional as v2

from pskd_classification.data import Images, OddSizeError
from pskd_classification.transforms import View

__all__ = ["DeviceImages", "DeviceLoader", "place"]

logger = logging.getLogger(__name__)

# What is placed where nobody asked for it: larger images gain little, more take long to decode.
AUTO_SIDE, AUTO_BYTES = 64, 2**31


class DeviceImages:
    """Images on the device, seen as `Images` sees them: a random crop, a flip, the normalisation.

    Args:
        images: what is decoded.
        view: how it is seen; not ``resized-crop``.
        device: where it stays.
        augmented: crop and flip.
        resize: images of another size than the view's, instead of refusing them.

    Attributes:
        targets: (M,) int64 labels, on the device.

    Raises:
        OddSizeError: for an image of another size.
        ValueError: for an image that cannot be read.
    """

    def __init__(
        self,
        images: Images,
        view: View,
        device: torch.device,
        *,
        augmented: bool = False,
        resize: bool = False,
    ) -> None:
        self._hflip = view.hflip if augmented else 0.0
        self._padding = view.padding if augmented else 0
        pixels = images.decode(view.size, resize=resize)
        pixels = F.pad(pixels.to(device), [self._padding] * 4)  # (M, 3, P, P) uint8
        # A view of all crops, (M, 3, P - S + 1, P - S + 1, S, S): none of them is made.
        self._crops = pixels.unfold(2, view.size, 1).unfold(3, view.size, 1)
        self.targets = images.targets.to(device)
        self._mean = _channels(view.mean, device)
        self._std = _channels(view.std, device)

    def __len__(self) -> int:
        return len(self.targets)

    def draw(self, count: int, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
        """Return crops, (N, 2) int64 first line and column, and flips, (N,) bool, on the CPU."""
        crops = torch.randint(
            2 * self._padding + 1, (count, 2), generator=generator, dtype=torch.int64, device="cpu"
        )
        chances = torch.rand(count, generator=generator, dtype=torch.float32, device="cpu")
        return crops, chances < self._hflip

    def seen(self, rows: Tensor, crops: Tensor, flips: Tensor) -> Tensor:
        """Return (N, 3, S, S) float32 images of (N,) rows, as of `draw`; all on the device."""
        pixels = self._crops[rows, :, crops[:, 0], crops[:, 1]]
        pixels = torch.where(flips[:, None, None, None], pixels.flip(-1), pixels)
        # As v2.Normalize, which would send mean and deviation to the device in every call.
        return v2.to_dtype(pixels, torch.float32, scale=True).sub_(self._mean).div_(self._std)


class DeviceLoader:
    """Yields what a DataLoader over `pskd.WithRows` does, without waiting for the device.

    A batch is (N,) int64 rows, (N, 3, S, S) float32 images and (N,) int64 labels, on the device.

    Args:
        images: of which the batches are.
        sampler: the rows of an epoch.
        batch_size: N of all but the last.
        drop_last: leave out a smaller last batch.
        generator: on the CPU, so that crops and flips are the same on every device; None for
            torch's.
    """

    def __init__(
        self,
        images: DeviceImages,
        *,
        batch_size: int,
        sampler: Sampler[int] | range,
        drop_last: bool = False,
        generator: torch.Generator | None = None,
    ) -> None:
        self._images, self._sampler, self._generator = images, sampler, generator
        self._batch_size, self._drop_last = batch_size, drop_last

    def __len__(self) -> int:
        whole, rest = divmod(len(self._sampler), self._batch_size)  # type: ignore[arg-type]
        return whole + (rest > 0 and not self._drop_last)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        order = torch.tensor(list(self._sampler), dtype=torch.int64, device="cpu")
        rows = order[: len(self) * self._batch_size]
        epoch = (rows, *self._images.draw(len(rows), self._generator))
        device = self._images.targets.device
        parts = (drawn.to(device).split(self._batch_size) for drawn in epoch)
        for own, crops, flips in zip(*parts, strict=True):
            yield own, self._images.seen(own, crops, flips), self._images.targets[own]


def place(
    parts: Mapping[str, Images],
    view: View,
    device: torch.device,
    *,
    wanted: bool | None,
    resize: bool,
) -> dict[str, DeviceImages] | None:
    """Decode a data set onto the device, or return None where images stay with a DataLoader.

    Args:
        parts: ``train``, which is augmented, ``validation`` and ``test``.
        view, device, resize: as of `DeviceImages`.
        wanted: None places images of at most 64 x 64 pixels, all of one size, that take up to 2 GiB
            and half of what is free.

    Raises:
        ValueError: for what is wanted and cannot be: images of several sizes, too large for the
            device, or cropped out of larger ones; also for an image that cannot be read.
    """
    if wanted is False:
        return None
    if view.augment == "resized-crop":
        if wanted:
            raise ValueError("--data-on-device: expected another --augment than resized-crop")
        return None
    sides = {part: view.size + 2 * view.padding * (part == "train") for part in parts}
    needed = sum(3 * sides[part] ** 2 * len(images) for part, images in parts.items())
    free = _free_bytes(device)
    if wanted is None and (view.size > AUTO_SIDE or needed > min(AUTO_BYTES, free / 2)):
        return None
    if needed > free:
        raise ValueError(
            f"--data-on-device: expected {needed:,} free bytes on {device}, got {free:,}"
        )
    try:
        return {
            part: DeviceImages(images, view, device, augmented=part == "train", resize=resize)
            for part, images in parts.items()
        }
    except OddSizeError as error:
        if wanted:
            raise ValueError(
                f"--data-on-device: {error} (--image-size resizes to one size)"
            ) from error
        logger.info("%s: images stay on the CPU", error)
        return None


def _channels(values: Sequence[float], device: torch.device) -> Tensor:
    """Return a number a channel, (3, 1, 1) float32."""
    return torch.tensor(values, dtype=torch.float32, device=device)[:, None, None]


def _free_bytes(device: torch.device) -> float:
    """Return what can be taken; infinity where that is not known."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    meminfo = Path("/proc/meminfo")
    if device.type != "cpu" or not meminfo.exists():
        return math.inf
    (line,) = (li for li in meminfo.read_text().splitlines() if li.startswith("MemAvailable"))
    return 1024 * int(line.split()[1])
