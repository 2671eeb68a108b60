"""What the loss allocates."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from loss_cases import every_form, loss_of, make
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import pskd.checks
import pskd.kernels.gradient
from pskd import mix_targets


class Allocations(TorchDispatchMode):
    """Records the bytes of every new storage that an operation returns."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # torch's documented way not to import its compiler, which takes seconds

    def __init__(self) -> None:
        super().__init__()
        self.bytes: list[int] = []
        self._known = {}  # keeps the storages alive, so that no address is used twice

    def _learn(self, values) -> list[int]:
        storages = [t.untyped_storage() for t in tree_leaves(values) if torch.is_tensor(t)]
        new = {s.data_ptr(): s for s in storages if s.nbytes() and s.data_ptr() not in self._known}
        self._known |= new
        return [storage.nbytes() for storage in new.values()]

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        self._learn((args, kwargs))  # what an operation is given, and may return a view of
        out = func(*args, **kwargs)
        self.bytes += self._learn(out)
        return out


def allocations(loss, logits: Tensor) -> tuple[list[int], list[int], int]:
    """Return the new storages of forward and backward, and the bytes saved in between."""
    saved = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor.numel() * tensor.element_size())
        return tensor

    log = Allocations()
    with log, torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        value = loss(logits)
    made = len(log.bytes)
    with log:
        if value.requires_grad:
            value.backward()
    return log.bytes[:made], log.bytes[made:], sum(saved)


@pytest.fixture(autouse=True)
def watched_as_it_is(monkeypatch, backend) -> None:
    """A mode that watches allocations is no tracer."""
    monkeypatch.setattr(pskd.checks, "is_in_torch_dispatch_mode", lambda: False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("inplace", [False, True])
@every_form
def test_nothing_of_the_logits_size_is_made_but_the_gradient(form, inplace, dtype):
    rows, classes, chunk = 64, 500, 2000
    batch = make(rows, classes, chunk=chunk)._replace(kept=8, dtype=torch.float32)
    leaf = batch.logits.to(dtype).requires_grad_()
    logits = leaf * 1
    matrix = logits.numel() * logits.element_size()
    alpha = torch.full((rows,), 0.5)
    loss = loss_of(batch, form, alpha, label_smoothing=0.1, inplace=inplace)
    with mock.patch.object(pskd.kernels.gradient, "_CHUNK_ELEMENTS", chunk):
        forward, backward, saved = allocations(lambda z: 3 * loss(z), logits)
    assert [size for size in forward if size > 4 * chunk] == [matrix] * (not inplace)
    # The product with the upstream gradient is made over it; the other is the leaf's, of `* 1`.
    assert [size for size in backward if size > 4 * chunk] == [matrix]
    assert saved <= matrix + 8 * 8 * rows


@every_form
def test_without_a_gradient_nothing_of_the_logits_size_is_made(form):
    batch = make(64, 500, chunk=2000)._replace(kept=8, dtype=torch.float32)
    forward, _, saved = allocations(loss_of(batch, form, 0.5), batch.logits.float())
    assert max(forward) <= 4 * 2000
    assert saved == 0


def test_the_memory_check_sees_what_the_mixture_costs():
    batch = make(64, 500)
    logits = batch.logits.float().requires_grad_()

    def mixture(z: Tensor) -> Tensor:
        return F.cross_entropy(z, mix_targets(batch.target, batch.dense("probs").float(), 0.5))

    forward, backward, saved = allocations(mixture, logits)
    matrix = logits.numel() * 4
    assert sum(size >= matrix for size in forward) > 2
    assert sum(size >= matrix for size in backward) >= 1
    assert saved >= 2 * matrix
