"""A detection data set without a download: handwritten digits on cluttered canvases.

    python -m demo.digits --out data/digits

The digits are scikit-learn's 1797 scans of 8x8 pixels. Each is enlarged, turned and stretched a
little, and pasted in a random colour, darker or brighter than what lies beneath. Around it there
are colour gradients, blotches, pen strokes, noise, and patches of scrambled digits: the same ink in
the same style, but no digit. Some images are blurred. A box is tight around the inked pixels.

Held out are scans: the last fifth of every digit's scans is for test images only, in digits and in
scrambled patches alike. An image depends on its part and its number alone, so a larger set begins
with the smaller one.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from demo.digit_images import PARTS, SEED, SIZE, draw_image
from pskd_tools.files import write_json

logger = logging.getLogger(__name__)

DESCRIPTION = "pskd demo: handwritten digits on cluttered canvases"


def write_digits(
    folder: str | Path, *, num_train: int = 800, num_test: int = 200
) -> dict[str, Path]:
    """Write images and COCO annotations; an annotation file is there only when it is complete.

    Args:
        folder: gets train/ and test/ with PNG images, train.json and test.json.
        num_train: images for training.
        num_test: images for testing, made of other scans.

    Returns:
        The annotation file of each part. Categories are 1 for "0" to 10 for "9".

    Raises:
        ValueError: no images asked for, or a folder that holds annotations of another origin.
    """
    folder = Path(folder)
    counts = {"num_train": num_train, "num_test": num_test}
    for name, value in counts.items():
        if value < 1:
            raise ValueError(f"{name}: expected at least 1, got {value}")
    files = {part: folder / f"{part}.json" for part in PARTS}
    for path in files.values():
        _check_own(path)
    for path in files.values():
        path.unlink(missing_ok=True)  # it would not describe the images that replace its own
    for part, path in files.items():
        write_json(path, _write_part(folder, part, counts[f"num_{part}"]))
        logger.info("%s: %d images", path, counts[f"num_{part}"])
    return files


def _check_own(path: Path) -> None:
    """Refuse to replace annotations that were not made here."""
    if not path.exists():
        return
    try:
        description = json.loads(path.read_text("utf-8"))["info"]["description"]
    except (ValueError, KeyError, TypeError):
        description = None
    if description != DESCRIPTION:
        raise ValueError(
            f"{path}: expected no file or one made by demo.digits, got another, which is left alone"
        )


def _write_part(folder: Path, part: str, count: int) -> dict:
    """Write the images of a part and return its annotations in COCO's format."""
    (folder / part).mkdir(parents=True, exist_ok=True)
    images, annotations = [], []
    for index in range(count):
        image, digits = draw_image(part, index)
        name = f"{index:05d}.png"
        image.save(folder / part / name)
        images.append({"id": index + 1, "file_name": name, "width": SIZE, "height": SIZE})
        for label, box in digits:
            entry = {"id": len(annotations) + 1, "image_id": index + 1, "category_id": label + 1}
            shape = {"bbox": [float(value) for value in box], "area": float(box[2] * box[3])}
            annotations.append(entry | shape | {"iscrowd": 0})
    return {
        "info": {"description": DESCRIPTION, "part": part, "seed": SEED},
        "licenses": [],
        "images": images,
        "annotations": annotations,
        "categories": [{"id": label + 1, "name": str(label)} for label in range(10)],
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m demo.digits", description=__doc__.split("\n")[0]
    )
    options = {"out": Path("data/digits"), "num-train": 800, "num-test": 200}
    for name, default in options.items():
        told = {"type": type(default), "default": default, "help": "default: %(default)s"}
        parser.add_argument(f"--{name}", **told)
    args = vars(parser.parse_args(argv))
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        write_digits(args.pop("out"), **args)
    except (OSError, ValueError) as error:
        print(f"demo.digits: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
