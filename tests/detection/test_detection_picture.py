"""The picture shows what is right, wrong and missed, a row a run."""

from __future__ import annotations

import base64
import io
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("pycocotools", reason="needs pycocotools: pip install pycocotools")
pytest.importorskip("matplotlib", reason="needs matplotlib: pip install matplotlib")

from PIL import Image, ImageColor

from demo import detection_picture as pictures
from pskd_tools.report.files import Box, Boxes
from pskd_tools.report.runs import Run

CAT, DOG = Box((10, 30, 20, 30), "cat"), Box((60, 60, 30, 30), "dog")


def image(*detections: Box) -> Boxes:
    """A grey image of a cat and a dog, with what was detected."""
    file = io.BytesIO()
    Image.new("L", (128, 96), 100).save(file, "PNG")
    uri = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
    return Boxes(128, 96, uri, [CAT, DOG], list(detections))


def found(thing: Box, score: float, correct: bool) -> Box:
    return Box(thing.box, thing.label, score, correct)


def test_marks_say_what_is_right_wrong_and_missed():
    second = Box((11, 31, 20, 30), "cat", 0.6, False)
    of_image = image(found(CAT, 0.9, True), second, found(DOG, 0.49, True))
    marks = pictures.marks(of_image, 0.5)
    assert [(mark.text, mark.color) for mark in marks] == [
        ("dog", pictures.MISSED),
        ("cat 0.60", pictures.WRONG),
        ("cat 0.90", pictures.RIGHT),
    ]
    assert pictures.headline("run", [marks, marks]) == "run: 2 right, 2 wrong, 2 missed"
    # Another class on its place does not find an object.
    of_image = image(Box(CAT.box, "dog", 0.9, True), found(DOG, 0.5, True))
    assert [mark.text for mark in pictures.marks(of_image, 0.5)] == ["cat", "dog 0.50", "dog 0.90"]


def test_runs_are_rows_in_their_order(tmp_path):
    runs = [
        Run("a", Path(), "detection", boxes={"1": image(found(CAT, 0.9, True))} | rest)
        for rest in ({}, {"2": image()})
    ]
    runs[0].boxes["2"] = image(found(CAT, 0.8, False))
    out = pictures.detections_picture(runs, tmp_path / "out.png")
    with Image.open(out) as file:
        assert file.format == "PNG"
        sheet = np.asarray(file.convert("RGB"))
    halves = sheet[: len(sheet) // 2], sheet[len(sheet) // 2 : -60]  # the legend is below
    for color, shown in ((pictures.RIGHT, (True, True)), (pictures.WRONG, (True, False))):
        rgb = ImageColor.getrgb(color)
        assert tuple(bool((half == rgb).all(axis=2).any()) for half in halves) == shown
    assert pictures.detections_picture(runs, out, num_images=1) == out
