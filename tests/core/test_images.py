"""Image files become the same 8-bit RGB pixels whatever they were written as, or are named."""

from __future__ import annotations

import io
import os
import socket
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch

from pskd.distributed import join, leave
from pskd_tools.images import SHOWN, check_images, read_rgb, read_size, to_rgb

PRELOADED = ["torch", "pskd_tools.images"]
Image = pytest.importorskip("PIL.Image")

GRAY = np.arange(24, dtype=np.uint8).reshape(4, 6) * 10
#: What an image of each orientation looks like, from its stored pixels.
UPRIGHT = {
    1: lambda p: p,
    2: lambda p: p[:, ::-1],
    3: lambda p: p[::-1, ::-1],
    4: lambda p: p[::-1],
    5: lambda p: p.T,
    6: lambda p: p.T[:, ::-1],
    7: lambda p: p[::-1, ::-1].T,
    8: lambda p: p.T[::-1],
}


def oriented(value: object) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = value
    return exif


def rgb(gray: np.ndarray) -> np.ndarray:
    return np.repeat(gray[..., None], 3, axis=2)


@pytest.mark.parametrize(
    ("suffix", "dtype"),
    [
        ("png", "<u2"), ("tif", "<u2"), ("tif", ">u2"), ("jp2", "<u2"), ("pgm", "<u2"),
        ("tif", "<i4"), ("png", "u1"),
    ],
)  # fmt: skip
def test_sixteen_bits_become_eight(suffix, dtype, tmp_path):
    pixels = GRAY if dtype == "u1" else GRAY.astype(dtype) * 257
    Image.fromarray(pixels).save(tmp_path / f"a.{suffix}")
    assert np.array_equal(read_rgb(tmp_path / f"a.{suffix}"), rgb(GRAY))


def test_sixteen_bits_are_rounded_over_their_full_range():
    image = Image.fromarray(np.array([[0, 128, 129, 32767, 65407, 65535]], np.uint16))
    assert np.asarray(to_rgb(image))[0, :, 0].tolist() == [0, 0, 1, 127, 255, 255]


@pytest.mark.parametrize(
    ("pixels", "kind"),
    [
        (np.ones((2, 2), np.float32), r"floating-point pixels \(mode F\)"),
        (np.full((2, 2), 65536, np.int32), r"integers beyond 16 bits \(mode I\)"),
        (np.full((2, 2), -1, np.int32), r"integers beyond 16 bits \(mode I\)"),
    ],
)
def test_pixels_of_unknown_range_are_refused(pixels, kind, tmp_path):
    Image.fromarray(pixels).save(tmp_path / "a.tif")
    with pytest.raises(ValueError, match=f"a.tif: expected an image, got {kind}: convert them"):
        read_rgb(tmp_path / "a.tif")


@pytest.mark.parametrize("mode", ["1", "L", "P", "PA", "LA", "RGB", "RGBA", "CMYK", "YCbCr", "HSV"])
def test_other_modes_are_converted_as_pillow_does(mode):
    pixels = np.random.default_rng(0).integers(0, 256, (4, 6, 4), dtype=np.uint8)
    image = Image.fromarray(pixels, "RGBA")
    image = image.convert("RGB").convert("P").convert(mode) if "P" in mode else image.convert(
        "RGB" if mode in ("YCbCr", "HSV", "CMYK") else mode
    ).convert(mode)  # fmt: skip
    assert image.mode == mode
    assert np.array_equal(to_rgb(image), image.convert("RGB"))


@pytest.mark.parametrize("suffix", ["png", "tif", "webp"])
@pytest.mark.parametrize("orientation", UPRIGHT)
def test_images_are_turned_upright_once(orientation, suffix, tmp_path):
    path = tmp_path / f"a.{suffix}"
    Image.fromarray(rgb(GRAY)).save(path, exif=oriented(orientation), lossless=True)
    expected = rgb(UPRIGHT[orientation](GRAY))
    image = read_rgb(path)
    assert np.array_equal(image, expected)
    assert np.array_equal(to_rgb(image), expected)
    assert read_size(path) == image.size == (6, 4)[:: 1 if orientation < 5 else -1]


@pytest.mark.parametrize("exif", [oriented(0), oriented(9), b"Exif\0\0nothing of the kind"])
def test_an_orientation_that_is_none_turns_nothing(exif, tmp_path):
    Image.fromarray(GRAY).save(tmp_path / "a.jpg", exif=exif)
    assert read_rgb(tmp_path / "a.jpg").size == read_size(tmp_path / "a.jpg") == (6, 4)


def png() -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 40), np.uint8)).save(file, "PNG")
    return file.getvalue()


def bomb() -> bytes:
    """The head of a PNG of 65,535 x 65,535 pixels."""
    whole = png()
    head = b"IHDR" + struct.pack(">II", 65535, 65535) + whole[24:29]
    return whole[:12] + head + struct.pack(">I", zlib.crc32(head)) + whole[33:]


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", "cannot identify image file"),
        (b"a picture", "cannot identify image file"),
        (png()[:800], "image file is truncated"),
        (bomb(), "Image size .* exceeds limit"),
        (None, "No such file"),
    ],
)
def test_a_file_that_cannot_be_read_is_named(content, problem, tmp_path):
    path = tmp_path / "a.png"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=f"a.png: expected an image, got .*{problem}"):
        read_rgb(path)


def read(path: Path) -> None:
    read_rgb(path)


@pytest.mark.parametrize("workers", [0, 1])
def test_every_image_is_checked_without_a_change_of_the_random_state(workers, tmp_path):
    for name in range(20):
        (tmp_path / f"{name}.png").write_bytes(png())
    images = [(tmp_path / f"{name}.png",) for name in range(20)]
    torch.manual_seed(0)
    before = torch.get_rng_state()
    assert check_images(images, read, workers) == 20
    assert torch.equal(torch.get_rng_state(), before)


def test_the_first_images_that_cannot_be_read_are_named(tmp_path):
    images = [(tmp_path / f"{name}.png",) for name in range(9)]
    for (path,) in images[1:]:
        path.write_bytes(b"")
    images[0][0].write_bytes(png())
    with pytest.raises(ValueError) as caught:
        check_images(images, read, 0)
    message = str(caught.value)
    assert message.startswith("--check-images: expected 9 images that can be read, got 8 that")
    assert [f"{name}.png: expected an image, got" in message for name in range(9)] == [
        1 <= name <= SHOWN for name in range(9)
    ]


def test_errors_of_another_kind_are_not_taken_for_damaged_images():
    with pytest.raises(ZeroDivisionError):
        check_images([(0,)], lambda x: 1 / x, 0)


def check_in_one_process(rank: int, size: int, folder: Path) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": (folder / "port").read_text()}
    join("cpu")
    try:
        check_images([(folder / f"{name}.png",) for name in range(4)], read, 0)
    except (ValueError, RuntimeError) as error:
        (folder / f"{rank}.txt").write_text(f"{type(error).__name__}: {error}")
    leave()


def test_processes_share_the_images_and_all_refuse(tmp_path, in_processes):
    for name in range(4):
        (tmp_path / f"{name}.png").write_bytes(png() if name % 2 == 0 else b"")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        (tmp_path / "port").write_text(str(free.getsockname()[1]))
    in_processes(check_in_one_process, 2, tmp_path)
    for rank, kind in enumerate(("ValueError: ", "RuntimeError: the first process failed: ")):
        error = (tmp_path / f"{rank}.txt").read_text()
        assert error.startswith(kind) and "expected 4 images that can be read, got 2" in error
        assert "1.png: expected" in error and "3.png: expected" in error
