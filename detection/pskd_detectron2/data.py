"""Training data for the memory teacher and from dataset specs.

The memory knows an annotation by its row: its place among all annotations of the training set, in
the order in which Detectron2's loaders return images and annotations.
"""

from __future__ import annotations

import atexit
import contextlib
import hashlib
import importlib.util
import io
import itertools
import json
import logging
import os
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from detectron2.data import (
    DatasetCatalog,
    DatasetMapper,
    MetadataCatalog,
    get_detection_dataset_dicts,
)
from detectron2.data.build import filter_images_with_only_crowd_annotations
from detectron2.data.datasets import register_coco_instances
from detectron2.data.datasets.coco import convert_to_coco_dict
from detectron2.data.detection_utils import SizeMismatchError, check_image_size
from detectron2.evaluation.pascal_voc_evaluation import parse_rec
from detectron2.structures import BoxMode
from detectron2.utils import comm
from detectron2.utils.file_io import PathHandler, PathManager
from pskd_detection import DetectionDataset, load_dataset, write_voc
from pskd_detection.boxes import Mended, is_finite
from pskd_detection.coco_format import RawAnnotations, flag, is_remote, raw_coco, read_coco
from pskd_detection.datasets import checked_dataset, voc_folder
from pskd_detection.segmentation import segmentation_problem
from pskd_detection.voc_format import read_voc

from pskd_detectron2.fast_rcnn import ROW_FIELD
from pskd_detectron2.files import local_path
from pskd_tools.files import write_json
from pskd_tools.images import check_images, read_rgb

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = [
    "BOXES",
    "ImageMapper",
    "PSKDDatasetMapper",
    "check_classes",
    "check_image_files",
    "check_keypoints",
    "check_records",
    "check_registered",
    "check_test_sets",
    "class_names_of",
    "count_annotations",
    "detection_dataset",
    "evaluator_type",
    "is_evaluated_as_coco",
    "number_annotations",
    "register_spec",
    "training_fingerprint",
    "training_records",
]

#: The evaluator types of data sets whose boxes this project evaluates too.
BOXES = (None, "coco", "coco_panoptic_seg", "pascal_voc")

_PACKAGES: dict[str | None, str] = {  # which Detectron2 imports at the end of a training
    "cityscapes_instance": "cityscapesscripts",
    "cityscapes_sem_seg": "cityscapesscripts",
    "coco_panoptic_seg": "panopticapi",
    "lvis": "lvis",
}
logger = logging.getLogger("detectron2." + __name__)
_ROW = "pskd_row"
_DATASETS: dict[str, DetectionDataset] = {}  # those that were registered from a spec, by it


@contextlib.contextmanager
def _named(name: object) -> Iterator[None]:
    """Turn what Detectron2 raises for records that are not in its format into a ValueError that
    names the data set or image."""
    kinds = (
        AssertionError,
        AttributeError,
        LookupError,
        NotImplementedError,
        TypeError,
        ValueError,
    )
    try:
        yield
    except kinds as error:
        raise ValueError(f"{name}: expected Detectron2's format, got {error!r}") from error


def training_records(
    names: str | Sequence[str], *, filter_empty: bool = True, **options
) -> list[dict]:
    """Return images and annotations as `get_detection_dataset_dicts`, to which an ``iscrowd`` that
    is text, as in ``"0"``, is set: it would leave the object out.

    Raises:
        ValueError: for records that are not in Detectron2's format, an ``iscrowd`` that is no flag,
            or if nothing is left to train on.
    """
    with _named(f"training set {names}"):
        records = get_detection_dataset_dicts(names, filter_empty=False, **options)
    if not isinstance(records, list):
        return records  # a `torch.utils.data.Dataset`, which Detectron2 does not filter either
    crowds = 0
    for record in records:
        for annotation in record.get("annotations", ()):
            if "iscrowd" in annotation:
                value = flag(annotation["iscrowd"], record["file_name"], "iscrowd")
                annotation["iscrowd"] = value
                crowds += value
    logger.info("%d crowd or difficult objects are left out of training", crowds)
    if filter_empty and "annotations" in records[0]:
        records = filter_images_with_only_crowd_annotations(records)
    if not records:
        raise ValueError(f"{names}: expected annotations to train on, got crowds or none")
    return records


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


class _UprightImages(PathHandler):
    """Opens ``pskd-rgb://PATH`` as the image of PATH in a form that needs no conversion."""

    PREFIX = "pskd-rgb://"

    def _get_supported_prefixes(self) -> list[str]:
        return [self.PREFIX]

    def _open(self, path: str, mode: str = "r", buffering: int = -1, **kwargs) -> io.BytesIO:
        uncompressed = io.BytesIO()
        _read(path.removeprefix(self.PREFIX)).save(uncompressed, "PPM")
        uncompressed.seek(0)
        return uncompressed


PathManager.register_handler(_UprightImages())


def _read(name: str) -> Image:
    """Read an image from wherever Detectron2 does."""
    with PathManager.open(name, "rb") as file:
        return read_rgb(name, file)


class ImageMapper(DatasetMapper):
    """`DatasetMapper` whose images are those of `pskd_tools.images.read_rgb`.

    The stock mapper clips 16-bit pixels, and does not name a damaged file.

    Raises:
        ValueError: naming an image that cannot be read or has another size than annotated.
    """

    def __call__(self, dataset_dict: dict) -> dict:
        name = dataset_dict["file_name"]
        try:
            mapped = super().__call__(
                dataset_dict | {"file_name": f"{_UprightImages.PREFIX}{name}"}
            )
        except SizeMismatchError as error:
            message = str(error).replace(_UprightImages.PREFIX, "")
            raise SizeMismatchError(message) from None
        mapped["file_name"] = name
        return mapped


class PSKDDatasetMapper(ImageMapper):
    """`ImageMapper` whose instances also carry the row of their annotation.

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
    _DATASETS[spec] = dataset
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


def detection_dataset(name: str) -> DetectionDataset:
    """Return the annotations of a registered dataset, whoever registered it.

    Raises:
        ValueError: for anything in it that could not be evaluated on (`load_dataset`), also by
            Detectron2's own evaluators, which read its files themselves.
    """
    if name not in _DATASETS:
        metadata = MetadataCatalog.get(name)
        if metadata.get("json_file"):
            raw = read_coco(local_path(metadata.json_file), metadata.get("image_root") or "")
            _check_for_coco_evaluator(raw)
            _loaded(name)
        elif metadata.get("dirname"):
            root = local_path(metadata.dirname)
            raw = read_voc(root, metadata.split)
            _check_for_voc_evaluator(root, raw)
            images = Path(raw.image_dir).relative_to(root)  # under the name that the records have
            raw = raw._replace(image_dir=os.path.join(metadata.dirname, images))
        else:
            raw = _from_records(name)
        _DATASETS[name] = checked_dataset(name, raw, metadata.get("thing_classes"))
    return _DATASETS[name]


def _check_for_coco_evaluator(raw: RawAnnotations) -> None:
    for i, a in enumerate(raw.annotations):
        is_number = is_finite(a.get("id")) or str(a.get("id")).isdecimal()
        if not is_number or a.get("iscrowd") not in (0, 1) or not is_finite(a.get("area")):
            raise ValueError(
                f"{raw.where(i)}: for COCOEvaluator expected a number as 'id', 'iscrowd' 0 or 1 "
                f"and a number as 'area', got {[a.get(k) for k in ('id', 'iscrowd', 'area')]}; "
                f"--test coco:{raw.source}:{raw.image_dir} fills them in"
            )


def _check_for_voc_evaluator(dirname: Path, raw: RawAnnotations) -> None:
    divided = [c["name"] for c in raw.categories if "/" in c["name"]]
    if divided:
        raise ValueError(
            f"{raw.source}: for PascalVOCDetectionEvaluator expected classes without a slash, got "
            f"{divided[0]}; --test voc:{dirname} reads it"
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


def _from_records(name: str) -> RawAnnotations:
    """Return a dataset that is known by its function only, by the conversion of COCOEvaluator."""
    _loaded(name)
    with _named(f"dataset {name!r}: records and thing_classes"):
        coco = convert_to_coco_dict(name)
    return raw_coco({"annotations": []} | coco, f"dataset {name!r}", "")


def _loaded(name: str) -> None:
    """Load a test set as it will be after training; its evaluators sort images by their ids."""
    with _named(f"dataset {name!r}"):
        sorted(record["image_id"] for record in DatasetCatalog.get(name))


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


def check_test_sets(names: Iterable[str], num_classes: int | None, *, masks: bool = False) -> None:
    """Look at the test sets before training and not at its end; those of boxes are read.

    Args:
        names: of the test sets.
        num_classes: K; None: the classes are not looked at.
        masks: whether the model predicts masks, which COCO's evaluation compares with all others.

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
            dataset = detection_dataset(name)
            _check_count(name, len(dataset.class_names), num_classes)
            if masks and is_evaluated_as_coco(name):
                _check_masks(dataset)


def is_evaluated_as_coco(name: str) -> bool:
    """Return whether COCO AP of a dataset of boxes is computed: not if it is VOC's only."""
    metadata = MetadataCatalog.get(name)
    is_voc = metadata.get("split") and metadata.get("dirname")
    return bool(metadata.get("json_file") or not is_voc)


def _check_masks(dataset: DetectionDataset) -> None:
    for a in dataset.coco["annotations"]:
        if not a.get("segmentation"):
            raise ValueError(
                f"{dataset.spec}: to evaluate a model with masks expected a segmentation of every "
                f"annotation, got none of annotation {a['id']}, of image {a['image_id']}"
            )


def evaluator_type(name: str) -> str | None:
    """Return how Detectron2 evaluates on a dataset; None for one of a user's that does not tell."""
    return MetadataCatalog.get(name).get("evaluator_type")


def _check_count(name: str, found: int, num_classes: int | None) -> None:
    if num_classes not in (found, None):
        raise ValueError(
            f"NUM_CLASSES of the model: expected {found}, the classes of {name}, got {num_classes}"
        )


def check_image_files(names: Iterable[str], workers: int) -> None:
    """Read every image of registered datasets once, for --check-images.

    Raises:
        ValueError: as `pskd_tools.images.check_images`.
    """
    records = [(record,) for name in names for record in DatasetCatalog.get(name)]
    logger.info("--check-images: read %d images", check_images(records, _check_image, workers))


def _check_image(record: dict) -> None:
    check_image_size(dict(record), np.asarray(_read(record["file_name"])))


def check_keypoints(
    train: Iterable[str], test: Iterable[str], num_keypoints: int, sigmas: Sequence[float]
) -> None:
    """Refuse what a model with keypoints would miss, some of it only after training.

    Args:
        train: names of the training sets.
        test: names of the test sets.
        num_keypoints: MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS.
        sigmas: TEST.KEYPOINT_OKS_SIGMAS; if empty, COCO's 17 are evaluated with.

    Raises:
        ValueError: naming the key, what was expected and what came.
    """
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
    if list(test) and (len(sigmas) or 17) != num_keypoints:
        raise ValueError(
            f"TEST.KEYPOINT_OKS_SIGMAS: expected {num_keypoints} numbers, one of each keypoint, "
            f"got {len(sigmas)}"
        )


def check_records(
    records: Iterable[dict],
    num_classes: int | None,
    *,
    masks: bool = False,
    mask_format: str = "polygon",
) -> None:
    """Refuse training data that Detectron2 would stumble on later, or train on as something else.

    Boxes that reach over their image's border are cut there by Detectron2, and left out where
    nothing remains, which is logged; those of --train were looked at more closely.

    Args:
        records: images and annotations in Detectron2's format.
        num_classes: K; None: the classes are not looked at.
        masks: whether the model learns masks.
        mask_format: INPUT.MASK_FORMAT.

    Raises:
        ValueError: naming the image of an annotation that is not in Detectron2's format, of a class
            outside [0, K), of a crowd flag other than 0 and 1, or of an annotation without the mask
            that it must have, or with one that pycocotools would crash on.
    """
    mended = Mended("training set")
    for record in records:
        annotations = record.get("annotations", ())
        with _named(record["file_name"]):
            found = (
                _problem(record, a, num_classes)
                or (masks and _mask_problem(record, a, mask_format))
                for a in annotations
            )
            problem = next(filter(None, found), None)
            outside = [a["bbox"] for a in annotations if not problem and _is_outside(record, a)]
        if problem:
            raise ValueError(f"{record['file_name']}: {problem}")
        for box in outside:
            mended.note("boxes outside their image left out", f"{record['file_name']}: {box}")
    mended.finish()


def _mask_problem(record: dict, annotation: dict, mask_format: str) -> str | None:
    if annotation.get("iscrowd", 0):
        return None
    segmentation: Any = annotation.get("segmentation")
    if segmentation is None or len(segmentation) == 0:
        return "expected a segmentation of every annotation (MODEL.MASK_ON), got one without"
    if isinstance(segmentation, dict) and mask_format == "polygon":
        return "INPUT.MASK_FORMAT: expected bitmask for run-length codes, got polygon"
    if isinstance(segmentation, np.ndarray) or None in (record.get("height"), record.get("width")):
        return None  # a mask, or an image whose size is not known
    return segmentation_problem(segmentation, record["height"], record["width"])


def _problem(record: dict, annotation: dict, num_classes: int | None) -> str | None:
    # Detectron2 makes an integer of it too.
    if num_classes is not None and not 0 <= int(annotation["category_id"]) < num_classes:
        return f"expected classes in [0, {num_classes - 1}], got {annotation['category_id']}"
    if annotation.get("iscrowd", 0) not in (0, 1):
        return f"expected 'iscrowd' as 0 or 1, got {annotation['iscrowd']!r}"
    return None


def _is_outside(record: dict, annotation: dict) -> bool:
    size = (record.get("width"), record.get("height"))
    if annotation["bbox_mode"] not in (BoxMode.XYXY_ABS, BoxMode.XYWH_ABS) or None in size:
        return False  # rotated boxes, images whose size is not known
    left, top, right, bottom = annotation["bbox"]
    if annotation["bbox_mode"] == BoxMode.XYWH_ABS:
        right, bottom = left + right, top + bottom
    return not (left < size[0] and top < size[1] and right > 0 and bottom > 0)
