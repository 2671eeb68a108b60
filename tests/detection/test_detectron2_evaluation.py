"""What a Detectron2 training and an evaluation leave: results, AP, confidence, VOC sets."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import detectron2_tiny as tiny
import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_pascal_voc
from detectron2.structures import Boxes, BoxMode, Instances
from PIL import Image
from pskd_detectron2 import register_spec
from pskd_detectron2.evaluation import ConfidenceEvaluator, build_evaluators
from pycocotools import mask as coco_mask

LONGER = "SOLVER.MAX_ITER 80 MODEL.PSKD.EPOCH_ITERS 30"  # until something is detected


@pytest.fixture(scope="module")
def evaluated(spec, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("evaluated")
    return tiny.run("fpn", out, LONGER, train=spec, test=spec)


def test_results_are_a_file(evaluated, spec):
    results = tiny.results(evaluated)
    assert results["seed"] == 1 and results["seconds_per_iteration"] > 0
    assert {"AP", "AP50", "AP75"} <= results["bbox"].keys()
    confidence = results["confidence"]
    assert {"d_ece", "la_ece", "aurc", "e_aurc", "num_detections"} <= confidence.keys()
    assert (confidence["iou_threshold"], confidence["score_threshold"]) == (0.5, 0.05)
    rois = results["ground_truth_rois"]
    assert rois["num_rois"] == 14 and rois["nll"] > 0 and 0 <= rois["accuracy"] <= 1
    assert (evaluated / "inference" / "reliability.png").read_bytes().startswith(b"\x89PNG")
    with np.load(evaluated / "inference" / "confidence.npz") as found:
        assert len(found["confidence"]) == confidence["num_detections"]
        assert found["correct"].sum() == confidence["num_matched"]


def expect_the_same_results(evaluated: Path, out: Path, *opts: str, **specs) -> None:
    """Evaluate the trained weights; of other training sets nothing is asked."""
    weights = f"DATASETS.TRAIN ('nowhere',) MODEL.WEIGHTS {evaluated / 'model_final.pth'}"
    tiny.run("fpn", out, weights, *opts, flags=("--eval-only",), **specs)
    trained, alone = tiny.results(evaluated), tiny.results(out, "evaluation")
    assert not (out / "results.json").exists()
    for part in ("bbox", "confidence", "ground_truth_rois"):
        assert alone[part] == trained[part]


@pytest.mark.parametrize("train", [True, False], ids=["with --train", "without"])
def test_eval_only_gives_the_same_results(train, evaluated, spec, tmp_path):
    expect_the_same_results(evaluated, tmp_path, train=spec if train else None, test=spec)


def test_a_stock_model_reads_the_checkpoint(evaluated, spec, tmp_path):
    expect_the_same_results(evaluated, tmp_path, tiny.stock("fpn"), train=None, test=spec)


def test_a_test_set_that_is_named_twice_counts_once_and_the_threshold_that_held_is_told(
    evaluated, spec, tmp_path
):
    opts = f"MODEL.WEIGHTS {evaluated / 'model_final.pth'} MODEL.ROI_HEADS.SCORE_THRESH_TEST 0.3"
    twice = f"DATASETS.TEST ('{spec}','{spec}')"
    tiny.run("fpn", tmp_path, opts, twice, train=spec, flags=("--eval-only",))
    results = tiny.results(tmp_path, "evaluation")
    assert results["ground_truth_rois"]["num_rois"] == 14
    assert results["confidence"]["score_threshold"] == 0.3


def test_weights_of_other_classes_are_not_evaluated(evaluated, spec, tmp_path):
    content = json.loads(Path(spec.split(":")[1]).read_text())
    content["categories"].append({"id": 3, "name": "star"})
    more = tmp_path / "more.json"
    more.write_text(json.dumps(content))
    opts = f"MODEL.WEIGHTS {evaluated / 'model_final.pth'}"
    test = f"coco:{more}:{spec.split(':')[2]}"
    with pytest.raises(ValueError, match=r"cls_score.* of shape \(4,.*, got \(3,.*--train names"):
        tiny.run("fpn", tmp_path, opts, flags=("--eval-only",), train=None, test=test)


def test_a_test_set_has_the_class_order_of_a_registered_training_set(spec, tmp_path):
    """Its file lists them the other way round."""
    content = json.loads(Path(spec.split(":")[1]).read_text())
    content["categories"] = [
        {"id": c["id"], "name": name}
        for c, name in zip(content["categories"], reversed(tiny.CLASSES), strict=True)
    ]
    other = tmp_path / "other.json"
    other.write_text(json.dumps(content))
    test = f"coco:{other}:{spec.split(':')[2]}"
    register_spec(spec, tmp_path)
    opts = f"DATASETS.TRAIN ('{spec}',) MODEL.ROI_HEADS.NUM_CLASSES 2"
    cfg = tiny.config("fpn", tmp_path, opts, train=None, test=test)
    assert MetadataCatalog.get(cfg.DATASETS.TEST[0]).thing_classes == list(tiny.CLASSES)


def test_a_finished_run_that_is_resumed_keeps_its_seconds(evaluated, spec, tmp_path):
    out = tmp_path / "again"
    shutil.copytree(evaluated, out)
    tiny.run("fpn", out, LONGER, flags=("--resume",), train=spec, test=spec)
    before, after = (tiny.results(f) for f in (evaluated, out))
    assert after["seconds_per_iteration"] == before["seconds_per_iteration"] > 0
    assert after["bbox"] == before["bbox"]


def test_a_dataset_that_is_known_by_its_function_only(evaluated, spec, tmp_path):
    """As Detectron2's guide registers them; COCOEvaluator converts it."""
    name = "made_by_function"
    register_spec(spec, tmp_path)
    records = DatasetCatalog.get(spec)
    DatasetCatalog.register(name, lambda: records)
    MetadataCatalog.get(name).thing_classes = list(tiny.CLASSES)
    opts = f"MODEL.WEIGHTS {evaluated / 'model_final.pth'} DATASETS.TEST ('{name}',)"
    out = tiny.run("fpn", tmp_path / "run", opts, flags=("--eval-only",), train=spec)
    results = tiny.results(out, "evaluation")
    trained = tiny.results(evaluated)
    assert results["bbox"]["AP"] == pytest.approx(trained["bbox"]["AP"])
    assert results["confidence"] == pytest.approx(trained["confidence"])


def make_voc(folder: Path, name: str, *, minimal: bool) -> Path:
    """Write the made images in VOC's layout; ``minimal`` as other tools write it, with fractions
    and without the keys that only VOC's own files have."""
    root = folder / name
    for part in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (root / part).mkdir(parents=True)
    tiny.make_images(folder)
    coco = json.loads((folder / "set.json").read_text())
    keys = "" if minimal else "<pose>x</pose><truncated>0</truncated><difficult>0</difficult>"
    dot = ".0" if minimal else ""
    for image in coco["images"]:
        name = f"img{image['id']}"
        with Image.open(folder / "set" / image["file_name"]) as picture:
            picture.save(root / "JPEGImages" / f"{name}.jpg")
        objects = "".join(
            f"<object><name>{tiny.CLASSES[a['category_id'] - 1]}</name>{keys}<bndbox>"
            f"<xmin>{a['bbox'][0] + 1}{dot}</xmin><ymin>{a['bbox'][1] + 1}{dot}</ymin>"
            f"<xmax>{a['bbox'][0] + a['bbox'][2]}{dot}</xmax>"
            f"<ymax>{a['bbox'][1] + a['bbox'][3]}{dot}</ymax></bndbox></object>"
            for a in coco["annotations"]
            if a["image_id"] == image["id"]
        )
        size = f"<size><width>{image['width']}</width><height>{image['height']}</height></size>"
        (root / "Annotations" / f"{name}.xml").write_text(
            f"<annotation>{size}{objects}</annotation>"
        )
    names = "\n".join(f"img{image['id']}" for image in coco["images"])
    (root / "ImageSets" / "Main" / "all.txt").write_text(names)
    return root


def as_detected(record: dict) -> dict:
    """What a perfect detector would find in an image."""
    boxes = [
        BoxMode.convert(a["bbox"], a["bbox_mode"], BoxMode.XYXY_ABS) for a in record["annotations"]
    ]
    found = Instances((record["height"], record["width"]))
    found.pred_boxes = Boxes(torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4))
    found.scores = torch.full((len(boxes),), 0.9)
    found.pred_classes = torch.tensor([a["category_id"] for a in record["annotations"]])
    return {"instances": found}


def test_a_voc_set_trains_and_has_voc_ap_too(evaluated, tmp_path):
    voc = f"voc:{make_voc(tmp_path, 'made', minimal=True)}:all"
    opts = f"MODEL.WEIGHTS {evaluated / 'model_final.pth'} SOLVER.MAX_ITER 2"
    out = tiny.run("fpn", tmp_path / "run", opts, train=voc, test=voc)
    results = tiny.results(out)
    assert results["voc"].keys() == {"AP", "AP50", "AP75"}
    assert set(results["bbox"]) > {"AP-ring", "AP-square"}
    assert results["ground_truth_rois"]["num_rois"] == 14


def found_by_all(voc: str, folder: Path) -> tuple:
    """Check that VOC AP is 100 where all is found; return the evaluator and the records."""
    _, evaluator = build_evaluators(voc, str(folder / "made"))
    evaluator.reset()
    records = DatasetCatalog.get(voc)
    evaluator.process(records, [as_detected(record) for record in records])
    assert evaluator.evaluate()["voc"] == pytest.approx({"AP": 100, "AP50": 100, "AP75": 100})
    return evaluator, records


@pytest.mark.parametrize("year", [2007, 2012])
def test_voc_ap_is_that_of_the_year(year, tmp_path):
    voc = f"voc:{make_voc(tmp_path, f'VOC{year}', minimal=True)}:all"
    register_spec(voc, tmp_path)
    evaluator, records = found_by_all(voc, tmp_path)
    # Of the objects 4 in 7 are found: that is the area under the curve, and 6 of its 11 points.
    evaluator.reset()
    part = [r if r["image_id"] % 2 else r | {"annotations": []} for r in records]
    evaluator.process(records, [as_detected(record) for record in part])
    area = 6 / 11 if year == 2007 else 4 / 7
    assert evaluator.evaluate()["voc"]["AP50"] == pytest.approx(100 * area)


def test_a_voc_set_that_detectron2_registered(tmp_path):
    root = make_voc(tmp_path, "voc", minimal=False)
    register_pascal_voc("made_voc", f"{root}/", "all", 2007, ("square", "ring"))
    evaluators = build_evaluators("made_voc", str(tmp_path / "made"))
    assert [type(e).__name__ for e in evaluators] == ["VOCEvaluator"]
    confidence = ConfidenceEvaluator("made_voc")
    first = DatasetCatalog.get("made_voc")[0]
    confidence.process([first], [as_detected(first)])
    assert confidence.evaluate()["confidence"]["num_matched"] == 2


def test_a_registered_voc_set_that_detectron2s_evaluator_fails_on(tmp_path):
    root = make_voc(tmp_path, "voc", minimal=False)
    path = root / "Annotations" / "img2.xml"
    path.write_text(path.read_text().replace("<difficult>0", "<difficult>Unspecified"))
    register_pascal_voc("unspecified_voc", f"{root}/", "all", 2007, ("square", "ring"))
    with pytest.raises(ValueError, match="img2.xml: for PascalVOCDetection.*; --test voc:.* reads"):
        ConfidenceEvaluator("unspecified_voc")
    register_spec(f"voc:{root}:all", tmp_path)  # which does


@pytest.mark.parametrize("ring", ["ring/disc", 300 * "r"], ids=["slash", "long"])
def test_a_registered_voc_set_whose_class_is_no_file_name(ring, tmp_path):
    root = make_voc(tmp_path, "voc", minimal=False)
    path = root / "Annotations" / "img2.xml"
    path.write_text(path.read_text().replace("ring", ring))
    name = f"voc_of_{ring[:5]}"
    register_pascal_voc(name, f"{root}/", "all", 2007, ("square", "ring", ring))
    with pytest.raises(ValueError, match=f"short classes without a slash, got {ring}; --test voc:"):
        ConfidenceEvaluator(name)


@pytest.mark.parametrize("ring", ["ring", "ring/disc", 300 * "r"])
def test_voc_ap_of_a_flat_folder_whose_names_have_spaces(ring, tmp_path):
    root, flat = make_voc(tmp_path, "voc", minimal=True), tmp_path / "flat"
    for path in root.glob("Annotations/*"):
        path.write_text(path.read_text().replace("ring", ring))
    flat.mkdir()
    for path in (*root.glob("Annotations/*"), *root.glob("JPEGImages/*")):
        path.rename(flat / path.name.replace("img", "my image "))
    voc = f"voc:{flat}"
    register_spec(voc, tmp_path)
    found_by_all(voc, tmp_path)


def test_run_length_codes_are_trained_on_as_bitmasks(spec, tmp_path):
    _, path, images = spec.split(":")
    content = json.loads(Path(path).read_text())
    sizes = {image["id"]: [image["height"], image["width"]] for image in content["images"]}
    for a in content["annotations"]:
        (x, y, w, h), size = a["bbox"], sizes[a["image_id"]]
        mask = np.zeros(size, dtype=np.uint8, order="F")
        mask[y : y + h, x : x + w] = 1
        counts = coco_mask.encode(mask)["counts"].decode()
        a["segmentation"] = {"size": size, "counts": counts}
    (tmp_path / "codes.json").write_text(json.dumps(content))
    codes = f"coco:{tmp_path / 'codes.json'}:{images}"
    opts = "INPUT.MASK_FORMAT bitmask SOLVER.MAX_ITER 2"
    out = tiny.run("mask", tmp_path / "run", opts, train=codes, test=codes)
    assert tiny.metrics(out)[0]["loss_mask"] > 0
