"""torchvision's `RoIHeads` with a teacher that scores the ROIs that were sampled.

Shapes: N images, R sampled ROIs, K foreground classes, and scores of K + 1 columns with background
first, as torchvision has them.

Two region proposal networks give two different sets of ROIs, so the teacher's own is not asked: it
gets the student's boxes, in the student's order, after they were sampled.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN
from torchvision.models.detection.roi_heads import RoIHeads

from pskd import pskd_cross_entropy
from pskd.targets import row_alphas
from pskd_torchvision.state import PSKDState


@contextmanager
def captured(module: nn.Module) -> Iterator[list]:
    """Yield a list to which every output of ``module`` is added until the block ends."""
    outputs: list = []
    handle = module.register_forward_hook(lambda _module, _args, output: outputs.append(output))
    try:
        yield outputs
    finally:
        handle.remove()


class PSKDRoIHeads(RoIHeads):
    """`RoIHeads` whose ``loss_classifier`` is PS-KD's; boxes, masks and keypoints are stock.

    The loss is ``F.cross_entropy(scores, mixed_target)``, a mean over the R ROIs as stock; it is
    torchvision's own, bit for bit, without a teacher and label smoothing.

    Source: Kim et al. 2021, section 3.1, on the classifier of torchvision's roi_heads.py.
    """

    pskd: PSKDState | None = None
    _sampled: list[list[Tensor]] | None = None  # boxes and labels of each image, where asked for

    def select_training_samples(self, proposals, targets):
        """As stock; the sample is kept for the teacher."""
        sampled = super().select_training_samples(proposals, targets)
        boxes, _matched, labels, _deltas = sampled
        if self._sampled is not None:
            self._sampled += [boxes, labels]
        return sampled

    def forward(self, features, proposals, image_shapes, targets=None):
        """As stock, ``loss_classifier`` replaced where there is a teacher."""
        pskd = self.pskd
        if pskd is None or not self.training or not (pskd.active or pskd.label_smoothing):
            return super().forward(features, proposals, image_shapes, targets)
        images, pskd.images = pskd.images, None
        self._sampled = []
        try:
            with captured(self.box_predictor) as predictions:
                result, losses = super().forward(features, proposals, image_shapes, targets)
            boxes, image_labels = self._sampled
        finally:
            self._sampled = None
        (scores, _deltas), labels = predictions[0], torch.cat(image_labels)
        past = None
        if pskd.active:
            past = _score_by_teacher(pskd.snapshot.model, images, boxes, image_shapes)
        losses["loss_classifier"] = _softened(pskd, scores, labels, past)
        return result, losses


@torch.no_grad()
def _score_by_teacher(
    teacher: nn.Module,
    images: Tensor | None,
    boxes: list[Tensor],
    image_shapes: list[tuple[int, int]],
) -> Tensor:
    """Return the (R, K + 1) probabilities of the snapshot teacher for the sampled boxes."""
    if images is None:
        raise RuntimeError(
            "the teacher has no images: expected the transform that the model had in add_pskd"
        )
    features = teacher.get_submodule("backbone")(images)
    heads = teacher.get_submodule("roi_heads")
    return class_logits(heads, features, boxes, image_shapes).float().softmax(dim=1)


def _softened(pskd: PSKDState, scores: Tensor, labels: Tensor, past: Tensor | None) -> Tensor:
    smoothing = pskd.label_smoothing
    if past is None:
        loss = pskd_cross_entropy(
            scores, labels, None, 0.0, label_smoothing=smoothing, reduction="sum"
        )
    else:
        taught = labels > 0 if pskd.foreground_only else torch.ones_like(labels, dtype=torch.bool)
        alpha = row_alphas(pskd.alpha, taught)
        loss, stats = pskd_cross_entropy(
            scores,
            labels,
            past,
            alpha,
            label_smoothing=smoothing,
            reduction="sum",
            return_stats=True,
        )
        pskd.means.add(scores, past, alpha, stats)
    # An empty batch has the loss 0 and stays in the graph.
    return loss / max(1, len(labels))


def class_logits(
    heads: RoIHeads,
    features: Tensor | dict[str, Tensor],
    boxes: list[Tensor],
    image_shapes: list[tuple[int, int]],
) -> Tensor:
    """Return the (R, K + 1) scores of given boxes, background first, by heads in eval mode.

    ``boxes``, (R_i, 4) of each image, are x1 y1 x2 y2 in pixels of the transformed image, and
    ``image_shapes`` (height, width) of each without its padding.
    """
    if isinstance(features, Tensor):  # of a backbone with one map; torchvision names it so
        features = {"0": features}
    pooled = heads.box_roi_pool(features, boxes, image_shapes)
    return heads.box_predictor(heads.box_head(pooled))[0]


def add_pskd(
    model: nn.Module, *, foreground_only: bool = False, label_smoothing: float = 0.0
) -> nn.Module:
    """Turn a built torchvision model into one of PS-KD, in place, and return it.

    Nothing is built anew: parameters keep their names and values. Without `PSKDEpochs`, which sets
    alpha and the teacher, the model trains as before.

    Args:
        model: of a ``fasterrcnn_*``, ``maskrcnn_*`` or ``keypointrcnn_*`` builder; not yet in DDP.
        foreground_only: background ROIs keep their hard target.
        label_smoothing: torch's, of the hard part, over all K + 1 classes; in [0, 1].

    Raises:
        ValueError: for another kind of model, one that has PS-KD already, or heads of a foreign
            class, whose own loss would be lost.
    """
    heads = getattr(model, "roi_heads", None)
    if not isinstance(model, GeneralizedRCNN) or not isinstance(heads, RoIHeads):
        raise ValueError(
            "model: expected one of torchvision's with RoIHeads (Faster, Mask or Keypoint R-CNN), "
            f"not yet wrapped, got {type(model).__name__}"
        )
    if getattr(heads, "pskd", None) is not None:
        raise ValueError("model: expected one without PS-KD, got one that has it already")
    if type(heads) is not RoIHeads and not isinstance(heads, PSKDRoIHeads):
        raise ValueError(
            f"roi_heads: expected RoIHeads or PSKDRoIHeads' subclass, got {type(heads).__name__}"
        )
    if type(heads) is RoIHeads:
        # Not built anew: RoIHeads hides its constructor's arguments in objects of their own.
        heads.__class__ = PSKDRoIHeads
    heads.pskd = PSKDState(foreground_only, label_smoothing)
    model.transform.register_forward_hook(heads.pskd.keep_images)
    return model
