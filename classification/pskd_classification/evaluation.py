"""What a model says of a data set, and how right and how sure it is.

Shapes: N samples, C classes.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset

from pskd.distributed import World, gather
from pskd_classification.data import Images
from pskd_classification.on_device import DeviceImages, DeviceLoader
from pskd_tools import presets
from pskd_tools.training import autocast

__all__ = ["Rows", "measure", "predict", "rows_of"]

TOP_K = 5


class Rows(NamedTuple):
    """What is known of each sample: enough for every metric.

    Attributes:
        confidence: (N,) float32, the probability of the predicted class.
        correct: (N,) bool, whether it is the label.
        nll: (N,) float64, in nats.
        in_top5: (N,) bool, whether the label is among the five most probable classes.
        label: (N,) int64.
        predicted: (N,) int64, the most probable class.
    """

    confidence: np.ndarray
    correct: np.ndarray
    nll: np.ndarray
    in_top5: np.ndarray
    label: np.ndarray
    predicted: np.ndarray


@torch.no_grad()
def predict(
    model: nn.Module,
    images: Images | DeviceImages,
    world: World,
    *,
    batch_size: int,
    workers: int,
    amp: bool | str,
) -> tuple[Tensor, Tensor] | None:
    """Score a data set, each process its share of it; a collective.

    Returns:
        (N, C) float32 logits and (N,) int64 labels on the CPU, in the data set's order; None in all
        but the first process.
    """
    own = range(world.rank, len(images), world.size)
    was_training = model.training
    model.eval()
    logits, labels = [], []
    for batch, target in _batches(images, own, batch_size, workers):
        with autocast(amp, world.device):
            scores = model(batch.to(world.device, non_blocking=True))
        logits.append(scores.float().cpu())
        labels.append(target.cpu())
    model.train(was_training)
    parts = gather((torch.cat(logits), torch.cat(labels)) if logits else None)
    if parts is None:
        return None
    first = parts[0]
    assert first is not None  # of any samples the first process has some
    all_logits = first[0].new_empty(len(images), first[0].size(1))
    all_labels = first[1].new_empty(len(images))
    for rank, part in enumerate(parts):
        if part is not None:  # fewer samples than processes
            all_logits[rank :: world.size], all_labels[rank :: world.size] = part
    return all_logits, all_labels


def _batches(
    images: Images | DeviceImages, rows: range, batch_size: int, workers: int
) -> Iterable[tuple[Tensor, Tensor]]:
    if isinstance(images, DeviceImages):
        return (batch[1:] for batch in DeviceLoader(images, batch_size=batch_size, sampler=rows))
    return DataLoader(Subset(images, rows), batch_size=batch_size, num_workers=workers)


def rows_of(logits: Tensor, target: Tensor, temperature: float = 1.0) -> Rows:
    """Return what is known of each sample, of (N, C) logits and (N,) labels."""
    lprobs = (logits.double() / temperature).log_softmax(dim=1)
    confidence, predicted = lprobs.max(dim=1)
    top = lprobs.topk(min(TOP_K, lprobs.size(1)), dim=1).indices
    return Rows(
        confidence=confidence.exp().float().numpy(),
        correct=(predicted == target).numpy(),
        nll=F.nll_loss(lprobs, target, reduction="none").numpy(),
        in_top5=(top == target[:, None]).any(dim=1).numpy(),
        label=target.numpy(),
        predicted=predicted.numpy(),
    )


def measure(rows: Rows) -> dict[str, float | int]:
    """Return `pskd_tools.presets.measure` of the rows (ECE over 15 bins), and their count."""
    raw = presets.measure(rows.confidence, rows.correct, nll=rows.nll, in_top5=rows.in_top5)
    return raw | {"count": len(rows.correct)}
