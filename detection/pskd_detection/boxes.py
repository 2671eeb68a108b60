"""The one policy for annotated boxes that do not lie inside their image.

A box is ``x, y, width, height`` in pixels; the image spans [0, image width] x [0, image height].

- Up to `SLACK` pixels beyond a border: rounding of the annotation tool. Clipped and counted.
- More than that, or no overlap with the image at all: an error, since mostly the boxes are of
  another convention (corners in place of sizes) or of another image.
- Width or height exactly 0, as a few have in published sets, COCO among them: left out and counted.
- Negative size, NaN, infinity, not four numbers: an error.
"""

from __future__ import annotations

import logging
import math
from numbers import Real

__all__ = ["SLACK", "BoxCheck"]

SLACK = 1.0
_log = logging.getLogger(__name__)


class BoxCheck:
    """Fits the boxes of one data set, and reports at its end what had to be changed.

    Args:
        source: the data set's file, for the messages.
    """

    def __init__(self, source: object) -> None:
        self._source = source
        self._found: dict[str, list] = {"clipped": [0, ""], "empty": [0, ""], "outside": [0, ""]}

    def fit(self, box: object, width: int, height: int, where: str) -> list[float] | None:
        """Return the box inside its image, or None if it is to be left out.

        Args:
            box: as it was read; expected to be four numbers ``x, y, width, height``.
            width: of the image in pixels.
            height: of the image in pixels.
            where: names the annotation in messages.

        Raises:
            ValueError: for what is no box. Boxes outside the image are reported by `finish`, so
                that their number can be told.
        """
        box = _four_numbers(box, where)
        x, y, w, h = map(float, box)
        if w == 0 or h == 0:
            self._count("empty", f"{where}: bbox {box}")
            return None
        left, top = max(x, 0.0), max(y, 0.0)
        right, bottom = min(x + w, float(width)), min(y + h, float(height))
        beyond = max(-x, -y, x + w - width, y + h - height)
        if beyond > SLACK or right <= left or bottom <= top:
            self._count("outside", f"{where}: bbox {box} in an image of {width} x {height}")
            return None
        if beyond <= 0:
            return [x, y, w, h]  # as annotated, without the rounding of x + w - x
        self._count("clipped", f"{where}: bbox {box} in an image of {width} x {height}")
        return [left, top, right - left, bottom - top]

    def finish(self) -> None:
        """Raise for boxes outside their image; log once what was clipped and left out.

        Raises:
            ValueError: naming the first such box and their number.
        """
        count, first = self._found["outside"]
        if count:
            raise ValueError(
                f"{self._source}: expected every box (x, y, width, height) inside its image, at "
                f"most {SLACK:g} pixel beyond, got {count} outside; the first is {first}"
            )
        for kind, verb in (("clipped", "clipped at the image border"), ("empty", "left out")):
            count, first = self._found[kind]
            if count:
                what = "boxes without area" if kind == "empty" else "boxes"
                _log.warning("%s: %d %s %s; the first: %s", self._source, count, what, verb, first)

    def _count(self, kind: str, what: str) -> None:
        found = self._found[kind]
        found[0] += 1
        found[1] = found[1] or what


def _four_numbers(box: object, where: str) -> list[float]:
    if (
        not isinstance(box, (list, tuple))
        or len(box) != 4
        or not all(isinstance(v, Real) and math.isfinite(v) for v in box)
    ):
        raise ValueError(f"{where}: expected bbox as four finite numbers, got {box!r}")
    if box[2] < 0 or box[3] < 0:
        raise ValueError(
            f"{where}: expected bbox as x, y, width, height with sizes of at least 0, got {box!r}"
        )
    return list(box)
