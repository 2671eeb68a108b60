"""A picture of what detectors found: the same test images, a row a run.

The images are the first of the set by id, so nobody chose them for their result.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from pycocotools import mask as coco_mask

from pskd.files import open_regular, parse_json
from pskd_tools.files import written_aside
from pskd_tools.images import read_rgb

if TYPE_CHECKING:
    from PIL.Image import Image
    from PIL.ImageDraw import ImageDraw

IMAGE_SIDE = 256  # pixels of the longer side, after scaling
MARGIN = 8
TEXT_SIZE = 15
MATCH_IOU = 0.5  # of a right detection, as in AP50
# Okabe and Ito's palette, which colour-blind readers can tell apart.
RIGHT, WRONG, MISSED = "#009E73", "#D55E00", "#F0E442"
INK, PAPER = "#333333", "#FFFFFF"

Box = tuple[float, float, float, float]  # x, y, width, height in pixels of the image as shown


class Mark(NamedTuple):
    """One box to draw: a detection that is right or wrong, or an object that was missed."""

    box: Box
    text: str
    color: str


def detections_picture(
    dataset_json: str | os.PathLike,
    image_dir: str | os.PathLike,
    runs: Mapping[str, str | os.PathLike],
    out: str | os.PathLike,
    *,
    num_images: int = 6,
    score_threshold: float = 0.5,
) -> Path:
    """Draw detections with class and score on the first test images, a row a run.

    A detection is right if its IoU with an object of its class is at least 0.5 and no better scored
    one has taken that object. Objects that no right detection found are drawn dashed.

    Args:
        dataset_json: COCO-format annotations of the test set.
        image_dir: folder of its images.
        runs: name -> file of detections, a list in COCO's results format (image_id, category_id,
            bbox as x, y, width, height in pixels, score). Rows are in this order.
        out: the PNG file, written aside and renamed.
        num_images: columns; fewer if the set has fewer images.
        score_threshold: detections below are not drawn, and count for nothing.

    Returns:
        ``out``.

    Raises:
        ValueError: no run, no column, a threshold outside [0, 1], a file that is not COCO's, or
            detections of images or categories that the set lacks.
    """
    if not runs:
        raise ValueError("runs: expected at least one name with a file of detections, got none")
    if num_images < 1:
        raise ValueError(f"num_images: expected at least 1, got {num_images}")
    if not 0 <= score_threshold <= 1:
        raise ValueError(f"score_threshold: expected a number in [0, 1], got {score_threshold}")
    if Path(out).suffix.lower() != ".png":
        raise ValueError(f"out: expected a name that ends in .png, got {out}")
    dataset = _read_dataset(dataset_json)
    images = sorted(dataset["images"], key=lambda image: image["id"])[:num_images]
    if not images:
        raise ValueError(f"{dataset_json}: expected at least one image, got none")
    rows = {}
    for name, path in runs.items():
        detections = _read_detections(path, dataset)
        rows[name] = [_marks(dataset, image["id"], detections, score_threshold) for image in images]
    return _save(_draw(images, Path(image_dir), rows, score_threshold), Path(out))


def _read_json(path: str | os.PathLike) -> object:
    try:
        with open_regular(path) as file:
            return parse_json(file.read())
    except ValueError as error:
        raise ValueError(f"{path}: expected a JSON file, got {error}") from error


def _read_dataset(path: str | os.PathLike) -> dict:
    dataset, keys = _read_json(path), {"images", "annotations", "categories"}
    if not isinstance(dataset, dict) or not keys <= dataset.keys():
        got = sorted(dataset) if isinstance(dataset, dict) else type(dataset).__name__
        raise ValueError(f"{path}: expected {', '.join(sorted(keys))}, got {got}")
    return dataset


def _read_detections(path: str | os.PathLike, dataset: dict) -> list[dict]:
    detections = _read_json(path)
    if not isinstance(detections, list):
        raise ValueError(f"{path}: expected a list of detections, got {type(detections).__name__}")
    fields = {"image_id", "category_id", "bbox", "score"}
    known = {
        "image_id": {image["id"] for image in dataset["images"]},
        "category_id": {category["id"] for category in dataset["categories"]},
    }
    for number, detection in enumerate(detections):
        place = f"{path}: detection {number}"
        if not isinstance(detection, dict) or not fields <= detection.keys():
            raise ValueError(f"{place}: expected {', '.join(sorted(fields))}, got {detection!r}")
        for field, ids in known.items():
            if detection[field] not in ids:
                raise ValueError(
                    f"{place}: expected {field} of the data set, got {detection[field]!r}"
                )
    return detections


# ---- what is right -----------------------------------------------------------------------------


def _marks(dataset: dict, image_id: int, detections: list, threshold: float) -> list[Mark]:
    """The boxes to draw on one image: missed objects first, so that detections lie above them."""
    names = {category["id"]: str(category["name"]) for category in dataset["categories"]}
    objects = [
        entry
        for entry in dataset["annotations"]
        if entry["image_id"] == image_id and not entry.get("iscrowd")
    ]
    shown = [d for d in detections if d["image_id"] == image_id and d["score"] >= threshold]
    shown.sort(key=lambda detection: -detection["score"])
    overlaps = _iou([d["bbox"] for d in shown], [entry["bbox"] for entry in objects])
    free = np.ones(len(objects), dtype=bool)
    found = []
    for detection, overlap in zip(shown, overlaps, strict=True):
        same = np.array([o["category_id"] == detection["category_id"] for o in objects], dtype=bool)
        fits = np.where(free & same, overlap, 0.0)
        right = bool((fits >= MATCH_IOU).any())
        if right:
            free[fits.argmax()] = False
        text = f"{names[detection['category_id']]} {detection['score']:.2f}"
        found.append(Mark(tuple(detection["bbox"]), text, RIGHT if right else WRONG))
    missed = [
        Mark(tuple(entry["bbox"]), names[entry["category_id"]], MISSED)
        for entry, is_free in zip(objects, free, strict=True)
        if is_free
    ]
    return missed + found[::-1]  # the best scored last, on top


def _iou(boxes: Sequence[Box], others: Sequence[Box]) -> np.ndarray:
    """IoU of every box with every other, (n, m) float, also where n or m is 0."""
    if not boxes or not others:
        return np.zeros((len(boxes), len(others)))
    return np.asarray(
        coco_mask.iou(np.array(boxes, float), np.array(others, float), [0] * len(others))
    )


# ---- drawing -----------------------------------------------------------------------------------


def _draw(images: list, folder: Path, rows: Mapping, threshold: float) -> Image:
    """The whole picture: a headline a run, its images below, a legend at the foot."""
    from PIL import Image, ImageDraw

    pictures = [_open(folder / image["file_name"]) for image in images]
    height = max(picture.height for picture, _ in pictures)
    line = TEXT_SIZE + MARGIN
    row = line + height + MARGIN
    width = MARGIN + sum(picture.width + MARGIN for picture, _ in pictures)
    # Six images of the demo fill the line of the legend; under fewer it takes several.
    legend = _legend_lines(width - 2 * MARGIN, threshold)
    sheet = Image.new("RGB", (width, MARGIN + row * len(rows) + line * len(legend)), PAPER)
    pen = ImageDraw.Draw(sheet)
    for number, (name, marks) in enumerate(rows.items()):
        top = MARGIN + number * row
        pen.text((MARGIN, top), _headline(name, marks), fill=INK, font=_font())
        left = MARGIN
        for (picture, scale), found in zip(pictures, marks, strict=True):
            sheet.paste(_marked(picture, scale, found), (left, top + line))
            left += picture.width + MARGIN
    for number, entries in enumerate(legend):
        left, top = MARGIN, MARGIN + row * len(rows) + line * number
        for color, text in entries:
            _rectangle(pen, (left, top + 2, left + 14, top + 14), color)
            pen.text((left + 20, top), text, fill=INK, font=_font())
            left += _legend_width(text)
    return sheet


def _headline(name: str, marks: Sequence[Sequence[Mark]]) -> str:
    counts = [sum(mark.color == color for marks_ in marks for mark in marks_) for color in _COLORS]
    return f"{name}: {counts[0]} right, {counts[1]} wrong, {counts[2]} missed"


_COLORS = (RIGHT, WRONG, MISSED)


def _legend_lines(width: int, threshold: float) -> list[list[tuple[str, str]]]:
    """The entries of the legend, as many a line as fit."""
    texts = (
        f"right: class and IoU of at least {MATCH_IOU:g}",
        "wrong: class, place or a second box",
        f"missed: no right box with a score of at least {threshold:g}",
    )
    lines: list[list[tuple[str, str]]] = [[]]
    for entry in zip(_COLORS, texts, strict=True):
        used = sum(_legend_width(text) for _, text in lines[-1])
        if lines[-1] and used + _legend_width(entry[1]) > width:
            lines.append([])
        lines[-1].append(entry)
    return lines


def _legend_width(text: str) -> int:
    return 20 + math.ceil(_font().getlength(text)) + 3 * MARGIN


def _font():
    from PIL import ImageFont

    return ImageFont.load_default(TEXT_SIZE)


def _open(path: Path) -> tuple[Image, float]:
    """An image as it is drawn, and its scale."""
    from PIL import Image

    image = read_rgb(path)
    scale = IMAGE_SIDE / max(image.size)
    width, height = (max(1, round(side * scale)) for side in image.size)
    return image.resize((width, height), Image.Resampling.BICUBIC), scale


def _marked(picture: Image, scale: float, marks: Sequence[Mark]) -> Image:
    """A copy with boxes, and above each its text; within the box where there is no room above."""
    from PIL import ImageDraw

    picture = picture.copy()
    pen = ImageDraw.Draw(picture)
    for box, text, color in marks:
        x, y, w, h = (value * scale for value in box)
        _rectangle(pen, (x, y, x + w, y + h), color)
        wide = _font().getlength(text) + 4
        left = min(max(0, x - 1), max(0, picture.width - wide))
        # A missed object's class stands below its box: above is where a wrong detection's stands.
        above, below = y - TEXT_SIZE - 3, y + h + 2
        top = min(below, picture.height - TEXT_SIZE - 2) if color == MISSED else max(0, above)
        pen.rectangle((left, top, left + wide, top + TEXT_SIZE + 1), fill=color)
        ink = INK if color == MISSED else PAPER
        pen.text((left + 2, top - 1), text, fill=ink, font=_font())
    return picture


def _rectangle(pen: ImageDraw, corners: Sequence[float], color: str) -> None:
    """A frame; of a missed object dashed."""
    if color != MISSED:
        pen.rectangle(tuple(corners), outline=color, width=2)
        return
    left, top, right, bottom = corners
    for start in np.arange(left, right, 8):
        for y in (top, bottom):
            pen.line((start, y, min(start + 4, right), y), fill=color, width=2)
    for start in np.arange(top, bottom, 8):
        for x in (left, right):
            pen.line((x, start, x, min(start + 4, bottom)), fill=color, width=2)


def _save(sheet: Image, path: Path) -> Path:
    """Write the picture under another name, then rename it."""
    with written_aside(path) as aside:
        sheet.save(aside, format="PNG")
    return path
