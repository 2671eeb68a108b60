"""Seconds per iteration of PS-KD in Detectron2 over the stock head, side by side.

One process, one batch, three models of the same weights: stock head, snapshot teacher, memory
teacher. Their iterations alternate, so that a machine whose speed drifts slows all. An iteration is
what Detectron2's trainer does after the images are loaded: forward, backward, step of the
optimizer. The arithmetic limit of the snapshot is 1.33, if backbone and box head were all of the
model: the teacher adds their forward, and neither proposals nor boxes nor masks.

    python benchmarks/detection_step.py [--config-file configs/detection/bccd_pskd.yaml] [KEY VALUE]
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable

import torch
from _measuring import at_least, conditions, measure, options
from detectron2.config import CfgNode
from detectron2.engine import DefaultTrainer
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage
from pskd_detectron2 import load_config
from pskd_detectron2.fast_rcnn import ROW_FIELD
from pskd_detectron2.hooks import PSKDHook
from torch import nn

ALPHA = 0.5
STOCK = {
    "PSKDROIHeads": "StandardROIHeads",
    "PSKDRes5ROIHeads": "Res5ROIHeads",
    "PSKDCascadeROIHeads": "CascadeROIHeads",
}


def made_batch(cfg: CfgNode, boxes_an_image: int) -> list[dict]:
    """Return SOLVER.IMS_PER_BATCH noise images of the config's size with boxes on them."""
    short = cfg.INPUT.MIN_SIZE_TRAIN[0]
    size = (short, short * 4 // 3)
    batch = []
    for image in range(cfg.SOLVER.IMS_PER_BATCH):
        instances = Instances(size)
        corner = torch.rand(boxes_an_image, 2) * torch.tensor(size[::-1]) * 0.7
        side = short * (0.1 + 0.2 * torch.rand(boxes_an_image, 2))
        instances.gt_boxes = Boxes(torch.cat([corner, corner + side], dim=1))
        instances.gt_boxes.clip(size)
        instances.gt_classes = torch.randint(cfg.MODEL.ROI_HEADS.NUM_CLASSES, (boxes_an_image,))
        rows = torch.arange(boxes_an_image) + image * boxes_an_image
        instances.set(ROW_FIELD, rows)
        pixels = torch.randint(0, 256, (3, *size), dtype=torch.uint8)
        batch.append({"image": pixels, "instances": instances})
    return batch


def build(cfg: CfgNode, teacher: str | None, rows: int) -> nn.Module:
    """Return a model with the stock head, or with PS-KD and a teacher in its second epoch."""
    cfg = cfg.clone()
    if teacher is None:
        cfg.MODEL.ROI_HEADS.NAME = STOCK[cfg.MODEL.ROI_HEADS.NAME]
    torch.manual_seed(1)
    model = DefaultTrainer.build_model(cfg).train()
    if teacher:
        hook = PSKDHook(model, epoch_iters=1, teacher=teacher, num_annotations=rows)
        pskd = model.roi_heads.pskd
        pskd.alpha = ALPHA
        (pskd.memory or pskd.snapshot).turn(1, hook.student)
    return model


def updates(cfg: CfgNode, model: nn.Module, batch: list[dict]) -> Callable[[], None]:
    """Return a function that makes one iteration."""
    optimizer = DefaultTrainer.build_optimizer(cfg, model)

    def update() -> None:
        optimizer.zero_grad()
        sum(model(batch).values()).backward()
        optimizer.step()

    return update


def run(args: argparse.Namespace, cfg: CfgNode) -> dict:
    torch.manual_seed(1)
    batch = made_batch(cfg, args.boxes)
    rows = args.boxes * len(batch)
    teachers = {"stock": None, "snapshot": "snapshot", "memory": "memory"}
    models = {name: build(cfg, teacher, rows) for name, teacher in teachers.items()}
    steps = {name: updates(cfg, model, batch) for name, model in models.items()}
    with EventStorage(0):
        steps["memory"]()
        models["memory"].roi_heads.pskd.memory.next_epoch()  # what is read from now on
        found = measure(steps, "stock", args.iterations, cfg.MODEL.DEVICE, warmup=args.warmup)
    told = conditions(args, cfg.MODEL.DEVICE, "iterations")
    return {**told, "images": len(batch), "size": list(batch[0]["image"].shape[1:]), **found}


def main() -> None:
    parser = options(__doc__, "threads")
    parser.add_argument(
        "--config-file", default="configs/detection/bccd_pskd.yaml", help="default: %(default)s"
    )
    parser.add_argument("--iterations", type=at_least(2), default=20, help="timed, of each model")
    parser.add_argument("--warmup", type=at_least(1), default=3, help="that are not counted")
    parser.add_argument("--boxes", type=at_least(1), default=12, help="annotations an image")
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="KEY VALUE pairs for the config")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    try:
        cfg = load_config(args.config_file, args.opts)
    except ValueError as error:
        parser.error(str(error))
    print(json.dumps(run(args, cfg), indent=2))


if __name__ == "__main__":
    main()
