"""What is read by its address is there, in this process and in the layout that the reader knows."""

from __future__ import annotations

import ctypes
import logging
from pathlib import Path

import pytest
import torch

from pskd import TopK, pskd_cross_entropy
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


@pytest.mark.parametrize("size", [0, 8])
@pytest.mark.parametrize("name", ["logits", "target", "teacher_probs", "alpha"])
def test_a_tensor_whose_memory_was_freed_is_named(name, size):
    given = batch()
    given[name] = freed(given[name], size)
    with pytest.raises(ValueError, match=r"expected a tensor in memory \(\d+ bytes\), got a freed"):
        pskd_cross_entropy(**given)


def test_labels_that_would_be_converted_are_looked_at_first():
    given = batch()
    with pytest.raises(ValueError, match="target: expected a tensor in memory"):
        pskd_cross_entropy(**given | {"target": freed(given["target"].int(), 0)})


def test_kept_classes_whose_memory_was_freed_are_named():
    given = batch()
    top = TopK.from_logits(given["teacher_probs"], 2)
    with pytest.raises(ValueError, match="indices: expected a tensor in memory"):
        pskd_cross_entropy(**given | {"teacher_probs": TopK(freed(top.indices, 0), top.probs)})


@pytest.mark.parametrize("name", ["logits", "teacher_probs"])
def test_a_sparse_tensor_is_named(name):
    given = batch()
    with pytest.raises(ValueError, match="expected a dense tensor, got the layout torch.spa"):
        pskd_cross_entropy(**given | {name: given[name].to_sparse()})


@pytest.mark.parametrize("name", ["logits", "teacher_probs", "alpha"])
def test_a_lazily_negated_tensor_keeps_its_sign(name):
    given = batch()
    negated = torch._neg_view(-given[name])
    assert negated.is_neg()
    expected = pskd_cross_entropy(**given)
    assert torch.equal(pskd_cross_entropy(**given | {name: negated}), expected)


def test_the_imaginary_part_of_conjugated_logits_keeps_its_sign():
    given = batch()
    logits = torch.complex(given["logits"], -given["logits"]).conj().imag
    assert logits.is_neg()
    expected = pskd_cross_entropy(**given)
    assert torch.equal(pskd_cross_entropy(**given | {"logits": logits}), expected)


def test_lazily_negated_logits_are_not_written_over():
    given = batch()
    logits = torch._neg_view(-given["logits"].requires_grad_())
    with pytest.raises(ValueError, match="inplace: expected plain logits, got ones that"):
        pskd_cross_entropy(**given | {"logits": logits}, inplace=True)


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
