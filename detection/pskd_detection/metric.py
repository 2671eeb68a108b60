"""D-ECE as a torchmetrics metric, for loops that log through torchmetrics.

    metric = DetectionECE()
    metric.update(preds, target)  # each batch, as torchmetrics' MeanAveragePrecision takes them
    metric.compute()              # of the images of all processes

Shapes: n detections and G objects of an image.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from pskd.calibration import reliability_bins
from pskd_detection.confidence import SCORE_THRESHOLD, match_image
from pskd_detection.datasets import Object
from pskd_detection.detections import to_xywh


class DetectionECE(Metric):
    """The ``d_ece`` of `pskd_detection.DetectionConfidence`: the gap of score and precision.

    Args:
        iou_threshold, score_threshold, bins: as of `pskd_detection.DetectionConfidence`.
        options: of `torchmetrics.Metric`.

    Source: Kueppers et al. 2020, "Multivariate Confidence Calibration for Object Detection".
    """

    is_differentiable = False
    higher_is_better = False
    full_state_update = False
    plot_lower_bound, plot_upper_bound = 0.0, 1.0

    confidence: list[Tensor]
    correct: list[Tensor]

    def __init__(
        self,
        *,
        iou_threshold: float = 0.5,
        score_threshold: float = SCORE_THRESHOLD,
        bins: int = 15,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.iou_threshold, self.score_threshold, self.bins = iou_threshold, score_threshold, bins
        self.add_state("confidence", default=[], dist_reduce_fx="cat")
        self.add_state("correct", default=[], dist_reduce_fx="cat")

    def update(
        self, preds: Sequence[Mapping[str, Tensor]], target: Sequence[Mapping[str, Tensor]]
    ) -> None:
        """Add a batch of images.

        Args:
            preds: of each image ``boxes`` (n, 4) as x1 y1 x2 y2 in pixels, ``scores`` (n,) in
                [0, 1] and ``labels`` (n,) integers.
            target: of each image ``boxes`` (G, 4), ``labels`` (G,), and ``iscrowd`` (G,) if any is.

        Raises:
            ValueError: for another number of images in the two.
        """
        for found, there in zip(preds, target, strict=True):
            kept = found["scores"] >= self.score_threshold
            scores, labels, boxes = (
                found[name][kept].cpu().double().numpy() for name in ("scores", "labels", "boxes")
            )
            crowd = there.get("iscrowd", torch.zeros_like(there["labels"]))
            truth = zip(
                to_xywh(there["boxes"].cpu().double().numpy()).tolist(),
                there["labels"].tolist(),
                crowd.bool().tolist(),
                strict=True,
            )
            objects = [Object(*one) for one in truth]
            rows, iou = match_image(to_xywh(boxes), scores, labels, objects, self.iou_threshold)
            self.confidence.append(torch.as_tensor(scores[rows], device=self.device).float())
            self.correct.append(torch.as_tensor(iou > 0, device=self.device))

    def compute(self) -> Tensor:
        """Return D-ECE as a fraction, a float32 number; ValueError if nothing was detected."""
        found = dim_zero_cat(self.confidence), dim_zero_cat(self.correct)
        error = reliability_bins(*found, bins=self.bins).expected_calibration_error
        return torch.tensor(error, dtype=torch.float32, device=self.device)
