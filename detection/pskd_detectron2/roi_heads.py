"""The three ROI heads that people use, with a teacher that scores the ROIs that were sampled.

Two region proposal networks give two different sets of ROIs, so the teacher's own is not asked: it
gets the student's boxes, in the student's order, after they were sampled.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from detectron2.config import configurable
from detectron2.modeling.roi_heads import (
    ROI_HEADS_REGISTRY,
    CascadeROIHeads,
    Res5ROIHeads,
    StandardROIHeads,
)
from detectron2.structures import ImageList, Instances, pairwise_iou
from torch import Tensor

from pskd_detectron2.fast_rcnn import ROW_FIELD, TEACHER_FIELD, PSKDFastRCNNOutputLayers
from pskd_detectron2.scoring import class_logits
from pskd_detectron2.state import PSKDState

if TYPE_CHECKING:  # what the stock class, mixed in after, brings
    from detectron2.modeling.roi_heads import ROIHeads as _Stock
else:
    _Stock = object


class _PSKDHeads(_Stock):
    """What the three heads share; mixed in before the stock class.

    Args:
        pskd_enabled: False trains as the stock heads do.
        pskd_foreground_only: background ROIs keep their hard target.
        pskd_label_smoothing: torch's, of the hard part, over all K + 1 classes; 0 with a sigmoid
            head.
        parts: of the stock heads. Box predictors become PS-KD's if it is enabled.

    Raises:
        ValueError: as `PSKDFastRCNNOutputLayers.of`.
    """

    # For TorchScript, of derived heads too: Detectron2 marks them on its own classes only.
    __constants__: tuple[str, ...] = ("training", "mask_on")

    @configurable
    def __init__(
        self,
        *,
        pskd_enabled: bool = True,
        pskd_foreground_only: bool = False,
        pskd_label_smoothing: float = 0.0,
        **parts,
    ) -> None:
        pskd = PSKDState(pskd_enabled, pskd_foreground_only, pskd_label_smoothing)
        of = PSKDFastRCNNOutputLayers.of
        if pskd_enabled and "box_predictors" in parts:  # of a cascade
            stages = enumerate(parts["box_predictors"])
            parts["box_predictors"] = [of(stock, pskd, stage) for stage, stock in stages]
        elif pskd_enabled:
            parts["box_predictor"] = of(parts["box_predictor"], pskd)
        super().__init__(**parts)
        self.pskd = pskd
        self._teacher_features: dict[str, Tensor] | None = None

    @classmethod
    def from_config(cls, cfg, input_shape) -> dict:
        options = cfg.MODEL.PSKD
        return super().from_config(cfg, input_shape) | {
            "pskd_enabled": options.ENABLED,
            "pskd_foreground_only": options.FOREGROUND_ONLY,
            "pskd_label_smoothing": options.LABEL_SMOOTHING,
        }

    def __call__(
        self,
        images: ImageList,
        features: dict[str, Tensor],
        proposals: list[Instances],
        targets: list[Instances] | None = None,
    ):
        """As the stock heads; in training the teacher's backbone sees the same images first.

        Around ``forward`` and not in it: TorchScript compiles ``forward``, which stays stock.

        Raises:
            ValueError: if the memory is the teacher and the annotations do not tell their rows.
        """
        if self.training and self.pskd.memory is not None:
            _check_rows(targets or [])
        if self.training and self.pskd.alpha and self.pskd.snapshot.available:
            with torch.no_grad():
                backbone = self.pskd.snapshot.model.get_submodule("backbone")
                self._teacher_features = backbone(images.tensor)
        try:
            return super().__call__(images, features, proposals, targets)
        finally:
            self._teacher_features = None

    @torch.no_grad()
    def _score_by_teacher(self, proposals: list[Instances], stage: int = 0) -> None:
        """Set the teacher's scores of the proposals as a field, if there is a teacher."""
        if self._teacher_features is None:
            return
        heads = self.pskd.snapshot.model.get_submodule("roi_heads")
        scores = class_logits(heads, self._teacher_features, proposals, stage)
        for image, part in zip(proposals, scores.split([len(p) for p in proposals]), strict=True):
            image.set(TEACHER_FIELD, part)


def _check_rows(targets: list[Instances]) -> None:
    # An image without annotations may lack the field; to others row 0 would be given in silence.
    if any(len(target) and not target.has(ROW_FIELD) for target in targets):
        raise ValueError(
            f"MODEL.PSKD.TEACHER memory: expected annotations with {ROW_FIELD}, from "
            "PSKDDatasetMapper on data of number_annotations, got some without"
        )


class _ScoresSampledProposals(_PSKDHeads):
    """Heads of one stage: the teacher scores the ROIs as soon as they are sampled."""

    @torch.no_grad()
    def label_and_sample_proposals(
        self, proposals: list[Instances], targets: list[Instances]
    ) -> list[Instances]:
        sampled = super().label_and_sample_proposals(proposals, targets)
        self._score_by_teacher(sampled)
        return sampled


@ROI_HEADS_REGISTRY.register()
class PSKDROIHeads(_ScoresSampledProposals, StandardROIHeads):
    """`StandardROIHeads` (FPN; Faster, Mask and Keypoint R-CNN) with PS-KD's ``loss_cls``."""

    __constants__ = ("training", "mask_on", "keypoint_on")


@ROI_HEADS_REGISTRY.register()
class PSKDRes5ROIHeads(_ScoresSampledProposals, Res5ROIHeads):
    """`Res5ROIHeads` (C4) with PS-KD's ``loss_cls``."""


@ROI_HEADS_REGISTRY.register()
class PSKDCascadeROIHeads(_PSKDHeads, CascadeROIHeads):
    """`CascadeROIHeads` with PS-KD's ``loss_cls`` in every stage, each against its own past."""

    def _run_stage(self, features: list[Tensor], proposals: list[Instances], stage: int):
        if self.training:
            self._score_by_teacher(proposals, stage)
        return super()._run_stage(features, proposals, stage)

    @torch.no_grad()
    def _match_and_label_boxes(
        self, proposals: list[Instances], stage: int, targets: list[Instances]
    ) -> list[Instances]:
        """As stock, which hands on the matched class and box; the matched row is needed too."""
        proposals = super()._match_and_label_boxes(proposals, stage, targets)
        for image, target in zip(proposals, targets, strict=True):
            if len(target) and target.has(ROW_FIELD):
                matched = pairwise_iou(target.gt_boxes, image.proposal_boxes).argmax(dim=0)
                image.set(ROW_FIELD, target.get(ROW_FIELD)[matched])
        return proposals
