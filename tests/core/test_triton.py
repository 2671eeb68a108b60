"""The GPU's kernel by a float64 reference, on a processor: Triton's interpreter runs it.

Shapes: N rows, C classes, k kept classes. Triton decides when it is *imported* whether its own
functions are interpreted, and that holds for the whole process. So the kernel runs in a process of
its own, and other tests of this one meet the Triton they expect. Compilation needs no GPU and is
tested here too; what a GPU makes of it is tested where there is one.
"""

from __future__ import annotations

import itertools
import math
import multiprocessing
import os
import pickle
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import NamedTuple
from unittest import mock

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pskd import TopK, mix_targets
from pskd.kernels.rows import Rows, RowValues

pytest.importorskip("triton", reason="needs Triton, which torch brings along on Linux with CUDA")

torch.set_num_threads(1)  # tiny tensors: more threads would only wait for each other

FORMS = ("probs", "logits", "top_k", "none")
WITH_TEACHER = FORMS[:3]
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
PAST_DTYPES = (*DTYPES, torch.float64)  # of teacher, alpha and scale
every_form = pytest.mark.parametrize("form", FORMS)
every_teacher = pytest.mark.parametrize("form", WITH_TEACHER)
# Rows that are one block of classes, and rows that are read in several.
every_block = pytest.mark.parametrize("block", [None, 32])
few = settings(max_examples=12, deadline=None, derandomize=True)

Kernel = Callable[..., tuple[RowValues, Tensor | None]]


# -- The kernel, interpreted in another process ----------------------------------------------------


class Call(NamedTuple):
    """One call; ``block`` is the number of classes read at once, where rows are to be longer."""

    rows: Rows
    scale: Tensor | float = 1.0
    grad: Tensor | None = None
    in_place: bool = False
    block: int | None = None


def run(call: Call) -> tuple[RowValues, Tensor | None]:
    """Return the values and the gradient that the kernel computes here."""
    from pskd.kernels import triton_rows as module

    grad = call.rows.logits if call.in_place else call.grad
    with mock.patch.object(module, "_BLOCK", call.block or module._BLOCK):
        return module.triton_rows(call.rows, call.scale, grad), grad


class Scaling(NamedTuple):
    """A gradient that is to be multiplied, and by what."""

    grad: Tensor
    factor: Tensor


def scale(call: Scaling) -> Tensor:
    """Return the product that the kernel leaves in the gradient's place."""
    from pskd.kernels import triton_rows as module

    with mock.patch.object(module, "_SCALED_BLOCK", 32):
        module.triton_scale(*call)
    return call.grad


def _run_pickled(pickled: bytes) -> bytes:
    # Bytes: tensors would be moved into shared memory, the sender's too.
    numpy.seterr(all="ignore")  # NaN and infinities are meant
    call = pickle.loads(pickled)
    try:
        return pickle.dumps(scale(call) if isinstance(call, Scaling) else run(call))
    except Exception as error:
        return pickle.dumps(type(error)(str(error)))


@pytest.fixture(scope="module")
def interpreter() -> Iterator[Callable[[Call], tuple[RowValues, Tensor | None]]]:
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        with mock.patch.dict(os.environ, TRITON_INTERPRET="1"):
            pool.submit(abs, 0).result()  # the process starts, and keeps the variable

        def interpreted(call: Call) -> tuple[RowValues, Tensor | None]:
            result = pickle.loads(pool.submit(_run_pickled, pickle.dumps(call)).result())
            if isinstance(result, Exception):
                raise result
            return result

        yield interpreted


@pytest.fixture(scope="module")
def kernel(interpreter) -> Kernel:
    """Return the kernel as a function of rows and of the fields of `Call`."""

    def call(rows: Rows, scale: Tensor | float = 1.0, **options) -> tuple[RowValues, Tensor | None]:
        if "grad" not in options:
            options["grad"] = torch.full_like(rows.logits, math.nan)
        return interpreter(Call(rows, scale, **options))

    return call


# -- Rows, and what they are compared with ---------------------------------------------------------


def make(
    form: str,
    count: int = 4,
    classes: int = 37,
    dtype: torch.dtype = torch.float32,
    past_dtype: torch.dtype | None = None,
    kept: int = 5,
    seed: int = 0,
    **fields,
) -> Rows:
    """Return rows with a past prediction in one of its forms."""
    generator = torch.Generator().manual_seed(seed)
    student, past = torch.randn(2, count, classes, generator=generator).double() * 3
    target = torch.randint(classes, (count,), generator=generator)
    past_dtype = past_dtype or dtype
    probs = indices = None
    if form == "probs":
        probs = past.softmax(1).to(past_dtype)
    elif form == "top_k":
        indices, probs = TopK.from_logits(past, min(kept, classes))
        probs = probs.to(past_dtype)
    scores = past.to(past_dtype) if form == "logits" else None
    made = Rows(student.to(dtype), target, probs, scores, indices, 0.3, -100, 0.0)
    return made._replace(**fields)


def dense(rows: Rows) -> Tensor:
    """Return the past prediction as a float64 matrix."""
    if rows.teacher_logits is not None:
        return rows.teacher_logits.double().softmax(1)
    if rows.probs is None:
        return torch.zeros_like(rows.logits, dtype=torch.float64)
    if rows.indices is None:
        return rows.probs.double()
    allowed = rows.logits != -math.inf
    return TopK(rows.indices, rows.probs.double()).dense(rows.logits.size(1), allowed)


def reference(rows: Rows, scale: float = 1.0) -> tuple[RowValues, Tensor]:
    """Return values and gradient by autograd, of the mixture and in float64."""
    valid = rows.target != rows.ignore_index
    soft, label = dense(rows)[valid], rows.target[valid, None]
    alpha = torch.as_tensor(rows.alpha, dtype=torch.float64).expand(len(valid))[valid]
    if rows.probs is None and rows.teacher_logits is None:
        alpha = torch.zeros_like(alpha)
    mixed = mix_targets(label[:, 0], soft, alpha, label_smoothing=rows.label_smoothing)
    logits = rows.logits.double().requires_grad_()
    lprobs = logits[valid].log_softmax(1)
    loss = -torch.where(mixed == 0, 0.0, mixed * lprobs).sum(1)
    (grad,) = torch.autograd.grad(loss.sum(), logits)
    at_label = torch.where(alpha == 0, 0.0, soft.gather(1, label)[:, 0])
    values = RowValues(loss, -lprobs.gather(1, label)[:, 0], at_label)
    ignored = RowValues(*torch.tensor([[0.0], [0.0], [1.0]]).double().expand(3, len(valid)))
    pairs = zip(ignored, values, strict=True)
    return RowValues(*(a.masked_scatter(valid, b.detach()) for a, b in pairs)), scale * grad


def assert_is(got: tuple[RowValues, Tensor], expected: tuple[RowValues, Tensor]) -> None:
    """Assert equality up to the rounding of sums, and of the gradient's dtype."""
    (values, grad), (true_values, true_grad) = got, expected
    for value, true in zip(values, true_values, strict=True):
        assert value.dtype == torch.float32
        torch.testing.assert_close(value.double(), true.double(), rtol=3e-6, atol=3e-6)
    rtol = max(3e-6, torch.finfo(grad.dtype).eps)
    torch.testing.assert_close(grad.double(), true_grad.double(), rtol=rtol, atol=3e-6)


@st.composite
def many_rows(draw, form: str) -> Rows:
    """Rows of awkward shapes, some ignored (by a label that may be a class), of mixed dtypes."""
    count, classes = draw(st.integers(1, 3)), draw(st.sampled_from([1, 2, 7, 16, 37, 64]))
    rows = make(
        form,
        count,
        classes,
        draw(st.sampled_from(DTYPES)),
        draw(st.sampled_from(PAST_DTYPES)),
        draw(st.integers(1, classes)),
        draw(st.integers(0, 2**20)),
        label_smoothing=draw(st.sampled_from([0.0, 0.1, 1.0])),
        ignore_index=draw(st.sampled_from([-100] if classes == 1 else [-100, 1])),
    )
    ignored = torch.tensor(draw(st.lists(st.booleans(), min_size=count, max_size=count)))
    weights = st.sampled_from([0.0, 0.5, 1.0]) | st.floats(1e-3, 1.0)
    alpha = draw(weights)
    if draw(st.booleans()):
        alpha = torch.tensor(draw(st.lists(weights, min_size=count, max_size=count)))
        alpha = alpha.to(draw(st.sampled_from(PAST_DTYPES)))
    return rows._replace(target=rows.target.masked_fill(ignored, rows.ignore_index), alpha=alpha)


# -- What it equals --------------------------------------------------------------------------------


@every_form
@given(data=st.data())
@few
def test_it_is_cross_entropy_against_the_mixture(kernel, form, data):
    rows = data.draw(many_rows(form))
    scale = data.draw(st.sampled_from([1.0, 0.0, 2.5]))
    options = {
        "in_place": data.draw(st.booleans()),
        "block": data.draw(st.sampled_from([None, 16])),
    }
    given_scale = torch.tensor(scale, dtype=data.draw(st.sampled_from(PAST_DTYPES)))
    got = kernel(rows, data.draw(st.sampled_from([scale, given_scale])), **options)
    assert_is(got, reference(rows, scale))


@every_form
@pytest.mark.parametrize("classes", [32, 39, 64, 71])
def test_rows_as_long_as_blocks_and_longer(kernel, form, classes):
    rows = make(form, 1, classes, torch.bfloat16, torch.float16, label_smoothing=0.1)
    assert_is(kernel(rows, block=32), reference(rows))


@every_block
@every_form
def test_the_gradient_may_take_the_place_of_the_logits(kernel, form, block):
    rows = make(form, label_smoothing=0.1)
    values, grad = kernel(rows, block=block)
    values_in_place, grad_in_place = kernel(rows, block=block, in_place=True)
    torch.testing.assert_close(values_in_place, values, rtol=0, atol=0)
    torch.testing.assert_close(grad_in_place, grad, rtol=0, atol=0)


@every_form
def test_values_alone_are_the_same(kernel, form):
    rows = make(form, label_smoothing=0.1)
    values, grad = kernel(rows, grad=None)
    assert grad is None
    torch.testing.assert_close(values, kernel(rows)[0], rtol=0, atol=0)


@every_form
@pytest.mark.parametrize("layout", ["rows apart", "columns first", "one row again and again"])
def test_strides_change_nothing(kernel, form, layout):
    def laid_out(tensor: Tensor | None) -> Tensor | None:
        if tensor is None or tensor.dim() != 2:
            return tensor
        if layout == "rows apart":
            return torch.cat([tensor, tensor], 1)[:, : tensor.size(1)]
        return (
            tensor.t().contiguous().t() if layout == "columns first" else tensor[:1].expand(4, -1)
        )

    rows = make(form)
    strided = Rows(*(laid_out(f) if isinstance(f, Tensor) else f for f in rows))
    grad = torch.full((4, 50), math.nan)[:, 3:40]
    got = kernel(strided, grad=grad)
    assert_is(got, reference(strided))


@every_block
def test_labels_may_be_among_the_listed_classes_or_not(kernel, block):
    indices = torch.tensor([[0, 18], [18, 0], [3, 36], [36, 3]])
    probs = torch.tensor([[0.5, 0.25]]).expand(4, 2)
    rows = make("none", target=torch.tensor([18, 18, 0, 36]), indices=indices, probs=probs)
    values, grad = kernel(rows, block=block)
    assert_is((values, grad), reference(rows))
    tail = 0.25 / 35
    torch.testing.assert_close(values.teacher_at_label, torch.tensor([0.25, 0.5, tail, 0.5]))


@pytest.mark.parametrize(
    ("dtype", "mass"), [(torch.int16, 0.0), (torch.int32, 0.6), (torch.int64, 1.5)]
)
def test_listed_classes_of_any_integer_type_and_mass(kernel, dtype, mass):
    rows = make("top_k")
    rows = rows._replace(indices=rows.indices.to(dtype), probs=rows.probs * mass)
    expected = reference(rows._replace(indices=rows.indices.long()))
    assert_is(kernel(rows), expected)


@every_block
@pytest.mark.parametrize("mass", [0.0, 0.6, 1.5])
def test_probabilities_need_not_sum_to_one(kernel, mass, block):
    rows = make("probs", alpha=0.7)
    rows = rows._replace(probs=rows.probs * mass)
    assert_is(kernel(rows, block=block), reference(rows))


@every_form
@pytest.mark.parametrize("shift", [-1e4, 1e4])
def test_large_logits_do_not_cancel(kernel, form, shift):
    rows = make(form)
    rows = rows._replace(logits=rows.logits + shift)
    assert_is(kernel(rows, block=16), reference(rows))


@every_block
@pytest.mark.parametrize("turned", [False, True])
def test_the_maximum_may_move_far_from_block_to_block(kernel, turned, block):
    rows = make("logits")
    steps = torch.linspace(-1e3, 1e3, 37)
    scores = rows.teacher_logits + (steps.flip(0) if turned else steps)
    rows = rows._replace(logits=rows.logits + steps, teacher_logits=scores)
    assert_is(kernel(rows, block=block), reference(rows))


# -- Rows that are ignored, or have no past prediction ---------------------------------------------


def poisoned(rows: Rows, where: Tensor, poison: float) -> Rows:
    """Return the rows with all that is known of the past prediction of some of them spoilt."""
    changes = {}
    for name in ("probs", "teacher_logits"):
        if getattr(rows, name) is not None:
            changes[name] = getattr(rows, name).masked_fill(where[:, None], poison)
    if rows.indices is not None:
        changes["indices"] = rows.indices.masked_fill(where[:, None], -(2**40))
    return rows._replace(**changes)


@every_block
@every_form
@pytest.mark.parametrize("poison", [math.nan, -math.inf])
def test_ignored_rows_may_hold_anything(kernel, form, poison, block):
    ignored = torch.tensor([False, True, False, True])
    rows = make(form, label_smoothing=0.1, ignore_index=5, alpha=torch.full((4,), 0.3))
    rows = rows._replace(target=torch.tensor([3, 5, 36, 5]))
    expected = reference(rows)
    spoilt = rows._replace(
        logits=rows.logits.masked_fill(ignored[:, None], poison),
        alpha=rows.alpha.masked_fill(ignored, math.nan),
    )
    values, grad = kernel(poisoned(spoilt, ignored, poison), torch.tensor(3.0), block=block)
    assert_is((values, grad / 3), expected)
    for value, constant in zip(values, (0.0, 0.0, 1.0), strict=True):
        assert (value[ignored] == constant).all()
    assert (grad[ignored] == 0.0).all()


@every_form
def test_where_all_rows_are_ignored_all_is_zero(kernel, form):
    rows = make(form, target=torch.full((4,), -100))
    rows = rows._replace(logits=torch.full_like(rows.logits, math.nan))
    values, grad = kernel(rows, math.inf, in_place=True)
    assert not values.loss.any() and not values.nll.any() and (values.teacher_at_label == 1).all()
    assert (grad == 0.0).all()


@every_block
@every_teacher
def test_rows_of_alpha_zero_are_hard_whatever_lies_in_the_teachers_row(kernel, form, block):
    alpha = torch.tensor([0.0, 0.5, 0.0, 1.0])
    rows = make(form, alpha=alpha, label_smoothing=0.1)
    values, grad = kernel(poisoned(rows, alpha == 0, math.nan), block=block)
    assert_is((values, grad), reference(rows))


def test_without_a_past_prediction_alpha_is_not_looked_at(kernel):
    rows = make("none", alpha=math.nan)
    values, grad = kernel(rows)
    assert_is((values, grad), reference(rows._replace(alpha=0.0)))
    assert not values.teacher_at_label.any()


# -- Infinite logits, and what is out of range -----------------------------------------------------


def forbid(rows: Rows, some: slice, *, of_teacher: bool) -> Rows:
    """Return the rows with logits of -inf at some classes, of which the teacher may know."""
    logits = rows.logits.clone()
    logits[:, some] = -math.inf
    changes = {"logits": logits}
    if of_teacher and rows.teacher_logits is not None:
        changes["teacher_logits"] = rows.teacher_logits.clone()
        changes["teacher_logits"][:, some] = -math.inf
    if of_teacher and rows.probs is not None:
        probs = dense(rows)
        probs[:, some] = 0.0
        probs = (probs * 1024).floor() / 1024
        probs[:, -1] += 1.0 - probs.sum(1)  # to the last bit: a tail is expected of all classes
        indices = None
        if rows.indices is not None:  # some of the forbidden classes are listed too
            probs, indices = probs.topk(37 - 3, dim=1)
        changes |= {"probs": probs.to(rows.probs.dtype), "indices": indices}
    return rows._replace(**changes)


@every_form
@pytest.mark.parametrize(("some", "block"), [(slice(20, 30), None), (slice(0, 20), 16)])
def test_classes_at_minus_infinity_that_nobody_expects(kernel, form, some, block):
    rows = make(form, target=torch.tensor([31, 32, 33, 36]), alpha=0.3)
    rows = forbid(rows, some, of_teacher=True)
    values, grad = kernel(rows, block=block)
    assert values.loss.isfinite().all()
    assert_is((values, grad), reference(rows))
    assert (grad[:, some] == 0.0).all()


@pytest.mark.parametrize("form", ["probs", "logits"])
def test_classes_at_minus_infinity_that_the_teacher_expects(kernel, form):
    rows = make(form, target=torch.tensor([31, 32, 33, 36]), alpha=torch.tensor([0.3, 1, 0, 0]))
    rows = forbid(rows, slice(0, 20), of_teacher=False)
    values, grad = kernel(rows, block=16)  # the first block has no finite logit
    assert values.loss[:2].tolist() == [math.inf, math.inf]
    assert_is((values, grad), reference(rows))


@every_block
def test_the_tail_of_a_sparse_teacher_spares_the_classes_at_minus_infinity(kernel, block):
    rows = make("top_k", target=torch.tensor([31, 32, 33, 36]), alpha=torch.tensor([0.3, 1, 0, 0]))
    logits = rows.logits.clone()
    logits[:, :20] = -math.inf
    logits.scatter_(1, rows.indices, 0.5)  # what the teacher lists by name can still be said
    rows = rows._replace(logits=logits)
    values, grad = kernel(rows, block=block)
    assert values.loss.isfinite().all()
    assert_is((values, grad), reference(rows))
    assert (grad[logits == -math.inf] == 0.0).all()


@every_form
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1, 1.0])
def test_a_label_at_minus_infinity(kernel, form, label_smoothing):
    rows = make(form, target=torch.full((4,), 25), label_smoothing=label_smoothing)
    rows = forbid(
        rows._replace(alpha=torch.tensor([0.0, 0.3, 0.9, 1.0])), slice(20, 30), of_teacher=True
    )
    values, grad = kernel(rows)
    assert values.nll.tolist() == [math.inf] * 4
    weights_label = 4 if form == "none" else 3
    assert values.loss.isinf().tolist() == [i < weights_label for i in range(4)]
    assert_is((values, grad), reference(rows))


@every_block
@pytest.mark.parametrize("kept", [5, 36, 37])
def test_a_sparse_teacher_lists_all_classes_at_minus_infinity_or_not_all(kernel, kept, block):
    rows = make("top_k", kept=kept)
    logits = rows.logits.clone()
    logits[0, rows.indices[0, -1]] = -math.inf
    rest = [c for c in range(37) if c not in rows.indices[1].tolist()]
    logits[1, rest] = -math.inf
    rows = rows._replace(logits=logits, alpha=1.0)
    probs = rows.probs.clone()
    probs[0, -1] = 0.0
    probs[1] /= probs[1].sum()
    assert_is(
        kernel(rows._replace(probs=probs), block=block), reference(rows._replace(probs=probs))
    )


@every_form
@pytest.mark.parametrize(("label", "block"), [(37, 32), (-1, None), (2**31, 32)])
def test_a_label_out_of_range_makes_its_row_nan_and_touches_no_other(kernel, form, label, block):
    rows = make(form, alpha=torch.tensor([0.0, 1.0, 0.3, 0.3]))
    out = torch.tensor([True, True, False, False])
    around = torch.full((6, 37), 7.0)
    target = rows.target.masked_fill(out, label)
    values, grad = kernel(rows._replace(target=target), grad=around[1:-1], block=block)
    expected, expected_grad = reference(rows)
    assert values.loss[out].isnan().all() and values.nll[out].isnan().all()
    assert grad[out].isnan().all()
    kept = RowValues(*(value[~out] for value in values))
    assert_is((kept, grad[~out]), (RowValues(*(v[~out] for v in expected)), expected_grad[~out]))
    whole = grad.as_strided((6, 37), (37, 1), 0)
    assert (whole[[0, -1]] == 7.0).all()


@pytest.mark.parametrize("index", [37, -1, 2**40])
def test_a_listed_class_out_of_range_makes_its_row_nan(kernel, index):
    rows = make("top_k", 2)
    rows.indices[0, 1] = index
    values, grad = kernel(rows, grad=torch.full((4, 37), 7.0)[1:-1])
    assert values.loss.isnan().tolist() == [True, False]
    assert grad.isnan().all(1).tolist() == [True, False]
    assert (grad.as_strided((4, 37), (37, 1), 0)[[0, -1]] == 7.0).all()


@every_form
def test_nan_logits_are_not_hidden(kernel, form):
    rows = make(form)
    rows.logits[0, 30] = math.nan
    values, grad = kernel(rows, block=16)
    assert values.loss.isnan().tolist() == [True, False, False, False]
    assert grad.isnan().all(1).tolist() == [True, False, False, False]


@every_form
def test_no_rows_and_no_classes(kernel, form):
    values, grad = kernel(make(form, 0))
    assert [value.shape for value in values] == [(0,)] * 3
    assert grad.shape == (0, 37)
    ignored = make("none", 2)._replace(logits=torch.empty(2, 0), target=torch.full((2,), -100))
    values, grad = kernel(ignored)
    assert values.loss.tolist() == [0.0, 0.0]


# -- Compiled --------------------------------------------------------------------------------------


@every_form
@pytest.mark.parametrize("classes", [1, 40_000])
def test_it_compiles_for_a_gpu_that_need_not_be_there(form, classes, monkeypatch, tmp_path):
    """The interpreter takes some code that the compiler refuses: types of branches and loops."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    from pskd.kernels import triton_rows as module

    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("Triton interprets in this process: TRITON_INTERPRET is set")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    # Launched with a stand-in, to learn the arguments.
    launched = mock.MagicMock()
    rows = make(form, 1, classes, torch.bfloat16, torch.float16, label_smoothing=0.1)
    with mock.patch.object(module, "rows_kernel", launched):
        module.triton_rows(rows, 1.0, rows.logits)
    arguments, options = launched.__getitem__.return_value.call_args
    names = module.rows_kernel.arg_names
    given = dict(zip(names, arguments, strict=False)) | options
    warps = given.pop("num_warps")
    # Triton makes constants of None and of the number 1 by itself.
    constants = {
        n: v for n, v in given.items() if n.isupper() or v is None or isinstance(v, int) and v == 1
    }
    signature = {n: "constexpr" if n in constants else _type_of(given[n]) for n in names}
    source = ASTSource(module.rows_kernel, signature, constants)
    compiled = compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps})
    assert "st.global" in compiled.asm["ptx"]


def _type_of(argument: Tensor | int) -> str:
    kinds = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.int64: "i64"}
    return f"*{kinds.get(argument.dtype, 'fp32')}" if isinstance(argument, Tensor) else "i32"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("factor", [torch.tensor(2e5), torch.tensor([0.5, 1.0, 0.0])])
def test_the_gradient_is_scaled_in_the_precision_of_the_factor(interpreter, dtype, factor):
    grad = torch.linspace(-1e-4, 1e-4, 3 * 70).reshape(3, 70).to(dtype)  # 2e5 exceeds float16
    got = interpreter(Scaling(grad.clone(), factor))
    expected = (grad.float() * factor.reshape(-1, 1)).to(dtype)
    # The interpreter cuts bfloat16 where a GPU rounds.
    rounding = torch.finfo(dtype).eps if dtype == torch.bfloat16 else 0.0
    torch.testing.assert_close(got, expected, rtol=rounding, atol=0.0)


def test_of_no_rows_no_gradient_is_scaled(interpreter):
    assert interpreter(Scaling(torch.empty(0, 5), torch.tensor(2.0))).shape == (0, 5)


def test_a_factor_of_one_leaves_the_gradient_alone(interpreter):
    grad = torch.full((2, 40), math.nan)
    grad.view(torch.int32).fill_(0x7FA00001)  # which a product by 1 would change to a quiet NaN
    got = interpreter(Scaling(grad.clone(), torch.tensor(1.0)))
    assert torch.equal(got.view(torch.int32), grad.view(torch.int32))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@every_form
def test_on_a_gpu(form):
    for classes, dtype in itertools.product([1, 100, 1000, 16_384, 32_003, 131_072], DTYPES):
        past_dtype = torch.float32 if dtype == torch.bfloat16 else dtype
        count = max(4, min(300, 2**21 // classes))
        rows = make(form, count, classes, dtype, past_dtype, label_smoothing=0.1, kept=20)
        target = rows.target.index_fill(0, torch.arange(0, count, 7), -100)
        rows = rows._replace(target=target, alpha=torch.linspace(0, 1, count))
        there = Rows(*(field.cuda() if isinstance(field, Tensor) else field for field in rows))
        apart = run(Call(there, torch.tensor(2.5).cuda(), torch.empty_like(there.logits)))
        in_place = run(Call(there, 2.5, in_place=True))
        torch.testing.assert_close(in_place, apart, rtol=0, atol=0)
        values, grad = apart
        assert_is((RowValues(*(v.cpu() for v in values)), grad.cpu()), reference(rows, 2.5))
