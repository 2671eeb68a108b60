"""How far the scores of detections can be trusted: D-ECE, LaECE and AURC.

Shapes: n detections of an image, N detections that were kept, G objects, K classes, B bins.

A detection is *correct* if it is matched to an object of its class. All values are fractions.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import numpy as np
from pycocotools import mask

from pskd.calibration import ReliabilityBins, reliability_bins
from pskd_detection.datasets import DetectionDataset, Object
from pskd_detection.detections import Detections, checked_detections, to_xywh
from pskd_tools.presets import measure

#: The least score of a detection that is looked at: what both frameworks keep by default.
SCORE_THRESHOLD = 0.05


def match_detections(iou: np.ndarray, crowd: np.ndarray, threshold: float) -> np.ndarray:
    """Return the (n,) IoU of each detection with its object, 0 without one, NaN for one on a crowd.

    In the order given, each detection takes the free object of highest IoU, if that is at least
    ``threshold``, in (0, 1]. On a crowd, an unmatched detection counts as neither right nor wrong.
    ``iou`` is (n, G); for a ``crowd``, (G,) bool, it is the part of the detection inside it.

    Source: the order and the treatment of ties are those of `pycocotools.cocoeval.COCOeval`.
    """
    matched = np.zeros(len(iou))
    free = ~crowd
    threshold = min(threshold, 1 - 1e-10)  # as there, for a threshold of 1
    for i, row in enumerate(iou):
        candidates = np.where(free, row, -1.0)
        best = len(candidates) - 1 - candidates[::-1].argmax() if len(candidates) else -1
        if best >= 0 and candidates[best] >= threshold:
            matched[i] = row[best]
            free[best] = False
        elif (row[crowd] >= threshold).any():
            matched[i] = np.nan
    return matched


def match_image(
    boxes: np.ndarray,
    scores: np.ndarray,
    labels: np.ndarray,
    objects: Sequence[Object],
    threshold: float,
) -> tuple[np.ndarray, np.ndarray]:
    """Match the detections of an image to the objects of their class, by falling score.

    Returns:
        The rows of the detections that are right or wrong, not those on a crowd, and the IoU of
        each with its object, 0 without one.
    """
    found = [(np.empty(0, np.int64), np.empty(0))]
    for label in np.unique(labels):
        rows = np.flatnonzero(labels == label)
        # Stable, as in COCO's evaluation: equal scores stay in the detector's order.
        rows = rows[np.argsort(-scores[rows], kind="stable")]
        own = [o for o in objects if o.label == label]
        iou = np.zeros(len(rows))
        if own:
            crowd = np.array([o.crowd for o in own])
            overlap = mask.iou(
                boxes[rows], np.array([o.box for o in own]), crowd.astype(int).tolist()
            )
            iou = match_detections(overlap, crowd, threshold)
        counts = ~np.isnan(iou)
        found.append((rows[counts], iou[counts]))
    rows, iou = (np.concatenate(parts) for parts in zip(*found, strict=True))
    return rows, iou


class DetectionConfidence:
    """Calibration and ranking of the scores of detections over a data set.

    Within an image and class, detections in order of falling score are matched to the objects by
    `match_detections`; the second detection of one object is therefore wrong. Detections on crowds
    (COCO's ``iscrowd``, VOC's difficult objects) are left out, and so are scores below
    ``score_threshold``.

    - **D-ECE** is the gap between score and precision: ``sum(n_b / N * |score_b - precision_b|)``
      over equal-width bins (lo, hi] of the score, all classes together.
    - **LaECE** also asks the score to tell how well the box fits: for each class ``sum(n_b / n *
      |score_b - precision_b * IoU_b|)`` with the mean IoU of the bin's correct detections, then the
      mean over the classes that have detections.
    - **AURC** is `pskd.calibration.aurc` of the kept detections; the excess AURC is what a better
      ranking of them would remove.

    None of them sees objects that were missed. They depend on the thresholds, which therefore stand
    among the results.

    Args:
        dataset: the test set.
        iou_threshold: the least IoU of a match, in (0, 1]. LaECE was published with 0.1, D-ECE with
            0.5 and more; here both share one matching.
        score_threshold: the least score of a detection that is kept, in [0, 1]. 0.05 is what
            Detectron2 and torchvision keep by themselves.
        bins: the number of bins of both errors; 15 as everywhere in pskd, so that D-ECE is the
            error that `pskd_tools.plots.reliability_diagram` shows. LaECE was published with 25.

    Raises:
        ValueError: a threshold or ``bins`` out of range.

    Source: Kueppers et al. 2020, "Multivariate Confidence Calibration for Object Detection"
    (D-ECE over the confidence alone); Oksuz et al. 2023, "Towards Building Self-Aware Object
    Detectors via Reliable Uncertainty Quantification and Calibration" (LaECE).
    """

    def __init__(
        self,
        dataset: DetectionDataset,
        *,
        iou_threshold: float = 0.5,
        score_threshold: float = SCORE_THRESHOLD,
        bins: int = 15,
    ) -> None:
        if not 0 < iou_threshold <= 1:
            raise ValueError(f"iou_threshold: expected a number in (0, 1], got {iou_threshold}")
        if not 0 <= score_threshold <= 1:
            raise ValueError(f"score_threshold: expected a number in [0, 1], got {score_threshold}")
        ReliabilityBins.empty(bins)  # refuses a number of bins that is none
        self._dataset = dataset
        self._bins = int(bins)
        self._options = {
            "iou_threshold": float(iou_threshold),
            "score_threshold": float(score_threshold),
            "bins": self._bins,
        }
        self._seen: set = set()
        empty = np.empty(0, np.float32)
        self._rows: list[tuple[np.ndarray, ...]] = [
            (empty, empty, np.empty(0, np.int64), np.empty((0, 4)), np.empty(0, str))
        ]

    def update(self, image_id: Hashable, detections: Detections) -> None:
        """Add the detections of one image.

        Raises:
            ValueError: an image that the data set does not have or that was added before;
                detections that are none.
        """
        if image_id in self._seen:
            raise ValueError(f"detections: expected image {image_id} once, got it again")
        found = checked_detections(image_id, detections, self._dataset)
        self._seen.add(image_id)
        kept = found.scores >= self._options["score_threshold"]
        boxes, scores, labels = to_xywh(found.boxes[kept]), found.scores[kept], found.labels[kept]
        objects = self._dataset.objects[image_id]
        rows, iou = match_image(boxes, scores, labels, objects, self._options["iou_threshold"])
        ids = np.full(len(rows), str(image_id))
        self._rows.append((scores[rows], iou, labels[rows], boxes[rows], ids))

    @property
    def confidence(self) -> np.ndarray:
        """The scores of all kept detections so far, (N,) float."""
        return self._column(0)

    @property
    def correct(self) -> np.ndarray:
        """Whether each of them is matched to an object, (N,) bool."""
        return self.iou > 0

    @property
    def iou(self) -> np.ndarray:
        """The IoU of each with its object, (N,) float; 0 without one."""
        return self._column(1)

    @property
    def labels(self) -> np.ndarray:
        """The class index of each, (N,) int64."""
        return self._column(2)

    @property
    def boxes(self) -> np.ndarray:
        """The box of each, (N, 4) float: x, y, width, height in pixels."""
        return self._column(3)

    @property
    def image_ids(self) -> np.ndarray:
        """The image of each, (N,) str."""
        return self._column(4)

    def _column(self, i: int) -> np.ndarray:
        if len(self._rows) > 1:
            self._rows = [tuple(np.concatenate(parts) for parts in zip(*self._rows, strict=True))]
        return self._rows[0][i]

    def compute(self) -> dict[str, float | int | None]:
        """The metrics of all detections so far; more may follow.

        Returns:
            ``d_ece``, ``la_ece``, ``aurc`` and ``e_aurc`` as fractions, None if no detection
            was kept; ``num_detections`` kept and ``num_matched`` among them; ``iou_threshold``,
            ``score_threshold`` and ``bins``.
        """
        confidence, correct = self.confidence, self.correct
        metrics: dict[str, float | None] = dict.fromkeys(("d_ece", "la_ece", "aurc", "e_aurc"))
        if len(confidence):
            raw = measure(confidence, correct, bins=self._bins)
            raw |= {"d_ece": raw["ece"], "la_ece": self._la_ece()}
            metrics = {name: raw[name] for name in metrics}
        counts = {"num_detections": len(confidence), "num_matched": int(correct.sum())}
        return {**metrics, **counts, **self._options}

    def _la_ece(self) -> float:
        errors = [
            _location_aware_bins(self.confidence[rows], self.iou[rows], self._bins)
            for rows in (self.labels == label for label in np.unique(self.labels))
        ]
        return float(np.mean([bins.expected_calibration_error for bins in errors]))


def _location_aware_bins(confidence: np.ndarray, iou: np.ndarray, bins: int) -> ReliabilityBins:
    """Return bins in which a correct detection counts by its IoU: precision times mean IoU."""
    filled = reliability_bins(confidence, iou > 0, bins=bins)
    # Sorted by confidence, each bin holds the next ``count`` rows.
    index = np.repeat(np.arange(bins), filled.count)
    iou_sum = np.bincount(index, weights=iou[np.argsort(confidence)], minlength=bins)
    return ReliabilityBins(filled.count, filled.confidence_sum, iou_sum)
