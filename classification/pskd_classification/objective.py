"""The loss of a batch: any teacher with any mixing.

Shapes: N images of a batch, C classes.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from pskd import MemoryCriterion, SnapshotCriterion, TopK
from pskd.loss import pskd_cross_entropy
from pskd_classification.mixing import Mixer

__all__ = ["Objective", "VirtualTeacher"]


class VirtualTeacher:
    """Tf-KD's teacher without a network: sure of the label, the rest even, softened.

    Equals ``(1 - alpha) * cross_entropy + alpha * <-p, log_softmax(z)>`` with p the distribution
    that has ``correct`` on the label and the rest evenly on the others, raised to ``1 /
    temperature`` and normalised. In effect it is a label smoothing.

    Args:
        num_classes: C.
        alpha: weight of the virtual teacher, the same in every epoch.
        correct: its probability of the label before it is softened.
        temperature: softens it; above 0.

    Source: Yuan et al. 2020, "Revisiting Knowledge Distillation via Label Smoothing
    Regularization", section 4.2 (Tf-KD_reg), with the student at temperature 1 as in its published
    code.
    """

    def __init__(
        self, num_classes: int, alpha: float, *, correct: float = 0.99, temperature: float = 20.0
    ) -> None:
        peak = correct ** (1.0 / temperature)
        rest = ((1.0 - correct) / max(1, num_classes - 1)) ** (1.0 / temperature)
        self.probability = peak / (peak + (num_classes - 1) * rest)
        self.alpha = alpha

    def past(self, target: Tensor) -> TopK:
        """Return what it says of (N,) labels."""
        shape = (len(target), 1)
        return TopK(target[:, None], target.new_full(shape, self.probability, dtype=torch.float32))


class Objective:
    """Scores a batch by the model and returns its loss.

    A mixed image's target is the mixture of its two samples' targets, each softened by its own row
    of the memory. What the model says of it tells nothing of either sample alone, so their rows
    keep what was last said of them unmixed. The snapshot teacher, like the student, sees the mixed
    image.

    Args:
        criterion: PS-KD, or with an alpha_final of 0 cross-entropy.
        mixer: of the images.
        virtual: Tf-KD's teacher beside cross-entropy.
    """

    def __init__(
        self,
        criterion: MemoryCriterion | SnapshotCriterion,
        mixer: Mixer,
        virtual: VirtualTeacher | None = None,
    ) -> None:
        self.criterion, self._mixer, self._virtual = criterion, mixer, virtual

    def __call__(self, model: nn.Module, rows: Tensor, images: Tensor, target: Tensor) -> Tensor:
        """Return the mean loss of a batch.

        Args:
            model: gives (N, C) logits.
            rows: (N,) int64 which samples they are.
            images: (N, 3, H, W).
            target: (N,) int64 labels.
        """
        mixed = self._mixer(images)
        if mixed is None:
            return self._plain(model(images), rows, images, target)
        logits = model(mixed.images)
        part = self._part(logits, mixed.images)
        if isinstance(self.criterion, MemoryCriterion):
            self.criterion.carry_over(rows)
        own, partner = mixed.weight, mixed.partner
        return own * part(target, rows) + (1.0 - own) * part(target[partner], rows[partner])

    def _plain(self, logits: Tensor, rows: Tensor, images: Tensor, target: Tensor) -> Tensor:
        """Return the loss of images that are not mixed."""
        if self._virtual is not None:
            return self._virtual_loss(self._virtual, logits, target)
        if isinstance(self.criterion, SnapshotCriterion):
            return self.criterion(logits, target, images, rows=rows)
        return self.criterion(logits, target, rows)

    def _part(self, logits: Tensor, images: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
        """Return the loss of mixed images against the labels and rows of one of their parts."""
        criterion, virtual = self.criterion, self._virtual
        if virtual is not None:
            return lambda target, _rows: self._virtual_loss(virtual, logits, target)
        if isinstance(criterion, SnapshotCriterion):
            past = criterion.score(images)
            return lambda target, _rows: criterion.loss(logits, target, past, recorded=False)
        return lambda target, rows: criterion.loss(logits, target, rows, recorded=False)

    def _virtual_loss(self, virtual: VirtualTeacher, logits: Tensor, target: Tensor) -> Tensor:
        smoothing = self.criterion.label_smoothing
        past, alpha = virtual.past(target), virtual.alpha
        return pskd_cross_entropy(logits, target, past, alpha, label_smoothing=smoothing)
