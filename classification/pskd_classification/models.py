"""Classifiers by name: the CIFAR networks of this package, torchvision's, and timm's."""

from __future__ import annotations

import functools

import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

from pskd_classification.networks import NETWORKS

__all__ = ["build_model"]

TIMM = "timm:"


def build_model(name: str, num_classes: int, *, dropout: float = 0.0) -> nn.Module:
    """Build a classifier with random weights; nothing is downloaded.

    Args:
        name: one of `networks.NETWORKS`, a classification model of torchvision (``resnet50``,
            ``convnext_tiny``, ...), or one of timm as ``timm:NAME``.
        num_classes: C.
        dropout: probability before the classifier; 0 leaves the model's own default.

    Raises:
        ValueError: for a name that none has, timm that is not installed, or dropout that the model
            has no place for.
    """
    if name in NETWORKS:
        return NETWORKS[name](num_classes, dropout=dropout)
    if name.startswith(TIMM):
        return _timm(name.removeprefix(TIMM), num_classes, dropout)
    if name not in torchvision.models.list_models(module=torchvision.models):
        raise ValueError(
            f"--model: expected one of {', '.join(NETWORKS)}, a classifier of torchvision "
            f"or {TIMM}NAME, got {name!r}"
        )
    options = {"dropout": dropout} if dropout else {}
    try:
        return torchvision.models.get_model(name, weights=None, num_classes=num_classes, **options)
    except TypeError:  # a builder that does not know dropout
        model = torchvision.models.get_model(name, weights=None, num_classes=num_classes)
        _add_dropout(model, name, dropout)
        return model


def _timm(name: str, num_classes: int, dropout: float) -> nn.Module:
    try:
        import timm
    except ImportError as error:
        raise ValueError(f"--model: {TIMM}{name} needs timm: pip install timm") from error
    options = {"drop_rate": dropout} if dropout else {}
    try:
        return timm.create_model(name, pretrained=False, num_classes=num_classes, **options)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"--model: expected a model of timm, got {name!r}: {error}") from error


def _add_dropout(model: nn.Module, name: str, probability: float) -> None:
    """Drop features by a hook: names of weights, and so checkpoints, stay torchvision's."""
    classifier = getattr(model, "fc", None)
    if not isinstance(classifier, nn.Linear):
        raise ValueError(f"--dropout: expected a model with a place for it, got {name}")
    classifier.register_forward_pre_hook(functools.partial(_drop_features, probability))


def _drop_features(probability: float, module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
    return (F.dropout(args[0], probability, module.training),)
