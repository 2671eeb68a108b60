"""What is read by its address is there, in this process and in the layout that the reader knows."""

from __future__ import annotations

import ctypes
import logging
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from pskd import (
    LinearTeacher,
    MemoryCriterion,
    SnapshotCriterion,
    TopK,
    calibration,
    gradient_rescaling,
    mix_targets,
    pskd_cross_entropy,
    pskd_linear_cross_entropy,
)
from pskd.kernels import native

needs_native = pytest.mark.skipif(not native.is_built(), reason="the compiled form was not built")


def batch() -> dict:
    generator = torch.Generator().manual_seed(0)
    logits, past = torch.randn(2, 6, 5, generator=generator).unbind()
    return {
        "logits": logits,
        "target": torch.tensor([0, 1, 2, 3, 4, 0]),
        "teacher_probs": past.softmax(1),
        "alpha": torch.full((6,), 0.5),
    }


def freed(tensor: torch.Tensor, size: int) -> torch.Tensor:
    copy = tensor.clone()
    copy.untyped_storage().resize_(size)
    return copy


FREED = pytest.mark.parametrize("size", [0, 8])
refused = pytest.raises(ValueError, match=r"expected a tensor in memory \(\d+ bytes\), got a freed")


@FREED
@pytest.mark.parametrize("name", ["logits", "target", "int32", "teacher_probs", "kept", "alpha"])
def test_the_loss_names_what_was_freed(name, size):
    given = batch()
    top = TopK.from_logits(given["teacher_probs"], 2)
    changed = {
        "int32": {"target": freed(given["target"].int(), size)},  # looked at before it is converted
        "kept": {"teacher_probs": TopK(freed(top.indices, size), top.probs)},
    }
    with refused:
        pskd_cross_entropy(**given | (changed.get(name) or {name: freed(given[name], size)}))


@FREED
@pytest.mark.parametrize(
    "name", ["hidden", "weight", "bias", "target", "int32", "teacher", "kept", "linear", "alpha"]
)
def test_the_loss_from_hidden_states_names_what_was_freed(name, size):
    given = batch()
    past, hidden, weight = given["teacher_probs"], given["logits"], torch.eye(5)
    top = TopK.from_logits(past, 2)
    call = {"hidden": hidden, "weight": weight, "bias": torch.zeros(5), "teacher": past}
    call |= {"target": given["target"], "alpha": given["alpha"]}
    changed = {
        "int32": {"target": freed(given["target"].int(), size)},
        "kept": {"teacher": TopK(freed(top.indices, size), top.probs)},
        "linear": {"teacher": LinearTeacher(freed(hidden, size), weight)},
    }
    with refused:
        pskd_linear_cross_entropy(**call | (changed.get(name) or {name: freed(call[name], size)}))


@FREED
@pytest.mark.parametrize("epoch", [1, 2])
@pytest.mark.parametrize("name", ["logits", "target", "rows"])
@pytest.mark.parametrize("form", ["memory", "snapshot"])
def test_a_criterion_names_what_was_freed(form, name, epoch, size):
    given = batch()
    call = {"logits": given["logits"], "target": given["target"], "rows": torch.arange(6)}
    inputs = [] if form == "memory" else [given["logits"]]
    criterion = (
        MemoryCriterion(6, 5, num_epochs=2)
        if form == "memory"
        else SnapshotCriterion(torch.nn.Linear(5, 5), num_epochs=2)
    )
    for number in range(1, epoch + 1):
        criterion.begin_epoch(number)
    call[name] = freed(call[name], size)
    with refused:
        criterion(call["logits"], call["target"], *inputs, rows=call["rows"])


def test_class_weights_targets_and_metrics_name_what_was_freed():
    given = batch()
    probs, target = given["teacher_probs"], given["target"]
    with refused:
        pskd_cross_entropy(**given, weight=freed(torch.ones(5), 0))
    for labels, past in ((freed(target, 0), probs), (target, freed(probs, 0))):
        with refused:
            mix_targets(labels, past, 0.5)
        with refused:
            calibration.negative_log_likelihood(past, labels)
    with refused:
        calibration.reliability_bins(freed(probs[:, 0], 0), target > 0)
    with refused:
        gradient_rescaling(probs[:, 0], freed(probs[:, 1].contiguous(), 0), 0.5)


@pytest.mark.parametrize("name", ["logits", "teacher_probs"])
def test_a_sparse_tensor_is_named(name):
    given = batch()
    sparse = {name: given[name].to_sparse()}
    with pytest.raises(ValueError, match="expected a dense tensor, got the layout torch.spa"):
        pskd_cross_entropy(**given | sparse)
    criterion = MemoryCriterion(6, 5, num_epochs=2)
    criterion.begin_epoch(1)
    call = {"logits": given["logits"], "teacher_probs": given["teacher_probs"]} | sparse
    named = "logits" if name == "logits" else "target"
    with pytest.raises(ValueError, match=f"{named}: expected a dense tensor, got the layout"):
        criterion(*call.values(), torch.arange(6))


@pytest.mark.parametrize("name", ["logits", "teacher_probs", "alpha", "conjugated"])
def test_a_lazily_negated_tensor_keeps_its_sign(name):
    given = batch()
    expected = pskd_cross_entropy(**given)
    if name == "conjugated":
        name, negated = "logits", torch.complex(given["logits"], -given["logits"]).conj().imag
    else:
        negated = torch._neg_view(-given[name])
    assert negated.is_neg()
    assert torch.equal(pskd_cross_entropy(**given | {name: negated}), expected)


def test_metrics_of_lazily_negated_tensors_keep_their_sign():
    probs, target = batch()["teacher_probs"], batch()["target"]
    confidence, negated = probs.amax(dim=1), torch._neg_view(-probs.amax(dim=1))
    expected = calibration.reliability_bins(confidence, target > 0)
    got = calibration.reliability_bins(negated, target > 0)
    assert got.confidence_sum.tolist() == expected.confidence_sum.tolist()


def test_logits_that_cannot_be_written_over_stay():
    """torch refuses to change a view of a leaf in place; here the parameter would be lost."""
    given = batch()
    leaf = torch.nn.Parameter(given["logits"].clone())
    negated = torch._neg_view(-given["logits"].requires_grad_())
    for logits, got in (
        (leaf.view(6, 5), "logits .*, got a view of a leaf"),
        (leaf[:, :5], "logits .*, got a view of a leaf"),
        (negated, "plain logits, got ones that"),
    ):
        with pytest.raises(ValueError, match=f"inplace: expected {got}"):
            pskd_cross_entropy(**given | {"logits": logits}, inplace=True)
    assert torch.equal(leaf, given["logits"])


@needs_native
def test_the_library_refuses_a_call_of_another_layout():
    library = native._library()
    loss = ctypes.c_float()
    good = {
        "size": ctypes.sizeof(native._Call),
        "version": native._VERSION,
        "threads": 1,
        "reduction": native._REDUCTIONS["sum"],
        "loss": ctypes.addressof(loss),
    }
    assert library.pskd_rows(ctypes.byref(native._Call(**good))) == 0  # of no rows
    bad = {"size": good["size"] - 8, "version": native._VERSION - 1, "loss": None, "rows": 1}
    for name, value in bad.items():
        call = native._Call(**good | {name: value})
        assert library.pskd_rows(ctypes.byref(call)) == native._BAD_CALL, name


@pytest.mark.parametrize("version", [None, native._VERSION - 1])
def test_a_library_of_other_sources_is_not_called(version, monkeypatch, caplog):
    class Library:
        if version is not None:
            pskd_rows_version = staticmethod(lambda: version)

    monkeypatch.setattr(ctypes, "CDLL", lambda path: Library())
    with caplog.at_level(logging.WARNING):
        assert native._loaded(Path("_native_rows.so")) is None
    assert "install pskd again" in caplog.text


@pytest.mark.parametrize("name", ["target", "teacher_probs", "alpha"])
def test_a_tensor_without_an_address_beside_logits_with_one_is_named(name):
    """To the library no address would mean that there is none."""
    given = batch()
    with FakeTensorMode() as mode:
        fake = mode.from_tensor(given[name])
    with pytest.raises(ValueError, match="expected a tensor in memory"):
        pskd_cross_entropy(**given | {name: fake})


@pytest.mark.parametrize("form", ["probs", "logits", "kept", "soft", "linear"])
def test_on_the_meta_device_a_loss_has_a_shape_and_no_values(form):
    """As of a model that is built without memory, to learn its shapes."""
    given = {name: tensor.to("meta") for name, tensor in batch().items()}
    probs, logits = given.pop("teacher_probs"), given.pop("logits").requires_grad_()
    past = {
        "probs": {"teacher_probs": probs},
        "logits": {"teacher_probs": None, "teacher_logits": probs},
        "kept": {"teacher_probs": TopK(probs[:, :2].long(), probs[:, :2])},
        "soft": {"teacher_probs": probs, "target": probs},
    }
    if form == "linear":
        loss = pskd_linear_cross_entropy(logits, probs[:5], given["target"], probs, given["alpha"])
    else:
        loss = pskd_cross_entropy(logits, **given | past[form])
    loss.backward()
    assert loss.is_meta and loss.shape == () and loss.dtype == torch.float32
    assert logits.grad.is_meta and logits.grad.shape == (6, 5)
