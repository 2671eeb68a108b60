"""Detectors by their builder's name, without any download, and local weights for them."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence

from torch import nn
from torchvision.models import detection, get_model, list_models
from torchvision.models.detection import FasterRCNN, MaskRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import (
    BackboneWithFPN,
    LastLevelMaxPool,
    resnet_fpn_backbone,
)
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.resnet import BasicBlock, ResNet
from torchvision.ops import FrozenBatchNorm2d, MultiScaleRoIAlign

from pskd_torchvision.weights import read_state_dict, some

KINDS = {"fasterrcnn_": FasterRCNN, "maskrcnn_": MaskRCNN}
# Beside the builders that torchvision has: its own parts with other ResNets.
RESNETS = ("resnet18", "resnet34", "resnet101")
TINY = "tiny_fpn"
TINY_CHANNELS, TINY_HEAD = 64, 256


def model_names() -> list[str]:
    """Return the names that `build_detector` knows."""
    stock = [name for name in list_models(module=detection) if name.startswith(tuple(KINDS))]
    added = [f"{kind}{body}" for kind in KINDS for body in (TINY, *(f"{r}_fpn" for r in RESNETS))]
    return sorted({*stock, *added})


def has_masks(name: str) -> bool:
    """Whether a builder's model learns masks, which the training set must then have."""
    return name.startswith("maskrcnn_")


def build_detector(
    name: str,
    num_classes: int,
    *,
    min_size: Sequence[int] | None = None,
    max_size: int | None = None,
    frozen_bn: bool = False,
) -> nn.Module:
    """Build a detector with random weights; what is None is as its builder has it.

    ``fasterrcnn_tiny_fpn`` and ``maskrcnn_tiny_fpn`` train on one CPU core in minutes: the stem and
    three stages of a ResNet-10, 64 channels, 64 ROIs of at most 300 proposals an image, for images
    of about 128 pixels with objects of 12 to 64.

    Args:
        name: one of `model_names`.
        num_classes: K, without background.
        min_size: pixels of the shorter side; of several, training draws one for each image and
            evaluation takes the last.
        max_size: pixels of the longer side.
        frozen_bn: batch norm of the backbone is a constant, for loaded weights and small batches.

    Raises:
        ValueError: for a name that is not known.
    """
    if name not in model_names():
        raise ValueError(f"--model: expected one of {', '.join(model_names())}, got {name!r}")
    given = {"min_size": min_size and tuple(min_size), "max_size": max_size}
    options = {key: value for key, value in given.items() if value is not None}
    model = _builder(name)(num_classes=num_classes + 1, **options)
    if frozen_bn:
        _freeze_batch_norm(model.backbone)
    return model


def _builder(name: str) -> Callable[..., FasterRCNN]:
    kind, body = name.split("_", 1)
    detector = KINDS[f"{kind}_"]
    if body == TINY:
        return lambda **options: _tiny(detector, **options)
    if body.removesuffix("_fpn") in RESNETS:
        return lambda **options: detector(_resnet_fpn(body.removesuffix("_fpn")), **options)
    # Both: without weights the builder still downloads those of the backbone.
    return lambda **options: get_model(name, weights=None, weights_backbone=None, **options)


def _resnet_fpn(body: str) -> nn.Module:
    # As torchvision's builders do without weights: nothing frozen.
    return resnet_fpn_backbone(
        backbone_name=body, weights=None, norm_layer=nn.BatchNorm2d, trainable_layers=5
    )


def _tiny(detector: type[FasterRCNN], *, num_classes: int, **options) -> FasterRCNN:
    """Build the detector that a CPU trains in minutes."""
    body, channels = ResNet(BasicBlock, [1, 1, 1, 1]), TINY_CHANNELS
    backbone = BackboneWithFPN(
        body,
        {"layer1": "0", "layer2": "1", "layer3": "2"},
        [64, 128, 256],
        channels,
        extra_blocks=LastLevelMaxPool(),
    )
    sizes = ((16,), (24,), (32,), (48,))
    tiny: dict[str, object] = {
        "min_size": 128,
        "max_size": 256,
        "rpn_anchor_generator": AnchorGenerator(sizes, ((0.5, 1.0, 2.0),) * len(sizes)),
        "box_roi_pool": MultiScaleRoIAlign(["0", "1", "2"], output_size=7, sampling_ratio=2),
        "box_head": TwoMLPHead(channels * 7**2, TINY_HEAD),
        "box_predictor": FastRCNNPredictor(TINY_HEAD, num_classes),
        "box_batch_size_per_image": 64,
    }
    for when in ("pre", "post"):
        for mode in ("train", "test"):
            tiny[f"rpn_{when}_nms_top_n_{mode}"] = 300
    if detector is MaskRCNN:
        tiny["mask_roi_pool"] = MultiScaleRoIAlign(["0", "1", "2"], 14, sampling_ratio=2)
        tiny["mask_head"] = MaskRCNNHeads(channels, (channels, channels), 1)
        tiny["mask_predictor"] = MaskRCNNPredictor(channels, channels, num_classes)
    return detector(backbone, **(tiny | options))


def _freeze_batch_norm(module: nn.Module) -> None:
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm2d):
            frozen = FrozenBatchNorm2d(child.num_features, child.eps)
            frozen.load_state_dict(child.state_dict())
            setattr(module, name, frozen)
        else:
            _freeze_batch_norm(child)


def load_weights(model: FasterRCNN, path: str | os.PathLike) -> list[str]:
    """Load a local file into a detector: a torchvision detector, or a ResNet for its backbone.

    The file is a state dict in torchvision's names, bare or under ``model`` or ``state_dict``. A
    box or mask predictor for another number of classes is not loaded; a ResNet's ``fc`` neither.

    Returns:
        The names of the model's weights that keep their values for want of others in the file.

    Raises:
        OSError: if it cannot be opened.
        ValueError: naming the file, if it is damaged or belongs to another model.
    """
    state = read_state_dict(path)
    is_detector = any(key.startswith("backbone.") for key in state)
    target = model if is_detector else getattr(model.backbone, "body", model.backbone)
    own = target.state_dict()
    prefix = "" if target is model else "backbone.body."
    state = {key: value for key, value in state.items() if not key.startswith("fc.")}
    left_out = {
        key
        for key, value in state.items()
        if key.startswith(("roi_heads.box_predictor.", "roi_heads.mask_predictor."))
        and (key not in own or value.shape != own[key].shape)
    }
    state = {key: value for key, value in state.items() if key not in left_out}
    _check_fits(path, state, own, allowed_to_lack=left_out)
    target.load_state_dict(state, strict=False)
    loaded = {prefix + key for key in state}
    return sorted(key for key in model.state_dict() if key not in loaded and not _is_counter(key))


def _is_counter(key: str) -> bool:
    # Older files lack it, and frozen batch norm does.
    return key.endswith(".num_batches_tracked")


def _check_fits(path, state: dict, own: dict, allowed_to_lack: set) -> None:
    missing = [k for k in own if k not in state and k not in allowed_to_lack and not _is_counter(k)]
    unknown = [k for k in state if k not in own and not _is_counter(k)]
    others = [k for k in state if k in own and state[k].shape != own[k].shape]
    for what, keys in (("lacks", missing), ("also has", unknown), ("has in another shape", others)):
        if keys:
            raise ValueError(
                f"{path}: expected the weights of this model or of its ResNet, got a file that "
                f"{what} {len(keys)} of them: {some(keys)}"
            )
