"""Matching, D-ECE, LaECE, AURC and AP: known numbers, invariants, and COCO's own matching."""

from __future__ import annotations

import contextlib
import io
import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pskd_detection import DetectionConfidence, DetectionDataset, Detections, average_precision
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from pskd import calibration

SIDE = 200
NAMES = ("a", "b", "c")
NOTHING = Detections(np.zeros((0, 4)), np.zeros(0), np.zeros(0, np.int64))


def dataset(objects: dict[int, list[tuple]], names=NAMES, ids=(2, 5, 9)) -> DetectionDataset:
    """Make annotations from {image id: [(class index, x1, y1, x2, y2[, iscrowd]), ...]}."""
    annotations = []
    for image, found in objects.items():
        for label, x1, y1, x2, y2, *crowd in found:
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image,
                    "category_id": ids[label],
                    "bbox": [x1, y1, x2 - x1, y2 - y1],
                    "area": (x2 - x1) * (y2 - y1),
                    "iscrowd": int(bool(crowd and crowd[0])),
                }
            )
    images = [{"id": i, "file_name": f"{i}.png", "width": SIDE, "height": SIDE} for i in objects]
    categories = [{"id": i, "name": n} for i, n in zip(ids, names, strict=False)]
    coco = {"info": {}, "images": images, "annotations": annotations, "categories": categories}
    return DetectionDataset("made", coco, Path())


def found(*rows: tuple, dtype=np.float64) -> Detections:
    """Make detections from rows (score, class index, x1, y1, x2, y2)."""
    table = np.array(rows, dtype=np.float64).reshape(-1, 6)
    return Detections(
        table[:, 2:].astype(dtype), table[:, 0].astype(dtype), table[:, 1].astype(int)
    )


def measured(data: DetectionDataset, detections: dict, **options) -> DetectionConfidence:
    confidence = DetectionConfidence(data, **options)
    for image_id, rows in detections.items():
        confidence.update(image_id, rows)
    return confidence


BOX = (10, 10, 50, 50)
HALF = (10, 10, 50, 30)  # IoU 1/2 with BOX
AWAY = (100, 100, 150, 150)


def test_known_numbers():
    data = dataset({1: [(0, *BOX), (1, *BOX)], 2: [(0, *BOX)]})
    detections = {
        1: found((0.9, 0, *BOX), (0.8, 0, *AWAY), (0.6, 1, *HALF), (0.01, 1, *BOX)),
        2: found((0.3, 2, *BOX)),
    }
    confidence = measured(data, detections, bins=2)
    results = confidence.compute()
    assert confidence.confidence.tolist() == [0.9, 0.8, 0.6, 0.3]
    assert confidence.correct.tolist() == [True, False, True, False]
    assert confidence.iou.tolist() == [1, 0, 0.5, 0]
    assert confidence.labels.tolist() == [0, 0, 1, 2]
    # Bin (0, 0.5]: 0.3 against 0. Bin (0.5, 1]: 2.3 / 3 against 2 / 3.
    assert results["d_ece"] == pytest.approx((0.3 + 0.3) / 4)
    # Class a: |1.7 - 1| / 2; class b: |0.6 - 0.5|; class c: 0.3.
    assert results["la_ece"] == pytest.approx((0.35 + 0.1 + 0.3) / 3)
    # Errors among the first 1, 2, 3, 4: 0, 1, 1, 2; at best 0, 0, 1, 2.
    assert results["aurc"] == pytest.approx((1 / 2 + 1 / 3 + 2 / 4) / 4)
    assert results["e_aurc"] == pytest.approx((1 / 2) / 4)
    rest = {k: results[k] for k in results if k not in ("d_ece", "la_ece", "aurc", "e_aurc")}
    assert rest == {
        "num_detections": 4,
        "num_matched": 2,
        "iou_threshold": 0.5,
        "score_threshold": 0.05,
        "bins": 2,
    }


def test_the_best_free_object_is_taken_in_order_of_score():
    # Both lie over both objects; the surer one takes what fits it best, the other what is left.
    data = dataset({1: [(0, 10, 10, 50, 50), (0, 14, 10, 54, 50)]})
    rows = (0.4, 0, 13, 10, 53, 50), (0.9, 0, 14, 10, 54, 50), (0.3, 0, 12, 10, 52, 50)
    confidence = measured(data, {1: found(*rows)})
    assert confidence.confidence.tolist() == [0.9, 0.4, 0.3]
    assert confidence.iou.tolist() == pytest.approx([1, 37 / 43, 0])


def test_thresholds_belong_to_what_they_admit():
    data = dataset({1: [(0, *BOX)]})
    half = {1: found((0.5, 0, *HALF))}
    assert measured(data, half, iou_threshold=0.5).compute()["num_matched"] == 1
    assert measured(data, half, iou_threshold=0.51).compute()["num_matched"] == 0
    assert measured(data, {1: found((0.5, 0, *BOX))}, iou_threshold=1).compute()["num_matched"] == 1
    scores = np.array([0.05, 0.04999], np.float32)
    for dtype in (np.float32, np.float64):
        rows = found(*((score, 0, *AWAY) for score in scores.astype(dtype)), dtype=np.float32)
        assert measured(data, {1: rows}).compute()["num_detections"] == 1


def test_a_detection_on_a_crowd_is_neither_right_nor_wrong():
    data = dataset({1: [(0, 0, 0, 100, 100, True), (0, 60, 60, 90, 90)]})
    rows = [(0.9, 0, 60, 60, 90, 90), (0.8, 0, 60, 60, 90, 90), (0.7, 0, 5, 5, 20, 20)]
    confidence = measured(data, {1: found(*rows, (0.6, 0, 90, 0, 190, 100))})
    # The first is the object's, the two inside the crowd are left out, the last is mostly outside.
    assert confidence.confidence.tolist() == [0.9, 0.6]
    assert confidence.correct.tolist() == [True, False]
    # An object of its own goes before the crowd, whichever fits better.
    loose = measured(data, {1: found((0.9, 0, 60, 60, 90, 80))})
    assert loose.iou.tolist() == pytest.approx([2 / 3])


def test_la_ece_asks_for_the_fit_of_the_box_too():
    data = dataset({1: [(0, *BOX)]})
    results = measured(data, {1: found((1.0, 0, *HALF))}).compute()
    assert results["d_ece"] == 0
    assert results["la_ece"] == pytest.approx(0.5)
    results = measured(data, {1: found((0.5, 0, *HALF))}).compute()
    assert results["d_ece"] == pytest.approx(0.5)
    assert results["la_ece"] == pytest.approx(0)


@pytest.mark.parametrize(
    "detections", [{}, {1: NOTHING}, {1: Detections([], [], [])}, {1: found((0.04, 0, *BOX))}]
)
@pytest.mark.parametrize("objects", [[], [(0, *BOX)], [(0, *BOX, True)]])
def test_without_detections_there_is_nothing_to_measure(detections, objects):
    confidence = measured(dataset({1: objects}), detections)
    results = confidence.compute()
    assert [results[k] for k in ("d_ece", "la_ece", "aurc", "e_aurc")] == [None] * 4
    assert results["num_detections"] == results["num_matched"] == 0
    assert confidence.correct.shape == confidence.confidence.shape == (0,)


def test_more_images_may_follow():
    data = dataset({1: [(0, *BOX)], 2: []})
    first, second = found((0.9, 0, *BOX)), found((0.7, 0, *BOX))
    confidence = measured(data, {1: first})
    assert confidence.compute()["num_detections"] == 1
    confidence.update(2, second)
    assert confidence.compute() == measured(data, {1: first, 2: second}).compute()


BAD = {
    "shape": (Detections(np.zeros((2, 4)), np.zeros(1), np.zeros(1, int)), "expected shapes"),
    "flat boxes": (Detections(np.zeros(4), np.zeros(1), np.zeros(1, int)), "expected shapes"),
    "three corners": (Detections(np.zeros((1, 3)), np.zeros(1), np.zeros(1, int)), "shapes"),
    "NaN box": (found((0.5, 0, 1, 1, np.nan, 2)), "finite boxes"),
    "swapped": (found((0.5, 0, 5, 1, 2, 2)), "x1 <= x2"),
    "score above": (
        found((1.5, 0, *BOX)),
        r"scores: expected .* got values in \[1.5, 1.5\]",
    ),
    "score NaN": (found((np.nan, 0, *BOX)), r"scores: expected values in \[0, 1\]"),
    "label above": (found((0.5, 3, *BOX)), r"labels in \[0, 3\), got int64 in \[3, 3\]"),
    "label below": (found((0.5, -1, *BOX)), r"labels in \[0, 3\)"),
    "label float": (Detections(np.zeros((1, 4)), np.ones(1), np.ones(1)), "integer labels"),
}


@pytest.mark.parametrize(("rows", "words"), BAD.values(), ids=BAD)
def test_what_is_no_detection_is_refused(rows, words):
    data = dataset({1: []})
    with pytest.raises(ValueError, match=f"image 1: .*{words}"):
        DetectionConfidence(data).update(1, rows)
    with pytest.raises(ValueError, match=f"image 1: .*{words}"):
        average_precision(data, {1: rows})


def test_images_are_added_once_and_known():
    data = dataset({1: []})
    confidence = DetectionConfidence(data)
    confidence.update(1, NOTHING)
    with pytest.raises(ValueError, match="expected image 1 once"):
        confidence.update(1, NOTHING)
    with pytest.raises(ValueError, match="an image of the data set, got 2"):
        confidence.update(2, NOTHING)
    with pytest.raises(ValueError, match="an image of the data set, got 2"):
        average_precision(data, {2: NOTHING})


@pytest.mark.parametrize("name, value", [
    ("iou_threshold", 0), ("iou_threshold", float("nan")), ("score_threshold", 2), ("bins", 1.5),
])  # fmt: skip
def test_options_out_of_range_are_refused(name, value):
    with pytest.raises(ValueError, match=f"{name}: expected"):
        DetectionConfidence(dataset({1: []}), **{name: value})


def random_scene(seed: int, *, decimals: int = 6) -> tuple[DetectionDataset, dict]:
    """Make objects, crowds, and detections of which many lie near an object."""
    rng = np.random.default_rng(seed)
    objects, detections = {}, {}
    for image in range(1, 6):
        count = rng.integers(0, 7)
        corners = rng.uniform(0, 120, (count, 2))
        boxes = np.concatenate([corners, corners + rng.uniform(10, 60, (count, 2))], axis=1)
        labels = rng.integers(0, 3, count)
        crowd = rng.random(count) < 0.25
        objects[image] = [
            (int(k), *map(float, box), bool(c))
            for k, box, c in zip(labels, boxes, crowd, strict=True)
        ]
        near = rng.integers(0, count, 3 * count) if count else np.zeros(0, int)
        moved = boxes[near] + rng.normal(0, 6, (len(near), 4))
        stray = rng.uniform(0, 100, (4, 2))
        moved = np.concatenate([moved, np.concatenate([stray, stray + 30], axis=1)])
        table = np.sort(moved.reshape(-1, 2, 2), axis=1).reshape(-1, 4)
        right = rng.random(len(near)) < 0.8
        guessed = np.where(right, labels[near], rng.integers(0, 3, len(near)))
        scores = np.round(rng.uniform(0.05, 1, len(table)), decimals)
        detections[image] = Detections(
            table, scores, np.concatenate([guessed, rng.integers(0, 3, 4)]).astype(np.int64)
        )
    return dataset(objects), detections


def coco_matches(data: DetectionDataset, detections: dict) -> dict[int, tuple[int, int]]:
    """Return how many detections COCO's own evaluation at IoU 0.5 counts and matches, by class."""
    rows = [
        {"image_id": i, "category_id": data.category_ids[k], "bbox": [*b[:2], *(b[2:] - b[:2])]}
        | {"score": s}
        for i, found_ in detections.items()
        for b, s, k in zip(*found_, strict=True)
    ]
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = {**data.coco, "annotations": [dict(a) for a in data.coco["annotations"]]}
        truth.createIndex()
        evaluation = COCOeval(truth, truth.loadRes(rows), "bbox")
        evaluation.params.iouThrs = np.array([0.5])
        evaluation.params.areaRng, evaluation.params.areaRngLbl = [[0, 1e10]], ["all"]
        evaluation.evaluate()
    counts = {label: [0, 0] for label in range(len(data.class_names))}
    for image in filter(None, evaluation.evalImgs):
        kept = ~image["dtIgnore"][0]
        label = data.category_ids.index(image["category_id"])
        counts[label][0] += int(kept.sum())
        counts[label][1] += int((image["dtMatches"][0][kept] > 0).sum())
    return {label: tuple(pair) for label, pair in counts.items()}


def class_counts(confidence: DetectionConfidence) -> dict[int, tuple[int, int]]:
    return {
        k: (
            int((confidence.labels == k).sum()),
            int(confidence.correct[confidence.labels == k].sum()),
        )
        for k in range(3)
    }


@pytest.mark.parametrize("decimals", [6, 1])  # of the scores: with one, many are equal
@pytest.mark.parametrize("seed", range(15))
def test_matching_is_that_of_cocos_evaluation(seed, decimals):
    data, detections = random_scene(seed, decimals=decimals)
    counts = class_counts(measured(data, detections, score_threshold=0))
    assert counts == coco_matches(data, detections)


def test_the_random_scenes_hold_what_matters():
    counts = np.zeros(3, int)
    for seed in range(15):
        data, detections = random_scene(seed)
        results = measured(data, detections, score_threshold=0).compute()
        total = sum(len(d.scores) for d in detections.values())
        counts += [results["num_matched"], results["num_detections"], total]
    matched, kept, total = counts
    assert 100 < matched < kept - 100 < total - 200  # right, wrong, and left out on crowds


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), order=st.randoms(use_true_random=False))
def test_the_order_of_images_and_detections_changes_nothing(seed, order):
    data, detections = random_scene(seed)
    images = list(detections)
    order.shuffle(images)
    shuffled = {}
    for image in images:
        rows = list(range(len(detections[image].scores)))
        order.shuffle(rows)
        shuffled[image] = Detections(*(column[rows] for column in detections[image]))
    assert measured(data, shuffled).compute() == pytest.approx(measured(data, detections).compute())
    assert average_precision(data, shuffled) == pytest.approx(average_precision(data, detections))


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), bins=st.integers(1, 30))
def test_the_numbers_are_those_of_the_core_on_the_kept_detections(seed, bins):
    data, detections = random_scene(seed)
    confidence = measured(data, detections, bins=bins)
    results = confidence.compute()
    rows = confidence.confidence, confidence.correct
    filled = calibration.reliability_bins(*rows, bins=bins)
    assert results["d_ece"] == filled.expected_calibration_error
    assert results["aurc"] == calibration.aurc(*rows)
    assert 0 <= results["e_aurc"] <= results["aurc"] <= 1
    assert 0 <= results["la_ece"] <= 1
    # By its definition, one bin at a time.
    errors = []
    for label in np.unique(confidence.labels):
        score, iou = (
            c[confidence.labels == label] for c in (confidence.confidence, confidence.iou)
        )
        which = np.maximum(np.ceil(score * bins).astype(int) - 1, 0)
        error = 0.0
        for b in np.unique(which):
            right = iou[which == b][iou[which == b] > 0]
            precision = len(right) / (which == b).sum()
            target = precision * right.mean() if len(right) else 0.0
            error += (which == b).mean() * abs(score[which == b].mean() - target)
        errors.append(error)
    assert results["la_ece"] == pytest.approx(np.mean(errors))


def test_perfect_detections_have_ap_100():
    data = dataset({1: [(0, *BOX), (1, *AWAY)], 2: [(0, *AWAY)]})
    detections = {1: found((0.9, 0, *BOX), (0.8, 1, *AWAY)), 2: found((0.7, 0, *AWAY))}
    results = average_precision(data, detections)
    assert list(results) == ["AP", "AP50", "AP75", "APs", "APm", "APl", "AP-a", "AP-b", "AP-c"]
    for name in ("AP", "AP50", "AP75", "AP-a", "AP-b", "APm"):
        assert results[name] == pytest.approx(100)
    # No object of class c, and none that is small or large by COCO's count of pixels.
    assert [results[name] for name in ("AP-c", "APs", "APl")] == [None] * 3


def test_ap_of_a_half_right_detector():
    data = dataset({1: [(0, *BOX), (0, *AWAY)]})
    results = average_precision(data, {1: found((0.9, 0, *BOX))})
    # Precision 1 up to recall 0.5: 51 of COCO's 101 recalls.
    assert results["AP"] == results["AP50"] == results["AP-a"] == pytest.approx(100 * 51 / 101)
    # IoU 1/2 counts at the first of ten thresholds only.
    half = average_precision(data, {1: found((0.9, 0, *HALF))})
    assert half["AP50"] == pytest.approx(100 * 51 / 101)
    assert half["AP"] == pytest.approx(10 * 51 / 101)
    assert half["AP75"] == 0


@pytest.mark.parametrize("detections", [{}, {1: NOTHING}])
def test_no_detection_at_all_is_ap_0(detections):
    results = average_precision(dataset({1: [(0, *BOX)]}), detections)
    assert results["AP"] == results["AP50"] == results["AP-a"] == 0
    assert results["AP-b"] is None


def test_without_objects_ap_is_undefined():
    results = average_precision(dataset({1: [], 2: [(0, *BOX, True)]}), {1: found((0.9, 0, *BOX))})
    assert set(results.values()) == {None}


def test_ap_leaves_the_data_set_as_it_was_and_prints_nothing(capsys, caplog):
    data = dataset({1: [(0, *BOX)]})
    before = repr(data.coco)
    with caplog.at_level(logging.DEBUG, logger="pskd_detection"):
        average_precision(data, {1: found((0.9, 0, *BOX), dtype=np.float32)})
    assert repr(data.coco) == before
    assert capsys.readouterr() == ("", "")
    assert "Average Precision" in caplog.text


# ---- as torchmetrics -----------------------------------------------------------------------------


def test_d_ece_in_torchmetrics_loop_is_the_same():
    torchmetrics = pytest.importorskip("torchmetrics", reason="needs torchmetrics")
    from pskd_detection.metric import DetectionECE

    data, detections = random_scene(0)
    expected = measured(data, detections).compute()
    metric = torchmetrics.MetricCollection([DetectionECE()])
    for i, image in detections.items():
        preds = {name: torch.as_tensor(value) for name, value in image._asdict().items()}
        boxes = np.array([o.box for o in data.objects[i]]).reshape(-1, 4)
        target = {"boxes": np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], axis=1)}
        target["labels"] = np.array([o.label for o in data.objects[i]], int)
        target["iscrowd"] = np.array([o.crowd for o in data.objects[i]], bool)
        metric.update([preds], [{k: torch.as_tensor(v) for k, v in target.items()}])
    assert metric.compute()["DetectionECE"].item() == pytest.approx(expected["d_ece"], rel=1e-5)
