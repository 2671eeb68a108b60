"""Training data: images and annotations as Detectron2 has them, checked, and read as shown.

The memory knows an annotation by its row: its place among all annotations of the training set, in
the order in which Detectron2's loaders return images and annotations.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import itertools
import json
import logging
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from detectron2.data import DatasetCatalog, DatasetMapper, get_detection_dataset_dicts
from detectron2.data.build import filter_images_with_only_crowd_annotations
from detectron2.data.common import ToIterableDataset
from detectron2.data.detection_utils import SizeMismatchError, check_image_size
from detectron2.structures import BoxMode
from detectron2.utils.file_io import PathHandler, PathManager
from pskd_detection.boxes import Mended
from pskd_detection.coco_format import flag
from pskd_detection.segmentation import segmentation_problem

from pskd_detectron2.fast_rcnn import ROW_FIELD
from pskd_detectron2.resume import ResumableTrainingSampler
from pskd_tools.images import check_images, read_rgb

if TYPE_CHECKING:
    from PIL.Image import Image

logger = logging.getLogger("detectron2." + __name__)
_ROW = "pskd_row"


@contextlib.contextmanager
def named(name: object) -> Iterator[None]:
    """Turn what Detectron2 raises for records that are not in its format into a ValueError that
    names the data set or image."""
    kinds = AssertionError, AttributeError, LookupError, NotImplementedError, TypeError, ValueError
    try:
        yield
    except kinds as error:
        raise ValueError(f"{name}: expected Detectron2's format, got {error!r}") from error


def training_records(
    names: str | Sequence[str], *, filter_empty: bool = True, **options
) -> list[dict]:
    """Return what `get_detection_dataset_dicts` does, every annotation with its row.

    An ``iscrowd`` that is text, as in ``"0"``, is read: to Detectron2 it is set.
    """
    with named(f"training set {names}"):
        records = get_detection_dataset_dicts(names, filter_empty=False, **options)
    if not isinstance(records, list):
        return records  # a `torch.utils.data.Dataset`, which Detectron2 does not filter either
    crowds = 0
    for record in records:
        for annotation in record.get("annotations", ()):
            if "iscrowd" in annotation:
                value = flag(annotation["iscrowd"], str(record.get("file_name")), "iscrowd")
                annotation["iscrowd"] = value
                crowds += value
    logger.info("%d crowd or difficult objects are left out of training", crowds)
    if filter_empty and "annotations" in records[0]:
        with named(f"training set {names}"):
            records = filter_images_with_only_crowd_annotations(records)
    if not records:
        raise ValueError(f"{names}: expected annotations to train on, got crowds or none")
    return number_annotations(records)


def source(loader: object) -> tuple[ResumableTrainingSampler | None, Sequence[dict] | None]:
    """Return a training loader's sampler, if it can be set, and the records that it draws from;
    None for those of a loader that hides them."""
    part = loader
    while part is not None and not isinstance(part, ToIterableDataset):
        part = getattr(part, "dataset", None)
    if part is None:
        return None, None
    sampler = part.sampler if isinstance(part.sampler, ResumableTrainingSampler) else None
    return sampler, part.dataset._dataset


def epoch_length(num_images: int, images_per_iteration: int) -> int:
    """Return the iterations in which a stream draws every image once, at least 1."""
    return max(1, num_images // images_per_iteration)


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


def check_records(
    records: Iterable[dict],
    num_classes: int | None,
    *,
    masks: bool = False,
    mask_format: str = "polygon",
    sem_seg: bool = False,
) -> None:
    """Refuse records that Detectron2 would stumble on later, or train on as something else.

    ``num_classes`` is K, or None: the model trains on no boxes, or its classes are not known.
    Boxes outside their image are left out by Detectron2, which is logged.
    """
    mended = Mended("training set")
    expected = ["file_name"]
    expected += ["annotations"] if num_classes is not None else []
    expected += ["sem_seg_file_name"] if sem_seg else []
    for number, record in enumerate(records, start=1):
        name = record.get("file_name") or f"training set: image number {number}"
        missing = [key for key in expected if key not in record]
        if missing:
            raise ValueError(f"{name}: to train this model expected {missing[0]!r}, got none")
        with named(name):
            found = (
                _class_problem(a, num_classes) or (masks and _mask_problem(record, a, mask_format))
                for a in record.get("annotations", ())
            )
            problem = next(filter(None, found), None)
            outside = [] if problem else _boxes_outside(record)
        if problem:
            raise ValueError(f"{name}: {problem}")
        for box in outside:
            mended.note("boxes outside their image left out", f"{name}: {box}")
    mended.finish()


def _class_problem(annotation: dict, num_classes: int | None) -> str | None:
    # Detectron2 makes an integer of it too.
    if num_classes is None or 0 <= int(annotation["category_id"]) < num_classes:
        return None
    return f"expected classes in [0, {num_classes - 1}], got {annotation['category_id']}"


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


def _boxes_outside(record: dict) -> list:
    """Return the boxes that do not overlap their image, if its size is known."""
    annotations, found = record.get("annotations", ()), []
    width, height = record.get("width"), record.get("height")
    for mode in {a["bbox_mode"] for a in annotations}:
        boxes = [a["bbox"] for a in annotations if a["bbox_mode"] == mode]
        left, top, right, bottom = BoxMode.convert(np.array(boxes), mode, BoxMode.XYXY_ABS).T
        if width is not None and height is not None:
            overlap = (left < width) & (top < height) & (right > 0) & (bottom > 0)
            found += [boxes[i] for i in np.flatnonzero(~overlap)]
    return found


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


def check_image_files(names: Iterable[str], workers: int) -> None:
    """Read every image of registered datasets once, for --check-images."""
    records = [(record,) for name in names for record in DatasetCatalog.get(name)]
    logger.info("--check-images: read %d images", check_images(records, _check_image, workers))


def _check_image(record: dict) -> None:
    check_image_size(dict(record), np.asarray(_read(record["file_name"])))
