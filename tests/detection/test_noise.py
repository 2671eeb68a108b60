"""Wrong training data made from clean data: as much as was asked for, and the same every time."""

from __future__ import annotations

import gzip
import json

import pytest
from PIL import Image

pytest.importorskip("pycocotools", reason="needs pip install '.[detection]'")

from demo import noise

LINES = [f"line {i}" for i in range(30)]


def coco(num_boxes: int = 40, classes: int = 3) -> dict:
    return {
        "images": [{"id": 1, "file_name": "a.png", "width": 100, "height": 100}],
        "categories": [{"id": 2 * i + 1, "name": f"class {i}"} for i in range(classes)],
        "annotations": [
            {
                "id": i + 1,
                "image_id": 1,
                "category_id": 2 * (i % classes) + 1,
                "bbox": [i, i, 10, 10],
                "iscrowd": int(i % 10 == 0),
            }
            for i in range(num_boxes)
        ],
    }


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 1.0])
def test_a_share_of_the_lines_changes_places_and_none_is_lost(share):
    mixed = noise.misaligned(LINES, share, seed=3)
    assert sorted(mixed) == sorted(LINES)
    assert sum(a != b for a, b in zip(mixed, LINES, strict=True)) == round(share * len(LINES))
    assert mixed == noise.misaligned(LINES, share, seed=3)
    assert not share or mixed != noise.misaligned(LINES, share, seed=4)


def test_a_share_of_the_boxes_gets_one_of_the_other_classes_and_crowds_keep_theirs():
    clean, noisy = coco(), noise.with_wrong_classes(coco(), 0.25, seed=0)
    pairs = list(zip(clean["annotations"], noisy["annotations"], strict=True))
    changed = [(old, new) for old, new in pairs if old != new]
    assert len(changed) == round(0.25 * 36)
    for old, new in changed:
        assert not old["iscrowd"] and new["category_id"] in {1, 3, 5} - {old["category_id"]}
        assert {**new, "category_id": old["category_id"]} == old
    assert noisy == noise.with_wrong_classes(coco(), 0.25, seed=0)
    assert {**noisy, "annotations": []} == {**clean, "annotations": []}


def test_what_cannot_be_made_wrong_is_refused():
    with pytest.raises(ValueError, match=r"share: expected a number in \[0, 1\], got 1.5"):
        noise.misaligned(LINES, 1.5, seed=0)
    with pytest.raises(ValueError, match="share: expected two items or more to permute, got one"):
        noise.misaligned(LINES[:2], 0.5, seed=0)
    with pytest.raises(ValueError, match="boxes: expected two classes or more, got 1"):
        noise.with_wrong_classes(coco(classes=1), 0.5, seed=0)


@pytest.mark.parametrize("opener", [open, gzip.open])
def test_command_line_for_lines(opener, tmp_path):
    path, out = tmp_path / ("en.gz" if opener is gzip.open else "en"), tmp_path / "noisy.en"
    with opener(path, "wt", encoding="utf-8") as file:
        file.writelines(f"{line}\n" for line in LINES)
    assert noise.main(["lines", str(path), "--share", "0.5", "--out", str(out)]) == 0
    assert out.read_text().splitlines() == noise.misaligned(LINES, 0.5, seed=0)


def test_command_line_for_boxes(tmp_path, capsys):
    Image.new("RGB", (100, 100)).save(tmp_path / "a.png")
    (tmp_path / "clean.json").write_text(json.dumps(coco()))
    words = ["boxes", f"coco:{tmp_path}/clean.json:{tmp_path}", "--out", str(tmp_path / "n.json")]
    assert noise.main([*words, "--share", "0.25", "--seed", "2"]) == 0
    noisy = json.loads((tmp_path / "n.json").read_text())
    classes = [box["category_id"] for box in noisy["annotations"]]
    assert (
        sum(a != b["category_id"] for a, b in zip(classes, coco()["annotations"], strict=True)) == 9
    )
    assert noise.main([*words, "--share", "2"]) == 1
    assert "noise: error: share: expected" in capsys.readouterr().err
