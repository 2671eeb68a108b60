"""Training data for the memory teacher and from dataset specs.

The memory knows an annotation by its row: its place among all annotations of the training set, in
the order in which Detectron2's loaders return images and annotations.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
from collections.abc import Sequence
from pathlib import Path

import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, DatasetMapper, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from pskd_detection import DetectionDataset, load_dataset
from pskd_detection.results import write_json

from pskd_detectron2.fast_rcnn import ROW_FIELD

__all__ = [
    "PSKDDatasetMapper",
    "check_datasets",
    "count_annotations",
    "detection_dataset",
    "number_annotations",
    "register_spec",
    "training_fingerprint",
]

_ROW = "pskd_row"
_DATASETS: dict[str, DetectionDataset] = {}  # those that were registered from a spec, by it


def number_annotations(dataset_dicts: list[dict]) -> list[dict]:
    """Give every annotation its row, in place; return the same list."""
    annotations = itertools.chain.from_iterable(d.get("annotations", ()) for d in dataset_dicts)
    for row, annotation in enumerate(annotations):
        annotation[_ROW] = row
    return dataset_dicts


def count_annotations(dataset_dicts: Sequence[dict]) -> int:
    """Return how many annotations there are."""
    return sum(len(d.get("annotations", ())) for d in dataset_dicts)


def training_fingerprint(dataset_dicts: Sequence[dict]) -> str:
    """Return the head of a sha256 over images, boxes and classes in their order."""
    digest = hashlib.sha256()
    for record in dataset_dicts:
        boxes = [
            [int(a["category_id"]), *(round(float(x), 3) for x in a["bbox"])]
            for a in record.get("annotations", ())
        ]
        line = [Path(record["file_name"]).name, record.get("height"), record.get("width"), boxes]
        digest.update(json.dumps(line).encode())
    return digest.hexdigest()[:16]


class PSKDDatasetMapper(DatasetMapper):
    """`DatasetMapper` whose instances also carry the row of their annotation.

    Augmentations and filters drop annotations on their way. The row travels in place of the class,
    which the stock code carries along whatever it does, and both are set apart at the end.
    """

    def _transform_annotations(self, dataset_dict: dict, transforms, image_shape) -> None:
        annotations = dataset_dict["annotations"]
        classes = {a[_ROW]: a["category_id"] for a in annotations}
        for annotation in annotations:
            annotation["category_id"] = annotation[_ROW]
        super()._transform_annotations(dataset_dict, transforms, image_shape)
        instances = dataset_dict["instances"]
        rows = instances.gt_classes
        instances.set(ROW_FIELD, rows)
        instances.gt_classes = torch.tensor(
            [classes[row] for row in rows.tolist()], dtype=rows.dtype
        )


def register_spec(
    spec: str, output_dir: str | os.PathLike, class_names: Sequence[str] | None = None
) -> DetectionDataset:
    """Register ``coco:ANNOTATIONS.json:IMAGE_DIR`` or ``voc:ROOT:SPLIT`` under the spec's own name.

    Whatever the format, Detectron2 reads the checked annotations as COCO JSON, which is written to
    ``output_dir/datasets``.

    Args:
        spec: the dataset, as on the command line.
        output_dir: of the run.
        class_names: of the training set, for a test set; classes are matched by name.

    Raises:
        ValueError: for anything in the dataset that could not be trained on (`load_dataset`).
    """
    dataset = load_dataset(spec, class_names)
    folder = Path(output_dir) / "datasets"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{hashlib.sha256(spec.encode()).hexdigest()[:16]}.json"
    write_json(path, dataset.coco)
    for catalog in (DatasetCatalog, MetadataCatalog):
        if spec in catalog.list():
            catalog.remove(spec)
    register_coco_instances(spec, {}, str(path), str(dataset.image_dir))
    _DATASETS[spec] = dataset
    metadata = MetadataCatalog.get(spec)
    metadata.thing_classes = list(dataset.class_names)
    if spec.startswith("voc:"):
        _, root, split = spec.split(":", 2)
        metadata.set(dirname=root, split=split, year=2012)
    return dataset


def detection_dataset(name: str) -> DetectionDataset:
    """Return the annotations of a registered dataset, whoever registered it.

    Raises:
        ValueError: if its metadata names neither a COCO file nor a VOC folder.
    """
    if name in _DATASETS:
        return _DATASETS[name]
    metadata = MetadataCatalog.get(name)
    if metadata.get("json_file"):
        spec = f"coco:{metadata.json_file}:{metadata.image_root}"
    elif metadata.get("dirname"):
        spec = f"voc:{metadata.dirname}:{metadata.split}"
    else:
        raise ValueError(f"dataset {name!r}: expected COCO or VOC format, got neither")
    _DATASETS[name] = load_dataset(spec, metadata.get("thing_classes"))
    return _DATASETS[name]


def check_datasets(cfg: CfgNode) -> None:
    """Refuse datasets that do not exist or whose classes the model's head does not have.

    Raises:
        ValueError: naming the dataset, what was expected and what came.
    """
    for name in (*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST):
        if name not in DatasetCatalog.list():
            raise ValueError(
                f"dataset {name!r}: expected a registered one, or --train/--test with a "
                "coco:... or voc:... spec"
            )
        classes = MetadataCatalog.get(name).get("thing_classes")
        if classes is not None and len(classes) != cfg.MODEL.ROI_HEADS.NUM_CLASSES:
            raise ValueError(
                f"MODEL.ROI_HEADS.NUM_CLASSES: expected {len(classes)}, the classes of {name}, got "
                f"{cfg.MODEL.ROI_HEADS.NUM_CLASSES}"
            )
