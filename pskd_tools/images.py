"""Image files as 8-bit RGB pixels, for every train script; Pillow is imported when one is read."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from pskd.distributed import Processes, gather, on_first_process
from pskd_tools import files

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["check_images", "named", "read_rgb", "read_size", "to_rgb"]

ORIENTATION = 0x0112  # the tag of EXIF and TIFF
SIDEWAYS = 5  # from this orientation on, width and height are exchanged
#: What turns an image of each orientation upright, in Pillow's words; 1 is upright.
TURNS = {
    2: "FLIP_LEFT_RIGHT",
    3: "ROTATE_180",
    4: "FLIP_TOP_BOTTOM",
    5: "TRANSPOSE",
    6: "ROTATE_270",
    7: "TRANSVERSE",
    8: "ROTATE_90",
}
SHOWN = 5  # images that cannot be read


def read_rgb(path: str | os.PathLike[str], file: BinaryIO | None = None) -> Image:
    """Read an image file as `to_rgb` converts it.

    Args:
        path: of the file.
        file: the same, open, where it is not on this machine's disk.

    Raises:
        ValueError: naming a file that is missing or damaged, is too large for Pillow
            (``PIL.Image.MAX_IMAGE_PIXELS``), or has pixels that `to_rgb` refuses.
    """
    with _opened(path, file) as image:
        return to_rgb(image)


def read_size(path: str | os.PathLike[str]) -> tuple[int, int]:
    """Return width and height in pixels of the image that `read_rgb` returns.

    Only PNGs and images stored sideways are decoded.

    Raises:
        ValueError: naming a file that cannot be read.
    """
    with _opened(path) as image:
        return (to_rgb(image) if _orientation(image) >= SIDEWAYS else image).size


def to_rgb(image: Image) -> Image:
    """Return an image as it is shown: upright by its EXIF orientation, in mode RGB.

    16-bit pixels are divided by 257, so that 65535 becomes 255. Other modes are converted by
    ``Image.convert``. The result has no EXIF data, so that nothing turns it once more.

    Raises:
        ValueError: for floating-point pixels and integers beyond 16 bits, whose range is unknown.
    """
    from PIL.Image import Transpose

    image.load()  # turns a TIFF, and finds the EXIF data that follow a PNG's pixels
    turn = TURNS.get(_orientation(image))
    if image.mode.startswith(("I", "F")):  # which Image.convert clips at 255
        image = _eight_bits(image)
    if turn is not None:
        image = image.transpose(Transpose[turn])
    rgb = image.convert("RGB")
    rgb.info = {}
    return rgb


def _eight_bits(image: Image) -> Image:
    from PIL.Image import fromarray

    pixels = np.asarray(image)
    if image.mode == "F" or pixels.min() < 0 or pixels.max() > 65535:
        kind = "floating-point pixels" if image.mode == "F" else "integers beyond 16 bits"
        raise ValueError(f"{kind} (mode {image.mode}): convert them to 8 or 16 bits")
    return fromarray(((pixels.astype(np.int32) + 128) // 257).astype(np.uint8))


def _orientation(image: Image) -> int:
    try:
        value = image.getexif().get(ORIENTATION)
    except Exception:  # damaged EXIF data, of which Pillow raises many kinds; the pixels are fine
        value = None
    return value if value in TURNS else 1


@contextlib.contextmanager
def _opened(path: str | os.PathLike[str], file: BinaryIO | None = None) -> Iterator[Image]:
    from PIL import Image

    with named(path), Image.open(file or path) as image:
        yield image


def named(
    name: object, errors: type[Exception] | tuple[type[Exception], ...] = Exception
) -> contextlib.AbstractContextManager[None]:
    """Turn what goes wrong with an image into a ValueError that names it.

    Args: as of `pskd_tools.files.named`.
    """
    return files.named(name, "expected an image, got", errors)


def check_images(
    images: Sequence[tuple[Any, ...]], read: Callable[..., object], workers: int
) -> int:
    """Read every image once and return how many there are; a collective.

    The processes share the images. The global random state stays as it is.

    Args:
        images: the arguments of ``read`` for each.
        read: reads one; its ValueError or OSError names the image.
        workers: processes of a DataLoader, 0 for none.

    Raises:
        ValueError: naming the first images that cannot be read, and how many there are.
    """
    own = Processes()
    loader = DataLoader(
        _Problems(images, read),
        batch_size=16,
        sampler=range(own.number, len(images), own.count),
        num_workers=workers,
        collate_fn=list,
        generator=torch.Generator(),
    )
    found = gather([problem for batch in loader for problem in batch if problem])

    def refuse() -> None:
        problems = [problem for part in found or () for problem in part]
        if problems:
            first = "; ".join(problems[:SHOWN])
            more = "; ..." if len(problems) > SHOWN else ""
            raise ValueError(
                f"--check-images: expected {len(images)} images that can be read, got "
                f"{len(problems)} that cannot: {first}{more}"
            )

    on_first_process(refuse)
    return len(images)


class _Problems(Dataset[str]):
    """What is wrong with each image; empty for nothing."""

    def __init__(self, images: Sequence[tuple[Any, ...]], read: Callable[..., object]) -> None:
        self._images, self._read = images, read

    def __getitem__(self, i: int) -> str:
        try:
            self._read(*self._images[i])
        except (OSError, ValueError) as error:
            return " ".join(str(error).split())
        return ""
