"""Draws an image of `demo.digits`: handwritten digits on a cluttered canvas, and their boxes."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFilter
from sklearn.datasets import load_digits

from pskd_tools.digits import last_of_each_class

PARTS = ("train", "test")
SIZE = 128  # of the canvas, in pixels
SEED = 1
TEST_SHARE = 0.2  # of each digit's scans
HEIGHTS = (24, 48)  # of a digit, in pixels
MAX_DIGITS = 5
MAX_SCRAMBLED = 1
MAX_OVERLAP = 0.15  # of two boxes, as a share of the smaller one: an IoU of at most 0.15 / 1.85
INK = 0.5  # from this opacity on a pixel belongs to the digit and its box
PLACING_TRIES = 50
_ENLARGED = 8  # a scan is turned at this many times its size


Box = tuple[int, int, int, int]  # x, y, width, height in pixels


class Digit(NamedTuple):
    """A pasted digit: its class and its box."""

    label: int
    box: Box


# ---- source scans ------------------------------------------------------------------------------


@functools.cache
def scans_of(part: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the scans that a part may use, (n, 8, 8) float in [0, 1], and their classes."""
    data = load_digits()
    is_test = last_of_each_class(data.target, lambda n: round(TEST_SHARE * n))
    chosen = is_test if part == "test" else ~is_test
    return data.images[chosen] / 16.0, data.target[chosen]


# ---- ink ---------------------------------------------------------------------------------------


def scramble(rng: np.random.Generator, scan: np.ndarray) -> np.ndarray:
    """The 2x2 pixel squares of an 8x8 scan in random order: a digit's ink, but no digit."""
    squares = scan.reshape(4, 2, 4, 2).swapaxes(1, 2).reshape(16, 2, 2)
    return rng.permutation(squares).reshape(4, 4, 2, 2).swapaxes(1, 2).reshape(8, 8)


def enlarge(rng: np.random.Generator, scan: np.ndarray, height: int) -> np.ndarray:
    """A scan as opacity, (height, width) float in [0, 1], turned and stretched a little."""
    side = 8 * _ENLARGED
    image = Image.fromarray((255 * np.pad(scan, 2)).astype(np.uint8))
    image = image.resize((side * 12 // 8, side * 12 // 8), Image.Resampling.BICUBIC)
    image = image.rotate(rng.uniform(-15, 15), Image.Resampling.BICUBIC)
    # The scans are grey between strokes; a steeper curve leaves pen strokes with soft edges.
    ink = np.clip((np.asarray(image, np.float32) / 255 - 0.2) / 0.5, 0, 1)
    top, left, bottom, right = _extent(ink)
    glyph = Image.fromarray((255 * ink[top:bottom, left:right]).astype(np.uint8))
    stretch = rng.uniform(0.8, 1.2) * height / glyph.height
    width = max(3, round(glyph.width * stretch))
    glyph = glyph.resize((width, height), Image.Resampling.BICUBIC)
    return np.asarray(glyph, np.float32) / 255


def _extent(ink: np.ndarray) -> tuple[int, int, int, int]:
    """The smallest (top, left, bottom, right) around the inked pixels, ends exclusive."""
    rows = np.flatnonzero((ink >= INK).any(axis=1))
    columns = np.flatnonzero((ink >= INK).any(axis=0))
    return rows[0], columns[0], rows[-1] + 1, columns[-1] + 1


# ---- canvas ------------------------------------------------------------------------------------


def draw_canvas(rng: np.random.Generator) -> np.ndarray:
    """A canvas of gradients, blotches and pen strokes, (SIZE, SIZE, 3) float in [0, 255]."""
    y, x = np.mgrid[0:SIZE, 0:SIZE] / SIZE
    angle = rng.uniform(0, 2 * np.pi)
    slope = ((x - 0.5) * np.cos(angle) + (y - 0.5) * np.sin(angle))[..., None]
    canvas = rng.uniform(70, 185) + rng.uniform(-25, 25, 3) + slope * rng.uniform(-80, 80, 3)
    coarse = rng.normal(128, rng.uniform(5, 30), (rng.integers(3, 9),) * 2)
    blotches = Image.fromarray(np.clip(coarse, 0, 255).astype(np.uint8))
    blotches = blotches.resize((SIZE, SIZE), Image.Resampling.BICUBIC)
    canvas = np.clip(canvas + np.asarray(blotches, np.float32)[..., None] - 128, 0, 255)
    return _draw_strokes(rng, canvas, int(rng.integers(2, 8)))


def _draw_strokes(rng: np.random.Generator, canvas: np.ndarray, count: int) -> np.ndarray:
    """Add lines and arcs as thin and as dark or bright as those of digits."""
    image = Image.fromarray(canvas.astype(np.uint8))
    pen = ImageDraw.Draw(image)
    for _ in range(count):
        color = tuple(int(c) for c in rng.uniform(20, 235) + rng.uniform(-20, 20, 3))
        width = int(rng.integers(1, 4))
        x, y = (int(c) for c in rng.integers(0, SIZE, 2))
        reach_x, reach_y = (int(c) for c in rng.integers(8, SIZE // 3, 2))
        if rng.random() < 0.5:
            ends = (x, y, x + reach_x * int(rng.choice([-1, 1])), y + reach_y)
            pen.line(ends, fill=color, width=width)
        else:
            start = int(rng.integers(0, 360))
            box = (x, y, x + reach_x, y + reach_y)
            pen.arc(box, start, start + int(rng.integers(60, 200)), fill=color, width=width)
    return np.asarray(image, np.float32)


def _paste(rng: np.random.Generator, canvas: np.ndarray, ink: np.ndarray, x: int, y: int) -> None:
    """Blend ink into the canvas, in place, in a colour that differs from what lies beneath."""
    part = canvas[y : y + ink.shape[0], x : x + ink.shape[1]]
    beneath = float(part.mean())
    contrast = rng.uniform(60, 130) * rng.choice([-1, 1])
    if not 0 <= beneath + contrast <= 255:
        contrast = -contrast
    color = np.clip(beneath + contrast + rng.uniform(-20, 20, 3), 0, 255)
    part += (ink * rng.uniform(0.9, 1.0))[..., None] * (color - part)


def _finish(rng: np.random.Generator, canvas: np.ndarray) -> Image.Image:
    """Blur some images, add sensor noise to all."""
    image = Image.fromarray(canvas.clip(0, 255).astype(np.uint8))
    if rng.random() < 0.5:
        image = image.filter(ImageFilter.GaussianBlur(rng.uniform(0.3, 1.2)))
    pixels = np.asarray(image, np.float32)
    noise = rng.normal(0, rng.uniform(3, 18), (*pixels.shape[:2], 1))
    noise = noise + rng.normal(0, 3, pixels.shape)
    return Image.fromarray((pixels + noise).clip(0, 255).astype(np.uint8))


# ---- images ------------------------------------------------------------------------------------


def _overlap(a: Box, b: Box) -> float:
    """The area that two boxes share, as a fraction of the smaller one."""
    width = min(a[0] + a[2], b[0] + b[2]) - max(a[0], b[0])
    height = min(a[1] + a[3], b[1] + b[3]) - max(a[1], b[1])
    return max(0, width) * max(0, height) / min(a[2] * a[3], b[2] * b[3])


def _place(
    rng: np.random.Generator, ink: np.ndarray, taken: Sequence[Box]
) -> tuple[int, int, Box] | None:
    """Where the ink goes, and its box, which hardly overlaps those taken; None without room."""
    top, left, bottom, right = _extent(ink)
    for _ in range(PLACING_TRIES):
        x = int(rng.integers(0, SIZE - ink.shape[1] + 1))
        y = int(rng.integers(0, SIZE - ink.shape[0] + 1))
        box = (x + int(left), y + int(top), int(right - left), int(bottom - top))
        if all(_overlap(box, other) <= MAX_OVERLAP for other in taken):
            return x, y, box
    return None


def draw_image(part: str, index: int) -> tuple[Image.Image, list[Digit]]:
    """One image of a part, by its number from 0, with the digits on it; at least one."""
    rng = np.random.default_rng([SEED, PARTS.index(part), index])
    scans, labels = scans_of(part)
    canvas = draw_canvas(rng)
    digits: list[Digit] = []
    taken: list[Box] = []
    num_digits = int(rng.integers(1, MAX_DIGITS + 1))
    for number in range(num_digits + int(rng.integers(0, MAX_SCRAMBLED + 1))):
        chosen = int(rng.choice(len(scans)))
        is_digit = number < num_digits
        # Log-uniform: as many digits between 24 and 34 pixels as between 34 and 48.
        height = round(float(np.exp(rng.uniform(*np.log(HEIGHTS)))))
        ink = enlarge(rng, scans[chosen] if is_digit else scramble(rng, scans[chosen]), height)
        place = _place(rng, ink, taken)
        if place is None:
            continue
        x, y, box = place
        _paste(rng, canvas, ink, x, y)
        taken.append(box)
        if is_digit:
            digits.append(Digit(int(labels[chosen]), box))
    return _finish(rng, canvas), digits
