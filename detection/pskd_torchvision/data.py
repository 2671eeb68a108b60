"""Images and targets in torchvision's form, from the data sets of both adapters.

Shapes: n objects of an image of C=3 channels, H rows and W columns; K classes, whose labels are 1
to K, since 0 is background in torchvision.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Sequence

import numpy as np
import torch
from pskd_detection import DetectionDataset
from pycocotools import mask as coco_mask
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import tv_tensors
from torchvision.transforms.v2 import functional as F

from pskd_tools.images import read_rgb

#: Boxes with a shorter side, in pixels, are left out: in float32 their corners may coincide, which
#: torchvision refuses in the middle of a training.
SMALLEST_SIDE = 0.01
logger = logging.getLogger(__name__)


class DetectionImages(Dataset):
    """The images of a data set with their objects; crowds are left out.

    What is random depends on the seed, the epoch and the image alone: neither on the number of
    workers nor on that of processes.

    Args:
        dataset: checked annotations.
        hflip: probability of a horizontal flip, in [0, 1].
        masks: whether targets have masks, decoded from COCO's ``segmentation``.
        seed: of the flips.

    Raises:
        ValueError: with ``masks``, naming the first annotation without a segmentation.
    """

    def __init__(
        self, dataset: DetectionDataset, *, hflip: float = 0.0, masks: bool = False, seed: int = 0
    ) -> None:
        self.dataset = dataset
        self._images: list[dict] = dataset.coco["images"]
        self._hflip, self._masks, self._seed, self._epoch = hflip, masks, seed, 0
        self._objects = self._objects_by_image()

    def _objects_by_image(self) -> dict[object, list[dict]]:
        objects: dict = defaultdict(list)
        small = 0
        for annotation in self.dataset.coco["annotations"]:
            if annotation["iscrowd"]:
                continue
            if min(annotation["bbox"][2:]) < SMALLEST_SIDE:
                small += 1
                continue
            if self._masks and not annotation.get("segmentation"):
                raise ValueError(
                    f"{self.dataset.spec}: annotation {annotation['id']} of image "
                    f"{annotation['image_id']}: for a model with masks expected 'segmentation' as "
                    "polygons or a run-length code, got none"
                )
            objects[annotation["image_id"]].append(annotation)
        if small:
            logger.warning(
                "%s: %d boxes below %g pixels left out", self.dataset.spec, small, SMALLEST_SIDE
            )
        return dict(objects)

    def set_epoch(self, epoch: int) -> None:
        """Choose the flips of an epoch; before its loader starts its workers."""
        self._epoch = epoch

    def __len__(self) -> int:
        return len(self._images)

    def image_id(self, index: int) -> int:
        """Return the id of an image in the data set."""
        return self._images[index]["id"]

    def __getitem__(self, index: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Return an image and its target.

        Returns:
            (C, H, W) float32 in [0, 1]; and ``boxes`` (n, 4) float32, x1 y1 x2 y2 in pixels,
            ``labels`` (n,) int64, and ``masks`` (n, H, W) uint8 where asked for.

        Raises:
            ValueError: naming an image that cannot be read or has another size than annotated.
        """
        entry = self._images[index]
        image = tv_tensors.Image(read_image(self.dataset, entry))
        target = self._target(entry)
        if np.random.default_rng((self._seed, self._epoch, index)).random() < self._hflip:
            image = F.horizontal_flip(image)
            target = {key: F.horizontal_flip(value) for key, value in target.items()}
        labels = [a["category_id"] for a in self._objects.get(entry["id"], ())]
        plain = {key: value.as_subclass(Tensor) for key, value in target.items()}
        classes = [1 + self.dataset.category_ids.index(label) for label in labels]
        plain["labels"] = torch.tensor(classes, dtype=torch.int64, device="cpu")
        return F.to_dtype(image, torch.float32, scale=True).as_subclass(Tensor), plain

    def _target(self, entry: dict) -> dict[str, Tensor]:
        objects, size = self._objects.get(entry["id"], ()), (entry["height"], entry["width"])
        corners = np.array([a["bbox"] for a in objects], dtype=np.float64).reshape(-1, 4)
        corners[:, 2:] += corners[:, :2]
        boxes = torch.from_numpy(corners).float()
        target = {"boxes": tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=size)}
        if self._masks:
            masks = np.zeros((len(objects), *size), dtype=np.uint8)
            for mask, annotation in zip(masks, objects, strict=True):
                mask[:] = _decoded(annotation["segmentation"], size)
            target["masks"] = tv_tensors.Mask(torch.from_numpy(masks))
        return target


def read_image(dataset: DetectionDataset, entry: dict) -> Tensor:
    """Return an image as it is shown, (C, H, W) uint8; one that is not as annotated is named."""
    path = dataset.image_dir / entry["file_name"]
    image = read_rgb(path)
    size = (entry["width"], entry["height"])
    if image.size != size:
        raise ValueError(
            f"{path}: expected {size[0]} x {size[1]} pixels as annotated, got "
            f"{image.size[0]} x {image.size[1]}"
        )
    return F.pil_to_tensor(image)


def collate(batch: Sequence[tuple[Tensor, dict]]) -> tuple[list[Tensor], list[dict]]:
    """Return the images and the targets of a batch, as torchvision's detectors take them."""
    images, targets = zip(*batch, strict=True)
    return list(images), list(targets)


def _decoded(segmentation: dict | list, size: tuple[int, int]) -> np.ndarray:
    """Return (H, W) uint8, 1 inside the object."""
    code = segmentation
    if isinstance(segmentation, list):
        code = coco_mask.merge(coco_mask.frPyObjects(segmentation, *size))
    elif isinstance(segmentation["counts"], list):
        code = coco_mask.frPyObjects(segmentation, *size)
    return coco_mask.decode(code)
