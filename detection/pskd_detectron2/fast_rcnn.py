"""The box predictor's classification loss with softened targets.

Shapes: R sampled ROIs, K foreground classes, and scores of K + 1 columns with background last.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from detectron2.modeling.roi_heads import FastRCNNOutputLayers
from detectron2.structures import Instances
from detectron2.utils.events import get_event_storage
from detectron2.utils.logger import log_first_n
from torch import Tensor

from pskd import PSKDStats, pskd_cross_entropy
from pskd.stats import ratios, teacher_means, teacher_sums
from pskd.targets import row_alphas
from pskd_detectron2.config import check_label_smoothing
from pskd_detectron2.memory import AnnotationMemory
from pskd_detectron2.state import PSKDState

#: (R_i, K + 1) scores of the snapshot teacher, a field of each image's sampled proposals.
TEACHER_FIELD = "pskd_teacher_scores"
#: (R_i,) int64 row of the annotation that an ROI is matched to; a field of the targets, which
#: Detectron2 carries over to the proposals because of its prefix.
ROW_FIELD = "gt_pskd_row"


class PSKDFastRCNNOutputLayers(FastRCNNOutputLayers):
    """`FastRCNNOutputLayers` whose ``loss_cls`` is PS-KD's; boxes and everything else are stock.

    Softmax heads: ``F.cross_entropy(scores, mixed_target)``, a mean over the R ROIs as stock.
    Sigmoid heads (``USE_SIGMOID_CE``): binary cross-entropy against
    ``(1 - alpha) * onehot + alpha * sigmoid(teacher)``, summed over K and divided by R as stock, on
    the sampled classes only under the federated loss.

    Source: Kim et al. 2021, section 3.1, on the classifier of detectron2's fast_rcnn.py.
    """

    if TYPE_CHECKING:  # TorchScript reads a module's annotations, and knows its own types only
        _fed_loss_classes: Tensor
    pskd = PSKDState(enabled=False)  # as in heads other than PS-KD's
    stage = 0  # of a cascade; each has its own rows of the memory

    @classmethod
    def of(
        cls, predictor: FastRCNNOutputLayers, pskd: PSKDState, stage: int = 0
    ) -> PSKDFastRCNNOutputLayers:
        """Return a predictor that learns from the teacher of ``pskd``, the state of the heads.

        In place of a stock one a new one, which takes over its options and very parameters: nothing
        is drawn again, so a model starts from the stock one's values.

        Raises:
            ValueError: if it is another, whose own loss would be lost; for a label smoothing
                outside [0, 1], or with a sigmoid head.
        """
        if type(predictor) is FastRCNNOutputLayers:
            stock, predictor = predictor, cls.__new__(cls)
            predictor.__setstate__(stock.__dict__)
        if not isinstance(predictor, cls):
            raise ValueError(
                f"box_predictor: expected FastRCNNOutputLayers or a subclass of {cls.__name__}, "
                f"got {type(predictor).__name__}"
            )
        check_label_smoothing(
            pskd.label_smoothing, predictor.use_sigmoid_ce, "pskd_label_smoothing"
        )
        predictor.pskd, predictor.stage = pskd, stage
        return predictor

    def losses(self, predictions: tuple[Tensor, Tensor], proposals: list[Instances]) -> dict:
        """As `FastRCNNOutputLayers.losses`, ``loss_cls`` replaced where there is a teacher."""
        losses = super().losses(predictions, proposals)
        if not self.pskd.enabled or not self.training or not len(proposals):
            return losses
        if not (self.pskd.is_driven or self.pskd.alpha):
            message = "PS-KD: enabled, but the model has no PSKDHook: it trains as the stock one"
            log_first_n(logging.WARNING, message, name="detectron2." + __name__, key="message")
        scores = predictions[0]
        labels = torch.cat([p.gt_classes for p in proposals])
        past = self._past(scores, labels, proposals)
        weight = self.loss_weight.get("loss_cls", 1.0)
        if self.use_sigmoid_ce:
            if past is not None:
                softening = self._sigmoid_softening(scores, labels, *past)
                losses["loss_cls"] = losses["loss_cls"] + weight * softening
        elif past is not None or self.pskd.label_smoothing:
            losses["loss_cls"] = weight * self._softened(scores, labels, past)
        return losses

    def get_fed_loss_classes(self, *args, **kwargs) -> Tensor:
        """As stock; the draw is kept, for the softened part of the loss is on these classes."""
        self._fed_loss_classes = super().get_fed_loss_classes(*args, **kwargs)
        return self._fed_loss_classes

    def _past(
        self, scores: Tensor, labels: Tensor, proposals: list[Instances]
    ) -> tuple[Tensor, Tensor] | None:
        """Return the (R, K + 1) past probabilities and the (R,) weight of each, or None."""
        pskd = self.pskd
        foreground = (labels >= 0) & (labels < self.num_classes)
        if pskd.memory is not None:
            return self._remembered(pskd.memory, scores, foreground, proposals)
        if not pskd.alpha or not all(p.has(TEACHER_FIELD) for p in proposals):
            return None
        past = self._probs(torch.cat([p.get(TEACHER_FIELD) for p in proposals]))
        keep = foreground if pskd.foreground_only else torch.ones_like(foreground)
        return past, row_alphas(pskd.alpha, keep)

    def _remembered(
        self,
        memory: AnnotationMemory,
        scores: Tensor,
        foreground: Tensor,
        proposals: list[Instances],
    ) -> tuple[Tensor, Tensor] | None:
        """Read last epoch's predictions of the matched annotations, and write this one's."""
        pskd = self.pskd
        rows = torch.cat(
            [
                # An image without annotations has none of the targets' fields.
                p.get(ROW_FIELD) if p.has(ROW_FIELD) else p.gt_classes.new_zeros(len(p))
                for p in proposals
            ]
        )
        rows = rows + self.stage * pskd.rows_per_stage
        given = None
        if pskd.alpha:
            past, seen = memory.read(rows)
            given = past, row_alphas(pskd.alpha, foreground & seen)
        # A background ROI carries the row of some annotation too, and is masked in place of being
        # selected, which would wait for the device.
        memory.write(rows, self._probs(scores.detach()), foreground)
        return given

    def _probs(self, scores: Tensor) -> Tensor:
        """Return (R, K + 1) float32 probabilities; a sigmoid head's background column is unused."""
        return scores.float().sigmoid() if self.use_sigmoid_ce else scores.float().softmax(dim=1)

    def _softened(
        self, scores: Tensor, labels: Tensor, past: tuple[Tensor, Tensor] | None
    ) -> Tensor:
        """Return the loss against the mixed target, and log what the teacher did."""
        smoothing = self.pskd.label_smoothing
        if past is None:
            loss = pskd_cross_entropy(
                scores, labels, None, 0.0, label_smoothing=smoothing, reduction="sum"
            )
        else:
            loss, stats = pskd_cross_entropy(
                scores, labels, *past, label_smoothing=smoothing, reduction="sum", return_stats=True
            )
            _log(scores.detach(), *past, stats)
        # An empty batch has the loss 0 and stays in the graph.
        return loss / max(1, len(labels))

    def _sigmoid_softening(
        self, scores: Tensor, labels: Tensor, past: Tensor, alpha: Tensor
    ) -> Tensor:
        """Return what the mixed target adds to the stock loss, which is linear in it, and log."""
        onehot = torch.zeros_like(past).scatter_(1, labels[:, None], 1.0)
        weight = alpha[:, None]
        change = torch.where(weight == 0, 0.0, weight * (onehot - past))  # whatever the past is
        # Without the background, the last column, which a sigmoid head does not train.
        scores, past = scores[:, :-1], past[:, :-1]
        softening = change[:, :-1] * scores.float()
        if self.use_fed_loss:
            sampled = softening.new_zeros(self.num_classes + 1)
            sampled[self._fed_loss_classes] = 1.0
            softening = softening * sampled[:-1]
        foreground = labels < self.num_classes  # whose class has a score
        label = labels.clamp_max(self.num_classes - 1)[:, None]
        nll = F.softplus(-scores.detach().float().gather(1, label)).squeeze(1)
        stats = PSKDStats(nll, past.gather(1, label).squeeze(1))
        _log(scores.detach(), past, alpha * foreground, stats)
        return softening.sum() / max(1, len(labels))


def _log(scores: Tensor, past: Tensor, alpha: Tensor, stats: PSKDStats) -> None:
    """Log what the teacher did, over the ROIs that have one."""
    means = teacher_means(teacher_sums(scores, past, alpha, stats))
    get_event_storage().put_scalars(**ratios(means, shared=False))
