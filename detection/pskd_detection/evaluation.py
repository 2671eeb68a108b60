"""AP of detections as COCO computes it, by pycocotools."""

from __future__ import annotations

import contextlib
import io
import logging
from collections.abc import Hashable, Mapping

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from pskd_detection.datasets import DetectionDataset
from pskd_detection.detections import Detections, checked_detections, to_xywh

_METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl")  # the first six of COCOeval.stats
_log = logging.getLogger(__name__)


def average_precision(
    dataset: DetectionDataset, detections: Mapping[Hashable, Detections]
) -> dict[str, float | None]:
    """COCO's box AP, over all classes and of each.

    Args:
        dataset: the test set.
        detections: by image id. An image that is not among them has no detections.

    Returns:
        ``AP`` (mean over IoU 0.50:0.95), ``AP50``, ``AP75``, ``APs``, ``APm``, ``APl`` (small,
        medium, large) and ``AP-<class>`` for each class, in percent, 0 to 100. None where there is
        no object to find. At most 100 detections an image and class count, as in COCO.

    Raises:
        ValueError: an image that the data set does not have; detections that are none.

    Source: COCO's evaluation, `pycocotools.cocoeval.COCOeval`.
    """
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        evaluation = _evaluated(dataset, detections)
        evaluation.summarize()
    _log.debug("%s", printed.getvalue())
    stats = evaluation.stats[: len(_METRICS)]
    results = {name: _percent(value) for name, value in zip(_METRICS, stats, strict=True)}
    precision = evaluation.eval["precision"]  # (IoUs, recalls, K, area ranges, detection limits)
    for i, name in enumerate(dataset.class_names):
        of_class = precision[:, :, i, 0, -1]
        of_class = of_class[of_class > -1]
        results[f"AP-{name}"] = _percent(of_class.mean() if of_class.size else -1)
    return results


def in_coco_format(
    dataset: DetectionDataset, detections: Mapping[Hashable, Detections]
) -> list[dict]:
    """Return detections in COCO's results format, a dictionary each.

    Args, Raises: as `average_precision`.
    """
    rows: list[dict] = []
    for image_id, found in detections.items():
        found = checked_detections(image_id, found, dataset)
        boxes = to_xywh(found.boxes).tolist()
        for box, score, label in zip(boxes, found.scores.tolist(), found.labels, strict=True):
            category = dataset.category_ids[label]
            row = {"image_id": image_id, "category_id": category, "bbox": box, "score": score}
            rows.append(row)
    return rows


def _evaluated(dataset: DetectionDataset, detections: Mapping[Hashable, Detections]) -> COCOeval:
    # Dictionaries of their own: the evaluation marks the annotations.
    truth = [dict(annotation) for annotation in dataset.coco["annotations"]]
    found = [
        row | {"id": i, "area": row["bbox"][2] * row["bbox"][3], "iscrowd": 0}
        for i, row in enumerate(in_coco_format(dataset, detections), start=1)
    ]
    evaluation = COCOeval(_indexed(dataset, truth), _indexed(dataset, found), "bbox")
    evaluation.evaluate()
    evaluation.accumulate()
    return evaluation


def _indexed(dataset: DetectionDataset, annotations: list[dict]) -> COCO:
    # In place of COCO.loadRes, which fails if there is no detection at all.
    coco = COCO()
    coco.dataset = {**dataset.coco, "annotations": annotations}
    coco.createIndex()
    return coco


def _percent(value: float) -> float | None:
    """Return a fraction in percent; COCO marks with -1 what is undefined."""
    return None if np.isnan(value) or value < 0 else 100.0 * float(value)
