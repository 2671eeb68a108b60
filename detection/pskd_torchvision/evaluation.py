"""Detections of a test set by all processes, and every number that is reported of them.

Shapes: n detections of an image, R annotated boxes of a batch, K classes.
"""

from __future__ import annotations

import logging
import os

import torch
import torch.nn.functional as F
from pskd_detection import (
    DetectionConfidence,
    Detections,
    average_precision,
    write_detections,
)
from pskd_detection.evaluation import in_coco_format
from torch import Tensor
from torch.utils.data import DataLoader, Subset
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN

from pskd.distributed import World, gather, sum_over_processes
from pskd_tools.files import write_json
from pskd_torchvision.data import DetectionImages, collate
from pskd_torchvision.roi_heads import captured, class_logits

logger = logging.getLogger(__name__)


def evaluate(
    model: GeneralizedRCNN,
    images: DetectionImages,
    world: World,
    *,
    batch_size: int = 1,
    workers: int = 0,
    output_dir: str | os.PathLike | None = None,
) -> dict | None:
    """Evaluate a detector; each process takes every ``world.size``-th image.

    Args:
        model: bare, with the same weights and buffers in all processes.
        images: the test set, without flips.
        world: the processes.
        batch_size: images a process takes at a time.
        workers: that read images, a process.
        output_dir: where ``coco_instances_results.json`` (COCO's results format),
            and the files of `write_detections` are written; None for none.

    Returns:
        In the first process ``bbox``, `average_precision` (percent); ``confidence``, that is
        `DetectionConfidence.compute` (fractions); and ``ground_truth_rois``: the annotated boxes
        themselves as ROIs, which are the same rows for every model, with ``nll`` (nats) and
        ``accuracy`` of the distribution over K + 1 classes at the true one, over ``num_rois`` boxes
        without crowds. None elsewhere.
    """
    detections, totals = _detect(model, images, world, batch_size, workers)
    parts = gather(detections)
    nll, hits, count = sum_over_processes(totals).tolist()
    if parts is None:
        return None
    unordered = {key: value for part in parts for key, value in part.items()}
    # In the order of the data set, however many processes there were.
    found = {image["id"]: unordered[image["id"]] for image in images.dataset.coco["images"]}
    confidence = DetectionConfidence(images.dataset)
    for image_id, of_image in found.items():
        confidence.update(image_id, of_image)
    if output_dir is not None:
        folder = write_detections(output_dir, images.dataset, confidence)
        rows = in_coco_format(images.dataset, found)
        write_json(folder / "coco_instances_results.json", rows)
    rois = {"nll": nll / max(count, 1), "accuracy": hits / max(count, 1), "num_rois": int(count)}
    return {
        "bbox": average_precision(images.dataset, found),
        "confidence": confidence.compute(),
        "ground_truth_rois": rois,
    }


@torch.no_grad()
def _detect(
    model: GeneralizedRCNN, images: DetectionImages, world: World, batch_size: int, workers: int
) -> tuple[dict[int, Detections], Tensor]:
    """Return the detections of this process's images by their id, and (3,) sums of true boxes."""
    share = range(world.rank, len(images), world.size)  # no image twice
    loader = DataLoader(
        Subset(images, share), batch_size=batch_size, num_workers=workers, collate_fn=collate
    )
    model.eval()
    ids = iter(images.image_id(index) for index in share)
    detections: dict[int, Detections] = {}
    totals = torch.zeros(3, dtype=torch.float64, device=world.device)
    for batch, targets in loader:
        batch = [image.to(world.device) for image in batch]
        targets = [{k: v.to(world.device) for k, v in target.items()} for target in targets]
        # The model's own forward makes the maps and the scaled boxes for the true boxes too.
        with captured(model.transform) as prepared, captured(model.backbone) as features:
            outputs = model(batch, targets)
        for output in outputs:
            detections[next(ids)] = Detections(
                output["boxes"].cpu().numpy(),
                output["scores"].cpu().numpy(),
                output["labels"].cpu().numpy() - 1,  # without background
            )
        totals += _score_true_boxes(model, features[0], *prepared[0])
    return detections, totals


def _score_true_boxes(model: GeneralizedRCNN, features, images, targets: list[dict]) -> Tensor:
    """Return (3,) float64: the sum of the NLL, of right classes, and the number of boxes."""
    labels = torch.cat([target["labels"] for target in targets])
    if not len(labels):
        return torch.zeros(3, dtype=torch.float64, device=labels.device)
    boxes = [target["boxes"] for target in targets]
    scores = class_logits(model.roi_heads, features, boxes, images.image_sizes).double()
    nll = F.cross_entropy(scores, labels, reduction="sum")
    hits = (scores.argmax(dim=1) == labels).sum()
    return torch.stack([nll, hits.double(), torch.full_like(nll, len(labels))])
