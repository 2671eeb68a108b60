"""Training data for the memory teacher and from dataset specs.

The memory knows an annotation by its row: its place among all annotations of the training set, in
the order in which Detectron2's loaders return images and annotations.
"""

from __future__ import annotations

import hashlib
import importlib.util
import itertools
import json
import os
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

from detectron2.data import DatasetCatalog, DatasetMapper, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from detectron2.data.datasets.coco import convert_to_coco_dict
from detectron2.structures import BoxMode
from detectron2.utils import comm
from pskd_detection import DetectionDataset, load_dataset, write_voc

from pskd.run.files import write_json
from pskd_detectron2.fast_rcnn import ROW_FIELD

__all__ = [
    "BOXES",
    "PSKDDatasetMapper",
    "check_classes",
    "check_records",
    "check_registered",
    "check_test_sets",
    "class_names_of",
    "count_annotations",
    "detection_dataset",
    "evaluator_type",
    "number_annotations",
    "register_spec",
    "training_fingerprint",
]

#: The evaluator types of data sets whose boxes this project evaluates too.
BOXES = (None, "coco", "coco_panoptic_seg", "pascal_voc")

_PACKAGES: dict[str | None, str] = {  # which Detectron2 imports at the end of a training
    "cityscapes_instance": "cityscapesscripts",
    "cityscapes_sem_seg": "cityscapesscripts",
    "coco_panoptic_seg": "panopticapi",
    "lvis": "lvis",
}
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
    Annotations that were not numbered are mapped as by `DatasetMapper`.
    """

    def _transform_annotations(self, dataset_dict: dict, transforms, image_shape) -> None:
        annotations = dataset_dict["annotations"]
        if not all(_ROW in annotation for annotation in annotations):
            super()._transform_annotations(dataset_dict, transforms, image_shape)
            return
        classes = {a[_ROW]: a["category_id"] for a in annotations}
        for annotation in annotations:
            annotation["category_id"] = annotation[_ROW]
        super()._transform_annotations(dataset_dict, transforms, image_shape)
        instances = dataset_dict["instances"]
        rows = instances.gt_classes
        instances.set(ROW_FIELD, rows)
        instances.gt_classes = rows.new_tensor([classes[row] for row in rows.tolist()])


def register_spec(
    spec: str, output_dir: str | os.PathLike, class_names: Sequence[str] | None = None
) -> DetectionDataset:
    """Register ``coco:ANNOTATIONS.json:IMAGE_DIR`` or ``voc:ROOT:SPLIT`` under the spec's own name.

    Whatever the format, Detectron2 reads the checked annotations, as COCO JSON, which is written to
    ``output_dir/datasets``. Those of a VOC set are there once more as VOC's XML, for VOC AP:
    Detectron2 wants keys and whole numbers in it that a user's files may not have. It is the AP of
    2007 (11 points) if ``2007`` is in the name of ROOT, else that of 2010 to 2012 (all points).

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
        written = path.with_suffix("")
        if comm.is_main_process():  # which evaluates
            write_voc(dataset.coco, written, split)
        year = 2007 if "2007" in Path(root).name else 2012
        metadata.set(dirname=str(written), split=split, year=year)
    return dataset


def detection_dataset(name: str) -> DetectionDataset:
    """Return the annotations of a registered dataset, whoever registered it.

    Raises:
        ValueError: for anything in it that could not be evaluated on (`load_dataset`).
    """
    if name not in _DATASETS:
        metadata = MetadataCatalog.get(name)
        class_names = metadata.get("thing_classes")
        if metadata.get("json_file"):
            spec = f"coco:{metadata.json_file}:{metadata.image_root}"
            _DATASETS[name] = load_dataset(spec, class_names)
        elif metadata.get("dirname"):
            _DATASETS[name] = load_dataset(f"voc:{metadata.dirname}:{metadata.split}", class_names)
        else:
            _DATASETS[name] = _from_records(name)
    return _DATASETS[name]


def _from_records(name: str) -> DetectionDataset:
    """Return a dataset that is known by its function only, by the conversion of COCOEvaluator."""
    coco = convert_to_coco_dict(name)
    with tempfile.TemporaryDirectory() as folder:
        path = write_json(Path(folder) / "dataset.json", coco)
        return load_dataset(f"coco:{path}:.", MetadataCatalog.get(name).get("thing_classes"))


def check_registered(names: Iterable[str]) -> None:
    """Raise ValueError for a dataset that does not exist."""
    for name in names:
        if name not in DatasetCatalog.list():
            raise ValueError(
                f"dataset {name!r}: expected a registered one, or --train/--test with a "
                "coco:... or voc:... spec"
            )


def class_names_of(names: Iterable[str]) -> list[str] | None:
    """Return the classes of the first dataset, which is loaded if they are not known before."""
    name = next(iter(names), None)
    if name is None or name not in DatasetCatalog.list():
        return None
    if MetadataCatalog.get(name).get("thing_classes") is None:
        DatasetCatalog.get(name)
    return MetadataCatalog.get(name).get("thing_classes")


def check_classes(names: Iterable[str], num_classes: int | None) -> None:
    """Raise ValueError for a dataset whose classes the model's head does not have.

    The classes of many datasets are known only when these have been loaded. ``num_classes`` None is
    a model that does not tell its classes.
    """
    for name in names:
        classes = MetadataCatalog.get(name).get("thing_classes")
        if classes is not None:
            _check_count(name, len(classes), num_classes)


def check_test_sets(names: Iterable[str], num_classes: int | None) -> None:
    """Look at the test sets before training and not at its end; those of boxes are read.

    Raises:
        ValueError: for anything in them that could not be evaluated on, other classes, or a package
            that Detectron2's evaluator needs and that is missing.
    """
    for name in names:
        kind = evaluator_type(name)
        package = _PACKAGES.get(kind)
        if package and not importlib.util.find_spec(package):
            raise ValueError(f"{name} ({kind}): expected the package {package}, got none")
        if kind in BOXES and num_classes is not None:
            _check_count(name, len(detection_dataset(name).class_names), num_classes)


def evaluator_type(name: str) -> str | None:
    """Return how Detectron2 evaluates on a dataset; None for one of a user's that does not tell."""
    return MetadataCatalog.get(name).get("evaluator_type")


def _check_count(name: str, found: int, num_classes: int | None) -> None:
    if num_classes not in (found, None):
        raise ValueError(
            f"NUM_CLASSES of the model: expected {found}, the classes of {name}, got {num_classes}"
        )


def check_records(records: Iterable[dict], num_classes: int | None, *, masks: bool = False) -> None:
    """Refuse training data that Detectron2 would stumble on later, or train on as something else.

    Boxes that reach over their image's border are cut there, as Detectron2 does; those of --train
    were looked at more closely.

    Args:
        records: images and annotations in Detectron2's format.
        num_classes: K; None: the classes are not looked at.
        masks: whether the model learns masks.

    Raises:
        ValueError: naming the image of a class that is none of K, of a box that does not touch its
            image, or of an annotation without the mask that it must have.
    """
    for record in records:
        for annotation in record.get("annotations", ()):
            problem = _problem(record, annotation, num_classes, masks)
            if problem:
                raise ValueError(f"{record['file_name']}: {problem}")


def _problem(record: dict, annotation: dict, num_classes: int | None, masks: bool) -> str | None:
    if num_classes is not None and not 0 <= annotation["category_id"] < num_classes:
        return f"expected classes in [0, {num_classes - 1}], got {annotation['category_id']}"
    is_trained = not annotation.get("iscrowd", 0)
    if masks and is_trained and not annotation.get("segmentation"):
        return "expected a segmentation of every annotation (MODEL.MASK_ON), got one without"
    mode, size = annotation["bbox_mode"], (record.get("width"), record.get("height"))
    if mode not in (BoxMode.XYXY_ABS, BoxMode.XYWH_ABS) or None in size:
        return None  # rotated boxes, images whose size is not known
    left, top, right, bottom = annotation["bbox"]
    if mode == BoxMode.XYWH_ABS:
        right, bottom = left + right, top + bottom
    if left < size[0] and top < size[1] and right > 0 and bottom > 0:
        return None
    return f"expected boxes in an image of {size[0]} x {size[1]}, got {annotation['bbox']}"
