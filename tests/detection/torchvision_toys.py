"""What the tests of the torchvision adapter share: made images and the smallest model."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
SIZE = 96  # pixels
CLASSES = ("red", "green")

if str(ROOT / "detection") not in sys.path:
    sys.path.insert(0, str(ROOT / "detection"))


def write_images(folder: Path, count: int = 8, *, seed: int = 0, segmentation: bool = True) -> str:
    """Write images with two coloured rectangles each, the fourth with none; return the spec."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True)
    images, annotations = [], []
    for i in range(count):
        pixels = rng.integers(0, 60, (SIZE, SIZE, 3)).astype(np.uint8)
        images.append({"id": i + 1, "file_name": f"{i}.png", "width": SIZE, "height": SIZE})
        for _ in range(0 if i == 3 else 2):
            w, h = map(int, rng.integers(16, 40, 2))
            x, y, c = (int(rng.integers(0, limit)) for limit in (SIZE - w, SIZE - h, 2))
            pixels[y : y + h, x : x + w, c] = 220
            outline = [x, y, x + w, y, x + w, y + h, x, y + h]
            annotation = {"image_id": i + 1, "category_id": c + 1, "bbox": [x, y, w, h]}
            annotations.append(annotation | ({"segmentation": [outline]} if segmentation else {}))
        Image.fromarray(pixels).save(folder / f"{i}.png")
    content = {
        "images": images,
        "annotations": annotations,
        "categories": [{"id": i + 1, "name": name} for i, name in enumerate(CLASSES)],
    }
    (folder / "set.json").write_text(json.dumps(content))
    return f"coco:{folder / 'set.json'}:{folder}"


def batch(masks: bool = False) -> tuple[list[torch.Tensor], list[dict]]:
    """Return two images of different size: one with two objects, one with none."""
    draw = torch.Generator().manual_seed(5)
    images = [torch.rand(3, height, 96, generator=draw) for height in (96, 80)]
    boxes = torch.tensor([[10.0, 12.0, 40.0, 50.0], [50.0, 30.0, 80.0, 90.0]])
    targets = [
        {"boxes": boxes, "labels": torch.tensor([1, 2])},
        {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)},
    ]
    if masks:
        for target, (height, width) in zip(targets, ((96, 96), (80, 96)), strict=True):
            target["masks"] = torch.zeros(len(target["boxes"]), height, width, dtype=torch.uint8)
            for mask, box in zip(target["masks"], target["boxes"].int().tolist(), strict=True):
                mask[box[1] : box[3], box[0] : box[2]] = 1
    return images, targets


def same(left: dict, right: dict) -> bool:
    """Whether two state dicts hold the same tensors, bit for bit."""
    return left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)
