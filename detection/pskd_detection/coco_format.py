"""Annotations in COCO's JSON: read, and checked whatever they were read from."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from pskd.run.files import read_json
from pskd_detection.boxes import BoxCheck

__all__ = ["RawAnnotations", "checked_coco", "read_coco"]


class RawAnnotations(NamedTuple):
    """What a reader found.

    Attributes:
        source: the file that names the images, for messages.
        image_dir: the folder of the images.
        info: of the COCO file, or empty.
        images, annotations, categories: in COCO format, not looked at yet.
        where: names the i-th annotation in messages.
    """

    source: Path
    image_dir: Path
    info: dict
    images: list
    annotations: list
    categories: list
    where: Callable[[int], str]


def read_coco(path: Path, image_dir: Path) -> RawAnnotations:
    """Read a COCO annotation file.

    Raises:
        ValueError: the file or the folder is missing, or the file is no JSON object with the lists
            ``images``, ``annotations`` and ``categories``.
    """
    try:
        content = read_json(path)
    except OSError as error:
        raise ValueError(f"{path}: expected a COCO annotation file, got {error}") from None
    if not image_dir.is_dir():
        raise ValueError(f"{image_dir}: expected the folder of the images of {path}, got none")
    for key in ("images", "annotations", "categories"):
        entries = content.get(key)
        if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
            got = "none" if key not in content else "something else"
            raise ValueError(f"{path}: expected {key!r} as a list of objects, got {got}")

    def where(i: int) -> str:
        return f"{path}: annotation {content['annotations'][i].get('id', f'number {i + 1}')!r}"

    info = content.get("info")
    return RawAnnotations(
        path,
        image_dir,
        info if isinstance(info, dict) else {},
        content["images"],
        content["annotations"],
        content["categories"],
        where,
    )


def checked_coco(raw: RawAnnotations) -> dict:
    """Return annotations in COCO format on which training and evaluation can rely.

    Annotations are numbered from 1 in their order: COCO's evaluation takes a match with number 0
    for none. ``area`` and ``iscrowd`` are filled in; ``ignore`` becomes ``iscrowd``, which is what
    COCO's evaluation looks at and what training skips. Categories are ordered by id.

    Raises:
        ValueError: naming the file, the entry, what was expected and what came.
    """
    images = _checked_images(raw)
    categories = sorted(_checked_categories(raw), key=lambda category: category["id"])
    annotations = _checked_annotations(raw, images, {c["id"] for c in categories})
    return {
        "info": raw.info,
        "images": list(images.values()),
        "annotations": annotations,
        "categories": categories,
    }


def _checked_id(entry: dict, seen: Iterable, where: str, key: str = "id") -> int:
    value = entry.get(key)
    if not isinstance(value, int) or isinstance(value, bool):
        got = "none" if value is None else repr(value)
        raise ValueError(f"{where}: expected an integer {key!r}, got {got}")
    if value in seen:
        raise ValueError(f"{where}: expected every {key!r} once, got {value} again")
    return value


def _checked_name(entry: dict, key: str, seen: Iterable, where: str) -> str:
    value = entry.get(key)
    if not isinstance(value, str) or not value:
        raise ValueError(f"{where}: expected {key!r} as text, got {value!r}")
    if value in seen:
        raise ValueError(f"{where}: expected every {key!r} once, got {value!r} again")
    return value


def _checked_categories(raw: RawAnnotations) -> list[dict]:
    ids: set[int] = set()
    names: set[str] = set()
    for i, category in enumerate(raw.categories):
        where = f"{raw.source}: category number {i + 1}"
        ids.add(_checked_id(category, ids, where))
        names.add(_checked_name(category, "name", names, where))
    return [dict(category) for category in raw.categories]


def _checked_images(raw: RawAnnotations) -> dict[int, dict]:
    """Return the images by their id, each with a file that exists and with its size."""
    images: dict[int, dict] = {}
    names: set[str] = set()
    for i, image in enumerate(raw.images):
        where = f"{raw.source}: image number {i + 1}"
        key = _checked_id(image, images, where)
        names.add(_checked_name(image, "file_name", names, where))
        images[key] = dict(image)
    if not images:
        raise ValueError(f"{raw.source}: expected at least one image, got none")
    missing = [n for n in names if not os.path.isfile(os.path.join(raw.image_dir, n))]
    if missing:
        first = next(i["file_name"] for i in raw.images if i["file_name"] in set(missing))
        raise ValueError(
            f"{raw.source}: expected every image in {raw.image_dir}, got {len(missing)} of "
            f"{len(names)} missing; the first is {first}"
        )
    for image in images.values():
        _set_size(image, raw)
    return images


def _set_size(image: dict, raw: RawAnnotations) -> None:
    """Check an image's size; read it from the image if the annotations do not tell it."""
    size: list[Any] = [image.get("width"), image.get("height")]
    if not all(size):  # missing, null, or 0 as some annotation tools write
        try:
            with Image.open(raw.image_dir / image["file_name"]) as file:
                size = list(file.size)
        except OSError as error:
            raise ValueError(f"{image['file_name']}: expected an image, got {error}") from None
    if not all(isinstance(v, (int, float)) and v == int(v) and v > 0 for v in size):
        raise ValueError(
            f"{raw.source}: image {image['id']}: expected 'width' and 'height' as positive "
            f"integers, got {size}"
        )
    image["width"], image["height"] = (int(v) for v in size)


def _checked_annotations(raw: RawAnnotations, images: dict, categories: set) -> list[dict]:
    check = BoxCheck(raw.source)
    seen: set[int] = set()
    kept: list[dict] = []
    for i, annotation in enumerate(raw.annotations):
        where = raw.where(i)
        if "id" in annotation:
            seen.add(_checked_id(annotation, seen, where))
        _check_known(annotation, "image_id", images, where)
        _check_known(annotation, "category_id", categories, where)
        image = images[annotation["image_id"]]
        box = check.fit(annotation.get("bbox"), image["width"], image["height"], where)
        if box is not None:
            kept.append(_filled_in(annotation, box, len(kept) + 1))
    check.finish()
    return kept


def _check_known(annotation: dict, key: str, known: Iterable, where: str) -> None:
    value = annotation.get(key)
    if not isinstance(value, int) or value not in known:
        raise ValueError(f"{where}: expected {key!r} of one in the file, got {value!r}")


def _filled_in(annotation: dict, box: list[float], number: int) -> dict:
    filled = {key: value for key, value in annotation.items() if key != "ignore"}
    crowd = bool(annotation.get("iscrowd")) or bool(annotation.get("ignore"))
    filled.update(id=number, bbox=box, iscrowd=int(crowd))
    if filled.get("area") is None:
        filled["area"] = box[2] * box[3]
    return filled
