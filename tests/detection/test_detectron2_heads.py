"""The three ROI heads and their loss, on one batch of made images.

Shapes: R sampled ROIs of the batch, K foreground classes, K + 1 columns with background last.
"""

from __future__ import annotations

import copy
import logging
from collections import Counter
from types import SimpleNamespace

import detectron2_tiny as tiny
import pytest
import torch
import torch.nn.functional as F
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_model
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.modeling.roi_heads import FastRCNNOutputLayers
from detectron2.structures import Boxes, Instances
from detectron2.utils import logger as detectron2_logger
from detectron2.utils.events import EventStorage
from pskd_detectron2 import PSKDFastRCNNOutputLayers, Trainer
from pskd_detectron2.fast_rcnn import ROW_FIELD, TEACHER_FIELD
from pskd_detectron2.memory import AnnotationMemory
from pskd_detectron2.scoring import class_logits, class_probs
from pskd_detectron2.state import PSKDState

import pskd

KINDS = list(tiny.HEADS)
K = len(tiny.CLASSES)
ALPHA = 0.4
LOSS = {"cascade": "loss_cls_stage0"}


@pytest.fixture(scope="module")
def trainers(spec, tmp_path_factory):
    """A trainer of a kind with options and its first batch, made once."""
    built: dict = {}

    def get(kind: str, *opts: str) -> tuple[Trainer, list[dict]]:
        if (kind, opts) not in built:
            out = tmp_path_factory.mktemp(kind)
            trainer = Trainer(tiny.config(kind, out, *opts, train=spec))
            built[kind, opts] = trainer, next(iter(trainer.data_loader))
        return built[kind, opts]

    return get


@pytest.fixture
def scene(trainers):
    """A model, a batch of two images, and a teacher that differs from the student."""

    def make(kind: str, *opts: str, teacher: str = "snapshot") -> SimpleNamespace:
        options = (*opts, f"MODEL.PSKD.TEACHER {teacher}")
        trainer, batch = trainers(kind, *options)
        model = copy.deepcopy(trainer.model).train()
        heads = model.roi_heads
        if teacher == "memory":
            rows = trainer.model.roi_heads.pskd.memory.probs.size(0)
            heads.pskd.memory = AnnotationMemory(rows, K + 1, "")
            heads.pskd.rows_per_stage = trainer.model.roi_heads.pskd.rows_per_stage
        return SimpleNamespace(
            model=model, heads=heads, pskd=heads.pskd, batch=copy.deepcopy(batch)
        )

    return make


def students_past(model) -> torch.nn.ModuleDict:
    """The parts that the hook hands to the snapshot, with other weights than the student's."""
    past = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in past.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    return torch.nn.ModuleDict({"backbone": past.backbone, "roi_heads": past.roi_heads})


def taught(scene):
    """Give a scene's heads a teacher."""
    scene.pskd.snapshot.refresh(students_past(scene.model))
    scene.pskd.alpha = ALPHA
    return scene


def forward(scene, seed: int = 5) -> dict:
    """The losses of the batch; the same ROIs are sampled for the same seed."""
    torch.manual_seed(seed)
    with EventStorage(0) as scene.storage:
        return scene.model(scene.batch)


@pytest.fixture
def seen(monkeypatch) -> list:
    """What the stock ``losses`` was given, a call each: (predictor, scores, proposals)."""
    calls, original = [], FastRCNNOutputLayers.losses

    def spy(self, predictions, proposals):
        calls.append((self, predictions[0], proposals))
        return original(self, predictions, proposals)

    monkeypatch.setattr(FastRCNNOutputLayers, "losses", spy)
    return calls


def labels_of(proposals) -> torch.Tensor:
    return torch.cat([p.gt_classes for p in proposals])


def rows_of(proposals) -> torch.Tensor:
    """The row that each ROI carries; 0 in an image without annotations."""
    rows = [p.get(ROW_FIELD) if p.has(ROW_FIELD) else 0 * p.gt_classes for p in proposals]
    return torch.cat(rows)


# ---- stock -------------------------------------------------------------------------------------


def test_a_head_that_is_not_trained_with_pskd_has_the_stock_loss():
    """Not enabled, or in eval mode, whatever teacher and label smoothing there are."""
    states = [PSKDState(enabled, label_smoothing=0.1) for enabled in (False, True)]
    for state, training in zip(states, (True, False), strict=True):
        state.alpha = ALPHA
        layers = predictor(state).train(training)
        scores, deltas, image = rois()
        with EventStorage(0):
            loss = layers.losses((scores, deltas), [image])["loss_cls"]
        assert torch.equal(loss, F.cross_entropy(scores, image.gt_classes))


@pytest.mark.parametrize("kind", KINDS)
def test_only_the_classification_loss_changes(kind, scene):
    s = scene(kind)
    without = forward(s)
    taught(s)
    with_teacher = forward(s)
    assert without.keys() == with_teacher.keys()
    changed = {name for name in without if not torch.equal(without[name], with_teacher[name])}
    expected = {name for name in without if name.startswith("loss_cls")}
    # Later stages of a cascade pool from features that did not change either.
    assert changed == expected


# ---- snapshot ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_is_cross_entropy_with_the_mixed_target(kind, scene, seen, spec, tmp_path):
    """Of what the teacher says of the student's own ROIs, in their order."""
    s = scene(kind)
    past = students_past(s.model)
    s.pskd.snapshot.refresh(past)
    s.pskd.alpha = ALPHA
    losses = forward(s)
    # The same weights in a stock model, which knows nothing of teachers.
    cfg = tiny.config(kind, tmp_path, tiny.stock(kind), train=spec)
    stock = build_model(cfg).eval()
    state = {f"{part}.{key}": v for part in past for key, v in past[part].state_dict().items()}
    stock.load_state_dict(state, strict=False)
    with torch.no_grad():
        features = stock.backbone(stock.preprocess_image(s.batch).tensor)
    for stage, (_, scores, proposals) in enumerate(seen):
        with torch.no_grad():
            probs = stock_scores(kind, stock.roi_heads, features, proposals, stage).softmax(1)
        target = pskd.mix_targets(labels_of(proposals), probs, ALPHA)
        expected = F.cross_entropy(scores, target)
        name = f"loss_cls_stage{stage}" if kind == "cascade" else "loss_cls"
        assert losses[name].item() == pytest.approx(expected.item(), rel=1e-5)
        assert not torch.isclose(expected, F.cross_entropy(scores, labels_of(proposals)))


def stock_scores(kind, heads, features, proposals, stage):
    boxes = [p.proposal_boxes for p in proposals]
    if kind == "c4":
        pooled = heads.res5(heads.pooler([features["res4"]], boxes)).mean(dim=[2, 3])
        return heads.box_predictor(pooled)[0]
    pooled = heads.box_pooler([features[name] for name in heads.box_in_features], boxes)
    if kind == "cascade":
        return heads.box_predictor[stage](heads.box_head[stage](pooled))[0]
    return heads.box_predictor(heads.box_head(pooled))[0]


def test_the_loss_keeps_its_weight(scene):
    plain, weighted = scene("fpn"), scene("fpn")
    weighted.heads.box_predictor.loss_weight = {"loss_cls": 3.0}
    found = []
    for s in (plain, weighted):
        found.append(forward(taught(s))["loss_cls"].item())
    assert found[1] == pytest.approx(3.0 * found[0])


def test_foreground_only_leaves_background_its_hard_target(scene, seen):
    s = taught(scene("fpn", "MODEL.PSKD.FOREGROUND_ONLY True"))
    loss = forward(s)["loss_cls"]
    _, scores, proposals = seen[0]
    labels = labels_of(proposals)
    teacher = torch.cat([p.get(TEACHER_FIELD) for p in proposals]).softmax(1)
    assert 0 < (labels < K).sum() < len(labels)
    target = pskd.mix_targets(labels, teacher, (labels < K) * ALPHA)
    assert loss.item() == pytest.approx(F.cross_entropy(scores, target).item(), rel=1e-5)


def test_label_smoothing_is_torchs_and_of_the_hard_part(scene, seen):
    s = scene("fpn", "MODEL.PSKD.LABEL_SMOOTHING 0.1")
    hard = forward(s)["loss_cls"]
    _, scores, proposals = seen[0]
    labels = labels_of(proposals)
    smoothed = F.cross_entropy(scores, labels, label_smoothing=0.1)
    assert hard.item() == pytest.approx(smoothed.item(), rel=1e-5)
    taught(s)
    soft = forward(s)["loss_cls"]
    _, scores, proposals = seen[1]
    teacher = torch.cat([p.get(TEACHER_FIELD) for p in proposals]).softmax(1)
    target = pskd.mix_targets(labels_of(proposals), teacher, ALPHA, label_smoothing=0.1)
    assert soft.item() == pytest.approx(F.cross_entropy(scores, target).item(), rel=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_the_teacher_gets_no_gradient_and_is_no_part_of_the_model(kind, scene):
    s = scene(kind)
    before = set(s.model.state_dict()), len(list(s.model.parameters()))
    taught(s)
    statistics = {key: value.clone() for key, value in s.pskd.snapshot.model.state_dict().items()}
    assert any("running_mean" in key for key in statistics)
    sum(forward(s).values()).backward()
    s.model.train()
    teacher = s.pskd.snapshot.model
    assert tiny.differing(statistics, teacher.state_dict()) == []
    assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())
    assert not any(module.training for module in teacher.modules())
    assert (set(s.model.state_dict()), len(list(s.model.parameters()))) == before
    assert any(p.grad is not None and p.grad.abs().sum() for p in s.heads.parameters())


def test_a_copy_of_the_model_drags_no_teacher_along(scene):
    s = taught(scene("fpn"))
    other = copy.deepcopy(s.model)
    assert not other.roi_heads.pskd.snapshot.available
    assert other.roi_heads.box_predictor.pskd is other.roi_heads.pskd
    assert not s.pskd.snapshot.model["roi_heads"].pskd.snapshot.available


@pytest.mark.parametrize("kind", ["fpn", "c4", "cascade"])
def test_under_autocast_the_teacher_works_in_the_students_precision(kind, scene, seen):
    s = taught(scene(kind))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = forward(s)[LOSS.get(kind, "loss_cls")]
    _, scores, proposals = seen[0]
    assert scores.dtype == torch.bfloat16
    assert all(p.get(TEACHER_FIELD).dtype == torch.bfloat16 for p in proposals)
    assert loss.dtype == torch.float32 and loss.isfinite()


def test_in_eval_mode_the_heads_are_stock(scene):
    s = scene("fpn")
    s.model.eval()
    plain = s.model(s.batch)
    taught(s)
    again = s.model(s.batch)
    for left, right in zip(plain, again, strict=True):
        assert torch.equal(left["instances"].scores, right["instances"].scores)


def test_boxes_are_scored_as_in_inference(scene):
    """The classes of a sigmoid head each for itself, and no background."""
    s = scene("fpn", "MODEL.ROI_BOX_HEAD.USE_SIGMOID_CE True")
    s.model.eval()
    _, _, proposals = rois()
    features = s.model.backbone(s.model.preprocess_image(s.batch[:1]).tensor)
    with torch.no_grad():
        scores = class_logits(s.heads, features, [proposals])
        probs = class_probs(s.heads, features, [proposals])
    assert torch.equal(probs[:, :K], scores[:, :K].sigmoid()) and not probs[:, K].any()


# ---- memory ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_the_memory_holds_the_mean_of_the_rois_of_each_annotation(kind, scene, seen):
    s = scene(kind, teacher="memory")
    forward(s)
    s.pskd.memory.next_epoch()
    count = s.pskd.rows_per_stage
    for stage, (_, scores, proposals) in enumerate(seen):
        probs, labels = scores.detach().softmax(1), labels_of(proposals)
        rows = rows_of(proposals)
        foreground = labels < K
        assert foreground.any()
        part = slice(stage * count, (stage + 1) * count)
        expected_seen = torch.zeros(count, dtype=torch.bool)
        expected_seen[rows[foreground].unique()] = True
        assert torch.equal(s.pskd.memory.seen[part], expected_seen)
        for row in rows[foreground].unique().tolist():
            mean = probs[foreground & (rows == row)].mean(0)
            assert torch.allclose(s.pskd.memory.probs[part][row], mean, atol=1e-6)
        # An annotation's ROIs have its class.
        for row in rows[foreground].unique().tolist():
            assert len(labels[foreground & (rows == row)].unique()) == 1


@pytest.mark.parametrize("kind", ["fpn", "cascade"])
def test_with_a_memory_foreground_learns_from_its_annotations_past(kind, scene, seen):
    s = scene(kind, teacher="memory")
    forward(s)
    s.pskd.memory.next_epoch()
    s.pskd.memory.seen[::2] = False  # as if no ROI had been matched to every other annotation
    s.pskd.memory.probs[::2] = 0.0
    s.pskd.alpha = ALPHA
    seen.clear()
    losses = forward(s, seed=6)
    for stage, (_, scores, proposals) in enumerate(seen):
        labels, rows = labels_of(proposals), rows_of(proposals)
        past, known = s.pskd.memory.read(rows + stage * s.pskd.rows_per_stage)
        weight = ((labels < K) & known) * ALPHA
        assert weight.any() and ((labels < K) & ~known).any() and (labels == K).any()
        expected = F.cross_entropy(scores, pskd.mix_targets(labels, past, weight))
        name = f"loss_cls_stage{stage}" if kind == "cascade" else "loss_cls"
        assert losses[name].item() == pytest.approx(expected.item(), rel=1e-5)


def test_what_an_epoch_writes_is_read_in_the_next_one_only():
    memory, nan = AnnotationMemory(4, 2, "set"), float("nan")
    probs = [[0.2, 0.8], [0.4, 0.6], [nan, nan], [1.0, 0.0], [nan, 1.0]]
    kept = torch.tensor([True, True, False, False, True])  # of row 3 what is not finite
    memory.write(torch.tensor([1, 1, 1, 2, 3]), torch.tensor(probs), kept)
    assert not memory.read(torch.arange(4))[1].any()
    memory.next_epoch()
    past, known = memory.read(torch.arange(4))
    assert known.tolist() == [False, True, False, False] and past.isfinite().all()
    assert torch.allclose(past[1], torch.tensor([0.3, 0.7]))
    memory.next_epoch()  # nothing written: the last prediction stays
    assert memory.read(torch.tensor([1]))[1].all()


def test_a_memory_comes_back_whole_or_not_at_all():
    memory, other, untouched = (AnnotationMemory(3, 2, "set") for _ in range(3))
    memory.write(torch.arange(3), torch.full((3, 2), 0.5), torch.ones(3, dtype=torch.bool))
    memory.next_epoch()
    state = memory.state_dict()
    other.load_state_dict(state)
    assert torch.equal(other.probs, memory.probs) and other.state_dict()["crc32"] == state["crc32"]
    state["probs"][0, 0] += 1.0
    with pytest.raises(ValueError, match="damaged: expected CRC-32"):
        untouched.load_state_dict(state)
    assert not untouched.probs.any()


def test_the_rows_survive_flips_crops_and_filters(spec, tmp_path):
    opts = (
        "MODEL.PSKD.TEACHER memory INPUT.CROP.ENABLED True INPUT.CROP.TYPE absolute "
        "INPUT.CROP.SIZE [40,40] DATALOADER.NUM_WORKERS 2"
    )
    trainer = Trainer(tiny.config("fpn", tmp_path, opts, train=spec))
    classes = {}
    for record in trainer._records:
        for annotation in record["annotations"]:
            classes[annotation["pskd_row"]] = annotation["category_id"]
    stream, found, fewest = iter(trainer.data_loader), {}, 2
    for _ in range(12):
        for image in next(stream):
            instances = image["instances"]
            fewest = min(fewest, len(instances))
            found |= dict(zip(instances.get(ROW_FIELD).tolist(), instances.gt_classes.tolist(),
                              strict=True))  # fmt: skip
    assert fewest < 2  # a crop has lost an annotation
    assert len(found) > len(classes) // 2
    assert all(classes[row] == label for row, label in found.items())


# ---- edges -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("teacher", ["snapshot", "memory"])
def test_images_without_annotations_have_a_loss_with_a_gradient(kind, teacher, scene):
    s = scene(kind, teacher=teacher)
    forward(s)
    if teacher == "memory":
        s.pskd.memory.next_epoch()
    else:
        taught(s)
    for image in s.batch:  # no foreground ROI in the whole batch
        image["instances"] = image["instances"][:0]
    losses = forward(s)
    loss = losses[LOSS.get(kind, "loss_cls")]
    assert loss.isfinite() and loss.grad_fn is not None
    sum(losses.values()).backward()
    grads = [p.grad for p in s.heads.parameters() if p.grad is not None]
    assert grads and all(grad.isfinite().all() for grad in grads)


def test_no_roi_at_all_is_a_loss_of_0_in_the_graph():
    state = PSKDState()
    layers = predictor(state)
    state.alpha = ALPHA
    scores = torch.zeros(0, K + 1, requires_grad=True)
    deltas = torch.zeros(0, 4 * K, requires_grad=True)
    empty = Instances((10, 10))
    empty.proposal_boxes, empty.gt_boxes = Boxes(torch.zeros(0, 4)), Boxes(torch.zeros(0, 4))
    empty.gt_classes = torch.zeros(0, dtype=torch.int64)
    empty.set(TEACHER_FIELD, torch.zeros(0, K + 1))
    with EventStorage(0):
        loss = layers.losses((scores, deltas), [empty])["loss_cls"]
    assert loss.item() == 0.0
    loss.backward()
    assert scores.grad.shape == (0, K + 1)


def predictor(state: PSKDState, **options) -> PSKDFastRCNNOutputLayers:
    stock = FastRCNNOutputLayers(
        ShapeSpec(channels=8),
        box2box_transform=Box2BoxTransform(weights=(10, 10, 5, 5)),
        num_classes=K,
        **options,
    )
    return PSKDFastRCNNOutputLayers.of(stock, state)


def rois(count: int = 12) -> tuple[torch.Tensor, torch.Tensor, Instances]:
    """Scores, deltas and one image's proposals with the teacher's scores, all made."""
    torch.manual_seed(2)
    boxes = torch.rand(count, 4) * 20
    boxes[:, 2:] += boxes[:, :2] + 5
    image = Instances((50, 50))
    image.proposal_boxes, image.gt_boxes = Boxes(boxes), Boxes(boxes + 1)
    image.gt_classes = torch.arange(count) % (K + 1)
    image.set(TEACHER_FIELD, torch.randn(count, K + 1))
    scores = torch.randn(count, K + 1, requires_grad=True)
    return scores, torch.randn(count, 4 * K), image


def test_a_sigmoid_head_learns_from_the_mixed_binary_targets():
    state = PSKDState()
    state.alpha = ALPHA
    layers = predictor(state, use_sigmoid_ce=True, loss_weight={"loss_cls": 2.0})
    state.snapshot.refresh(torch.nn.Identity())
    scores, deltas, image = rois()
    with EventStorage(0) as storage:
        loss = layers.losses((scores, deltas), [image])["loss_cls"]
    hard = F.one_hot(image.gt_classes, K + 1)[:, :K].float()
    target = (1 - ALPHA) * hard + ALPHA * image.get(TEACHER_FIELD)[:, :K].sigmoid()
    bce = F.binary_cross_entropy_with_logits(scores[:, :K], target, reduction="sum")
    assert loss.item() == pytest.approx(2.0 * bce.item() / len(image), rel=1e-5)
    (grad,) = torch.autograd.grad(loss, scores)
    expected = 2.0 * (scores[:, :K].sigmoid() - target) / len(image)
    assert torch.allclose(grad[:, :K], expected, atol=1e-6) and not grad[:, K].any()
    assert storage.latest()["pskd/teacher_nll"][0] > 0


@pytest.mark.parametrize("use_sigmoid_ce", [False, True])
def test_a_teacher_of_rois_that_are_not_softened_may_say_anything(use_sigmoid_ce):
    state = PSKDState(foreground_only=True)
    state.alpha = ALPHA
    layers = predictor(state, use_sigmoid_ce=use_sigmoid_ce)
    state.snapshot.refresh(torch.nn.Identity())
    losses = []
    for past in (0.0, float("nan")):
        scores, deltas, image = rois()
        image.get(TEACHER_FIELD)[image.gt_classes == K] = past
        with EventStorage(0):
            losses.append(layers.losses((scores, deltas), [image])["loss_cls"])
        losses += torch.autograd.grad(losses[-1], scores)
    assert torch.equal(losses[0], losses[2]) and torch.equal(losses[1], losses[3])


def test_the_federated_loss_softens_the_sampled_classes_only():
    state = PSKDState()
    state.alpha = ALPHA
    layers = predictor(
        state,
        use_sigmoid_ce=True,
        use_fed_loss=True,
        get_fed_loss_cls_weights=lambda: torch.tensor([1.0, 1.0]),
        fed_loss_num_classes=1,
    )
    scores, deltas, image = rois()
    image.gt_classes = torch.tensor([0, K] * 6)  # the other class is not sampled
    with EventStorage(0):
        loss = layers.losses((scores, deltas), [image])["loss_cls"]
    hard = F.one_hot(image.gt_classes, K + 1)[:, :1].float()
    target = (1 - ALPHA) * hard + ALPHA * image.get(TEACHER_FIELD)[:, :1].sigmoid()
    bce = F.binary_cross_entropy_with_logits(scores[:, :1], target, reduction="sum")
    assert loss.item() == pytest.approx(bce.item() / len(image), rel=1e-5)


@pytest.mark.parametrize("is_driven", [False, True])
def test_heads_that_no_hook_drives_say_so_once(is_driven, caplog, monkeypatch):
    monkeypatch.setattr(detectron2_logger, "_LOG_COUNTER", Counter())
    state = PSKDState()
    state.is_driven = is_driven
    scores, deltas, image = rois()
    layers = predictor(state)
    with EventStorage(0), caplog.at_level(logging.WARNING):
        for _ in range(2):
            layers.losses((scores, deltas), [image])
    assert caplog.text.count("has no PSKDHook") == (0 if is_driven else 1)


def test_what_is_logged():
    state = PSKDState(foreground_only=True)
    state.alpha = ALPHA
    layers = predictor(state)
    scores, deltas, image = rois()
    with EventStorage(0) as storage:
        layers.losses((scores, deltas), [image])
        logged = {key: value for key, (value, _) in storage.latest().items()}
    rows = image.gt_classes < K
    labels = image.gt_classes[rows]
    student = scores.detach().softmax(1)[rows]
    teacher = image.get(TEACHER_FIELD).softmax(1)[rows]
    assert logged["pskd/teacher_nll"] == pytest.approx(F.nll_loss(teacher.log(), labels).item())
    agree = (student.argmax(1) == teacher.argmax(1)).float().mean()
    assert logged["pskd/teacher_agreement"] == pytest.approx(agree.item())
    at_label = student.gather(1, labels[:, None])[:, 0]
    factor = pskd.gradient_rescaling(at_label, teacher.gather(1, labels[:, None])[:, 0], ALPHA)
    mean = (factor * (1 - at_label)).sum() / (1 - at_label).sum()
    assert logged["pskd/gradient_rescaling"] == pytest.approx(mean.item(), abs=1e-5)
