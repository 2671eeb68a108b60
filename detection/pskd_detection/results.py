"""Results as files that `pskd report` reads."""

from __future__ import annotations

import base64
import io
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from pskd_detection.confidence import DetectionConfidence
from pskd_detection.datasets import DetectionDataset
from pskd_tools.files import read_json, write_json, written_aside
from pskd_tools.images import read_rgb
from pskd_tools.plots import reliability_diagram, risk_coverage_plot

SHOWN_IMAGES, SHOWN_SIDE = 64, 256  # with 10 to 15 KB each, under 1 MB


def write_results(
    output_dir: str | os.PathLike, results: Mapping, *, evaluation: bool = False
) -> Path:
    """Write a run's numbers to its folder, which is made if there is none.

    Args:
        output_dir: the run's folder.
        results: a training's go to ``results.json``. If it had nothing left to train, the seconds
            of an iteration are those of the file that is there.
        evaluation: whether nothing was to be trained; then they go to ``evaluation.json``.
    """
    folder = Path(output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / ("evaluation.json" if evaluation else "results.json")
    trained_nothing = results.get("seconds_per_iteration", 0.0) is None
    if trained_nothing and path.exists():
        before = read_json(path).get("seconds_per_iteration")
        results = {**results, "seconds_per_iteration": before}
    return write_json(path, results, indent=2)


def write_detections(
    output_dir: str | os.PathLike,
    dataset: DetectionDataset,
    found: DetectionConfidence,
    *,
    open_file: Callable[[str, str], Any] = open,
) -> Path:
    """Write what `pskd report` compares detections by, and return the folder.

    Which is ``confidence.npz`` and ``test_images.json``, and of at least one detection
    ``reliability.png`` and ``risk_coverage.png``. The images are the first of the data set, so that
    any two runs have the same. One that cannot be opened is left out.

    Args:
        output_dir: an evaluation's folder, made if there is none.
        dataset: the test set.
        found: of all its images.
        open_file: opens an image, such as Detectron2's ``PathManager.open``.
    """
    folder = Path(output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    # There is no temperature to fit: what the suppression of overlapping boxes leaves are scores
    # of some boxes, not logits over the classes of all.
    with written_aside(folder / "confidence.npz") as aside:
        np.savez_compressed(
            aside, confidence=found.confidence, correct=found.correct, ids=found.image_ids
        )
    names, images = dataset.class_names, {}
    for image in dataset.coco["images"][:SHOWN_IMAGES]:
        key = str(image["id"])
        uri = _data_uri(os.path.join(dataset.image_dir, image["file_name"]), open_file)
        if uri is None:
            continue
        images[key] = {
            "width": image["width"],
            "height": image["height"],
            "image": uri,
            "objects": [
                {"box": box, "label": names[label]}
                for box, label, crowd in dataset.objects[image["id"]]
                if not crowd
            ],
            "detections": [
                {
                    "box": found.boxes[row],
                    "label": names[found.labels[row]],
                    "score": found.confidence[row],
                    "correct": found.correct[row],
                }
                for row in np.flatnonzero(found.image_ids == key)
            ],
        }
    write_json(folder / "test_images.json", images)
    if len(found.confidence):
        runs = {"detections": (found.confidence, found.correct)}
        reliability_diagram(runs, folder / "reliability.png")
        risk_coverage_plot(runs, folder / "risk_coverage.png")
    return folder


def _data_uri(path: str, open_file: Callable[[str, str], Any]) -> str | None:
    try:
        with open_file(path, "rb") as file:
            picture = read_rgb(path, file)
    except (OSError, ValueError):
        return None
    picture.thumbnail((SHOWN_SIDE, SHOWN_SIDE))
    buffer = io.BytesIO()
    picture.save(buffer, format="JPEG", quality=80)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
