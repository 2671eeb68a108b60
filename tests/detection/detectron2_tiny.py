"""What the tests of the Detectron2 adapter share: made images, tiny models, train_net in-process.

The models are those of ``configs/detection``, made narrow; a run of ten iterations takes seconds.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip(  # for the tests that import this file
    "detectron2",
    reason="needs Detectron2: https://detectron2.readthedocs.io/tutorials/install.html",
)

from detectron2.config import LazyConfig  # noqa: E402
from detectron2.engine import defaults  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / "configs" / "detection"
sys.path.insert(0, str(ROOT / "detection"))

import train_net  # noqa: E402

CLASSES = ("square", "ring")
#: Config file and head of each kind of model.
HEADS = {
    "fpn": ("faster_rcnn_R_50_FPN_1x_pskd.yaml", "StandardROIHeads"),
    "mask": ("mask_rcnn_R_50_FPN_1x_pskd.yaml", "StandardROIHeads"),
    "c4": ("voc_faster_rcnn_R_50_C4_pskd.yaml", "Res5ROIHeads"),
    "cascade": ("cascade_mask_rcnn_R_50_FPN_1x_pskd.yaml", "CascadeROIHeads"),
}
TINY = (
    "MODEL.DEVICE cpu MODEL.WEIGHTS '' MODEL.BACKBONE.FREEZE_AT 0 MODEL.RESNETS.NORM BN "
    "MODEL.RESNETS.WIDTH_PER_GROUP 4 MODEL.RESNETS.STEM_OUT_CHANNELS 8 "
    "MODEL.RESNETS.RES2_OUT_CHANNELS 16 MODEL.FPN.OUT_CHANNELS 16 MODEL.ROI_BOX_HEAD.FC_DIM 16 "
    "MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION 4 MODEL.ROI_MASK_HEAD.CONV_DIM 8 "
    "MODEL.ROI_MASK_HEAD.NUM_CONV 1 MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE 16 "
    "MODEL.RPN.PRE_NMS_TOPK_TRAIN 50 MODEL.RPN.POST_NMS_TOPK_TRAIN 50 "
    "MODEL.RPN.PRE_NMS_TOPK_TEST 50 MODEL.RPN.POST_NMS_TOPK_TEST 20 "
    "MODEL.RPN.BATCH_SIZE_PER_IMAGE 32 "
    "MODEL.PIXEL_STD [57.0,57.0,57.0] INPUT.MIN_SIZE_TRAIN (64,) INPUT.MIN_SIZE_TEST 64 "
    "DATALOADER.NUM_WORKERS 0 SOLVER.IMS_PER_BATCH 2 SOLVER.BASE_LR 0.01 SOLVER.WARMUP_ITERS 0 "
    "SOLVER.STEPS () SOLVER.MAX_ITER 8 SOLVER.CHECKPOINT_PERIOD 100 TEST.EVAL_PERIOD 0 SEED 1"
).split()
#: A resumed run equals the straight one under these.
EXACT = "DATALOADER.SAMPLER_TRAIN ResumableTrainingSampler DATALOADER.ASPECT_RATIO_GROUPING False"


def _get(cfg, *keys: str, default=None):
    """What `default_setup` looks up four times, each time through a copy of the whole config."""
    for key in keys:
        node = cfg
        for name in key.split("."):
            node = node.get(name, {})
        if node != {}:
            return node
    return default


defaults._try_get_key = _get  # a fourth of the time of a tiny run


def make_images(folder: Path, name: str = "set", count: int = 8, empty: tuple = (7,)) -> str:
    """Write bright squares and rings on noise, 64 x 80 or 80 x 64, in COCO format with masks.

    Returns:
        The dataset spec. The images of ``empty`` have no annotation.
    """
    rng = np.random.default_rng(7)
    (folder / name).mkdir(parents=True, exist_ok=True)
    images, annotations = [], []
    for number in range(count):
        height, width = (64, 80) if number % 2 else (80, 64)
        pixels = rng.integers(0, 80, (height, width, 3))
        for label in () if number in empty else (0, 1):
            side = int(rng.integers(14, 26))
            x, y = int(rng.integers(1, width // 2 - 4)), int(rng.integers(1, height - side))
            x += label * (width // 2 - 8)
            x = min(x, width - side - 1)
            pixels[y : y + side, x : x + side, label] = 230
            if label:
                pixels[y + 4 : y + side - 4, x + 4 : x + side - 4] = 20
            right, bottom = x + side, y + side
            annotations.append(
                {
                    "id": 100 + len(annotations),
                    "image_id": number + 1,
                    "category_id": label + 1,
                    "bbox": [x, y, side, side],
                    "area": side * side,
                    "iscrowd": 0,
                    "segmentation": [[x, y, right, y, right, bottom, x, bottom]],
                }
            )
        Image.fromarray(pixels.astype(np.uint8)).save(folder / name / f"{number}.png")
        images.append(
            {"id": number + 1, "file_name": f"{number}.png", "width": width, "height": height}
        )
    content = {
        "info": {},
        "images": images,
        "annotations": annotations,
        "categories": [{"id": i, "name": name} for i, name in enumerate(CLASSES, start=1)],
    }
    (folder / f"{name}.json").write_text(json.dumps(content))
    return f"coco:{folder / name}.json:{folder / name}"


def arguments(
    kind: str, out: Path, *opts: object, train: str | None, test: str | None = None
) -> list[str]:
    """Return the command line of train_net.py for a tiny model; later ``opts`` win."""
    config = HEADS[kind][0] if kind in HEADS else kind
    line = ["--config-file", str(CONFIGS / config)]
    line += [word for name, spec in (("--train", train), ("--test", test)) if spec
             for word in (name, spec)]  # fmt: skip
    tests = [] if test else ["DATASETS.TEST", "()"]
    words = [word for opt in opts for word in str(opt).split()]
    return [*line, *TINY, *tests, "OUTPUT_DIR", str(out), *words]


def main(line: list[str]) -> None:
    """Do in this process what train_net.py does."""
    train_net.main(train_net.parse(line))


def lazy_file(cfg, folder: Path) -> str:
    """Write a LazyConfig as a user's own file, in which targets are names; return its path."""
    folder.mkdir(parents=True, exist_ok=True)
    saved, mine = folder / "saved.yaml", folder / "mine.py"
    LazyConfig.save(cfg, str(saved))
    mine.write_text(
        "from detectron2.config import LazyConfig\n"
        f"_cfg = LazyConfig.load_rel({str(saved)!r})\n"
        "dataloader, lr_multiplier, model = _cfg.dataloader, _cfg.lr_multiplier, _cfg.model\n"
        "optimizer, train = _cfg.optimizer, _cfg.train\n"
    )
    return str(mine)


def lazy_arguments(
    out: Path, *words: str, config: str = "", train: str | None = None, test: str | None = None
) -> list[str]:
    """Return the command line of train_net.py for a tiny LazyConfig; later ``words`` win."""
    line = ["--config-file", config or str(Path(__file__).with_name("lazy_tiny.py"))]
    line += [word for name, spec in (("--train", train), ("--test", test)) if spec
             for word in (name, spec)]  # fmt: skip
    line += [word for word in words if word.startswith("--")]
    line += [f"train.output_dir={out}", "train.max_iter=2", "train.eval_period=0"]
    line += ["dataloader.train.total_batch_size=2"]
    return [*line, *(word for word in words if not word.startswith("--"))]


def run(kind: str, out: Path, *opts: object, flags: tuple = (), **specs) -> Path:
    """Train in this process through train_net.py and return the output folder."""
    main([*flags, *arguments(kind, out, *opts, **specs)])
    return out


def config(kind: str, out: Path, *opts: object, **specs):
    """Return the frozen config that train_net.py makes of the same command line."""
    return train_net.setup(train_net.parse(arguments(kind, out, *opts, **specs)))


def stock(kind: str) -> str:
    """The options that make a config its baseline."""
    return f"MODEL.PSKD.ENABLED False MODEL.ROI_HEADS.NAME {HEADS[kind][1]}"


def metrics(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.json").read_text().splitlines()]


def results(out: Path, name: str = "results") -> dict:
    return json.loads((out / f"{name}.json").read_text())


def checkpoint(out: Path, name: str = "model_final") -> dict:
    return torch.load(out / f"{name}.pth", weights_only=True)


def differing(left: dict, right: dict) -> list[str]:
    """The keys under which two state dicts do not hold the same tensors, bit for bit."""
    assert left.keys() == right.keys()
    return [key for key in left if not torch.equal(left[key], right[key])]


def stopped_after(straight: Path, iterations: int, out: Path) -> Path:
    """A run's folder as a stop after some iterations would have left it."""
    out.mkdir()
    name = f"model_{iterations - 1:07d}.pth"
    shutil.copy(straight / name, out / name)
    (out / "last_checkpoint").write_text(name)
    return out
