"""Evaluators beside Detectron2's own: confidence of detections, and the head on true boxes."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from functools import partial

import numpy as np
import torch
from detectron2.data import MetadataCatalog
from detectron2.evaluation import (
    CityscapesInstanceEvaluator,
    CityscapesSemSegEvaluator,
    COCOEvaluator,
    COCOPanopticEvaluator,
    DatasetEvaluator,
    LVISEvaluator,
    PascalVOCDetectionEvaluator,
    SemSegEvaluator,
)
from detectron2.modeling import GeneralizedRCNN
from detectron2.structures import Boxes, Instances
from detectron2.utils import comm
from detectron2.utils.file_io import PathManager
from pskd_detection import DetectionConfidence, DetectionDataset, Detections, write_detections
from pskd_detection.voc_format import voc_class

from pskd_detectron2.files import output_folder
from pskd_detectron2.registered import (
    detection_dataset,
    evaluator_type,
    has_boxes,
    is_coco,
    is_voc,
)
from pskd_detectron2.scoring import class_probs, has_class_logits


class ConfidenceEvaluator(DatasetEvaluator):
    """D-ECE, LaECE and AURC of detections, with the thresholds and the number of detections.

    Args:
        dataset_name: a registered one in COCO or VOC format.
        output_dir: where the files of `write_detections` are written; None for none.
        options: of `pskd_detection.DetectionConfidence`, such as ``iou_threshold``.
    """

    def __init__(self, dataset_name: str, output_dir: str | None = None, **options) -> None:
        self._dataset = detection_dataset(dataset_name)
        self._ids = image_ids(self._dataset)
        self._output_dir, self._options = output_dir, options
        self._detections: dict = {}

    def reset(self) -> None:
        self._detections = {}

    def process(self, inputs: list[dict], outputs: list[dict]) -> None:
        for image, output in zip(inputs, outputs, strict=True):
            instances = output["instances"].to("cpu")
            self._detections[self._ids[os.path.normpath(image["file_name"])]] = Detections(
                instances.pred_boxes.tensor.numpy(),
                instances.scores.numpy(),
                instances.pred_classes.numpy(),
            )

    def evaluate(self) -> dict | None:
        parts = comm.gather(self._detections)
        if not comm.is_main_process():
            return None
        confidence = DetectionConfidence(self._dataset, **self._options)
        for part in parts:
            for image_id, detections in part.items():
                confidence.update(image_id, detections)
        results = confidence.compute()
        if self._output_dir:
            with output_folder(self._output_dir) as folder:
                write_detections(folder, self._dataset, confidence, open_file=PathManager.open)
        # Detectron2 prints and logs floats only.
        return {"confidence": {k: math.nan if v is None else v for k, v in results.items()}}


class VOCEvaluator(PascalVOCDetectionEvaluator):
    """VOC AP under a name of its own: COCO's is ``bbox``."""

    def __init__(self, dataset_name: str) -> None:
        super().__init__(dataset_name)
        names = MetadataCatalog.get(dataset_name).thing_classes
        self._class_names = [voc_class(name) for name in names]

    def evaluate(self) -> dict | None:
        results = super().evaluate()
        return results and {"voc": dict(results["bbox"])}


def build_evaluators(
    dataset_name: str, output_dir: str, kpt_oks_sigmas: Sequence[float] = ()
) -> list[DatasetEvaluator]:
    """Return the evaluators of a registered dataset, by its evaluator type as Detectron2's own
    train_net.py does; of one without a type COCO AP or VOC AP."""
    coco = partial(
        COCOEvaluator, dataset_name, output_dir=output_dir, kpt_oks_sigmas=kpt_oks_sigmas
    )
    match evaluator_type(dataset_name):
        case "cityscapes_instance":
            return [CityscapesInstanceEvaluator(dataset_name)]
        case "cityscapes_sem_seg":
            return [CityscapesSemSegEvaluator(dataset_name)]
        case "lvis":
            return [LVISEvaluator(dataset_name, output_dir=output_dir)]
        case "sem_seg":
            return [SemSegEvaluator(dataset_name, output_dir=output_dir)]
        case "coco_panoptic_seg":
            return [
                SemSegEvaluator(dataset_name, output_dir=output_dir),
                coco(),
                COCOPanopticEvaluator(dataset_name, output_dir),
            ]
    evaluators = [coco()] if is_coco(dataset_name) else []
    return [*evaluators, VOCEvaluator(dataset_name)] if is_voc(dataset_name) else evaluators


def scores_ground_truth(model: torch.nn.Module, dataset_name: str) -> bool:
    """Return whether `ground_truth_rois` can be asked of a model and a registered dataset."""
    heads = getattr(getattr(model, "module", model), "roi_heads", None)
    return has_class_logits(heads) and has_boxes(dataset_name)


def image_ids(dataset: DetectionDataset) -> dict[str, object]:
    """Return the ids of the images by their normalised path."""
    return {
        os.path.normpath(os.path.join(dataset.image_dir, image["file_name"])): image["id"]
        for image in dataset.coco["images"]
    }


@torch.no_grad()
def ground_truth_rois(model: GeneralizedRCNN, loader, dataset_name: str) -> dict[str, float]:
    """Score the annotated boxes themselves as ROIs: the same rows for every model.

    Returns:
        ``nll`` (nats) and ``accuracy`` of the distribution over K + 1 classes at the true one, over
        ``num_rois`` boxes; crowds are left out.
    """
    dataset = detection_dataset(dataset_name)
    ids = image_ids(dataset)
    model = getattr(model, "module", model)
    was_training = model.training
    model.eval()
    totals = torch.zeros(3, dtype=torch.float64, device="cpu")
    for inputs in loader:
        images = model.preprocess_image(inputs)
        truth = [
            [o for o in dataset.objects[ids[os.path.normpath(image["file_name"])]] if not o.crowd]
            for image in inputs
        ]
        proposals = [
            scaled([o.box for o in objects], image, size).to(images.tensor.device)
            for objects, image, size in zip(truth, inputs, images.image_sizes, strict=True)
        ]
        labels = torch.tensor([o.label for objects in truth for o in objects], dtype=torch.int64)
        if len(labels):
            features = model.backbone(images.tensor)
            probs = class_probs(model.roi_heads, features, proposals).double().cpu()
            at_label = probs.gather(1, labels[:, None]).squeeze(1)
            nll = -at_label.clamp_min(torch.finfo(torch.float32).tiny).log()
            hits = probs.argmax(1) == labels
            totals += torch.stack([nll.sum(), hits.sum(), totals.new_tensor(len(labels))])
    model.train(was_training)
    nll, hits, count = sum(comm.all_gather(totals)).tolist()
    return {"nll": nll / max(count, 1), "accuracy": hits / max(count, 1), "num_rois": int(count)}


def scaled(boxes: list[list[float]], image: dict, size: tuple[int, int]) -> Instances:
    """Return x, y, width, height of the original image as proposals on the resized one."""
    height, width = size
    corners = np.array(boxes, dtype=np.float64).reshape(-1, 4)
    corners[:, 2:] += corners[:, :2]
    factors = [width / image["width"], height / image["height"]] * 2
    proposals = Instances(size)
    proposals.proposal_boxes = Boxes(torch.from_numpy(corners * factors).float())
    return proposals
