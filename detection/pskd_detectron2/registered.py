"""Data sets in Detectron2's catalogs: those of --train and --test, and what is asked of all."""

from __future__ import annotations

import argparse
import atexit
import hashlib
import importlib.util
import os
import tempfile
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from detectron2.data.datasets.coco import convert_to_coco_dict
from detectron2.evaluation.pascal_voc_evaluation import parse_rec
from detectron2.utils import comm
from pskd_detection import DetectionDataset, load_dataset, write_voc
from pskd_detection.boxes import is_finite
from pskd_detection.coco_format import RawAnnotations, is_remote, raw_coco
from pskd_detection.datasets import checked_dataset, voc_folder
from pskd_detection.voc_format import read_voc, voc_class

from pskd_detectron2.data import check_records, named, source
from pskd_detectron2.files import local_path
from pskd_detectron2.resume import ResumableTrainingSampler
from pskd_tools.files import read_json, write_json

_BOXES = (None, "coco", "coco_panoptic_seg", "pascal_voc")  # evaluator types
_PACKAGES: dict[str | None, str] = {  # which Detectron2 imports at the end of a training
    "cityscapes_instance": "cityscapesscripts",
    "cityscapes_sem_seg": "cityscapesscripts",
    "coco_panoptic_seg": "panopticapi",
    "lvis": "lvis",
}
_known: dict[str, DetectionDataset] = {}  # what `detection_dataset` returned, by name

# ---- --train and --test --------------------------------------------------------------------------


def register_specs(
    args: argparse.Namespace, output_dir: str | os.PathLike, train: Sequence[str]
) -> int | None:
    """Register the data sets of --train and --test; return K, where they set it.

    Without --train a test set has the classes of ``train``, the config's training sets.
    """
    num_classes: int | None = None
    class_names: Sequence[str] | None = None
    if args.train:
        trained = register_spec(args.train, output_dir, strict=args.strict_data)
        class_names, num_classes = trained.class_names, len(trained.class_names)
    elif args.test and not args.eval_only:  # an evaluation does not ask about the training set
        class_names = _class_names(train)
    if args.test:
        tested = register_spec(args.test, output_dir, class_names, strict=args.strict_data)
        if args.eval_only:
            num_classes = len(tested.class_names)
    return num_classes


def _class_names(names: Sequence[str]) -> Sequence[str] | None:
    """Return the classes of the first dataset, which is loaded if they are not known before."""
    if not names or names[0] not in DatasetCatalog.list():
        return None
    metadata = MetadataCatalog.get(names[0])
    if metadata.get("thing_classes") is None:
        DatasetCatalog.get(names[0])
    return metadata.get("thing_classes")


def register_spec(
    spec: str,
    output_dir: str | os.PathLike,
    class_names: Sequence[str] | None = None,
    *,
    strict: bool = False,
) -> DetectionDataset:
    """Register the data set of a spec (`load_dataset`) under the spec's own name.

    Whatever the format, Detectron2 reads the checked annotations, as COCO JSON, which is written to
    ``output_dir/datasets``. Those of a VOC set are there once more as VOC's XML, for VOC AP:
    Detectron2 wants keys and whole numbers in it that a user's files may not have. It is the AP of
    2007 (11 points) if ``2007`` is in the name of ROOT, else that of 2010 to 2012 (all points).
    With a remote ``output_dir`` they are in a temporary folder. Names of keypoints are those of the
    JSON's categories; "left" and "right" are mirrored.

    Args:
        spec: the dataset, as on the command line.
        output_dir: of the run.
        class_names: of the training set, for a test set; classes are matched by name.
        strict: as in `load_dataset`.

    Raises:
        ValueError: for anything in the dataset that could not be trained on (`load_dataset`).
    """
    dataset = load_dataset(spec, class_names, strict=strict)
    folder = Path(_temporary() if is_remote(output_dir) else output_dir) / "datasets"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{hashlib.sha256(os.fsencode(spec)).hexdigest()[:16]}.json"
    write_json(path, dataset.coco)
    for catalog in (DatasetCatalog, MetadataCatalog):
        if spec in catalog.list():
            catalog.remove(spec)
    register_coco_instances(spec, {}, str(path), str(dataset.image_dir))
    _known[spec] = dataset
    metadata = MetadataCatalog.get(spec)
    metadata.thing_classes = list(dataset.class_names)
    keypoints = next(filter(None, (c.get("keypoints") for c in dataset.coco["categories"])), None)
    if keypoints:
        metadata.set(keypoint_names=keypoints, keypoint_flip_map=_mirrored(keypoints))
    root = voc_folder(spec)
    if root is not None:
        written = path.with_suffix("")
        if comm.is_main_process():  # which evaluates
            write_voc(dataset.coco, written, "all")
        year = 2007 if "2007" in Path(root).name else 2012
        metadata.set(dirname=str(written), split="all", year=year)
    return dataset


@cache
def _temporary() -> str:
    """Return a folder that is removed when the program ends."""
    folder = tempfile.TemporaryDirectory()
    atexit.register(folder.cleanup)
    return folder.name


def _mirrored(names: Sequence[str]) -> list[tuple[str, str]]:
    """Return the pairs of keypoints that a horizontal flip exchanges."""
    pairs = [(n, n.replace("left", "right").replace("Left", "Right")) for n in names]
    return [(left, right) for left, right in pairs if left != right and right in names]


# ---- the annotations of a registered data set ----------------------------------------------------


def evaluator_type(name: str) -> str | None:
    """Return how Detectron2 evaluates on a dataset; None for one that does not tell."""
    return MetadataCatalog.get(name).get("evaluator_type")


def is_voc(name: str) -> bool:
    """Return whether VOC AP of a dataset of boxes is computed."""
    metadata = MetadataCatalog.get(name)
    return bool(metadata.get("split") and metadata.get("dirname"))


def is_coco(name: str) -> bool:
    """Return whether COCO AP of a dataset of boxes is computed: not if it is VOC's only."""
    return bool(MetadataCatalog.get(name).get("json_file")) or not is_voc(name)


def has_boxes(name: str) -> bool:
    """Return whether a dataset, which is read, has boxes that this project evaluates on."""
    return evaluator_type(name) in _BOXES and bool(detection_dataset(name).coco["annotations"])


def detection_dataset(name: str, *, masks: bool = False) -> DetectionDataset:
    """Return the annotations of a registered dataset, whoever registered it.

    Refused is what could not be evaluated on, also by Detectron2's own evaluators, which read its
    files themselves; of its masks only with ``masks``.
    """
    if name not in _known:
        raw = _read(name, masks)
        classes = MetadataCatalog.get(name).get("thing_classes")
        _known[name] = checked_dataset(name, raw, classes)
    return _known[name]


def _read(name: str, masks: bool) -> RawAnnotations:
    metadata = MetadataCatalog.get(name)
    if metadata.get("json_file"):
        _load(name)
        path = local_path(metadata.json_file)
        content = {"annotations": [], **read_json(path)}  # of COCO's test-dev there are none
        raw = raw_coco(content, path, metadata.get("image_root") or "")
        _check_for_coco_evaluator(raw, masks)
        return raw
    if metadata.get("dirname"):
        root = local_path(metadata.dirname)
        raw = read_voc(root, metadata.split)
        _check_for_voc_evaluator(root, raw)
        images = Path(raw.image_dir).relative_to(root)  # under the name that the records have
        return raw._replace(image_dir=os.path.join(metadata.dirname, images))
    _load(name)
    with named(f"dataset {name!r}: records and thing_classes"):
        coco = convert_to_coco_dict(name)  # as COCOEvaluator does
    return raw_coco({"annotations": []} | coco, f"dataset {name!r}", "")


def _load(name: str) -> None:
    """Load a test set as after training, when evaluators sort images by their ids."""
    with named(f"dataset {name!r}"):
        records = DatasetCatalog.get(name)
        sorted(record["image_id"] for record in records)
        for record in records:
            if None in (record.get("width", 0), record.get("height", 0)):
                raise ValueError(f"no width or height of {record['file_name']}")


def _check_for_coco_evaluator(raw: RawAnnotations, masks: bool) -> None:
    for i, a in enumerate(raw.annotations):
        is_number = is_finite(a.get("id")) or str(a.get("id")).isdecimal()
        if not is_number or a.get("iscrowd") not in (0, 1) or not is_finite(a.get("area")):
            raise ValueError(
                f"{raw.where(i)}: for COCOEvaluator expected a number as 'id', 'iscrowd' 0 or 1 "
                f"and a number as 'area', got {[a.get(k) for k in ('id', 'iscrowd', 'area')]}; "
                f"--test coco:{raw.source}:{raw.image_dir} fills them in"
            )
        polygons = a.get("segmentation")
        # Of two points it is a box to pycocotools, and all others must be one too.
        if masks and isinstance(polygons, list) and polygons and len(polygons[0]) < 6:
            raise ValueError(
                f"{raw.where(i)}: for COCOEvaluator expected a first polygon of three or more "
                f"points, got {polygons[0]}; --test coco:{raw.source}:{raw.image_dir} leaves it out"
            )


def _check_for_voc_evaluator(dirname: Path, raw: RawAnnotations) -> None:
    names = [c["name"] for c in raw.categories if voc_class(c["name"]) != c["name"]]
    if names:
        raise ValueError(
            f"{raw.source}: for PascalVOCDetectionEvaluator, which names files by them, expected "
            f"short classes without a slash, got {names[0]}; --test voc:{dirname} reads it"
        )
    for image in raw.images:
        path = Path(dirname, "Annotations", image["file_name"]).with_suffix(".xml")
        try:
            parse_rec(str(path))
        except (AttributeError, OSError, ValueError) as error:
            raise ValueError(
                f"{path}: for PascalVOCDetectionEvaluator expected name, pose, truncated, "
                f"difficult and bndbox of whole numbers, got {error}; --test voc:{dirname} reads it"
            ) from None


# ---- before anything is built --------------------------------------------------------------------


def check_sets(
    train: Iterable[str], test: Iterable[str], num_classes: int | None, *, masks: bool = False
) -> None:
    """Refuse data sets on which a run would fail, some of them at its end; test sets are read.

    Without ``num_classes``, K, neither classes nor boxes are looked at. ``masks``: the model
    predicts masks, which COCO's evaluation compares with all others.
    """
    for name in (*train, *test):
        if name not in DatasetCatalog.list():
            raise ValueError(
                f"dataset {name!r}: expected a registered one, or --train/--test with a "
                "coco:... or voc:... spec"
            )
    check_classes(train, num_classes)
    for name in test:
        kind = evaluator_type(name)
        package = _PACKAGES.get(kind)
        if package and not importlib.util.find_spec(package):
            raise ValueError(f"{name} ({kind}): expected the package {package}, got none")
        if num_classes is not None and kind in _BOXES:
            dataset = detection_dataset(name, masks=masks)
            _check_count(name, len(dataset.class_names), num_classes)
            if masks and is_coco(name):
                _check_masks(dataset)


def check_classes(names: Iterable[str], num_classes: int | None) -> None:
    """Refuse datasets of other classes than the model's; many know them only when loaded."""
    for name in names:
        classes = MetadataCatalog.get(name).get("thing_classes")
        if classes is not None:
            _check_count(name, len(classes), num_classes)


def checked_source(
    loader: object,
    model: torch.nn.Module,
    names: Iterable[str],
    num_classes: int | None,
    fallback: Callable[[], Sequence[dict]],
    **masks: Any,
) -> tuple[ResumableTrainingSampler | None, Sequence[dict]]:
    """Return the `source` of a training loader, checked (`check_records`); the records of one that
    hides them are those of ``fallback``."""
    sampler, records = source(loader)
    if records is None:
        records = fallback()
    check_classes(names, num_classes)
    sem_seg = hasattr(getattr(model, "module", model), "sem_seg_head")
    check_records(records, num_classes, sem_seg=sem_seg, **masks)
    return sampler, records


def _check_count(name: str, found: int, num_classes: int | None) -> None:
    if num_classes not in (found, None):
        raise ValueError(
            f"NUM_CLASSES of the model: expected {found}, the classes of {name}, got {num_classes}"
        )


def _check_masks(dataset: DetectionDataset) -> None:
    for a in dataset.coco["annotations"]:
        if not a.get("segmentation"):
            raise ValueError(
                f"{dataset.spec}: to evaluate a model with masks expected a segmentation of every "
                f"annotation, got none of annotation {a['id']}, of image {a['image_id']}"
            )


def check_keypoints(
    train: Iterable[str], test: Iterable[str], num_keypoints: int, sigmas: Sequence[float]
) -> None:
    """Refuse what a model with keypoints would miss, some of it only after training."""
    for name in train:
        metadata = MetadataCatalog.get(name)
        names = metadata.get("keypoint_names")
        if not names or metadata.get("keypoint_flip_map") is None:
            raise ValueError(
                f"MODEL.KEYPOINT_ON: expected the names of the keypoints of {name}, as 'keypoints' "
                "of a category in the file of --train, or as keypoint_names and keypoint_flip_map "
                f"of MetadataCatalog.get({name!r}), got none"
            )
        if len(names) != num_keypoints:
            raise ValueError(
                f"MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS: expected {len(names)}, the keypoints of "
                f"{name}, got {num_keypoints}"
            )
    if any(map(has_boxes, test)) and (len(sigmas) or 17) != num_keypoints:
        raise ValueError(
            f"TEST.KEYPOINT_OKS_SIGMAS: expected {num_keypoints} numbers, one of each keypoint, "
            f"got {len(sigmas)}"
        )
