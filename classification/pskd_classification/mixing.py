"""CutMix and Mixup by torchvision, told as who was mixed with whom and how much.

Shapes: N images of a batch.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torchvision.transforms import v2

__all__ = ["Mixed", "Mixer"]


class Mixed(NamedTuple):
    """Images of which each is mixed of two.

    Attributes:
        images: (N, 3, H, W).
        partner: (N,) int64, the image of the batch that was mixed into each.
        weight: () lambda, the share of the image itself, in [0, 1]; one for the whole batch.
    """

    images: Tensor
    partner: Tensor
    weight: Tensor


class Mixer:
    """Mixes a batch now and then, by CutMix, Mixup, or either with equal chance.

    Args:
        cutmix_alpha, mixup_alpha: of the beta distribution of lambda; 0 leaves it out.
        probability: of a batch to be mixed.

    Source: Yun et al. 2019 (CutMix); Zhang et al. 2018 (Mixup).
    """

    def __init__(
        self, cutmix_alpha: float = 0.0, mixup_alpha: float = 0.0, probability: float = 0.5
    ) -> None:
        self._probability = probability
        # "Labels" are the places in the batch: what comes back tells the mixture itself.
        self._kinds = [
            kind(alpha=alpha, num_classes=None)
            for kind, alpha in ((v2.CutMix, cutmix_alpha), (v2.MixUp, mixup_alpha))
            if alpha
        ]

    @property
    def enabled(self) -> bool:
        """Whether any batch can be mixed."""
        return bool(self._kinds) and self._probability > 0.0

    def __call__(self, images: Tensor) -> Mixed | None:
        """Return the batch mixed, or None where it is left as it is."""
        if not self.enabled or len(images) < 2:
            return None
        if torch.rand((), dtype=torch.float32, device="cpu") >= self._probability:
            return None
        mix = self._kinds[int(torch.randint(len(self._kinds), (), device="cpu"))]
        shares = torch.eye(len(images), dtype=torch.float32, device=images.device)
        images, shares = mix(images, shares)
        others = shares.clone().fill_diagonal_(-1.0)
        return Mixed(images, others.argmax(dim=1), shares[0, 0])
