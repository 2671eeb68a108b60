"""Annotations in COCO's JSON: read, and checked whatever they were read from."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable, Container
from pathlib import Path
from typing import Any, NamedTuple

from pskd_detection.boxes import Mended, fitted, is_finite
from pskd_detection.segmentation import segmentation_problem, with_three_points
from pskd_tools.files import read_json
from pskd_tools.images import read_size

_log = logging.getLogger(__name__)

# As label tools write them; makesense.ai has "Unspecified".
_FLAGS = {"": 0, "0": 0, "0.0": 0, "false": 0, "no": 0, "unspecified": 0}
_FLAGS |= {"1": 1, "1.0": 1, "true": 1, "yes": 1}


class RawAnnotations(NamedTuple):
    """What a reader found.

    Attributes:
        source: the file that names the images, or what else names the data set in messages.
        image_dir: the folder of the images; a remote one (`is_remote`) is not looked into.
        info: of the COCO file, or empty.
        images, annotations, categories: in COCO format, not looked at yet.
        where: names the i-th annotation in messages.
    """

    source: object
    image_dir: Path | str
    info: dict
    images: list
    annotations: list
    categories: list
    where: Callable[[int], str]


def flag(value: object, where: str, key: str) -> int:
    """Return a number, a truth value or text such as "no" as 0 or 1; None and empty text are 0."""
    known = _FLAGS.get("" if value is None else str(value).strip().lower())
    if known is None:
        raise ValueError(
            f"{where}: expected {key!r} as 0 or 1, true or false, yes or no, got {value!r}"
        )
    return known


def is_remote(path: str | os.PathLike[str]) -> bool:
    """Return whether a path has a scheme, such as ``s3://``."""
    return "://" in os.fspath(path)


def read_coco(path: Path, image_dir: Path | str) -> RawAnnotations:
    """Read a COCO annotation file, whose folder of images must be there."""
    try:
        content = read_json(path)
    except OSError as error:
        raise ValueError(f"{path}: expected a COCO annotation file, got {error}") from None
    if not is_remote(image_dir) and not os.path.isdir(image_dir or "."):
        raise ValueError(f"{image_dir}: expected the folder of the images of {path}, got none")
    return raw_coco(content, path, image_dir)


def raw_coco(content: dict, source: object, image_dir: Path | str) -> RawAnnotations:
    """Return the parts of COCO's format: lists of images, annotations and categories."""
    for key in ("images", "annotations", "categories"):
        entries = content.get(key)
        if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
            got = "none" if key not in content else "something else"
            raise ValueError(f"{source}: expected {key!r} as a list of objects, got {got}")

    def where(i: int) -> str:
        return f"{source}: annotation {content['annotations'][i].get('id', f'number {i + 1}')!r}"

    info = content.get("info")
    return RawAnnotations(
        source,
        image_dir,
        info if isinstance(info, dict) else {},
        content["images"],
        content["annotations"],
        content["categories"],
        where,
    )


def without_root(raw: RawAnnotations) -> RawAnnotations:
    """Return a data set without the category that Roboflow adds: number 0, of which all others are
    a part, and of which there is no object."""
    root: dict = next((c for c in raw.categories if c.get("id") == 0), {})
    others = [c for c in raw.categories if c is not root]
    is_above = bool(others) and all(c.get("supercategory") == root.get("name") for c in others)
    if not root or not is_above or any(a.get("category_id") == 0 for a in raw.annotations):
        return raw
    _log.warning(
        "%s: category 0, %r, is no class: it has no annotations and all other categories in it",
        raw.source, root.get("name"),
    )  # fmt: skip
    return raw._replace(categories=others)


def checked_coco(raw: RawAnnotations, strict: bool = False) -> dict:
    """Return annotations in COCO format on which training and evaluation can rely.

    Annotations are numbered from 1 in their order: COCO's evaluation takes a match with number 0
    for none. ``area``, ``iscrowd`` and, where others have them, ``keypoints`` are filled in;
    ``ignore`` becomes ``iscrowd``, which is what COCO's evaluation looks at and what training
    skips. Categories are ordered by id.

    What Detectron2 trains on all the same is mended as it does, counted and logged, or refused if
    ``strict``: ids that are not integers are replaced, annotations of images that are not in the
    file and polygons of fewer than three points are left out, and `boxes` says what happens to
    boxes. All else is a ValueError that names the file and the entry.
    """
    mended = Mended(raw.source, strict)
    images = _checked_images(raw, mended)
    categories = _checked_categories(raw, mended)
    annotations = _checked_annotations(raw, images, categories, mended)
    _fill_keypoints(annotations)
    mended.finish()
    return {
        "info": raw.info,
        "images": list(images.values()),
        "annotations": annotations,
        "categories": list(categories.values()),
    }


def _key(value: object) -> str:
    """Return an id as text, under which 7, 7.0 and "7" are one."""
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def _check_new(value: object, seen: Container, where: str, key: str = "id") -> None:
    if _key(value) in seen:
        raise ValueError(f"{where}: expected every {key!r} once, got {value!r} again")


def _by_id(entries: list[dict], what: str, name: str, source: object) -> dict[str, dict]:
    """Return images or categories by the key of their id; id and name are there, and once."""
    found: dict[str, dict] = {}
    names: set[str] = set()
    for i, entry in enumerate(entries, start=1):
        where = f"{source}: {what} number {i}"
        value: Any = entry.get("id")
        is_number = is_finite(value) and not isinstance(value, bool)
        if not is_number and not (isinstance(value, str) and value):
            got = "none" if value is None else repr(value)
            raise ValueError(f"{where}: expected an integer 'id', got {got}")
        _check_new(value, found, where)
        if not isinstance(entry.get(name), str) or not entry[name]:
            raise ValueError(f"{where}: expected {name!r} as text, got {entry.get(name)!r}")
        _check_new(entry[name], names, where, name)
        names.add(entry[name])
        is_whole = isinstance(value, float) and value.is_integer()
        found[_key(value)] = entry | {"id": int(value) if is_whole else value}
    return found


def _number(entries: dict[str, dict], what: str, mended: Mended, source: object) -> None:
    """Number entries from 1 in their order, in place, unless all ids are integers."""
    others = [e["id"] for e in entries.values() if not isinstance(e["id"], int)]
    for value in others:
        mended.note(f"{what} whose id is no integer numbered anew", f"{source}: id {value!r}")
    for number, entry in enumerate(entries.values() if others else (), start=1):
        entry["id"] = number


def _checked_categories(raw: RawAnnotations, mended: Mended) -> dict[str, dict]:
    """Return the categories by the key of their id in the file, ordered by it."""
    for i, category in enumerate(raw.categories, start=1):
        points = category.get("keypoints") or []
        if not isinstance(points, list) or not all(isinstance(name, str) for name in points):
            raise ValueError(
                f"{raw.source}: category number {i}: expected 'keypoints' as a list of names, got "
                f"{points!r}"
            )
    found = _by_id(raw.categories, "category", "name", raw.source)
    # Text after numbers, since the two cannot be compared.
    order = sorted(found, key=lambda key: (isinstance(found[key]["id"], str), found[key]["id"]))
    found = {key: found[key] for key in order}
    _number(found, "categories", mended, raw.source)
    return found


def _checked_images(raw: RawAnnotations, mended: Mended) -> dict[str, dict]:
    """Return the images by the key of their id in the file, each with a file and its size."""
    named = [image | _file_name(image, raw.image_dir) for image in raw.images]
    images = _by_id(named, "image", "file_name", raw.source)
    if not images:
        raise ValueError(f"{raw.source}: expected at least one image, got none")
    names = [image["file_name"] for image in images.values()]
    missing = [name for name in names if _is_missing(raw.image_dir, name)]
    if missing:
        raise ValueError(
            f"{raw.source}: expected every image in {raw.image_dir}, got {len(missing)} of "
            f"{len(names)} missing; the first is {missing[0]}"
        )
    for image in images.values():
        image["width"], image["height"] = _size(image, raw)
    _number(images, "images", mended, raw.source)
    return images


def _is_missing(image_dir: Path | str, name: str) -> bool:
    path = os.path.join(image_dir, name)
    return not is_remote(path) and not os.path.isfile(path)


def _file_name(image: dict, image_dir: Path | str) -> dict:
    """Return an image's file name in its folder, if there is one."""
    name, url = image.get("file_name"), image.get("coco_url")
    if not name and isinstance(url, str):  # of LVIS; its split's folder may be that of the images
        name = "/".join(url.split("/")[-2:])
        name = name.rpartition("/")[2] if _is_missing(image_dir, name) else name
    if isinstance(name, str) and "\\" in name and _is_missing(image_dir, name):
        name = name.replace("\\", "/")  # of a tool on Windows
    return {"file_name": name}


def _size(image: dict, raw: RawAnnotations) -> list[int]:
    """Return an image's width and height, read from it if the annotations do not tell them."""
    size: list[Any] = [image.get("width"), image.get("height")]
    if not all(size):  # missing, null, or 0 as some annotation tools write
        size = list(read_size(os.path.join(raw.image_dir, image["file_name"])))
    if not all(is_finite(v) and v == int(v) and v > 0 for v in size):
        raise ValueError(
            f"{raw.source}: image {image['id']}: expected 'width' and 'height' as positive "
            f"integers, got {size}"
        )
    return [int(v) for v in size]


def _checked_annotations(
    raw: RawAnnotations, images: dict[str, dict], categories: dict[str, dict], mended: Mended
) -> list[dict]:
    seen: set[str] = set()
    kept: list[dict] = []
    for i, annotation in enumerate(raw.annotations):
        where = raw.where(i)
        if annotation.get("id") is not None:
            _check_new(annotation["id"], seen, where)
            seen.add(_key(annotation["id"]))
        image = images.get(_key(annotation.get("image_id")))
        if image is None and annotation.get("image_id") is not None:
            orphan = f"{where}: image_id {annotation['image_id']!r}"
            mended.note("annotations of images that are not in the file left out", orphan)
            continue
        category = categories.get(_key(annotation.get("category_id")))
        if image is None or category is None:
            key = "image_id" if image is None else "category_id"
            got = annotation.get(key)
            raise ValueError(f"{where}: expected {key!r} of one in the file, got {got!r}")
        filled = _filled_in(annotation, image, category, where, mended)
        if filled is not None:
            kept.append({**filled, "id": len(kept) + 1})
    return kept


def _filled_in(
    annotation: dict, image: dict, category: dict, where: str, mended: Mended
) -> dict | None:
    """Return an annotation with all that it must have, or None if it is left out."""
    box = fitted(annotation.get("bbox"), (image["width"], image["height"]), where, mended)
    if box is None:
        return None
    filled = {key: value for key, value in annotation.items() if key != "ignore"}
    flags = [flag(annotation.get(key), where, key) for key in ("iscrowd", "ignore")]
    filled.update(image_id=image["id"], category_id=category["id"], bbox=box, iscrowd=max(flags))
    filled["area"] = _area(annotation.get("area"), box, where, mended)
    _check_keypoints(annotation.get("keypoints"), category, where)
    if annotation.get("segmentation"):
        return _with_segmentation(filled, image, where, mended)
    return filled


def _area(value: Any, box: list[float], where: str, mended: Mended) -> float:
    """Return an area in pixels; where there is no good one that of the box."""
    if value in (None, ""):
        return box[2] * box[3]
    try:
        area = float(value)
    except (TypeError, ValueError, OverflowError):
        area = math.nan
    if 0 <= area < math.inf:
        return area
    mended.note("areas that are no number of pixels replaced by the box's", f"{where}: {value!r}")
    return box[2] * box[3]


def _with_segmentation(filled: dict, image: dict, where: str, mended: Mended) -> dict | None:
    """Return an annotation whose segmentation pycocotools can be given; None to leave it out."""
    segmentation = filled["segmentation"]
    if isinstance(segmentation, list):
        filled["segmentation"] = with_three_points(segmentation)
        # Of empty polygons only, as tools for boxes write them, there is none to lose.
        if len(filled["segmentation"]) < len(segmentation) and any(segmentation):
            if not filled["segmentation"]:
                mended.note("annotations with polygons of fewer than three points left out", where)
                return None
            mended.note("polygons of fewer than three points left out", where)
    problem = segmentation_problem(filled["segmentation"], image["height"], image["width"])
    if problem:
        raise ValueError(f"{where}: segmentation: {problem}")
    return filled


def _check_keypoints(keypoints: object, category: dict, where: str) -> None:
    if not keypoints:
        return
    names = category.get("keypoints")
    count = len(keypoints) if isinstance(keypoints, list) and all(map(is_finite, keypoints)) else -1
    if count % 3 or (names and count != 3 * len(names)):
        expected = f"{3 * len(names)} numbers" if names else "numbers"
        raise ValueError(
            f"{where}: expected 'keypoints' as {expected} x, y, visibility, ..., got {keypoints!r}"
        )


def _fill_keypoints(annotations: list[dict]) -> None:
    """Give every annotation keypoints, in place, if some have them: to Detectron2 and to COCO's
    evaluation it is all or none. Those that are filled in are not visible."""
    lengths = {len(a["keypoints"]) for a in annotations if a.get("keypoints")}
    for a in annotations if len(lengths) == 1 else ():
        keypoints = a["keypoints"] = a.get("keypoints") or [0] * max(lengths)
        if not is_finite(a.get("num_keypoints")):
            a["num_keypoints"] = sum(v > 0 for v in keypoints[2::3])
