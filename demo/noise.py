"""Wrong training data, as crawled or crowd-sourced sets have it, made from clean data.

    python -m demo.noise lines train.en.gz --share 0.333 --out train.noisy.en
    python -m demo.noise boxes voc:BCCD:train --share 0.3 --out train.noisy.json

``lines`` permutes a share of the lines: next to an untouched source file they are misaligned
sentence pairs. ``boxes`` gives a share of the boxes another class, drawn
evenly from the others. Apply neither to data that is validated or tested on.
"""

from __future__ import annotations

import argparse
import copy
import gzip
import random
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

from pskd_tools.files import write_json

Item = TypeVar("Item")


def misaligned(items: Sequence[Item], share: float, seed: int) -> list[Item]:
    """Return the items with a share of them permuted among themselves, none left in its place.

    Raises:
        ValueError: for a share outside [0, 1], or one of a single item.
    """
    chosen = _chosen(len(items), share, seed)
    if len(chosen) == 1:
        raise ValueError(f"share: expected two items or more to permute, got one of {len(items)}")
    mixed = list(items)
    for place, source in zip(chosen, chosen[1:] + chosen[:1], strict=True):
        mixed[place] = items[source]
    return mixed


def with_wrong_classes(coco: dict, share: float, seed: int) -> dict:
    """Return checked COCO annotations with another class for a share of the boxes.

    Crowds keep their class: no training looks at it.

    Raises:
        ValueError: for a share outside [0, 1], or data of a single class.
    """
    noisy = copy.deepcopy(coco)
    ids = [category["id"] for category in coco["categories"]]
    if len(ids) < 2:
        raise ValueError(f"boxes: expected two classes or more, got {len(ids)}")
    boxes = [box for box in noisy["annotations"] if not box["iscrowd"]]
    draw = random.Random(f"classes {seed}")
    for i in _chosen(len(boxes), share, seed):
        own = boxes[i]["category_id"]
        boxes[i]["category_id"] = draw.choice([key for key in ids if key != own])
    return noisy


def _chosen(count: int, share: float, seed: int) -> list[int]:
    """Return the places of a share of the items, in random order."""
    if not 0.0 <= share <= 1.0:
        raise ValueError(f"share: expected a number in [0, 1], got {share}")
    return random.Random(seed).sample(range(count), round(share * count))


def write_lines(path: Path, lines: Sequence[str]) -> None:
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8", newline="\n")


def _lines(args: argparse.Namespace) -> None:
    opener = gzip.open if Path(args.file).suffix == ".gz" else open
    with opener(args.file, "rt", encoding="utf-8", newline="\n") as file:
        lines = [line.removesuffix("\n") for line in file]
    write_lines(Path(args.out), misaligned(lines, args.share, args.seed))


def _boxes(args: argparse.Namespace) -> None:
    from pskd_detection import load_dataset  # which text does not need

    noisy = with_wrong_classes(load_dataset(args.spec).coco, args.share, args.seed)
    write_json(Path(args.out), noisy)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m demo.noise", description=__doc__.split("\n")[0]
    )
    kinds = parser.add_subparsers(required=True)
    lines = kinds.add_parser("lines", help="misalign a text file")
    lines.add_argument("file", help="a sentence a line, plain or .gz")
    boxes = kinds.add_parser("boxes", help="give boxes a wrong class")
    boxes.add_argument("spec", help="coco:ANNOTATIONS.json:IMAGE_DIR or voc:ROOT[:SPLIT]")
    lines.set_defaults(write=_lines)
    boxes.set_defaults(write=_boxes)
    for kind in (lines, boxes):
        kind.add_argument("--share", type=float, required=True, help="of what is made wrong")
        kind.add_argument("--seed", type=int, default=0, help="default: %(default)s")
        kind.add_argument("--out", required=True, help="the file to write")
    args = parser.parse_args(argv)
    try:
        args.write(args)
    except (OSError, ValueError) as error:
        print(f"noise: error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
