"""What is mended in annotations, and the one policy for boxes that do not fit their image.

A box is ``x, y, width, height`` in pixels; the image spans [0, image width] x [0, image height].
As Detectron2 does:

- A box that reaches beyond a border is clipped.
- A box that does not overlap its image, or has no area, is left out.

All of it is counted and logged. With ``strict`` it is an error, since many such boxes mean another
convention (corners in place of sizes) or another image; up to `SLACK` pixels (rounding of the
annotation tool) and sizes of exactly 0 (a few in published sets, COCO among them) pass even then.

NaN, infinity and what is not four numbers are errors.
"""

from __future__ import annotations

import logging
import math
from collections import Counter

SLACK = 1.0
_log = logging.getLogger(__name__)


class Mended:
    """Counts what was changed in a data set, by kind, and reports it at the end."""

    def __init__(self, source: object, strict: bool = False) -> None:
        self._source, self._strict = source, strict
        self._counts: Counter[str] = Counter()
        self._first: dict[str, str] = {}
        self._tolerated: set[str] = set()

    def note(self, kind: str, where: str, *, tolerated: bool = False) -> None:
        """Count one more of a kind, such as "boxes left out"; ``tolerated``: even if strict."""
        self._counts[kind] += 1
        self._first.setdefault(kind, where)
        if tolerated:
            self._tolerated.add(kind)

    def finish(self) -> None:
        """Log each kind once, with its count and the first of it; if strict, raise ValueError."""
        for kind, number in self._counts.items() if self._strict else ():
            if kind not in self._tolerated:
                raise ValueError(
                    f"{self._source}: strictly read, expected nothing to mend, got {number} "
                    f"{kind}; the first is {self._first[kind]}"
                )
        for kind, number in self._counts.items():
            _log.warning("%s: %d %s; the first: %s", self._source, number, kind, self._first[kind])


def is_finite(value: object) -> bool:
    """Return whether a value is a number, and neither NaN nor infinite."""
    # An integer beyond every float compares, but has no `math.isfinite`.
    return isinstance(value, (int, float)) and -math.inf < value < math.inf


def fitted(box: object, size: tuple[int, int], where: str, mended: Mended) -> list[float] | None:
    """Return a box x, y, width, height inside an image, or None if it is to be left out.

    ``size`` is the image's (width, height).
    """
    if not isinstance(box, (list, tuple)) or len(box) != 4 or not all(map(is_finite, box)):
        raise ValueError(f"{where}: expected bbox as four finite numbers, got {box!r}")
    width, height = size
    x, y, w, h = map(float, box)
    found = f"{where}: bbox {list(box)} in an image of {width} x {height}"
    left, top = max(x, 0.0), max(y, 0.0)
    right, bottom = min(x + w, float(width)), min(y + h, float(height))
    beyond = max(-x, -y, x + w - width, y + h - height)
    if w < 0 or h < 0:
        mended.note("boxes of negative width or height left out", found)
        return None
    if w == 0 or h == 0:
        mended.note("boxes without area left out", found, tolerated=True)
        return None
    if right <= left or bottom <= top:
        mended.note("boxes outside their image left out", found)
        return None
    if beyond <= 0:
        return [x, y, w, h]  # as annotated, without the rounding of x + w - x
    if beyond > SLACK:
        mended.note(f"boxes more than {SLACK:g} pixel outside their image clipped", found)
    else:
        mended.note("boxes clipped at the image border", found, tolerated=True)
    return [left, top, right - left, bottom - top]
