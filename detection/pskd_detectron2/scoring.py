"""Class scores of given boxes by any of the three box heads, without labels and losses."""

from __future__ import annotations

import torch
from detectron2.modeling.roi_heads import (
    CascadeROIHeads,
    Res5ROIHeads,
    ROIHeads,
    RROIHeads,
    StandardROIHeads,
)
from detectron2.structures import Instances
from torch import Tensor


def has_class_logits(heads: object) -> bool:
    """Return whether `class_logits` knows heads of this kind, which a cascade's and all but the
    rotated ones are."""
    return isinstance(heads, (StandardROIHeads, Res5ROIHeads)) and not isinstance(heads, RROIHeads)


def class_logits(
    heads: ROIHeads, features: dict[str, Tensor], proposals: list[Instances], stage: int = 0
) -> Tensor:
    """Return the (R, K + 1) scores of the proposals' boxes in eval mode, background last."""
    names = heads.in_features if isinstance(heads, Res5ROIHeads) else heads.box_in_features
    maps = [features[name] for name in names]
    boxes = [p.proposal_boxes for p in proposals]
    if isinstance(heads, CascadeROIHeads):
        pooled = heads.box_head[stage](heads.box_pooler(maps, boxes))
        return heads.box_predictor[stage](pooled)[0]
    if isinstance(heads, Res5ROIHeads):
        pooled = heads._shared_roi_transform(maps, boxes).mean(dim=[2, 3])
    else:
        pooled = heads.box_head(heads.box_pooler(maps, boxes))
    return heads.box_predictor(pooled)[0]


def class_probs(heads: ROIHeads, features: dict[str, Tensor], proposals: list[Instances]) -> Tensor:
    """Return (R, K + 1) probabilities as inference has them: a cascade's mean over its stages.

    With a sigmoid head the last column, which it does not train, is 0.
    """
    stages = getattr(heads, "num_cascade_stages", 1)
    probs = []
    for stage in range(stages):
        scores = class_logits(heads, features, proposals, stage).float()
        predictor = heads.box_predictor[stage] if stages > 1 else heads.box_predictor
        if predictor.use_sigmoid_ce:
            foreground = scores[:, :-1].sigmoid()
            probs.append(torch.cat([foreground, torch.zeros_like(scores[:, -1:])], dim=1))
        else:
            probs.append(scores.softmax(dim=1))
    return sum(probs[1:], probs[0]) / stages
