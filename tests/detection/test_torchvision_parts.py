"""Parts of the torchvision adapter: images, targets, builders, weights, learning rate, log."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from pskd_detection import load_dataset
from pskd_torchvision import (
    DetectionImages,
    LearningRate,
    build_detector,
    evaluate,
    load_weights,
    model_names,
)
from pskd_torchvision.data import SMALLEST_SIDE, collate
from pskd_torchvision.roi_heads import captured
from pycocotools import mask as coco_mask
from torch import nn
from torch.utils.data import DataLoader
from torchvision.ops import FrozenBatchNorm2d
from torchvision_toys import CLASSES, SIZE, same, write_images

from pskd.distributed import World


@pytest.fixture(scope="module")
def spec(tmp_path_factory) -> str:
    return write_images(tmp_path_factory.mktemp("parts") / "images")


def edited(tmp_path: Path, edit) -> str:
    """Write the images and change their annotations; return the spec."""
    spec = write_images(tmp_path / "images")
    path = tmp_path / "images" / "set.json"
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))
    return spec


# ---- images and targets ----------------------------------------------------------------------


def test_an_image_and_its_target(spec):
    dataset = load_dataset(spec)
    images = DetectionImages(dataset)
    assert len(images) == 8 and images.image_id(2) == 3
    image, target = images[0]
    assert image.dtype == torch.float32 and image.shape == (3, SIZE, SIZE)
    assert type(image) is type(target["boxes"]) is torch.Tensor
    with Image.open(dataset.image_dir / "0.png") as file:
        pixels = torch.from_numpy(np.array(file)).permute(2, 0, 1)
    torch.testing.assert_close(image, pixels / 255)
    first, second = (a for a in dataset.coco["annotations"] if a["image_id"] == 1)
    corners = [[x, y, x + w, y + h] for x, y, w, h in (first["bbox"], second["bbox"])]
    assert target["boxes"].tolist() == corners and target["boxes"].dtype == torch.float32
    # 0 is background in torchvision.
    assert target["labels"].tolist() == [first["category_id"], second["category_id"]]
    assert target["labels"].dtype == torch.int64 and min(target["labels"]) >= 1
    assert target.keys() == {"boxes", "labels"}


def test_labels_are_class_indices_whatever_the_files_ids(tmp_path):
    def renumber(content):
        for entry in (*content["categories"], *content["annotations"]):
            key = "category_id" if "category_id" in entry else "id"
            entry[key] = {1: 90, 2: 7}[entry[key]]

    _, before = DetectionImages(load_dataset(write_images(tmp_path / "as_is")))[0]
    renumbered = load_dataset(edited(tmp_path, renumber))
    assert renumbered.class_names == ("green", "red")
    _, after = DetectionImages(renumbered)[0]
    assert after["labels"].tolist() == [3 - label for label in before["labels"].tolist()]


def test_an_image_without_annotations_has_empty_targets(spec):
    _, target = DetectionImages(load_dataset(spec), masks=True, hflip=1.0)[3]
    assert target["boxes"].shape == (0, 4) and target["boxes"].dtype == torch.float32
    assert target["labels"].shape == (0,) and target["labels"].dtype == torch.int64
    assert target["masks"].shape == (0, SIZE, SIZE) and target["masks"].dtype == torch.uint8


def test_crowds_and_boxes_without_size_in_float32_are_left_out(tmp_path, caplog):
    def edit(content):
        content["annotations"][0]["iscrowd"] = 1
        content["annotations"][1]["bbox"][2] = SMALLEST_SIDE / 2

    images = DetectionImages(load_dataset(edited(tmp_path, edit)))
    assert len(images[0][1]["boxes"]) == 0 and len(images[1][1]["boxes"]) == 2
    assert "1 boxes below 0.01 pixels left out" in caplog.text


def test_a_flip_turns_image_boxes_and_masks(spec):
    dataset = load_dataset(spec)
    image, target = DetectionImages(dataset, masks=True)[0]
    flipped, turned = DetectionImages(dataset, masks=True, hflip=1.0)[0]
    assert torch.equal(flipped, image.flip(2))
    assert torch.equal(turned["masks"], target["masks"].flip(2))
    x1, y1, x2, y2 = target["boxes"].unbind(1)
    assert torch.equal(turned["boxes"], torch.stack([SIZE - x2, y1, SIZE - x1, y2], dim=1))
    for mask, (left, top, right, bottom) in zip(
        turned["masks"], turned["boxes"].int(), strict=True
    ):
        assert (
            mask[top:bottom, left:right].all() and mask.sum() == mask[top:bottom, left:right].sum()
        )


def test_flips_depend_on_seed_epoch_and_image_alone(spec):
    dataset = load_dataset(spec)
    plain = [image for image, _ in DetectionImages(dataset)]

    def flips(seed: int, epoch: int, workers: int = 0, order=range(8)) -> dict[int, bool]:
        images = DetectionImages(dataset, hflip=0.5, seed=seed)
        images.set_epoch(epoch)
        loader = DataLoader(
            images, batch_size=1, sampler=order, num_workers=workers, collate_fn=collate
        )
        return {i: not torch.equal(b[0][0], plain[i]) for i, b in zip(order, loader, strict=True)}

    expected = flips(1, 1)
    assert 0 < sum(expected.values()) < 8
    torch.manual_seed(123)
    assert flips(1, 1, workers=2, order=range(7, -1, -1)) == expected
    assert flips(1, 2) != expected and flips(2, 1) != expected


@pytest.mark.parametrize("form", ["polygon", "runs", "compressed"])
def test_masks_in_all_three_of_cocos_forms(tmp_path, form):
    box = np.zeros((SIZE, SIZE), dtype=np.uint8, order="F")
    box[10:30, 20:50] = 1
    packed = coco_mask.encode(box)
    runs = np.diff(np.flatnonzero(np.diff(box.flatten("F"), prepend=0, append=0)), prepend=0)
    counts = [*runs.tolist(), int(box.size - runs.sum())]
    value = {
        # The second has two corners: no area, which pycocotools takes for a box.
        "polygon": [[20, 10, 50, 10, 50, 30, 20, 30], [0, 0, 90, 90]],
        "runs": {"size": [SIZE, SIZE], "counts": counts},
        "compressed": {"size": [SIZE, SIZE], "counts": packed["counts"].decode()},
    }[form]
    edit = lambda content: content["annotations"][0].update(segmentation=value)  # noqa: E731
    _, target = DetectionImages(load_dataset(edited(tmp_path, edit)), masks=True)[0]
    assert np.array_equal(target["masks"][0].numpy(), box)


@pytest.mark.parametrize("value", [None, [], [[]]])
def test_missing_segmentations_are_refused_before_training(tmp_path, value):
    edit = lambda content: content["annotations"][3].update(segmentation=value)  # noqa: E731
    dataset = load_dataset(edited(tmp_path, edit))
    with pytest.raises(ValueError, match="annotation 4 of image 2: .*got none"):
        DetectionImages(dataset, masks=True)


def test_deep_and_turned_images_are_read_as_shown(tmp_path):
    spec = write_images(tmp_path / "images")
    gray = np.arange(96 * 96).reshape(96, 96) % 256
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn to the right
    Image.fromarray((gray * 257).astype(np.uint16)).save(tmp_path / "images/0.png", exif=exif)
    image, _ = DetectionImages(load_dataset(spec))[0]
    expected = np.repeat(np.rot90(gray, -1)[None], 3, axis=0)
    assert np.array_equal((image * 255).round(), expected)


# ---- builders and weights ------------------------------------------------------------------------


@pytest.fixture
def offline(monkeypatch) -> None:
    def refuse(*args, **kwargs):
        raise AssertionError(f"a download was tried: {args}")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", refuse)
    monkeypatch.setattr(torchvision.models._api, "load_state_dict_from_url", refuse)


@pytest.fixture(scope="module")
def tiny() -> nn.Module:
    torch.manual_seed(0)
    return build_detector("fasterrcnn_tiny_fpn", len(CLASSES))


def test_the_known_builders():
    names = model_names()
    assert {"fasterrcnn_resnet50_fpn", "fasterrcnn_mobilenet_v3_large_320_fpn"} <= set(names)
    assert {"maskrcnn_resnet50_fpn_v2", "fasterrcnn_resnet18_fpn", "maskrcnn_tiny_fpn"} <= set(
        names
    )
    assert all(name.startswith(("fasterrcnn_", "maskrcnn_")) for name in names)


@pytest.mark.parametrize("name", ["fasterrcnn_mobilenet_v3_large_320_fpn", "maskrcnn_resnet18_fpn"])
def test_a_builder_downloads_nothing_and_takes_sizes(offline, name):
    model = build_detector(name, 4, min_size=[64, 96], max_size=128)
    assert model.roi_heads.box_predictor.cls_score.out_features == 5
    assert (model.transform.min_size, model.transform.max_size) == ((64, 96), 128)
    assert model.roi_heads.has_mask() == name.startswith("mask")
    assert all(p.requires_grad for p in model.parameters())  # nothing is frozen without weights


def test_frozen_batch_norm_keeps_its_statistics(tiny):
    model = build_detector("fasterrcnn_tiny_fpn", len(CLASSES), frozen_bn=True)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in model.modules())
    assert isinstance(model.backbone.body.layer1[0].bn1, FrozenBatchNorm2d)
    counters = {k for k in tiny.state_dict() if k.endswith("num_batches_tracked")}
    assert tiny.state_dict().keys() - model.state_dict().keys() == counters != set()


def test_a_detectors_weights_but_for_other_classes(tiny, tmp_path):
    path = tmp_path / "detector.pth"
    torch.save({"model": {f"module.{k}": v for k, v in tiny.state_dict().items()}}, path)
    equal = build_detector("fasterrcnn_tiny_fpn", len(CLASSES))
    assert load_weights(equal, path) == [] and same(equal.state_dict(), tiny.state_dict())
    for frozen in (False, True):
        other = build_detector("fasterrcnn_tiny_fpn", 7, frozen_bn=frozen)
        fresh = load_weights(other, path)
        assert fresh == [
            f"roi_heads.box_predictor.{layer}.{kind}"
            for layer in ("bbox_pred", "cls_score")
            for kind in ("bias", "weight")
        ]
        assert torch.equal(other.roi_heads.box_head.fc6.weight, tiny.roi_heads.box_head.fc6.weight)


def test_a_resnets_weights_for_the_backbone(tmp_path):
    torch.manual_seed(1)
    resnet = torchvision.models.resnet18(weights=None)
    torch.save(resnet.state_dict(), tmp_path / "resnet18.pth")
    model = build_detector("fasterrcnn_resnet18_fpn", 2)
    random = load_weights(model, tmp_path / "resnet18.pth")
    assert random == sorted(
        name for name in model.state_dict() if not name.startswith("backbone.body.")
    )
    assert torch.equal(model.backbone.body.layer4[1].conv2.weight, resnet.layer4[1].conv2.weight)


def test_weights_that_do_not_fit_are_refused(tiny, tmp_path):
    state = tiny.state_dict()
    head = "roi_heads.box_head.fc6.weight"
    files = {
        "lacks 1 of them: roi_heads.box_head": {k: v for k, v in state.items() if k != head},
        "also has 1 of them: rpn.more": state | {"rpn.more": torch.zeros(1)},
        "in another shape 1 of them: roi_heads.box_head": state | {head: torch.zeros(1)},
        "lacks": {"backbone.body.conv1.weight": state["backbone.body.conv1.weight"]},
        "expected a state dict, bare or under model or state_dict, got list": [1, 2],
    }
    for i, (message, content) in enumerate(files.items()):
        path = tmp_path / f"{i}.pth"
        torch.save(content, path)
        with pytest.raises(ValueError, match=rf"{path}: .*{message}"):
            load_weights(tiny, path)


# ---- evaluation ----------------------------------------------------------------------------------


def test_a_perfect_detector_has_perfect_numbers(spec, tmp_path):
    torch.manual_seed(0)
    model = build_detector("fasterrcnn_tiny_fpn", len(CLASSES), min_size=[60])
    original = model.forward

    def perfect(images, targets):
        found = [{k: v.clone() for k, v in target.items()} for target in targets]
        original(images, targets)
        return [{**target, "scores": torch.ones(len(target["labels"]))} for target in found]

    model.forward = perfect
    images = DetectionImages(load_dataset(spec))
    alone = World(0, 1, torch.device("cpu"))
    results = evaluate(model, images, alone, batch_size=3, output_dir=tmp_path)
    confidence = results["confidence"]
    assert (results["bbox"]["AP"], confidence["d_ece"], confidence["aurc"]) == (100.0, 0.0, 0.0)
    rows = json.loads((tmp_path / "coco_instances_results.json").read_text())
    truth = images.dataset.coco["annotations"]
    keys = ("image_id", "category_id", "bbox")
    assert [[row[key] for key in keys] for row in rows] == [[a[key] for key in keys] for a in truth]


def test_the_true_boxes_are_scored_as_rois(spec):
    """Against torchvision's own inference, to which the true boxes are given as proposals."""
    torch.manual_seed(0)
    model = build_detector("fasterrcnn_tiny_fpn", len(CLASSES), min_size=[60]).eval()
    images = DetectionImages(load_dataset(spec))
    results = evaluate(model, images, World(0, 1, torch.device("cpu")), batch_size=3)
    nlls, hits = [], []
    for image, target in (images[i] for i in range(len(images))):
        prepared, (scaled,) = model.transform([image], [target])
        boxes, sizes = [scaled["boxes"]], prepared.image_sizes
        with torch.no_grad(), captured(model.roi_heads.box_predictor) as outputs:
            model.roi_heads(model.backbone(prepared.tensors), boxes, sizes)
        lprobs = outputs[0][0].double().log_softmax(dim=1)
        nlls += (-lprobs.gather(1, target["labels"][:, None])).flatten().tolist()
        hits += (lprobs.argmax(1) == target["labels"]).tolist()
    rois = results["ground_truth_rois"]
    assert rois["num_rois"] == len(nlls) == 14
    assert rois["nll"] == pytest.approx(np.mean(nlls), rel=1e-5)
    assert rois["accuracy"] == np.mean(hits)


# ---- learning rate, seeds, log -----------------------------------------------------------------


@pytest.mark.parametrize("warmup", [0, 3, 100])
def test_the_learning_rate_is_that_of_torchvisions_reference(warmup):
    length, steps = 5, [2, 3]
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.2)
    by_epoch = torch.optim.lr_scheduler.MultiStepLR(optimizer, steps, gamma=0.1)
    rate = LearningRate(0.2, warmup, steps, 0.1)
    for epoch in range(1, 5):
        by_iteration = None
        if epoch == 1 and warmup:
            by_iteration = torch.optim.lr_scheduler.LinearLR(
                optimizer, start_factor=1e-3, total_iters=min(warmup, length - 1)
            )
        for i in range(length):
            assert rate.at(epoch, i, length) == pytest.approx(optimizer.param_groups[0]["lr"])
            optimizer.step()
            if by_iteration is not None:
                by_iteration.step()
        by_epoch.step()


def test_an_epoch_of_one_iteration_needs_no_warm_up():
    assert LearningRate(0.2, 1000).at(1, 0, 1) == 0.2
