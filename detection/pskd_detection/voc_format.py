"""Annotations in PASCAL VOC's XML, read into COCO's format and written from it."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import NamedTuple

from pskd_detection.coco_format import RawAnnotations

__all__ = ["read_voc", "write_voc"]

_SUFFIXES = (".jpg", ".png", ".jpeg")


class _Object(NamedTuple):
    where: str
    name: str
    box: list[float]
    difficult: bool


def read_voc(root: Path, split: str) -> RawAnnotations:
    """Read one split of a folder in VOC's layout.

    That is ``ImageSets/Main/SPLIT.txt`` with a name a line, ``Annotations/NAME.xml`` and
    ``JPEGImages/NAME.jpg`` (or .png, .jpeg). Images are numbered from 1 in the split's order, the
    classes are those found in the split, sorted by name.

    VOC's corners are pixel indices that start at 1, both inclusive: the box that covers an image
    of width W has xmin 1 and xmax W. Here it spans [xmin - 1, xmax], as in Detectron2's loader.

    A difficult object becomes a crowd (``iscrowd`` 1): training leaves it out, and in evaluation it
    neither counts as missed nor makes a detection on it wrong. VOC's own evaluation does the same,
    but takes a box as being *on* it by IoU, where COCO's takes the part of the detection inside it.

    Raises:
        ValueError: a missing file, XML that cannot be read, an object without name or box.
    """
    listing = root / "ImageSets" / "Main" / f"{split}.txt"
    try:
        lines = listing.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{listing}: expected a list of image names, got {error}") from None
    names = [line.strip() for line in lines if line.strip()]
    images: list[dict] = []
    objects: list[tuple[int, _Object]] = []
    for number, name in enumerate(names, start=1):
        path = root / "Annotations" / f"{name}.xml"
        tree = _parsed(path)
        images.append({"id": number, "file_name": _file_name(root, name), **_size(tree)})
        objects += [(number, found) for found in _objects(tree, path)]
    classes = sorted({found.name for _, found in objects})
    number_of = {name: i for i, name in enumerate(classes, start=1)}
    return RawAnnotations(
        listing,
        root / "JPEGImages",
        {"description": f"PASCAL VOC format, split {split}"},
        images,
        [
            {
                "image_id": image,
                "category_id": number_of[found.name],
                "bbox": found.box,
                "iscrowd": int(found.difficult),
            }
            for image, found in objects
        ],
        [{"id": number, "name": name} for name, number in number_of.items()],
        lambda i: objects[i][1].where,
    )


def write_voc(coco: dict, root: Path, split: str) -> None:
    """Write what VOC's evaluation reads: ``ImageSets/Main/SPLIT.txt`` and ``Annotations``.

    Corners are rounded to whole pixels, as VOC's are. Crowds become difficult objects.

    Args:
        coco: checked annotations in COCO's format.
        root: the folder, which is made if there is none.
        split: names the list of the images.
    """
    found: dict[int, list[dict]] = {image["id"]: [] for image in coco["images"]}
    for annotation in coco["annotations"]:
        found[annotation["image_id"]].append(annotation)
    names = {category["id"]: category["name"] for category in coco["categories"]}
    listing = root / "ImageSets" / "Main" / f"{split}.txt"
    for folder in (listing.parent, root / "Annotations"):
        folder.mkdir(parents=True, exist_ok=True)
    stems = []
    for image in coco["images"]:
        stems.append(Path(image["file_name"]).stem)
        tree = ElementTree.Element("annotation")
        for annotation in found[image["id"]]:
            _write_object(tree, annotation, names[annotation["category_id"]])
        ElementTree.ElementTree(tree).write(root / "Annotations" / f"{stems[-1]}.xml")
    listing.write_text("".join(f"{stem}\n" for stem in stems), encoding="utf-8")


def _write_object(tree: ElementTree.Element, annotation: dict, name: str) -> None:
    x, y, w, h = annotation["bbox"]
    corners = {"xmin": x + 1, "ymin": y + 1, "xmax": x + w, "ymax": y + h}
    element = ElementTree.SubElement(tree, "object")
    texts = {"name": name, "pose": "Unspecified", "truncated": 0}
    for key, value in (texts | {"difficult": annotation["iscrowd"]}).items():
        ElementTree.SubElement(element, key).text = str(value)
    box = ElementTree.SubElement(element, "bndbox")
    for key, value in corners.items():
        ElementTree.SubElement(box, key).text = str(round(value))


def _parsed(path: Path) -> ElementTree.Element:
    try:
        return ElementTree.parse(path).getroot()
    except (OSError, ElementTree.ParseError) as error:
        raise ValueError(f"{path}: expected VOC annotations in XML, got {error}") from None


def _file_name(root: Path, name: str) -> str:
    for suffix in _SUFFIXES:
        if (root / "JPEGImages" / (name + suffix)).is_file():
            return name + suffix
    return name + _SUFFIXES[0]  # which is reported with all others that are missing


def _size(tree: ElementTree.Element) -> dict[str, int]:
    """Return the size where it is told; otherwise it is read from the image."""
    found = {}
    for key in ("width", "height"):
        text = (tree.findtext(f"size/{key}") or "").strip()
        if text.isdecimal():
            found[key] = int(text)
    return found


def _objects(tree: ElementTree.Element, path: Path) -> list[_Object]:
    objects = []
    for i, element in enumerate(tree.findall("object"), start=1):
        where = f"{path}: object {i}"
        name = (element.findtext("name") or "").strip()
        if not name:
            raise ValueError(f"{where}: expected a name, got none")
        left, top, right, bottom = _corners(element, where)
        box = [left - 1, top - 1, right - left + 1, bottom - top + 1]
        difficult = (element.findtext("difficult") or "0").strip() not in ("", "0")
        objects.append(_Object(where, name, box, difficult))
    return objects


def _corners(element: ElementTree.Element, where: str) -> list[float]:
    texts = [element.findtext(f"bndbox/{key}") for key in ("xmin", "ymin", "xmax", "ymax")]
    try:
        return [float(text or "") for text in texts]
    except ValueError:
        raise ValueError(
            f"{where}: expected bndbox with xmin, ymin, xmax, ymax, got {texts}"
        ) from None
