"""PSKDRoIHeads, its teacher and PSKDEpochs: what the loss is, and what stays torchvision's own."""

from __future__ import annotations

import copy
import io
import logging
import threading

import pytest
import torch
import torch.nn.functional as F
from pskd_torchvision import PSKDEpochs, PSKDRoIHeads, add_pskd, build_detector, roi_heads
from pskd_torchvision.roi_heads import captured
from torch import nn
from torchvision.models.detection import FasterRCNN, retinanet_resnet50_fpn
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.ops import MultiScaleRoIAlign
from torchvision_toys import CLASSES, batch, same

from pskd import cosine_alpha, gradient_rescaling, linear_alpha, mix_targets

ALPHA = 0.6


@pytest.fixture(scope="module")
def stock() -> nn.Module:
    """A detector of torchvision's own, whose images are also resized at random."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    return build_detector("fasterrcnn_tiny_fpn", len(CLASSES), min_size=[72, 96])


@pytest.fixture
def plain(stock) -> nn.Module:
    return copy.deepcopy(stock).train()


@pytest.fixture
def student(plain) -> nn.Module:
    return add_pskd(plain)


def with_teacher(model: nn.Module, alpha: float = ALPHA) -> nn.Module:
    """Give the model a teacher that differs from it, as after an epoch; return the model."""
    epochs = PSKDEpochs(model, num_epochs=2, alpha_final=alpha, alpha_schedule="constant")
    epochs.begin_epoch(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.05)
        model.roi_heads.box_predictor.cls_score.bias.copy_(torch.tensor([0.3, -0.2, 0.1]))
    epochs.begin_epoch(2)
    with torch.no_grad():
        model.roi_heads.box_predictor.cls_score.weight.mul_(-1.0)
        model.roi_heads.box_predictor.cls_score.bias.zero_()
    return model


def step(model: nn.Module, data=None, seed: int = 1) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    return model(*(data or batch(masks=model.roi_heads.has_mask())))


class Seen:
    """What one step hands to the loss, and what both models are asked."""

    def __init__(self, model: nn.Module, monkeypatch, **kwargs) -> None:
        self.boxes = {}
        calls = []
        original = roi_heads.pskd_cross_entropy

        def spy(logits, target, teacher_probs, alpha, **options):
            calls.append((logits, target, teacher_probs, alpha))
            return original(logits, target, teacher_probs, alpha, **options)

        monkeypatch.setattr(roi_heads, "pskd_cross_entropy", spy)
        teacher = model.roi_heads.pskd.snapshot.model
        handles = []
        for name, part in (("student", model), ("teacher", teacher)):
            heads = part.roi_heads if name == "student" else part["roi_heads"]
            backbone = part.backbone if name == "student" else part["backbone"]
            for key, module in (("pool", heads.box_roi_pool), ("backbone", backbone)):
                handles.append(module.register_forward_pre_hook(self._keep(name, key)))
        self.losses = step(model, **kwargs)
        for handle in handles:
            handle.remove()
        ((self.logits, self.labels, self.past, self.alpha),) = calls

    def _keep(self, name, key):
        def hook(_module, args):
            self.boxes[name, key] = args

        return hook


# ---- torchvision's own loss ------------------------------------------------------------------


@pytest.mark.parametrize("alpha, teacher", [(0.0, False), (ALPHA, False), (0.0, True)])
def test_without_alpha_or_teacher_training_is_torchvisions_bit_for_bit(stock, alpha, teacher):
    runs = []
    for model in (copy.deepcopy(stock).train(), add_pskd(copy.deepcopy(stock).train())):
        if isinstance(model.roi_heads, PSKDRoIHeads):
            pskd = model.roi_heads.pskd
            pskd.alpha = alpha
            if teacher:
                parts = {"backbone": model.backbone, "roi_heads": model.roi_heads}
                pskd.snapshot.refresh(nn.ModuleDict(parts))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
        losses = []
        for i in range(3):
            losses.append(step(model, seed=i))
            optimizer.zero_grad()
            sum(losses[-1].values()).backward()
            optimizer.step()
        runs.append((losses, model.state_dict()))
    (expected, weights), (losses, own) = runs
    assert all(same(a, b) for a, b in zip(expected, losses, strict=True))
    assert same(weights, own)


@pytest.mark.parametrize("kind", ["fasterrcnn", "maskrcnn"])
def test_with_a_teacher_only_the_classifiers_loss_changes(kind):
    torch.manual_seed(0)
    model = add_pskd(build_detector(f"{kind}_tiny_fpn", len(CLASSES), min_size=[72, 96]).train())
    expected = step(copy.deepcopy(with_teacher(model)))  # a copy has no teacher
    losses = step(model)
    assert losses.keys() == expected.keys() and ("loss_mask" in losses) == (kind == "maskrcnn")
    changed = {name for name in losses if not torch.equal(losses[name], expected[name])}
    assert changed == {"loss_classifier"}
    sum(losses.values()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_detections_do_not_change(student):
    images, _ = batch()
    model = with_teacher(student).eval()
    expected = copy.deepcopy(model)
    expected.roi_heads.__class__ = RoIHeads
    for own, other in zip(model(images), expected(images), strict=True):
        assert same(own, other)
    assert model.roi_heads.pskd.images is None


# ---- PS-KD's loss ----------------------------------------------------------------------------


@pytest.mark.parametrize("foreground_only", [False, True])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_loss_is_cross_entropy_with_the_mixed_target(
    plain, monkeypatch, foreground_only, smoothing
):
    model = add_pskd(plain, foreground_only=foreground_only, label_smoothing=smoothing)
    seen = Seen(with_teacher(model), monkeypatch)
    assert 0 < int((seen.labels > 0).sum()) < len(seen.labels)
    softened = seen.labels > 0 if foreground_only else torch.ones(len(seen.labels))
    soft_target = mix_targets(
        seen.labels, seen.past, ALPHA * softened.float(), label_smoothing=smoothing
    )
    expected = F.cross_entropy(seen.logits, soft_target)
    torch.testing.assert_close(seen.losses["loss_classifier"], expected)
    hard = F.cross_entropy(seen.logits, seen.labels)
    assert not torch.isclose(hard, expected, atol=1e-3)
    weight = model.roi_heads.box_predictor.cls_score.weight
    own, other = (
        torch.autograd.grad(loss, weight, retain_graph=True)[0]
        for loss in (seen.losses["loss_classifier"], expected)
    )
    torch.testing.assert_close(own, other)


def test_label_smoothing_alone_is_torchs(plain):
    model = add_pskd(plain, label_smoothing=0.2)
    with captured(model.roi_heads.box_predictor) as outputs:
        loss = step(model)["loss_classifier"]
    model.roi_heads.pskd.label_smoothing = 0.0
    sampled = []
    original = RoIHeads.select_training_samples
    model.roi_heads.select_training_samples = lambda *a: (
        sampled.append(original(model.roi_heads, *a)) or sampled[-1]
    )
    step(model)  # the same seed: the same sample
    labels = torch.cat(sampled[0][2])
    torch.testing.assert_close(loss, F.cross_entropy(outputs[0][0], labels, label_smoothing=0.2))


def test_the_teachers_probabilities_are_those_of_last_epochs_model(stock, monkeypatch):
    """Computed anew by torchvision's own inference on the student's images and boxes."""
    model = add_pskd(copy.deepcopy(stock).train())
    epochs = PSKDEpochs(model, num_epochs=2, alpha_final=ALPHA)
    epochs.begin_epoch(1)
    step(model)  # batch norm's statistics are no longer those of the start
    last = copy.deepcopy(model).eval()
    last.roi_heads.__class__ = RoIHeads
    epochs.begin_epoch(2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01)
    seen = Seen(model, monkeypatch)
    images = seen.boxes["student", "backbone"][0]
    _, boxes, shapes = seen.boxes["student", "pool"]
    with torch.no_grad(), captured(last.roi_heads.box_predictor) as outputs:
        last.roi_heads(last.backbone(images), boxes, shapes)
    torch.testing.assert_close(seen.past, outputs[0][0].softmax(dim=1), rtol=0, atol=1e-6)
    assert not torch.allclose(seen.past, seen.logits.softmax(dim=1), atol=1e-3)
    assert seen.alpha.unique().item() == pytest.approx(ALPHA)


def test_no_gradient_reaches_the_teacher(student, monkeypatch):
    seen = Seen(with_teacher(student), monkeypatch)
    sum(seen.losses.values()).backward()
    teacher = student.roi_heads.pskd.snapshot.model
    assert not seen.past.requires_grad
    assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())
    assert not any(part.training for part in teacher.modules())
    assert all(p.grad is not None for p in student.parameters())


@pytest.mark.parametrize("foreground_only", [False, True])
def test_what_is_logged_of_the_teacher(plain, monkeypatch, foreground_only):
    """Of foreground_only the means are over the foreground."""
    model = with_teacher(add_pskd(plain, foreground_only=foreground_only))
    seen = Seen(model, monkeypatch)
    rows = torch.arange(len(seen.labels))[(seen.labels > 0) | (not foreground_only)]
    labels, logits, past = seen.labels[rows], seen.logits.detach()[rows], seen.past[rows]
    student_p = logits.softmax(dim=1).gather(1, labels[:, None])[:, 0]
    teacher_p = past.gather(1, labels[:, None])[:, 0]
    means = model.roi_heads.pskd.means.take()
    agreement = (logits.argmax(1) == past.argmax(1)).float().mean()
    # Weighted by the plain gradient, the mean of the factors is that of the gradients.
    factors = gradient_rescaling(student_p, teacher_p, ALPHA)
    rescaling = (factors * (1 - student_p)).sum() / (1 - student_p).sum()
    assert means == {
        "pskd/teacher_nll": pytest.approx(float(-teacher_p.log().mean()), rel=1e-5),
        "pskd/teacher_agreement": pytest.approx(float(agreement)),
        "pskd/gradient_rescaling": pytest.approx(float(rescaling), rel=1e-5),
    }
    assert model.roi_heads.pskd.means.take() == {}


# ---- edges -------------------------------------------------------------------------------------


@pytest.mark.parametrize("foreground_only", [False, True])
def test_a_batch_without_any_object_stays_in_the_graph(plain, foreground_only):
    model = with_teacher(add_pskd(plain, foreground_only=foreground_only))
    images, targets = batch()
    losses = step(model, (images[1:], targets[1:]))
    sum(losses.values()).backward()
    assert all(value.isfinite() for value in losses.values())
    gradients = [p.grad for p in model.roi_heads.box_predictor.parameters()]
    assert all(g is not None and g.isfinite().all() for g in gradients)
    assert model.roi_heads.box_predictor.cls_score.weight.grad.abs().sum() > 0
    means = model.roi_heads.pskd.means.take()
    assert ("pskd/teacher_nll" in means) != foreground_only  # a mean of nothing is left out


def test_no_roi_at_all_is_a_loss_of_zero_in_the_graph(student):
    model = with_teacher(student)
    images, targets = batch()
    model.roi_heads.pskd.images = torch.stack(images[:1])
    features = model.backbone(torch.stack(images[:1]))
    _, losses = model.roi_heads(features, [torch.zeros(0, 4)], [(96, 96)], targets[1:])
    loss = losses["loss_classifier"]
    loss.backward()
    assert float(loss.detach()) == 0.0
    assert float(model.roi_heads.box_predictor.cls_score.weight.grad.abs().sum()) == 0.0


def test_a_backbone_with_a_single_map():
    torch.manual_seed(0)
    backbone = nn.Sequential(nn.Conv2d(3, 8, 3, stride=8, padding=1), nn.ReLU())
    backbone.out_channels = 8
    model = FasterRCNN(
        backbone,
        num_classes=3,
        min_size=96,
        rpn_anchor_generator=AnchorGenerator(((32,),), ((0.5, 1.0, 2.0),)),
        box_roi_pool=MultiScaleRoIAlign(["0"], output_size=7, sampling_ratio=1),
        box_batch_size_per_image=16,
    )
    step(with_teacher(add_pskd(model).train()))
    assert model.roi_heads.pskd.means.take()["pskd/teacher_nll"] > 0.0


def test_mixed_precision_takes_the_teacher_with_it(student, monkeypatch):
    model = with_teacher(student)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        seen = Seen(model, monkeypatch)
    images = seen.boxes["student", "backbone"][0]
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        features = model.roi_heads.pskd.snapshot.model["backbone"](images)
    features_seen, _, _ = seen.boxes["teacher", "pool"]
    assert features_seen["0"].dtype == features["0"].dtype == torch.bfloat16
    assert torch.equal(features_seen["0"], features["0"])
    assert seen.past.dtype == seen.losses["loss_classifier"].dtype == torch.float32
    sum(seen.losses.values()).backward()


def test_a_transform_that_was_replaced_is_missed(student):
    model = with_teacher(student)
    model.transform = copy.deepcopy(model.transform)
    model.transform._forward_hooks.clear()
    with pytest.raises(RuntimeError, match="transform that the model had in add_pskd"):
        step(model)


# ---- what the model carries --------------------------------------------------------------------


def test_the_teacher_is_no_part_of_the_model(stock, student):
    model = with_teacher(student)
    assert model.state_dict().keys() == stock.state_dict().keys()
    assert len(list(model.parameters())) == len(list(stock.parameters()))
    assert len(list(model.modules())) == len(list(stock.modules()))
    assert isinstance(model.roi_heads, RoIHeads)


def pickled(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, pickled])
def test_a_copy_of_the_model_has_its_own_state_and_no_teacher(student, copied):
    model = with_teacher(student)
    other = copied(model)
    assert model.roi_heads.pskd.snapshot.available
    assert other.roi_heads.pskd is not model.roi_heads.pskd
    assert not other.roi_heads.pskd.snapshot.available and other.roi_heads.pskd.alpha == 0.0
    with_teacher(other)
    step(other)  # its hook hands the images to its own state
    assert model.roi_heads.pskd.means.take() == {}
    assert other.roi_heads.pskd.means.take()["pskd/teacher_nll"] > 0.0


def test_the_teacher_holds_neither_a_teacher_nor_images(student):
    model = with_teacher(student)
    step(model)
    teacher = model.roi_heads.pskd.snapshot.model["roi_heads"]
    assert not teacher.pskd.snapshot.available
    assert model.roi_heads.pskd.images is None and teacher.pskd.images is None
    assert model.roi_heads._sampled is None


def test_heads_without_add_pskd_train_as_stock(stock, plain):
    plain.roi_heads.__class__ = PSKDRoIHeads
    assert same(step(plain), step(copy.deepcopy(stock).train()))
    assert plain.roi_heads._sampled is None


# ---- what is refused -------------------------------------------------------------------------


class ForeignHeads(RoIHeads):
    """Somebody's own loss."""


def test_models_that_cannot_have_pskd_are_refused(plain):
    retina = retinanet_resnet50_fpn(weights=None, weights_backbone=None, num_classes=2)
    for model in (retina, nn.Sequential(plain), plain.backbone):
        with pytest.raises(ValueError, match=f"with RoIHeads .* got {type(model).__name__}"):
            add_pskd(model)
    plain.roi_heads.__class__ = ForeignHeads
    with pytest.raises(ValueError, match="expected RoIHeads or .* got ForeignHeads"):
        add_pskd(plain)
    assert type(plain.roi_heads) is ForeignHeads
    plain.roi_heads.__class__ = RoIHeads
    with pytest.raises(ValueError, match="got one that has it already"):
        add_pskd(add_pskd(plain))


# ---- epochs --------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule, function", [("linear", linear_alpha), ("cosine", cosine_alpha)])
def test_alpha_follows_the_schedule_and_the_teacher_the_model(student, schedule, function, caplog):
    epochs = PSKDEpochs(student, num_epochs=4, alpha_final=ALPHA, alpha_schedule=schedule)
    pskd = student.roi_heads.pskd
    caplog.set_level(logging.INFO)
    for epoch in range(1, 5):
        student.backbone.fpn.layer_blocks[0][0].bias.data.fill_(epoch)
        student.backbone.body.bn1.running_mean.fill_(epoch)
        epochs.begin_epoch(epoch)
        # There is nothing to learn from in the first epoch.
        assert pskd.alpha == (function(epoch, 4, ALPHA) if epoch > 1 else 0.0)
        assert pskd.snapshot.available == (epoch > 1)
        assert epochs.take_means() == {"pskd/alpha": pskd.alpha}
        if epoch > 1:
            assert same(pskd.snapshot.model["backbone"].state_dict(), student.backbone.state_dict())
            assert same(
                pskd.snapshot.model["roi_heads"].state_dict(), student.roi_heads.state_dict()
            )
    assert f"epoch 4 of 4, alpha {ALPHA:.4f}" in caplog.text


def test_a_mean_of_weights_goes_on_after_a_resume(student):
    def turned(epochs: PSKDEpochs, model, numbers) -> None:
        for epoch in numbers:
            model.backbone.fpn.layer_blocks[0][0].bias.data.fill_(epoch)
            epochs.begin_epoch(epoch)

    def mean() -> torch.Tensor:
        teacher = student.roi_heads.pskd.snapshot.model
        return teacher["backbone"].fpn.layer_blocks[0][0].bias.clone()

    options = {"num_epochs": 4, "alpha_final": ALPHA, "teacher": "ema"}
    turned(straight := PSKDEpochs(student, **options), student, (1, 2, 3))
    state = straight.state_dict()
    turned(straight, student, (4,))
    # What the teacher turned to at the beginning of the epochs 2, 3 and 4.
    expected = mean()
    assert torch.allclose(expected, torch.tensor(0.25 * 2 + 0.25 * 3 + 0.5 * 4))
    resumed = PSKDEpochs(student, **options)
    resumed.load_state_dict(state)
    turned(resumed, student, (4,))
    assert torch.equal(mean(), expected)
    with pytest.raises(ValueError, match="teacher: expected 'ema', with which the checkpoint"):
        PSKDEpochs(student, **(options | {"teacher": "snapshot"})).load_state_dict(state)


def test_without_alpha_there_is_never_a_teacher(student):
    epochs = PSKDEpochs(student, num_epochs=2, alpha_final=0.0)
    epochs.begin_epoch(1)
    epochs.begin_epoch(2)
    assert not student.roi_heads.pskd.snapshot.available
    assert epochs.take_means() == {}


def test_a_model_that_cannot_be_copied_is_refused_when_its_epochs_are_made(student):
    student.roi_heads.lock = threading.Lock()
    with pytest.raises(ValueError, match="got PSKDRoIHeads 'roi_heads' with the attribute 'lock'"):
        PSKDEpochs(student, num_epochs=2)
    PSKDEpochs(student, num_epochs=2, alpha_final=0.0)  # keeps no teacher


def test_epochs_need_a_model_with_pskd_and_come_in_order(plain):
    with pytest.raises(ValueError, match="add_pskd"):
        PSKDEpochs(plain, num_epochs=2)
    epochs = PSKDEpochs(add_pskd(plain), num_epochs=3)
    for epoch, message in ((4, "expected one of 1 to 3, got 4"), (2, "1 after the last, got 2")):
        with pytest.raises(ValueError, match=message):
            epochs.begin_epoch(epoch)


@pytest.mark.parametrize(
    "changes, allowed",
    [
        ({"num_epochs": 5}, True),
        ({"alpha_final": 0.5}, True),
        ({"alpha_schedule": "cosine"}, True),
        ({"foreground_only": True}, False),  # what may change is the schedule, not the loss
        ({"label_smoothing": 0.1}, False),
    ],
)
def test_a_resumed_run_has_the_options_of_the_checkpoint(stock, changes, allowed):
    def epochs(allow=False, foreground_only=False, label_smoothing=0.0, **options):
        model = add_pskd(
            copy.deepcopy(stock), foreground_only=foreground_only, label_smoothing=label_smoothing
        )
        given = {"num_epochs": 4, "alpha_final": ALPHA} | options
        return PSKDEpochs(model, **given, allow_schedule_change=allow)

    state, name = epochs().state_dict(), next(iter(changes))
    with pytest.raises(ValueError, match=f"{name}: expected"):
        epochs(**changes).load_state_dict(state)
    if allowed:
        epochs(True, **changes).load_state_dict(state)
    else:
        with pytest.raises(ValueError, match=rf"{name}: .* got \S+$"):
            epochs(True, **changes).load_state_dict(state)
    # The length of the baseline is no part of PS-KD.
    epochs(alpha_final=0.0, num_epochs=9).load_state_dict(epochs(alpha_final=0.0).state_dict())
