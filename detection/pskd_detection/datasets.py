"""Detection data sets without code: ``coco:ANNOTATIONS.json:IMAGE_DIR`` and ``voc:ROOT[:SPLIT]``.

Both become one form, COCO's. What cannot be trained on is refused when it is read; what Detectron2
trains on all the same is mended as it does (`checked_coco`).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

from pskd_detection.coco_format import (
    RawAnnotations,
    checked_coco,
    is_remote,
    read_coco,
    without_root,
)
from pskd_detection.voc_format import read_voc

_FORMS = "coco:ANNOTATIONS.json:IMAGE_DIR or voc:ROOT[:SPLIT]"
_log = logging.getLogger(__name__)


class Object(NamedTuple):
    """An annotated object: its box as x, y, width, height in pixels, its class index, its flag."""

    box: list[float]
    label: int
    crowd: bool


@dataclass(frozen=True)
class DetectionDataset:
    """Checked annotations and where their images are.

    Attributes:
        spec: what it was read from, or its name.
        coco: ``info``, ``images`` (``id``, ``file_name``, ``width``, ``height``), ``annotations``
            (``id`` from 1 in their order, ``image_id``, ``category_id``, ``bbox`` as x, y, width,
            height in pixels, ``area``, ``iscrowd``, and what else the file holds, such as
            ``segmentation``) and ``categories`` (``id``, ``name``), ordered by id.
        image_dir: the folder that the file names start from.
    """

    spec: str
    coco: dict
    image_dir: Path | str

    @cached_property
    def class_names(self) -> tuple[str, ...]:
        """The names of the K classes; class index i, from 0, is the i-th."""
        return tuple(category["name"] for category in self.coco["categories"])

    @cached_property
    def category_ids(self) -> tuple[int, ...]:
        """The category id of each class index, rising."""
        return tuple(category["id"] for category in self.coco["categories"])

    @cached_property
    def objects(self) -> dict[Hashable, list[Object]]:
        """The objects of each image, by its id."""
        label = {key: i for i, key in enumerate(self.category_ids)}
        found: dict[Hashable, list[Object]] = {image["id"]: [] for image in self.coco["images"]}
        for a in self.coco["annotations"]:
            box = Object(a["bbox"], label[a["category_id"]], bool(a["iscrowd"]))
            found[a["image_id"]].append(box)
        return found

    @cached_property
    def fingerprint(self) -> str:
        """A sha256 over classes, images' names and sizes, and annotations' boxes and classes.

        The order of images and annotations counts, since what is remembered of an annotation is
        found by its number. Folders, ids of categories and the order of keys do not.
        """
        digest = hashlib.sha256(json.dumps(self.class_names).encode())
        index = {key: i for i, key in enumerate(self.category_ids)}
        names = {image["id"]: image["file_name"] for image in self.coco["images"]}
        for image in self.coco["images"]:
            size = [image["file_name"], image["width"], image["height"]]
            digest.update(json.dumps(size).encode())
        for a in self.coco["annotations"]:
            box = [round(float(value), 3) for value in a["bbox"]]
            row = [names[a["image_id"]], index[a["category_id"]], a["iscrowd"], box]
            digest.update(json.dumps(row).encode())
        return digest.hexdigest()


def load_dataset(
    spec: str, class_names: Sequence[str] | None = None, *, strict: bool = False
) -> DetectionDataset:
    """Read and check a detection data set.

    Args:
        spec: ``coco:ANNOTATIONS.json:IMAGE_DIR`` or ``voc:ROOT:SPLIT``; ``voc:ROOT`` is all XML
            of a folder in VOC's layout, or of a flat one with images beside their XML.
        class_names: for a test set, the classes of the training set in their order: the classes of
            the data are found among them by name. Without, it is read as a training set: it brings
            its own classes and must have something to train on.
        strict: whether annotations that would be mended (`checked_coco`) are an error.

    Raises:
        ValueError: naming the file and, where there is one, the annotation, what was expected and
            what came.
    """
    return checked_dataset(spec, _read(spec), class_names, strict=strict)


def checked_dataset(
    name: str, raw: RawAnnotations, class_names: Sequence[str] | None, *, strict: bool = False
) -> DetectionDataset:
    """Return what a reader found as a data set, as `load_dataset` does."""
    coco = checked_coco(raw, strict)
    crowds = sum(annotation["iscrowd"] for annotation in coco["annotations"])
    count = len(coco["annotations"])
    if class_names is not None:
        _use_classes(coco, class_names, raw.source)
    elif crowds == count:
        raise ValueError(
            f"{raw.source}: expected annotations to train on, got "
            f"{count} crowd or difficult ones and no other"
        )
    if crowds:
        _log.warning(
            "%s: %d of %d objects are crowd or difficult: left out of training, and neither right "
            "nor wrong in evaluation", raw.source, crowds, count,
        )  # fmt: skip
    return DetectionDataset(name, coco, raw.image_dir)


def _read(spec: str) -> RawAnnotations:
    kind, first, second = _parts(spec)
    if kind == "coco":
        return without_root(read_coco(Path(first), Path(second)))
    return read_voc(Path(first), second or None)


def voc_folder(spec: str) -> str | None:
    """Return the folder of a ``voc:`` spec; None for another."""
    kind, folder, _ = _parts(spec)
    return folder if kind == "voc" else None


def _parts(spec: str) -> tuple[str, str, str]:
    """Return the kind, the path, and image folder or split; of ``voc:ROOT`` no split."""
    if is_remote(spec):  # whose colons would be taken for these
        raise ValueError(f"dataset: expected local paths in {_FORMS}, got {spec!r}")
    kind, _, rest = spec.partition(":")
    first, colon, second = rest.rpartition(":")  # the last colon: a path may hold others
    if kind == "voc" and rest and (not colon or Path(rest).is_dir()):
        return kind, rest, ""
    if kind not in ("coco", "voc") or not first or not second:
        raise ValueError(f"dataset: expected {_FORMS}, got {spec!r}")
    return kind, first, second


def _spec(text: str) -> str:
    """Return an option's text if it has the form of a spec; argparse puts the option's name."""
    try:
        _parts(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error).removeprefix("dataset: ")) from None
    return text


def _use_classes(coco: dict, class_names: Sequence[str], source: object) -> None:
    """Give the categories the order of the training set's, in place."""
    names = [category["name"] for category in coco["categories"]]
    if names == list(class_names):
        return  # and the file's own ids are kept
    unknown = sorted(set(names) - set(class_names))
    if unknown:
        raise ValueError(
            f"{source}: expected the classes of the training set ({', '.join(class_names)}), got "
            f"also {', '.join(unknown)}"
        )
    number_of = {name: i for i, name in enumerate(class_names, start=1)}
    renumbered = {category["id"]: number_of[category["name"]] for category in coco["categories"]}
    for annotation in coco["annotations"]:
        annotation["category_id"] = renumbered[annotation["category_id"]]
    coco["categories"] = [{"id": number, "name": name} for name, number in number_of.items()]


def add_dataset_arguments(parser: argparse.ArgumentParser, required: bool = True) -> None:
    """Add ``--train SPEC``, ``--test SPEC`` and ``--strict-data``."""
    parser.add_argument(
        "--train",
        metavar="SPEC",
        type=_spec,
        required=required,
        help=f"training set: {_FORMS}; its classes set the number of classes",
    )
    parser.add_argument(
        "--test",
        metavar="SPEC",
        type=_spec,
        required=required,
        help="test set, in the same form; its classes are matched to the training set's by name",
    )
    parser.add_argument(
        "--strict-data",
        action="store_true",
        help="refuse annotations of --train and --test that would be clipped, left out or replaced",
    )
