"""Files of results: strict JSON, whole or not there; their images."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path

import numpy as np
from PIL import Image
from pskd_detection import (
    DetectionConfidence,
    DetectionDataset,
    Detections,
    write_detections,
    write_results,
)

from pskd_tools.files import write_json
from pskd_tools.report.files import Box, read_boxes


def strict(path: Path) -> object:
    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    return json.loads(path.read_text(), parse_constant=refuse)


def test_what_json_lacks_becomes_null_or_plain(tmp_path):
    value = {"inf": [float("inf"), np.float32("nan")], "array": np.array([[1.0, np.nan]])}
    value |= {"numpy": (np.float32(0.5), np.int64(3), np.bool_(True)), "path": tmp_path, 7: "ä"}
    expected = {"inf": [None, None], "array": [[1.0, None]], "numpy": [0.5, 3, True]}
    expected |= {"path": str(tmp_path), "7": "ä"}
    assert strict(write_json(tmp_path / "x.json", value)) == expected


def test_results_go_to_their_place(tmp_path):
    write_results(tmp_path / "a" / "b", {"AP": 1.0})
    path = write_results(tmp_path / "a" / "b", {"AP": np.float64(2.5), "d_ece": None})
    assert path == tmp_path / "a" / "b" / "results.json"
    assert strict(path) == {"AP": 2.5, "d_ece": None}
    assert list(path.parent.iterdir()) == [path]


def test_an_evaluation_leaves_the_trainings_numbers(tmp_path):
    write_results(tmp_path, {"AP": 1.0, "seconds_per_iteration": 0.5})
    write_results(tmp_path, {"AP": 3.0}, evaluation=True)
    assert strict(tmp_path / "results.json") == {"AP": 1.0, "seconds_per_iteration": 0.5}
    assert strict(tmp_path / "evaluation.json") == {"AP": 3.0}
    # A finished training that is resumed has nothing left to time.
    write_results(tmp_path, {"AP": 2.0, "seconds_per_iteration": None})
    assert strict(tmp_path / "results.json") == {"AP": 2.0, "seconds_per_iteration": 0.5}


def test_detections_are_kept_with_their_images(tmp_path):
    Image.new("RGB", (600, 300)).save(tmp_path / "1.png")  # there is no 2.png
    boxes = [[10, 20, 30, 40], [100, 20, 30, 40], [200, 20, 30, 40]]
    annotations = [
        {"id": i, "image_id": 1, "category_id": 5, "bbox": box, "iscrowd": int(i == 3)}
        for i, box in enumerate(boxes, start=1)
    ]
    images = [{"id": i, "file_name": f"{i}.png", "width": 600, "height": 300} for i in (1, 2)]
    categories = [{"id": 5, "name": "cat"}]
    coco = {"images": images, "annotations": annotations, "categories": categories}
    dataset = DetectionDataset("made", coco, tmp_path)
    found = DetectionConfidence(dataset)
    corners = np.array([[10, 20, 40, 60], [400, 20, 430, 60]], float)
    found.update(1, Detections(corners, np.array([0.75, 0.5]), np.zeros(2, int)))
    found.update(2, Detections(corners[:1], np.array([0.25]), np.zeros(1, int)))
    write_detections(tmp_path / "out", dataset, found)
    with np.load(tmp_path / "out" / "confidence.npz") as arrays:
        assert arrays["ids"].tolist() == ["1", "1", "2"]
        assert arrays["correct"].tolist() == [True, False, False]
    ((key, image),) = read_boxes(tmp_path / "out" / "test_images.json").items()
    assert (key, image.width, image.height) == ("1", 600, 300)
    assert image.objects == [Box(tuple(map(float, box)), "cat") for box in boxes[:2]]
    assert image.detections == [
        Box((10.0, 20.0, 30.0, 40.0), "cat", 0.75, True),
        Box((400.0, 20.0, 30.0, 40.0), "cat", 0.5, False),
    ]


def test_a_picture_of_the_report_is_as_shown(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn to the right
    deep = Image.fromarray(np.full((300, 600), 100 * 257, np.uint16))
    deep.save(tmp_path / "1.png", exif=exif)
    images = [{"id": 1, "file_name": "1.png", "width": 300, "height": 600}]
    coco = {"images": images, "annotations": [], "categories": [{"id": 1, "name": "cat"}]}
    dataset = DetectionDataset("made", coco, tmp_path)
    write_detections(tmp_path / "out", dataset, DetectionConfidence(dataset))
    (kept,) = strict(tmp_path / "out" / "test_images.json").values()
    picture = Image.open(io.BytesIO(base64.b64decode(kept["image"].partition(",")[2])))
    assert picture.size == (128, 256)
    assert abs(picture.getpixel((64, 128))[0] - 100) < 5
