"""Models, mixing, the loss of a batch, and the figures, each by what must hold of it."""

from __future__ import annotations

import itertools
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
import torchmetrics
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from pskd_classification.evaluation import measure, predict, rows_of
from pskd_classification.mixing import Mixer
from pskd_classification.models import build_model
from pskd_classification.networks import BottleneckBlock
from pskd_classification.objective import Objective, VirtualTeacher
from torch.utils.data import TensorDataset

import pskd
from pskd.distributed import World

N, C = 6, 4

# ---- models ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["preact_resnet10_tiny", "resnet18", "shufflenet_v2_x0_5", "efficientnet_b0"]
)
def test_a_model_scores_the_classes_and_its_weights_have_torchvisions_names(name):
    model = build_model(name, C)
    assert model.eval()(torch.zeros(2, 3, 32, 32)).shape == (2, C)
    if not name.startswith("preact"):
        stock = torchvision.models.get_model(name, weights=None, num_classes=C)
        assert list(model.state_dict()) == list(stock.state_dict())


@pytest.mark.parametrize(
    ("name", "weights", "channels"),
    [
        ("preact_resnet18", 11_218_340, (64, 128, 256, 512)),
        # As the authors' code has them.
        ("preact_resnet18_published", 11_217_444, (64, 128, 256, 512)),
        ("preact_resnet101_published", 42_697_380, (256, 512, 1024, 2048)),
    ],
)
def test_a_network_for_small_images_has_its_size(name, weights, channels):
    with torch.device("meta"):
        model = build_model(name, 100)
        images = torch.zeros(2, 3, 32, 32)
    assert sum(p.numel() for p in model.parameters()) == weights
    shapes = []
    for stage in (model.layer1, model.layer2, model.layer3, model.layer4):
        stage.register_forward_hook(lambda *call: shapes.append(tuple(call[-1].shape[1:])))
    assert model(images).shape == (2, 100)
    sides = (32, 16, 8, 4)
    assert shapes == [(c, side, side) for c, side in zip(channels, sides, strict=True)]


def as_published(weights: dict, images: torch.Tensor) -> torch.Tensor:
    """The published PreAct ResNet-18 in evaluation, written from its description."""

    def norm(x, name):
        mean, var = weights[f"{name}.running_mean"], weights[f"{name}.running_var"]
        return F.batch_norm(x, mean, var, weights[f"{name}.weight"], weights[f"{name}.bias"])

    def conv(x, name, stride=1):
        kernel = weights[f"{name}.weight"]
        return F.conv2d(x, kernel, stride=stride, padding=kernel.size(-1) // 2)

    x = norm(conv(images, "conv1"), "bn1").relu()
    for stage, number in itertools.product((1, 2, 3, 4), (0, 1)):
        block = f"layer{stage}.{number}"
        stride = 2 if stage > 1 and number == 0 else 1
        activated = norm(x, f"{block}.bn1").relu()
        out = norm(conv(activated, f"{block}.conv1", stride), f"{block}.bn2").relu()
        shortcut = activated
        if f"{block}.shortcut.weight" in weights:
            shortcut = conv(activated, f"{block}.shortcut", stride)
        x = conv(out, f"{block}.conv2") + shortcut
    return F.avg_pool2d(x, 4).flatten(1) @ weights["fc.weight"].T + weights["fc.bias"]


def test_the_published_network_computes_what_is_described():
    torch.manual_seed(0)
    model = build_model("preact_resnet18_published", C).double()
    images = torch.randn(4, 3, 32, 32, dtype=torch.float64)
    model.train()(images)  # statistics that are not those of the start
    weights = model.state_dict()
    assert torch.allclose(model.eval()(images), as_published(weights, images))
    # Torch's default initialisation: uniform within 1 / sqrt(fan in).
    kernel = build_model("preact_resnet18_published", C).layer4[1].conv2.weight
    assert kernel.abs().max() <= (512 * 9) ** -0.5 and kernel.std().item() > 0.5 * (512 * 9) ** -0.5


def test_the_bottlenecks_of_the_published_network_activate_after_the_shortcut():
    block = BottleneckBlock(8, 2, 1).eval()
    torch.nn.init.zeros_(block.conv3.weight)
    x = torch.randn(2, 8, 4, 4)
    assert torch.equal(block(x), x.relu())
    assert isinstance(BottleneckBlock(8, 2, 2).shortcut[1], torch.nn.BatchNorm2d)


@pytest.mark.parametrize(
    "name", ["preact_resnet10_tiny", "preact_resnet18_published", "resnet18", "resnet50"]
)
def test_dropout_acts_in_training_only_and_leaves_the_weights_names(name):
    model, plain = build_model(name, C, dropout=0.5), build_model(name, C)
    assert list(model.state_dict()) == list(plain.state_dict())
    model.load_state_dict(plain.state_dict())
    images = torch.randn(4, 3, 32, 32)
    # Statistics of the batch, so that training differs by the regulariser alone.
    for network in (model, plain):
        for module in network.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.momentum = 0.0
    assert torch.equal(model.eval()(images), plain.eval()(images))
    torch.manual_seed(0)
    assert not torch.allclose(model.train()(images), plain.train()(images))


def test_a_model_without_a_place_for_dropout_is_refused():
    with pytest.raises(ValueError, match="--dropout: .* got densenet121"):
        build_model("densenet121", C, dropout=0.1)


def test_a_model_of_timm_gets_its_options_by_timms_names(monkeypatch):
    def create_model(name: str, **options):
        if name != "known":
            raise RuntimeError("Unknown model")
        return options

    monkeypatch.setitem(sys.modules, "timm", SimpleNamespace(create_model=create_model))
    plain = {"pretrained": False, "num_classes": C}
    assert build_model("timm:known", C) == plain
    assert build_model("timm:known", C, dropout=0.1) == plain | {"drop_rate": 0.1}
    with pytest.raises(ValueError, match="expected a model of timm, got 'other': Unknown model"):
        build_model("timm:other", C)
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ValueError, match="--model: timm:known needs timm: pip install timm"):
        build_model("timm:known", C)


# ---- mixing ------------------------------------------------------------------------------------


def batch(seed: int = 0, rows: int = N):
    generator = torch.Generator().manual_seed(seed)
    images = torch.rand(rows, 3, 8, 8, generator=generator)
    return images, torch.randint(C, (rows,), generator=generator)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 1000), rows=st.integers(2, 5))
def test_mixup_mixes_pixels_by_the_weight(seed, rows):
    torch.manual_seed(seed)
    images, _ = batch(seed, rows)
    mixed = Mixer(mixup_alpha=1.0, probability=1.0)(images)
    expected = mixed.weight * images + (1 - mixed.weight) * images[mixed.partner]
    assert torch.allclose(mixed.images, expected, atol=1e-6)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 1000))
def test_cutmix_takes_pixels_of_the_partner_in_the_share_that_is_told(seed):
    torch.manual_seed(seed)
    images, _ = batch(seed)
    mixed = Mixer(cutmix_alpha=1.0, probability=1.0)(images)
    kept = (mixed.images == images).all(dim=1)
    assert torch.equal(
        mixed.images.movedim(1, -1)[~kept], images[mixed.partner].movedim(1, -1)[~kept]
    )
    assert kept.float().mean() == pytest.approx(mixed.weight.item(), abs=1e-6)


def test_batches_are_mixed_as_often_as_asked():
    images, _ = batch()
    torch.manual_seed(0)
    mixer = Mixer(cutmix_alpha=1.0, mixup_alpha=1.0, probability=0.25)
    mixed = [mixer(images) for _ in range(400)]
    assert 60 < sum(m is not None for m in mixed) < 140
    assert Mixer()(images) is None and not Mixer().enabled
    assert Mixer(cutmix_alpha=1.0, probability=1.0)(images[:1]) is None


# ---- the loss of a batch -----------------------------------------------------------------------


class Scores(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(3 * 64, C)

    def forward(self, images):
        return self.linear(images.flatten(1))


class FixedMixer:
    def __init__(self, images: torch.Tensor) -> None:
        torch.manual_seed(5)
        self.mixed = Mixer(cutmix_alpha=1.0, probability=1.0)(images)

    def __call__(self, _images):
        return self.mixed


@pytest.mark.parametrize("teacher", ["none", "memory", "snapshot", "virtual"])
@pytest.mark.parametrize(("mixed", "smoothing"), list(itertools.product([False, True], [0.0, 0.1])))
def test_the_loss_is_the_cross_entropy_against_the_mixture(teacher, mixed, smoothing):
    images, target = batch()
    torch.manual_seed(0)
    model, rows = Scores(), torch.arange(N)
    common = {"num_epochs": 4, "label_smoothing": smoothing}
    virtual = None
    if teacher == "snapshot":
        criterion = pskd.SnapshotCriterion(model, alpha_final=0.8, **common)
    else:
        alpha = 0.8 if teacher == "memory" else 0.0
        memory = {"dtype": torch.float32} if alpha else {}
        criterion = pskd.MemoryCriterion(N, C, alpha_final=alpha, **common, **memory)
    if teacher == "virtual":
        virtual = VirtualTeacher(C, 0.3)
    criterion.begin_epoch(1)
    first = Objective(criterion, Mixer())(model, rows, images, target)
    assert torch.allclose(first, F.cross_entropy(model(images), target, label_smoothing=smoothing))
    past = model(images).softmax(dim=1).detach()
    criterion.begin_epoch(2)
    mixer = FixedMixer(images) if mixed else Mixer()
    if mixed and teacher == "snapshot":  # it sees what the student sees
        past = model(mixer.mixed.images).softmax(dim=1).detach()
    with torch.no_grad():
        model.linear.weight += 0.1 * torch.randn_like(model.linear.weight)

    loss = Objective(criterion, mixer, virtual)(model, rows, images, target)
    alpha = {"none": 0.0, "virtual": 0.3}.get(teacher, 0.4)
    if teacher == "virtual":
        past = virtual.past(target).dense(C)
    soft = pskd.mix_targets(target, past, alpha, num_classes=C, label_smoothing=smoothing)
    seen = images
    if mixed:
        seen, partner, weight = mixer.mixed
        other = soft[partner]
        if teacher == "snapshot":
            other = pskd.mix_targets(
                target[partner], past, alpha, num_classes=C, label_smoothing=smoothing
            )
        soft = weight * soft + (1 - weight) * other
    assert loss.item() == pytest.approx(F.cross_entropy(model(seen), soft).item(), rel=1e-5)


def test_the_memory_keeps_what_was_last_said_unmixed():
    images, target = batch()
    model, rows = Scores(), torch.arange(N)
    criterion = pskd.MemoryCriterion(N, C, num_epochs=3, dtype=torch.float32)
    criterion.begin_epoch(1)
    Objective(criterion, Mixer())(model, rows, images, target)
    first = model(images).softmax(dim=1)
    criterion.begin_epoch(2)
    Objective(criterion, FixedMixer(images))(model, rows, images, target)
    criterion.begin_epoch(3)
    past, seen = criterion.memory.read(rows)
    assert seen.all() and torch.allclose(past, first, atol=1e-6)


def test_the_virtual_teacher_is_the_softened_distribution():
    probs = torch.tensor([0.9, 0.05, 0.05])
    expected = (probs.log() / 5).softmax(dim=0)
    past = VirtualTeacher(3, 0.5, correct=0.9, temperature=5.0).past(torch.tensor([0]))
    assert torch.allclose(past.dense(3)[0], expected)


# ---- figures -----------------------------------------------------------------------------------


def test_figures_agree_with_torchmetrics_and_with_the_core():
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(300, 8, generator=generator)
    target = torch.randint(8, (300,), generator=generator)
    found = measure(rows_of(logits, target))
    for name, k in (("top1_error", 1), ("top5_error", 5)):
        oracle = torchmetrics.classification.MulticlassAccuracy(8, top_k=k, average="micro")
        assert found[name] == pytest.approx(1 - oracle(logits, target).item(), abs=1e-6)
    ece = torchmetrics.classification.MulticlassCalibrationError(8, n_bins=15, norm="l1")
    assert found["ece"] == pytest.approx(ece(logits, target).item(), abs=1e-5)
    assert found["nll"] == pytest.approx(F.cross_entropy(logits, target).item(), rel=1e-5)
    probs = logits.softmax(dim=1)
    confidence, correct = probs.max(dim=1).values, probs.argmax(dim=1) == target
    assert found["aurc"] == pytest.approx(pskd.calibration.aurc(confidence, correct), rel=1e-6)
    assert found["count"] == 300


def test_a_temperature_changes_confidence_and_not_the_prediction():
    logits, target = torch.randn(50, 4), torch.randint(4, (50,))
    plain, scaled = rows_of(logits, target), rows_of(logits, target, 3.0)
    assert (plain.correct == scaled.correct).all() and (plain.in_top5).all()
    assert (scaled.confidence < plain.confidence).all()


def test_predictions_come_in_the_order_of_the_data_and_leave_the_model_training():
    images, target = batch(rows=7)
    model = Scores().train()
    world = World(0, 1, torch.device("cpu"))
    data = TensorDataset(images, target)
    logits, labels = predict(model, data, world, batch_size=3, workers=0, amp=False)
    assert torch.equal(labels, target) and torch.allclose(logits, model(images))
    assert model.training
