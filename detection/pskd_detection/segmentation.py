"""Polygons and run-length codes that pycocotools would crash on, or read as something else.

It trusts its input: NaN or a coordinate of 1e9 ends the process, a run-length code that is too
short leaves memory of others in the mask, and four numbers are a box to it. Shapes: H x W pixels.
"""

from __future__ import annotations

import numpy as np

# How far a polygon may reach, since memory grows with it: in sides of its image, and in pixels, for
# an image whose size is wrong.
_SIDES, _PIXELS = 10, 10**6
_BITS, _MORE, _SIGN, _ZERO = 5, 0x20, 0x10, 48  # of a character of a compressed code


def with_three_points(segmentation: list) -> list:
    """Return a list without the polygons of fewer than three points, or of half a point."""
    return [p for p in segmentation if not isinstance(p, list) or (len(p) > 5 and not len(p) % 2)]


def segmentation_problem(segmentation: object, height: int, width: int) -> str | None:
    """Return what is wrong with a segmentation in COCO's format; None if nothing is.

    It is polygons, each a list or array of x, y, x, y, ...; or a run-length code with ``size``
    [H, W] and ``counts``, compressed or not.
    """
    if isinstance(segmentation, dict):
        return _code_problem(segmentation, height, width)
    if not isinstance(segmentation, (list, tuple)):
        return f"expected polygons or a run-length code, got {type(segmentation).__name__}"
    reach = min(_SIDES * max(height, width), _PIXELS)
    return next(filter(None, (_polygon_problem(polygon, reach) for polygon in segmentation)), None)


def _polygon_problem(polygon: object, reach: int) -> str | None:
    try:
        points = np.asarray(polygon)
    except ValueError:  # lists of several lengths
        points = np.empty(0, object)
    if points.ndim != 1 or points.dtype.kind not in "iuf":
        return f"expected polygons as lists of numbers x, y, x, y, ..., got {_short(polygon)}"
    if len(points) < 6 or len(points) % 2:
        return f"expected polygons of three or more points, got {_short(polygon)}"
    if not (np.abs(points) <= reach).all():
        return f"expected polygons within {reach} pixels of the corner, got {_short(polygon)}"
    return None


def _code_problem(code: dict, height: int, width: int) -> str | None:
    size, counts = code.get("size"), code.get("counts")
    if not isinstance(size, (list, tuple)) or [*map(repr, size)] != [str(height), str(width)]:
        return f"expected a run-length code of size [{height}, {width}], got {_short(size)}"
    runs = _runs(counts) if isinstance(counts, (str, bytes)) else _integers(counts)
    if runs is None or (runs < 0).any():
        return f"expected 'counts' as a run-length code, got {_short(counts)}"
    if runs.sum() != height * width:
        return (
            f"expected 'counts' of {height} x {width} = {height * width} pixels, got those of "
            f"{runs.sum()}"
        )
    return None


def _integers(counts: object) -> np.ndarray | None:
    if not isinstance(counts, list) or not all(type(run) in (int, float) for run in counts):
        return None
    if not all(run % 1 == 0 for run in counts):  # nor NaN or infinite; pycocotools takes 3.0 too
        return None
    return np.asarray(counts, dtype=object)  # of any size


def _runs(counts: str | bytes) -> np.ndarray | None:
    """Return the lengths of the runs of a compressed code; None if it is none.

    A character holds 5 bits of a number, the lowest first, and whether more follow. From the
    fourth run on the number is the difference to the run before the last.
    """
    text = counts.encode("utf-8", "surrogatepass") if isinstance(counts, str) else counts
    codes = np.frombuffer(text, dtype=np.uint8).astype(np.int64) - _ZERO
    if not codes.size or (codes < 0).any() or (codes > 63).any() or codes[-1] & _MORE:
        return None
    ends = np.flatnonzero(~codes & _MORE)  # the last character of each number
    starts = np.concatenate([[0], ends[:-1] + 1])
    place = np.arange(codes.size) - np.repeat(starts, ends - starts + 1)
    if place.max() > 6:  # 7 characters are more than 32 bits
        return None
    numbers = np.add.reduceat((codes & (_MORE - 1)) << _BITS * place, starts)
    numbers -= np.where(codes[ends] & _SIGN, 1 << _BITS * (place[ends] + 1), 0)
    for first in (1, 2):
        numbers[first::2] = numbers[first::2].cumsum()
    return numbers


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
