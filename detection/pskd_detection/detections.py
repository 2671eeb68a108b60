"""Detections of one image, and their check against the data set.

Shapes: n detections, K classes.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from pskd.checks import check_unit_range, rounding
from pskd_detection.datasets import DetectionDataset


class Detections(NamedTuple):
    """What a detector found in one image.

    Attributes:
        boxes: (n, 4) float, x1 y1 x2 y2 in pixels of the original image.
        scores: (n,) float in [0, 1].
        labels: (n,) integer, class index in [0, K).
    """

    boxes: np.ndarray
    scores: np.ndarray
    labels: np.ndarray


def checked_detections(
    image_id: object, detections: Detections, dataset: DetectionDataset
) -> Detections:
    """Return the detections as arrays of float64, the scores' own float type, and int64.

    Raises:
        ValueError: for an image that the data set does not have, or what `Detections` does not say.
    """
    if image_id not in dataset.objects:
        raise ValueError(f"detections: expected the id of an image of the data set, got {image_id}")
    where = f"detections of image {image_id}"
    boxes, scores, labels = (np.asarray(values) for values in detections)
    if scores.ndim != 1 or boxes.shape != (len(scores), 4) or labels.shape != scores.shape:
        # An empty list has no second dimension to get wrong.
        if not (boxes.size == scores.size == labels.size == 0):
            raise ValueError(
                f"{where}: expected shapes (n, 4), (n,) and (n,), got {boxes.shape}, "
                f"{scores.shape} and {labels.shape}"
            )
    boxes = boxes.reshape(-1, 4).astype(np.float64)
    scores = scores.reshape(-1)
    scores = scores if scores.dtype in (np.float32, np.float64) else scores.astype(np.float64)
    labels = labels.reshape(-1)
    if not np.isfinite(boxes).all() or (boxes[:, 2:] < boxes[:, :2]).any():
        raise ValueError(f"{where}: expected finite boxes with x1 <= x2 and y1 <= y2, got others")
    if len(scores):
        check_unit_range(f"{where}: scores", scores.min(), scores.max(), rounding(scores.dtype))
        scores = scores.clip(0.0, 1.0)
    classes = len(dataset.class_names)
    if len(labels) and (
        labels.dtype.kind not in "iu" or not 0 <= labels.min() <= labels.max() < classes
    ):
        raise ValueError(
            f"{where}: expected integer labels in [0, {classes}), got {labels.dtype} in "
            f"[{labels.min()}, {labels.max()}]"
        )
    return Detections(boxes, scores, labels.astype(np.int64))


def to_xywh(boxes: np.ndarray) -> np.ndarray:
    """Return (n, 4) corners x1 y1 x2 y2 as x, y, width, height."""
    return np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], axis=1)
