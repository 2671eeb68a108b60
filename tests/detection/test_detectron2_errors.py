"""Bad input to train_net.py: an error before the first iteration that names expected and got."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import detectron2_tiny as tiny
import numpy as np
import pytest
import torch
from detectron2.config import LazyConfig
from detectron2.data import DatasetCatalog, DatasetMapper, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from detectron2.structures import BoxMode
from omegaconf import OmegaConf
from PIL import Image
from pskd_detectron2 import PSKDHook, Trainer, register_spec
from pskd_detectron2.config import recipe_path
from pskd_detectron2.data import (
    ImageMapper,
    check_records,
    count_annotations,
    training_records,
)
from pskd_detectron2.lazy import evaluate, use_own_parts
from pskd_detectron2.registered import _known, check_sets, detection_dataset

RETINANET = recipe_path("detectron2:COCO-Detection/retinanet_R_50_FPN_1x.yaml")


def refused(kind: str, out, message: str, *opts: str, **specs) -> None:
    with pytest.raises(ValueError, match=message):
        tiny.run(kind, out, *opts, **specs)
    assert not (out / "metrics.json").exists()
    assert not list(out.glob("*.pth"))


@pytest.mark.parametrize("heads", ["RROIHeads", "Nowhere"])
def test_other_heads_cannot_learn_from_a_teacher(heads, spec, tmp_path):
    message = f"PSKDCascadeROIHeads, or one derived from them, got {heads}"
    refused("fpn", tmp_path, message, f"MODEL.ROI_HEADS.NAME {heads}", train=spec)


def test_a_sigmoid_head_has_no_label_smoothing(spec, tmp_path):
    opts = "MODEL.ROI_BOX_HEAD.USE_SIGMOID_CE True MODEL.PSKD.LABEL_SMOOTHING 0.1"
    message = "LABEL_SMOOTHING: expected 0 with a sigmoid head .USE_SIGMOID_CE., got 0.1"
    refused("fpn", tmp_path, message, opts, train=spec)


def test_a_sampler_without_epochs_trains_with_epoch_iters(spec, tmp_path):
    opts = "DATALOADER.SAMPLER_TRAIN RepeatFactorTrainingSampler DATALOADER.REPEAT_THRESHOLD 0.1"
    opts += " MODEL.PSKD.EPOCH_ITERS 1 SOLVER.MAX_ITER 2"
    out = tiny.run("fpn", tmp_path, opts, train=spec)
    assert tiny.metrics(out)[-1]["pskd/alpha"] == pytest.approx(0.7)


def registered(name: str, spec: str, folder, change=lambda content: None) -> str:
    """Register a COCO file as Detectron2's users do: its classes are known when it was read."""
    folder.mkdir(exist_ok=True)
    _, path, images = changed(spec, folder, change).split(":")
    if name in DatasetCatalog.list():
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)
    register_coco_instances(name, {}, path, images)
    return name


@pytest.mark.parametrize("part", ["TRAIN", "TEST", "spec", RETINANET])
def test_a_class_count_that_is_not_the_datasets(part, spec, tmp_path):
    """A registered COCO set tells its classes when it is loaded, a spec before."""
    register_spec(spec, tmp_path)
    name = spec if part in ("spec", RETINANET) else registered(f"late_{part}", spec, tmp_path)
    train = registered("one", spec, tmp_path / "one", only_squares) if part == "TEST" else name
    opts = f"DATASETS.TRAIN ('{train}',) MODEL.ROI_HEADS.NUM_CLASSES 1"
    opts += " MODEL.RETINANET.NUM_CLASSES 1"
    opts += f" DATASETS.TEST ('{name}',)" if part == "TEST" else ""
    kind = part if part == RETINANET else "fpn"
    message = f"NUM_CLASSES of the model: expected 2, the classes of {name}, got 1"
    refused(kind, tmp_path / "run", message, opts, train=None)


def only_squares(content: dict) -> None:
    content["categories"] = content["categories"][:1]
    content["annotations"] = [a for a in content["annotations"] if a["category_id"] == 1]


ROTATED = BoxMode.XYWHA_ABS
NAN = [[1, 2, 3, 4, 5, float("nan")]]
CODE = {"size": [80, 64], "counts": [80 * 64]}
LONG_CODE = {"size": [80, 64], "counts": [80 * 64 - 1, 2]}
SHORT = [[1, 2, 30, 40], [1, 2, 30, 2, 30, 40]]


def first(**values):
    """Change a file's first annotation."""
    return lambda content: content["annotations"][0].update(values)


def image(**values):
    return lambda content: content["images"][0].update(values)


TRAINING_SETS = {  # model, change of the file, what is said
    "no mask": ("mask", first(segmentation=[]), "0.png: expected a segmentation of every annot"),
    "NaN": ("mask", first(segmentation=NAN), "0.png: expected polygons within 800 pixels of the"),
    "code": ("mask", first(segmentation=CODE), "MASK_FORMAT: expected bitmask for run-length code"),
    "long code": (
        "mask INPUT.MASK_FORMAT bitmask",
        first(segmentation=LONG_CODE),
        "0.png: expected 'counts' of 80 x 64 = 5120 pixels, got those of 5121",
    ),
    "flag": ("fpn", first(iscrowd="maybe"), "0.png: expected 'iscrowd' as 0 or 1, .* got 'maybe'"),
    "ignore": ("fpn", first(ignore=1), "training set .'train',.: expected Detectron2's.*Assertion"),
    "class": ("fpn", first(category_id=None), "training set .'train',.: expected .*, got KeyError"),
    "box": ("fpn", first(bbox=["1", "2", "3", "4"]), "0.png: expected .*, got TypeError"),
}
COCO = "annotation .*: for COCOEvaluator expected .*; --test coco:.*changed.json:.* fills"
TEST_SETS = {
    "NaN": ("fpn", first(segmentation=NAN), "changed.json: annotation 100: segmentation: expected"),
    "no area": ("fpn", first(area=None), COCO),
    "area": ("fpn", first(area="9"), COCO),
    "flag": ("fpn", first(iscrowd="0"), COCO),
    "id": ("fpn", first(id="k"), COCO),
    "ignore": ("fpn", first(ignore=1), "dataset 'test': expected Det.*AssertionError.*ignore"),
    "class": ("fpn", first(category_id="1"), "dataset 'test': .* KeyError.*category_id=1"),
    "ids of two kinds": ("fpn", image(id="x"), "dataset 'test': expected Det.* TypeError"),
    "no width": ("fpn", lambda c: c["images"][0].pop("width"), "'test': .* KeyError.'width'"),
    "null width": ("fpn", image(width=None), "'test': .*no width or height of .*0.png"),
    "two points": ("mask", first(segmentation=SHORT), "first polygon of three or more points, got"),
}


@pytest.mark.parametrize("part, case", [
    *(("TRAIN", case) for case in TRAINING_SETS), *(("TEST", case) for case in TEST_SETS),
])  # fmt: skip
def test_a_registered_set_that_would_fail_later(part, case, spec, tmp_path):
    kind, change, message = (TRAINING_SETS if part == "TRAIN" else TEST_SETS)[case]
    kind, _, opts = kind.partition(" ")
    name = registered(part.lower(), spec, tmp_path, change)
    opts += f" DATASETS.{part} ('{name}',) MODEL.ROI_HEADS.NUM_CLASSES 2"
    refused(kind, tmp_path / "run", message, opts, train=None if part == "TRAIN" else spec)


def test_polygons_of_two_points_do_not_matter_to_a_model_without_masks(spec, tmp_path):
    name = registered("short", spec, tmp_path, first(segmentation=SHORT))
    check_sets([], [name], 2)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda r: r[0].pop("file_name"), "image number 1: to train .* expected 'file_name', got"),
        (lambda r: [a.pop("annotations") for a in r], "0.png: to train .* expected 'annotations'"),
        (lambda r: r[1].pop("annotations"), "training set .*by_function.*KeyError.'annotations'"),
        (lambda r: r[0]["annotations"][0].update(bbox_mode=9), "0.png: .*NotImplementedError"),
    ],
)
def test_records_of_a_function_that_lack_something(change, message, spec, tmp_path):
    register_spec(spec, tmp_path)
    records = DatasetCatalog.get(spec)
    change(records)
    by_function("by_function", records)
    opts = "DATASETS.TRAIN ('by_function',) MODEL.ROI_HEADS.NUM_CLASSES 2"
    refused("fpn", tmp_path / "run", message, opts, train=None)


def test_a_panoptic_model_needs_labels_of_pixels(spec, tmp_path):
    recipe = recipe_path("detectron2:COCO-PanopticSegmentation/panoptic_fpn_R_50_1x.yaml")
    opts = "MODEL.SEM_SEG_HEAD.CONVS_DIM 32 MODEL.ROI_HEADS.NAME StandardROIHeads"
    message = "0.png: to train this model expected 'sem_seg_file_name', got none"
    refused(recipe, tmp_path / "run", message, opts, train=spec)


def test_a_registered_test_set_without_annotations_is_evaluated_as_by_detectron2(spec, tmp_path):
    out = tiny.run("fpn", tmp_path / "train", "SOLVER.MAX_ITER 1", train=spec)
    name = registered("test_dev", spec, tmp_path, lambda c: c.pop("annotations"))
    opts = f"MODEL.WEIGHTS {out / 'model_final.pth'} DATASETS.TEST ('{name}',)"
    low = "MODEL.ROI_HEADS.NUM_CLASSES 2 MODEL.ROI_HEADS.SCORE_THRESH_TEST 0.0"
    tiny.run("fpn", tmp_path / "run", opts, low, flags=("--eval-only",), train=None)
    assert (tmp_path / "run" / "inference" / "coco_instances_results.json").exists()
    assert "confidence" not in tiny.results(tmp_path / "run", "evaluation")


@pytest.mark.parametrize("value", [None, []], ids=repr)
def test_a_test_set_without_the_masks_that_a_model_is_evaluated_on(value, spec, tmp_path):
    other = changed(spec, tmp_path, lambda c: c["annotations"][3].update(segmentation=value))
    message = "to evaluate a model with masks expected a segmentation .*, got none of annotation 4"
    refused("mask", tmp_path / "run", message, train=spec, test=other)
    tiny.config("fpn", tmp_path / "boxes", train=spec, test=other)


def test_a_box_outside_its_image_is_left_out_and_counted(caplog):
    record = {"file_name": "a.png", "width": 64, "height": 80}
    box = {"category_id": 0, "bbox": [200.0, 200.0, 5.0, 5.0], "bbox_mode": BoxMode.XYWH_ABS}
    check_records([record | {"annotations": [box, box]}], 1)
    assert "2 boxes outside their image left out; the first: a.png: [200.0, " in caplog.text


@pytest.mark.parametrize("value", ["0", "False", 0, False, "Unspecified"], ids=repr)
def test_flags_of_registered_sets_are_read_and_not_only_looked_at(value, spec, tmp_path):
    unset = lambda c: [a.update(iscrowd=value) for a in c["annotations"]]  # noqa: E731
    name = registered("flags", spec, tmp_path, unset)
    records = training_records(name)
    assert len(records) == 7 and count_annotations(records) == 14
    assert {a["iscrowd"] for record in records for a in record["annotations"]} == {0}


def test_a_registered_set_of_crowds_only(spec, tmp_path):
    crowds = lambda c: [a.update(iscrowd="yes") for a in c["annotations"]]  # noqa: E731
    name = registered("crowds", spec, tmp_path, crowds)
    with pytest.raises(ValueError, match="crowds: expected annotations to train on, got crowds"):
        training_records(name)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda r: r[0].pop("width"), "'by_function': .*KeyError.'width'."),
        (lambda r: r[0]["annotations"][0].update(iscrowd="no"), "'by_function': .*got ValueError"),
        (
            lambda r: r[0]["annotations"][0].update(segmentation=[[0, 0, 1e9, 1e9, 1, 0]]),
            "dataset 'by_function': annotation 1: segmentation: expected polygons within 800",
        ),
        (lambda r: r[0].update(file_name="no.png"), "dataset 'by_function': expected every image"),
        (lambda r: r[0].pop("image_id"), "'by_function': .*KeyError.'image_id'."),
        (lambda r: r[0]["annotations"][0].update(bbox_mode=9), "'by_function': .*NotImplemented"),
    ],
)
def test_a_set_that_is_known_by_its_function_is_named_by_its_name(change, message, spec, tmp_path):
    register_spec(spec, tmp_path)
    records = DatasetCatalog.get(spec)
    by_function("by_function", records)
    assert detection_dataset("by_function").spec == "by_function"
    by_function("by_function", records)
    change(records)
    with pytest.raises(ValueError, match=message):
        detection_dataset("by_function")


def by_function(name: str, records: list[dict]) -> None:
    for catalog in (DatasetCatalog, MetadataCatalog):
        if name in catalog.list():
            catalog.remove(name)
    _known.pop(name, None)
    DatasetCatalog.register(name, lambda: records)
    MetadataCatalog.get(name).thing_classes = list(tiny.CLASSES)


def test_a_set_without_annotations_that_is_known_by_its_function(spec, tmp_path):
    register_spec(spec, tmp_path)
    by_function("empty", [record | {"annotations": []} for record in DatasetCatalog.get(spec)])
    assert detection_dataset("empty").coco["annotations"] == []


def with_keypoints(content: dict) -> None:
    for category in content["categories"]:
        category["keypoints"] = ["left", "right"]
    for a in content["annotations"][1:]:  # and the first has none
        x, y, w, h = a["bbox"]
        a["keypoints"] = [x + 1, y + h // 2, 2, x + w - 1, y + h // 2, 2]


KEYPOINTS = (
    "MODEL.KEYPOINT_ON True MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS 2 "
    "MODEL.ROI_KEYPOINT_HEAD.CONV_DIMS (8,)"
)


def test_keypoints_of_a_file_are_trained_and_evaluated(spec, tmp_path):
    other = changed(spec, tmp_path, with_keypoints)
    opts = (KEYPOINTS, "TEST.KEYPOINT_OKS_SIGMAS [0.1,0.1] SOLVER.MAX_ITER 2 INPUT.RANDOM_FLIP none"
            " MODEL.ROI_HEADS.SCORE_THRESH_TEST 0.0 SOLVER.BASE_LR 1e-4")  # fmt: skip
    out = tiny.run("fpn", tmp_path / "run", *opts, train=other, test=other)
    assert "AP" in tiny.results(out)["keypoints"]
    metadata = MetadataCatalog.get(other)
    assert metadata.keypoint_names == ["left", "right"]
    assert metadata.keypoint_flip_map == [("left", "right")]


@pytest.mark.parametrize(
    "opts, change, message",
    [
        (
            "",
            lambda c: None,
            "MODEL.KEYPOINT_ON: expected the names of the keypoints of coco:",
        ),
        (
            "",
            with_keypoints,
            "TEST.KEYPOINT_OKS_SIGMAS: expected 2 numbers, one of each keypoint",
        ),
        (
            "MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS 17",
            with_keypoints,
            "ROI_KEYPOINT_HEAD.NUM_KEYPOINTS: expected 2, the keypoints of coco:.*, got 17",
        ),
    ],
)
def test_keypoints_that_would_fail_later(opts, change, message, spec, tmp_path):
    other = changed(spec, tmp_path, change)
    refused("fpn", tmp_path / "run", message, KEYPOINTS, opts, train=other, test=other)


def test_a_class_that_the_head_does_not_have():
    record = {"file_name": "a.png", "annotations": [{"category_id": 2}]}
    with pytest.raises(ValueError, match=r"a.png: expected classes in \[0, 1\], got 2"):
        check_records([record], 2)


@pytest.mark.parametrize(
    "record, annotation",
    [
        ({"width": 30, "height": 30}, {"bbox": [20, 20, 30, 30, 0.0], "bbox_mode": ROTATED}),
        ({}, {}),  # of an image of unknown size
        ({}, {"category_id": "1"}),
        ({}, {"category_id": 1.0}),
    ],
)
def test_what_cannot_be_compared_or_is_made_an_integer_is_left_to_detectron2(record, annotation):
    whole = {"category_id": 0, "bbox": [20, 20, 30, 30], "bbox_mode": BoxMode.XYXY_ABS}
    check_records([{"file_name": "a.png", "annotations": [whole | annotation], **record}], 2)


def test_a_model_without_roi_heads(spec, tmp_path):
    words = tiny.arguments("fpn", tmp_path, train=spec)
    words[1] = "detectron2:COCO-Detection/retinanet_R_50_FPN_1x.yaml"  # with a Python expression
    words += ["MODEL.PSKD.ENABLED", "True", "MODEL.ROI_HEADS.NAME", "PSKDROIHeads"]
    message = "expected a model with PSKD ROI heads, got NoneType"
    with pytest.raises(ValueError, match=message):
        tiny.main(words)


def test_the_memory_wants_annotations_that_tell_their_rows(spec, tmp_path, monkeypatch):
    monkeypatch.setattr("pskd_detectron2.trainer.PSKDDatasetMapper", DatasetMapper)
    with pytest.raises(ValueError, match="expected annotations with gt_pskd_row, from PSKDDataset"):
        tiny.run("fpn", tmp_path, "MODEL.PSKD.TEACHER memory", train=spec)


@pytest.mark.parametrize(
    "opts, told",
    [
        ("", "stock one, in spite of MODEL.ROI_HEADS.NAME PSKDROIHeads, MODEL.PSKD.TEACHER memory"),
        ("MODEL.ROI_HEADS.NAME StandardROIHeads", "in spite of MODEL.PSKD.TEACHER memory"),
        ("MODEL.ROI_HEADS.NAME StandardROIHeads MODEL.PSKD.TEACHER snapshot", ""),
        ("MODEL.PSKD.ENABLED True", ""),
    ],
)
def test_keys_without_enabled_are_told(opts, told, spec, tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr(
        "pskd_detectron2.config.logger.warning", lambda *a: said.append(a[0] % a[1:])
    )
    keys = "MODEL.PSKD.ENABLED False MODEL.PSKD.TEACHER memory"
    cfg = tiny.config("fpn", tmp_path, keys, opts, train=spec)
    Trainer(cfg)
    assert len(said) == bool(told) and all(line.endswith(told) for line in said)


@pytest.mark.parametrize(
    "opts, options, message",
    [
        ("MODEL.PSKD.ENABLED False", {}, "expected heads with MODEL.PSKD.ENABLED True, got False"),
        (tiny.stock("fpn"), {}, "expected a model with PSKD ROI heads, got StandardROIHeads"),
        ("", {"epoch_iters": 0}, "epoch_iters: expected 1 or more, got 0"),
        ("", {"teacher": "memory"}, "num_annotations: expected 1 or more, got 0"),
    ],
)
def test_what_the_hook_refuses(opts, options, message, spec, tmp_path):
    model = Trainer.build_model(tiny.config("fpn", tmp_path, opts, train=spec))
    with pytest.raises(ValueError, match=message):
        PSKDHook(model, **({"epoch_iters": 3} | options))


def test_the_hook_wants_a_model_that_can_be_copied(spec, tmp_path):
    model = Trainer.build_model(tiny.config("fpn", tmp_path, train=spec))
    model.backbone.lock = threading.Lock()
    with pytest.raises(ValueError, match="got FPN 'backbone' with the attribute 'lock': .*lock"):
        PSKDHook(model, epoch_iters=3)
    PSKDHook(model, epoch_iters=3, teacher="memory", num_annotations=5)


def test_a_loader_that_hides_its_data_is_trained_from_by_epochs_of_the_training_set(spec, tmp_path):
    class Own(Trainer):
        @classmethod
        def build_train_loader(cls, cfg):
            return iter(super().build_train_loader(cfg))

    trainer = Own(tiny.config("fpn", tmp_path, train=spec))
    assert trainer._sampler is None and len(trainer._records) == 7  # of 8 one has no annotation


@pytest.mark.parametrize("teacher", ["snapshot", "memory"])
def test_without_alpha_no_teacher_is_kept(teacher, spec, tmp_path):
    options = f"MODEL.PSKD.TEACHER {teacher} MODEL.PSKD.EPOCH_ITERS 3 SOLVER.CHECKPOINT_PERIOD 2"
    zero = "MODEL.PSKD.ALPHA_FINAL 0.0"
    tiny.run("fpn", tmp_path, options, zero, "SOLVER.MAX_ITER 5", train=spec)
    hook = torch.load(tmp_path / "model_0000003.pth", weights_only=True)["trainer"]["hooks"]
    assert hook["PSKDHook"].keys() == {"options"}
    # Resumed as it was, it goes on; with a teacher there is none to go on with.
    (tmp_path / "last_checkpoint").write_text("model_0000003.pth")
    changed = "MODEL.PSKD.ALPHA_FINAL 0.7 MODEL.PSKD.ALLOW_SCHEDULE_CHANGE True"
    flags, more = ("--resume",), "SOLVER.MAX_ITER 5"
    with pytest.raises(ValueError, match="expected a checkpoint with (the snaps|a memory)"):
        tiny.run("fpn", tmp_path, options, more, changed, flags=flags, train=spec)
    tiny.run("fpn", tmp_path, options, more, zero, flags=flags, train=spec)


def test_a_training_of_one_epoch_says_that_it_has_no_teacher(spec, tmp_path):
    out = tiny.run("fpn", tmp_path, "SOLVER.MAX_ITER 1", train=spec)
    assert "the first has no teacher" in (out / "log.txt").read_text()


def changed(spec: str, folder, change) -> str:
    """A spec of the same images whose annotations went through ``change``."""
    _, path, images = spec.split(":")
    with open(path) as file:
        content = json.load(file)
    change(content)
    other = folder / "changed.json"
    other.write_text(json.dumps(content))
    return f"coco:{other}:{images}"


def test_an_annotation_outside_its_image(spec, tmp_path):
    other = changed(spec, tmp_path, lambda c: c["annotations"][0].update(bbox=[60, 60, 40, 40]))
    words = ["--strict-data", *tiny.arguments("fpn", tmp_path / "run", train=other)]
    message = r"strictly read, .*annotation 100: bbox \[60, 60, 40, 40\]"
    with pytest.raises(ValueError, match=message):
        tiny.main(words)
    assert count_annotations(training_records(registered_spec(other, tmp_path))) == 14


def registered_spec(spec: str, folder) -> str:
    return register_spec(spec, folder).spec


@pytest.mark.parametrize(
    "name, content, flags",
    [
        ("no.pth", None, ()),
        ("bad.pth", b"x", ("--eval-only",)),
        ("bad.pkl", b"", ()),
        ("cut.pth", b"PK", ("--eval-only",)),
    ],
)
def test_weights_that_cannot_be_read_are_named(name, content, flags, spec, tmp_path):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    message = f"{name}: expected weights or a checkpoint, got "
    with pytest.raises(ValueError, match=message):
        tiny.run("fpn", tmp_path / "run", "MODEL.WEIGHTS", tmp_path / name, train=spec, test=spec,
                 flags=flags)  # fmt: skip


@pytest.mark.parametrize("part", ["train", "test"])
def test_strict_data_of_a_lazy_config(part, spec, tmp_path):
    other = changed(spec, tmp_path, lambda c: c["annotations"][0].update(bbox=[60, 60, 40, 40]))
    with pytest.raises(ValueError, match="strictly read, expected nothing to mend, got 1"):
        tiny.main(tiny.lazy_arguments(tmp_path / "run", "--strict-data", **{part: other}))


def test_a_lazy_config_without_an_evaluator_is_not_evaluated():
    assert evaluate(OmegaConf.create({"dataloader": {}}), None) == {}


@pytest.mark.parametrize(
    "words, message",
    [
        (("dataloader.train.dataset.names=nowhere",), "dataset 'nowhere': expected a registered"),
        (("dataloader.test.dataset.names=nowhere",), "dataset 'nowhere': expected a registered"),
        (
            ("model.roi_heads.num_classes=5",),
            "NUM_CLASSES of the model: expected 2, the classes of lazily, got",
        ),
        (("--eval-only", "train.init_checkpoint="), "--eval-only: expected train.init_checkpoint"),
    ],
)
def test_bad_input_to_a_lazy_config(words, message, spec, tmp_path):
    name = registered("lazily", spec, tmp_path)
    sets = [f"dataloader.{part}.dataset.names={name}" for part in ("train", "test")]
    line = tiny.lazy_arguments(tmp_path / "run", *sets, "model.roi_heads.num_classes=2", *words)
    with pytest.raises(ValueError, match=message):
        tiny.main(line)
    assert not (tmp_path / "run" / "metrics.json").exists()


# ---- images --------------------------------------------------------------------------------------


@pytest.fixture
def images(tmp_path) -> tuple[str, Path]:
    return tiny.make_images(tmp_path / "data", count=2, empty=()), tmp_path / "data" / "set"


@pytest.mark.parametrize(
    "part, teacher", [("train", "snapshot"), ("train", "memory"), ("test", "snapshot")]
)
def test_deep_and_turned_images_are_read_as_shown(part, teacher, images, tmp_path):
    spec, folder = images
    gray = np.arange(64 * 80).reshape(64, 80) % 256  # of an image of 64 x 80, once turned
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn to the right
    Image.fromarray((gray * 257).astype(np.uint16)).save(folder / "0.png", exif=exif)
    opts = ["MODEL.PSKD.TEACHER", teacher, "INPUT.RANDOM_FLIP", "none"]
    cfg = tiny.config("fpn", tmp_path / "run", *opts, train=spec, test=spec)
    loader = (
        Trainer.build_train_loader(cfg) if part == "train" else Trainer.build_test_loader(cfg, spec)
    )
    found = next(image for batch in loader for image in batch if image["image_id"] == 1)
    assert found["file_name"] == str(folder / "0.png")
    expected = np.repeat(np.rot90(gray, -1)[None], 3, axis=0)
    assert np.array_equal(found["image"], expected)


@pytest.mark.parametrize("part", ["train", "test"])
def test_a_lazy_config_reads_images_the_same_way(part):
    cfg = LazyConfig.load(str(Path(__file__).with_name("lazy_tiny.py")))
    loader = cfg.dataloader[part]
    use_own_parts(cfg)
    assert loader.mapper._target_ is ImageMapper
    assert (loader.dataset._target_ is training_records) == (part == "train")
    loader.mapper._target_ = "somewhere.Mapper"
    use_own_parts(cfg)
    assert loader.mapper._target_ == "somewhere.Mapper"


def test_an_image_that_cannot_be_mapped_is_named(images, tmp_path):
    spec, folder = images
    cfg = tiny.config("fpn", tmp_path / "run", train=spec)
    mapper, path = ImageMapper(cfg, is_train=False), folder / "0.png"
    record = {"file_name": str(path), "width": 64, "height": 80}
    with pytest.raises(ValueError, match=f"Mismatched image shape for image {path}, got"):
        mapper(record | {"width": 63})
    path.write_bytes(path.read_bytes()[:999])
    with pytest.raises(ValueError, match=f"{path}: expected an image, got .*truncated"):
        mapper(record)


@pytest.mark.parametrize("kind", ["fpn", "lazy"])
def test_every_image_is_checked_before_the_first_step(kind, images, tmp_path):
    spec, folder = images
    if kind == "fpn":
        line = tiny.arguments(kind, tmp_path / "run", train=spec, test=spec)
    else:
        line = tiny.lazy_arguments(tmp_path / "run", train=spec, test=spec)
    (folder / "1.png").write_bytes(b"")
    message = "--check-images: expected 4 images that can be read, got 2 that cannot: .*1.png: exp"
    with pytest.raises(ValueError, match=message):
        tiny.main(["--check-images", *line])
    assert not list((tmp_path / "run").glob("*.pth"))


def test_checked_images_are_counted(images, tmp_path):
    spec, folder = images
    line = ["--check-images", *tiny.arguments("fpn", tmp_path / "run", train=spec, test=spec)]
    tiny.main([*line, "SOLVER.MAX_ITER", "1"])
    assert "--check-images: read 4 images" in (tmp_path / "run" / "log.txt").read_text()
    (folder / "1.png").write_bytes(b"")
    weights = f"MODEL.WEIGHTS {tmp_path / 'run' / 'model_final.pth'}"
    flags = ("--check-images", "--eval-only")  # an evaluation does not look at the training set
    tiny.run("fpn", tmp_path / "run", weights, flags=flags, train=spec)
