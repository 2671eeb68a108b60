"""Annotations in PASCAL VOC's XML, read into COCO's format and written from it."""

from __future__ import annotations

import codecs
import hashlib
import os
import re
import xml.etree.ElementTree as ElementTree
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from PIL import Image

from pskd_detection.coco_format import RawAnnotations, flag

_DECLARED = re.compile(rb"""\s*<\?xml[^>]*?encoding\s*=\s*["']([^"']+)["']""")
_LONGEST_NAME = 200  # bytes of a class, of which a file is named; file systems allow 255
# Names of label tools for encodings that Python names differently; GB 18030 holds all of GB 2312.
_ENCODINGS = {"ansi": "cp1252", "gb2312": "gb18030", "gbk": "gb18030"}


def read_voc(root: Path, split: str | None = None) -> RawAnnotations:
    """Read a folder of VOC's XML; all that is there without a ``split``, a list's name.

    In VOC's own layout annotations are in ``Annotations``, images in ``JPEGImages`` or ``images``,
    and ``ImageSets/Main/SPLIT.txt`` has a name a line. Without these folders it is a flat one, as
    label tools write it, with images beside their XML.

    The image of ``NAME.xml`` is ``NAME`` with any suffix of an image, or else the XML's
    ``<filename>``. Images are numbered from 1 in their order, the classes are those found, sorted
    by name.

    VOC's corners are pixel indices that start at 1, both inclusive: the box that covers an image
    of width W has xmin 1 and xmax W. Here it spans [xmin - 1, xmax], as in Detectron2's loader.

    A difficult object becomes a crowd (``iscrowd`` 1): training leaves it out, and in evaluation it
    neither counts as missed nor makes a detection on it wrong. VOC's own evaluation does the same,
    but takes a box as being *on* it by IoU, where COCO's takes the part of the detection inside it.
    """
    listing = root / "ImageSets" / "Main" / f"{split}.txt"
    xml_dir = _subfolder(root, "Annotations")
    image_dir = _subfolder(root, "JPEGImages", "images")
    if split is None:
        files = _all_xml(xml_dir)
    else:
        files = [(name, xml_dir / f"{name}.xml") for name in _listed_names(listing, root)]
    known = _images_by_stem(image_dir)
    images: list[dict] = []
    annotations: list[dict] = []
    for number, (name, path) in enumerate(files, start=1):
        tree = _parsed(path)
        images.append({"id": number, "file_name": _file_name(known, name, tree), **_size(tree)})
        annotations += [{"image_id": number} | found for found in _objects(tree, path)]
    places = [a.pop("where") for a in annotations]
    classes = sorted({a["name"] for a in annotations})
    number_of = {name: i for i, name in enumerate(classes, start=1)}
    for a in annotations:
        a["category_id"] = number_of[a.pop("name")]
    return RawAnnotations(
        root if split is None else listing,
        image_dir,
        {"description": f"PASCAL VOC format, {f'split {split}' if split else 'all'}"},
        images,
        annotations,
        [{"id": number, "name": name} for name, number in number_of.items()],
        places.__getitem__,
    )


def _subfolder(root: Path, *names: str) -> Path:
    """Return the first folder of these names, in any case, or else the root itself."""
    found = {p.name.lower(): p for p in sorted(root.glob("*/"))}
    return next((found[name.lower()] for name in names if name.lower() in found), root)


def _listed_names(listing: Path, root: Path) -> list[str]:
    try:
        lines = _unicode(listing.read_bytes(), "surrogateescape").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(
            f"{listing}: expected a list of image names, got {error}; voc:{root} reads all images"
        ) from None
    return [line.strip() for line in lines if line.strip()]


def _all_xml(folder: Path) -> list[tuple[str, Path]]:
    """Return name and path of all XML; of a flat folder what is in it, of VOC's also below it."""
    below = folder.rglob("*") if folder.name.lower() == "annotations" else folder.glob("*")
    # macOS leaves a ._NAME.xml of its own beside a file on foreign disks.
    found = sorted(
        path for path in below if path.suffix.lower() == ".xml" and not path.name.startswith("._")
    )
    if not found:
        raise ValueError(f"{folder}: expected VOC annotations, *.xml, got none")
    return [(path.relative_to(folder).with_suffix("").as_posix(), path) for path in found]


def _images_by_stem(image_dir: Path) -> dict[str, list[str]]:
    """Return the paths in a folder of what Pillow takes for images, by path without suffix."""
    suffixes = Image.registered_extensions()
    found: dict[str, list[str]] = defaultdict(list)
    for folder, _, names in os.walk(image_dir):
        for name in sorted(names):
            path = Path(folder, name).relative_to(image_dir)
            if path.suffix.lower() in suffixes:
                found[path.with_suffix("").as_posix()].append(path.as_posix())
    return dict(found)


def _file_name(known: dict[str, list[str]], name: str, tree: ElementTree.Element) -> str:
    """Return the image of an XML; if there is none, the name to report as missing."""
    # Of a path, perhaps of another machine and with its separators, the last part.
    told = PurePosixPath((tree.findtext("filename") or "").strip().replace("\\", "/")).name
    beside = PurePosixPath(name).with_name(told) if told else PurePosixPath(name)
    found = known.get(name) or known.get(beside.with_suffix("").as_posix())
    if not found:
        return told or f"{name}.jpg"
    return next((path for path in found if PurePosixPath(path).name == told), found[0])


def voc_class(name: str) -> str:
    """Return a class as `write_voc` names it: VOC's evaluation makes a file of that name."""
    name = name.replace("/", "\N{DIVISION SLASH}")
    content = os.fsencode(name)
    return name if len(content) <= _LONGEST_NAME else hashlib.sha256(content).hexdigest()


def write_voc(coco: dict, root: Path, split: str) -> None:
    """Write what VOC's evaluation reads: ``ImageSets/Main/SPLIT.txt`` and ``Annotations``.

    Corners are rounded to whole pixels, as VOC's are. Crowds become difficult objects. Images are
    named by their id: file names may have spaces, which divide the columns of VOC's files.

    Args:
        coco: checked annotations in COCO's format.
        root: the folder, which is made if there is none.
        split: names the list of the images.
    """
    found: dict[int, list[dict]] = {image["id"]: [] for image in coco["images"]}
    for annotation in coco["annotations"]:
        found[annotation["image_id"]].append(annotation)
    names = {category["id"]: voc_class(category["name"]) for category in coco["categories"]}
    listing = root / "ImageSets" / "Main" / f"{split}.txt"
    for folder in (listing.parent, root / "Annotations"):
        folder.mkdir(parents=True, exist_ok=True)
    for image in coco["images"]:
        tree = ElementTree.Element("annotation")
        for annotation in found[image["id"]]:
            _write_object(tree, annotation, names[annotation["category_id"]])
        ElementTree.ElementTree(tree).write(root / "Annotations" / f"{image['id']}.xml")
    listing.write_text("".join(f"{image['id']}\n" for image in coco["images"]))


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
        return ElementTree.fromstring(_decoded(path.read_bytes()))
    except (OSError, LookupError, ValueError, ElementTree.ParseError) as error:
        raise ValueError(f"{path}: expected VOC annotations in XML, got {error}") from None


def _decoded(content: bytes) -> str:
    """Return the text of XML; expat itself knows few of the encodings that label tools declare."""
    declared = _DECLARED.match(content)  # not after a byte order mark, which tells it too
    if declared is None:
        return _unicode(content)
    name = declared[1].decode("latin-1").lower()
    return content.decode(_ENCODINGS.get(name, name))


def _unicode(content: bytes, errors: str = "strict") -> str:
    """Return the text of UTF-8, with a byte order mark or not, or of UTF-16 with one."""
    is_utf16 = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    return content.decode("utf-16" if is_utf16 else "utf-8-sig", errors)


def _size(tree: ElementTree.Element) -> dict[str, int]:
    """Return the size where it is told; otherwise it is read from the image."""
    found = {}
    for key in ("width", "height"):
        text = (tree.findtext(f"size/{key}") or "").strip()
        if text.isdecimal():
            found[key] = int(text)
    return found


def _objects(tree: ElementTree.Element, path: Path) -> Iterator[dict]:
    for i, element in enumerate(tree.findall("object"), start=1):
        where = f"{path}: object {i}"
        name = (element.findtext("name") or "").strip()
        if not name:
            raise ValueError(f"{where}: expected a name, got none")
        left, top, right, bottom = _corners(element, where)
        box = [left - 1, top - 1, right - left + 1, bottom - top + 1]
        difficult = flag(element.findtext("difficult"), where, "difficult")
        yield {"where": where, "name": name, "bbox": box, "iscrowd": difficult}


def _corners(element: ElementTree.Element, where: str) -> list[float]:
    texts = [element.findtext(f"bndbox/{key}") for key in ("xmin", "ymin", "xmax", "ymax")]
    try:
        return [float(text or "") for text in texts]
    except ValueError:
        raise ValueError(
            f"{where}: expected bndbox with xmin, ymin, xmax, ymax, got {texts}"
        ) from None
