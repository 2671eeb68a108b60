"""A picture of what detectors found: the same test images, a row a run.

The images are the first of the test set, so nobody chose them for their result.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from pycocotools import mask as coco_mask

from pskd_tools.drawing import INK, new_figure, save
from pskd_tools.report.files import Box, Boxes
from pskd_tools.report.runs import Run

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MATCH_IOU = 0.5  # of a right detection, as in AP50
SIDE = 1.7  # inches of an image
# Okabe and Ito's palette, which colour-blind readers can tell apart.
RIGHT, WRONG, MISSED = "#009E73", "#D55E00", "#F0E442"


class Mark(NamedTuple):
    """One box to draw: a detection that is right or wrong, or an object that was missed."""

    box: tuple[float, float, float, float]  # left, top, width and height in pixels
    text: str
    color: str


def detections_picture(
    runs: Sequence[Run], out: Path, *, num_images: int = 6, score_threshold: float = 0.5
) -> Path:
    """Draw detections with class and score on the first test images, a row a run.

    Args:
        runs: with `Run.boxes`; rows are in this order.
        out: the file; its suffix is the format.
        num_images: columns; fewer if there are fewer images.
        score_threshold: detections below are not drawn, and count for nothing.

    Returns:
        ``out``.
    """
    from matplotlib.lines import Line2D

    keys = list(runs[0].boxes)[:num_images]
    figure = new_figure(max(SIDE * len(keys), 3 * SIDE), (SIDE + 0.3) * len(runs) + 0.3)
    for part, run in zip(figure.subfigures(len(runs), squeeze=False)[:, 0], runs, strict=True):
        found = [marks(run.boxes[key], score_threshold) for key in keys]
        part.suptitle(headline(run.name, found), x=0.01, ha="left", fontsize=9, color=INK)
        grid = part.subplots(1, len(keys), squeeze=False)[0]
        for axes, key, of_image in zip(grid, keys, found, strict=True):
            _draw(axes, run.boxes[key], of_image)
    legend = {
        RIGHT: f"right: class and IoU of at least {MATCH_IOU:g}",
        WRONG: "wrong: class, place or a second box",
        MISSED: f"missed: no right box with a score of at least {score_threshold:g}",
    }
    figure.legend(
        handles=[
            Line2D([], [], color=color, linestyle=_line(color), label=text)
            for color, text in legend.items()
        ],
        loc="outside lower left",
        ncols=3 if len(keys) > 4 else 1,
        fontsize=8,
        labelcolor=INK,
        frameon=False,
    )
    return save(figure, out)


def marks(image: Boxes, threshold: float) -> list[Mark]:
    """Return the boxes to draw on an image: missed objects first, the best scored last, on top."""
    shown = [d for d in image.detections if d.score is not None and d.score >= threshold]
    missed = [
        Mark(thing.box, thing.label, MISSED)
        for thing in image.objects
        if not _is_found(thing, shown)
    ]
    return missed + [
        Mark(d.box, f"{d.label} {d.score:.2f}", RIGHT if d.correct else WRONG)
        for d in sorted(shown, key=lambda detection: detection.score or 0.0)
    ]


def _is_found(thing: Box, detections: Sequence[Box]) -> bool:
    right = [d.box for d in detections if d.correct and d.label == thing.label]
    if not right:
        return False
    iou = coco_mask.iou(np.array(right), np.array([thing.box]), [0])
    return bool(iou.max() >= MATCH_IOU)


def headline(name: str, found: Sequence[Sequence[Mark]]) -> str:
    colors = [mark.color for of_image in found for mark in of_image]
    right, wrong, missed = (colors.count(color) for color in (RIGHT, WRONG, MISSED))
    return f"{name}: {right} right, {wrong} wrong, {missed} missed"


def _line(color: str) -> str:
    return "--" if color == MISSED else "-"


def _draw(axes: Axes, image: Boxes, found: Sequence[Mark]) -> None:
    """Show an image with boxes, and above each its text; a missed object's stands below."""
    from matplotlib.patches import Rectangle
    from PIL import Image

    picture = Image.open(io.BytesIO(base64.b64decode(image.image.partition(",")[2])))
    axes.imshow(picture, extent=(0, image.width, image.height, 0), interpolation="bicubic")
    axes.set_axis_off()
    for (left, top, width, height), text, color in found:
        look = {"edgecolor": color, "linestyle": _line(color), "linewidth": 1.2}
        axes.add_patch(Rectangle((left, top), width, height, fill=False, **look))
        is_missed = color == MISSED
        axes.text(
            left,
            top + height if is_missed else top,
            text,
            fontsize=5.5,
            color=INK if is_missed else "white",
            verticalalignment="top" if is_missed else "bottom",
            bbox={"facecolor": color, "edgecolor": "none", "pad": 0.8},
            parse_math=False,  # a class called "$x$" is a name, not a formula
        ).set_in_layout(False)
