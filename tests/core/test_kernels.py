"""Each form of the loss for CPUs, compiled and of torch's operators, against float64.

Shapes: N rows, C classes, k kept classes. What is compared with is cross-entropy against the
mixture, which exists, in float64; what is allowed is the rounding of the dtype.
"""

from __future__ import annotations

import math
from importlib.machinery import EXTENSION_SUFFIXES
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

from pskd import TopK, mix_targets, pskd_cross_entropy
from pskd.kernels import Rows, backend_of, native

torch.set_num_threads(1)  # tiny tensors: more threads would only wait for each other

HALVES = (torch.bfloat16, torch.float16)
DTYPES = (torch.float32, *HALVES)
FORMS = ("hard", "probs", "logits", "top_k")
few = settings(max_examples=25, deadline=None, derandomize=True)


def teacher_of(form: str, scores: Tensor, dtype: torch.dtype) -> dict[str, object]:
    """Return the arguments that give a teacher, of a dtype of its own."""
    if form == "hard":
        return {"teacher_probs": None}
    if form == "logits":
        return {"teacher_probs": None, "teacher_logits": scores.to(dtype)}
    if form == "probs":
        return {"teacher_probs": scores.softmax(1).to(dtype)}
    top = TopK.from_logits(scores, (scores.size(1) + 1) // 2)
    return {"teacher_probs": TopK(top.indices.int(), top.probs.to(dtype))}


def exact(
    logits: Tensor, target: Tensor, teacher: dict, alpha: float | Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Return loss and gradient of each row against the mixture, in float64."""
    past, classes = teacher["teacher_probs"], logits.size(1)
    if teacher.get("teacher_logits") is not None:
        past = teacher["teacher_logits"].double().softmax(1)
    elif isinstance(past, TopK):
        past = TopK(past.indices, past.probs.double())
    elif past is not None:
        past = past.double()
    valid = target >= 0
    alpha = 0.0 if past is None else alpha
    alpha = alpha.double() if isinstance(alpha, Tensor) else alpha
    mixture = mix_targets(
        target.clamp_min(0), past, alpha, num_classes=classes, label_smoothing=eps
    ).double()
    z = logits.detach().double().requires_grad_()
    lprobs = z.log_softmax(1)
    loss = -torch.where(mixture == 0, 0.0, mixture * lprobs).sum(1)
    loss = torch.where(valid, loss, 0.0)
    (grad,) = torch.autograd.grad(loss.sum(), z)
    return loss.detach(), grad


def tolerance(dtype: torch.dtype) -> dict[str, float]:
    """Return what rounding to a dtype, after sums of float32, may change."""
    return {"rtol": max(2 * torch.finfo(dtype).eps, 4e-6), "atol": 4e-6}


def random_rows(rows: int, classes: int, seed: int, scale: float = 3.0) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    student, past = torch.randn(2, rows, classes, generator=generator) * scale
    return student, past, torch.randint(classes, (rows,), generator=generator)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES)
@given(
    rows=st.sampled_from([0, 1, 3, 9]),
    classes=st.sampled_from([1, 2, 7, 16, 129, 2100]),
    seed=st.integers(0, 2**20),
    alpha=st.sampled_from([0.0, 0.3, 1.0]),
    by_row=st.booleans(),
    eps=st.sampled_from([0.0, 0.1, 1.0]),
    teacher_dtype=st.sampled_from(DTYPES),
    reduction=st.sampled_from(["none", "sum", "mean"]),
    inplace=st.booleans(),
    data=st.data(),
)
@few
def test_it_is_cross_entropy_against_the_mixture(
    backend, form, dtype, rows, classes, seed, alpha, by_row, eps, teacher_dtype, reduction,
    inplace, data,
):  # fmt: skip
    student, past, target = random_rows(rows, classes, seed)
    ignored = data.draw(st.lists(st.booleans(), min_size=rows, max_size=rows))
    target[torch.tensor(ignored, dtype=torch.bool)] = -100
    if by_row:
        alpha = alpha * (torch.arange(rows) % 2)
    teacher = teacher_of(form, past, teacher_dtype)
    leaf = student.to(dtype).requires_grad_()
    options = {"label_smoothing": eps, "reduction": reduction, "inplace": inplace}
    loss = pskd_cross_entropy(leaf * 1, target, alpha=alpha, **teacher, **options)
    upstream = torch.linspace(0.5, 2.0, rows) if reduction == "none" else torch.tensor(0.7)
    (grad,) = torch.autograd.grad(loss, leaf, upstream)

    value, slope = exact(leaf, target, teacher, alpha, eps)
    share = 1 / max(1, int((target >= 0).sum())) if reduction == "mean" else 1.0
    expected = value if reduction == "none" else share * value.sum()
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), expected, rtol=4e-6, atol=1e-5)
    assert grad.dtype == dtype
    slope = slope * share * upstream.double().reshape(-1, 1)
    torch.testing.assert_close(grad.double(), slope, **tolerance(dtype))
    assert not grad[target < 0].any()


@pytest.mark.parametrize(
    ("logits", "teacher", "expected"),
    [
        (torch.float32, torch.float16, "native"),
        (torch.bfloat16, torch.float32, "native"),
        (torch.float64, torch.float64, "torch"),
        (torch.float32, torch.float64, "torch"),
    ],
)
def test_the_compiled_form_serves_all_but_float64(backend, logits, teacher, expected):
    target, probs = torch.tensor([0]), torch.tensor([[0.5, 0.5]], dtype=teacher)
    rows = Rows(torch.zeros(1, 2, dtype=logits), target, probs, None, None, 0.5, -100, 0.0)
    assert backend_of(rows) == (expected if backend == "native" else "torch")


def test_two_threads_give_the_same_to_the_last_bit(backend):
    student, past, target = random_rows(300, 700, 0)
    found = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        z = student.clone().requires_grad_()
        loss = pskd_cross_entropy(z, target, past.softmax(1), 0.5)
        found.append((loss.detach(), *torch.autograd.grad(loss, z)))
    torch.set_num_threads(1)
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])


# -- Infinite logits -------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize("form", FORMS)
def test_a_masked_class_costs_nothing_where_the_teacher_masks_it_too(backend, form, dtype):
    """fairseq and decoders with a masked vocabulary score what cannot be by -infinity."""
    student, past, target = (part for part in random_rows(5, 9, 2))
    masked = torch.tensor([4, 7])
    target = torch.where(torch.isin(target, masked), 0, target)
    student, past = (scores.index_fill(1, masked, -math.inf) for scores in (student, past))
    teacher = teacher_of(form, past, torch.float32)
    if form == "top_k":  # all but one masked class listed: nothing is left to spread
        top = TopK.from_logits(past, 8)
        teacher = {"teacher_probs": TopK(top.indices, top.probs / top.probs.sum(1, keepdim=True))}
        probs = teacher["teacher_probs"].probs
        probs[:, 0] += 1e-6  # more than 1 in all, so that rounding leaves no rest to spread
    z = student.to(dtype).requires_grad_()
    loss = pskd_cross_entropy(z, target, alpha=0.5, reduction="none", **teacher)
    (grad,) = torch.autograd.grad(loss.sum(), z)
    kept = [c for c in range(9) if c not in masked]
    small = {name: given for name, given in teacher.items()}
    if form == "top_k":
        small = {"teacher_probs": teacher["teacher_probs"].dense(9)[:, kept]}
    elif form != "hard":
        (name,) = (name for name, given in teacher.items() if given is not None)
        small[name] = teacher[name][:, kept]
    renumbered = torch.tensor([kept.index(int(label)) for label in target])
    value, slope = exact(z[:, kept], renumbered, small, 0.5, 0.0)
    torch.testing.assert_close(loss.double(), value, rtol=1e-5, atol=1e-5)
    assert not grad[:, masked].any()
    torch.testing.assert_close(grad[:, kept].double(), slope, **tolerance(dtype))


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize("eps", [0.0, 0.1])
@pytest.mark.parametrize("inplace", [False, True])
def test_the_tail_is_spread_over_the_classes_that_the_student_can_say(backend, eps, inplace, dtype):
    """By equality with cross-entropy against the mixture over these classes."""
    student, past, target = random_rows(6, 9, 5)
    student = student.to(dtype)
    student[:4, [4, 7]] = -math.inf
    student[3] = student[3].index_fill(0, torch.tensor([0, 1, 2, 3, 5, 6]), -math.inf)
    target = torch.where(student.gather(1, target[:, None])[:, 0].isinf(), 8, target)
    top = TopK(torch.tensor([[8, 0, 1]] * 6), past.softmax(1)[:, :3] / 2)
    top.probs[:4, 1:] *= student[:4, :2].isfinite()  # what is listed and masked has nothing
    if eps:  # smoothing spreads over masked classes too and costs infinitely much, as in torch
        student = student.clamp_min(-1e4)
    mixed = mix_targets(
        target, top.dense(9, student != -math.inf).double(), 0.5, label_smoothing=eps
    )
    reference = student.double().requires_grad_()
    value = -torch.where(mixed == 0, 0.0, mixed * reference.log_softmax(1)).sum(1)
    (slope,) = torch.autograd.grad(value.sum(), reference)
    leaf = student.clone().requires_grad_()
    loss = pskd_cross_entropy(
        leaf * 1, target, top, 0.5, label_smoothing=eps, reduction="none", inplace=inplace
    )
    (grad,) = torch.autograd.grad(loss.sum(), leaf)
    torch.testing.assert_close(loss.double(), value.detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(grad.double(), slope, **tolerance(dtype))
    assert (grad[student == -math.inf] == 0).all()


@pytest.mark.parametrize("form", ["probs", "logits", "top_k"])
def test_what_the_teacher_expects_and_the_student_excludes_costs_infinitely_much(backend, form):
    student, past, target = torch.zeros(1, 4), torch.zeros(1, 4), torch.tensor([0])
    student[0, 3] = -math.inf
    z = student.requires_grad_()
    teacher = teacher_of(form, past, torch.float32)
    loss = pskd_cross_entropy(z, target, alpha=0.5, **teacher)
    assert loss == math.inf
    (grad,) = torch.autograd.grad(loss, z)
    torch.testing.assert_close(grad, torch.tensor([[1 / 3 - 5 / 8, 5 / 24, 5 / 24, -1 / 8]]))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("poison", [math.inf, math.nan])
def test_an_overflown_logit_is_seen_in_its_row_and_in_no_other(backend, form, poison):
    """Half precision overflows to infinity in Detectron2's heads: the loss scale must notice."""
    student, past, target = random_rows(3, 9, 3)
    student[1, 5] = poison
    teacher = teacher_of(form, past, torch.float32)
    loss = pskd_cross_entropy(student, target, alpha=0.5, reduction="none", **teacher)
    assert loss.isnan().tolist() == [False, True, False]
    assert F.cross_entropy(student, target, reduction="none")[1].isnan()


@pytest.mark.parametrize("form", ["probs", "top_k", "logits"])
@pytest.mark.parametrize("eps", [0.0, 0.1])
def test_rows_of_alpha_zero_do_not_look_at_their_teacher(backend, form, eps):
    student, past, target = random_rows(3, 9, 4)
    teacher = teacher_of(form, past, torch.float32)
    given = teacher["teacher_probs"] if teacher["teacher_probs"] is not None else None
    (given.probs if form == "top_k" else given if form == "probs" else teacher["teacher_logits"])[
        1
    ] = math.nan
    z = student.requires_grad_()
    alpha = torch.tensor([0.5, 0.0, 0.5])
    loss = pskd_cross_entropy(
        z, target, alpha=alpha, reduction="none", label_smoothing=eps, **teacher
    )
    (grad,) = torch.autograd.grad(loss.sum(), z)
    hard = F.cross_entropy(z, target, reduction="none", label_smoothing=eps)
    torch.testing.assert_close(loss[1], hard[1])
    torch.testing.assert_close(grad[1], torch.autograd.grad(hard[1], z)[0][1])
    assert loss.isfinite().all() and grad.isfinite().all()


# -- Over the logits -------------------------------------------------------------------------------


def test_the_gradient_lies_where_the_logits_were(backend):
    student, past, target = random_rows(4, 6, 5)
    leaf = student.requires_grad_()
    logits = leaf * 1
    loss = pskd_cross_entropy(logits, target, past.softmax(1), 0.5, inplace=True)
    assert torch.equal(logits.detach(), torch.autograd.grad(loss, leaf)[0])


def test_logits_that_what_made_them_keeps_are_missed_by_autograd(backend):
    student, past, target = random_rows(4, 6, 5)
    loss = pskd_cross_entropy(student.requires_grad_().tanh(), target, None, 0.0, inplace=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_logits_changed_after_the_loss_are_missed_by_autograd(backend):
    student, past, target = random_rows(4, 6, 5)
    logits = student.requires_grad_() * 1
    loss = pskd_cross_entropy(logits, target, None, 0.0, inplace=True)
    logits.detach().zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize(
    ("logits", "message"),
    [
        (
            torch.zeros(2, 3, requires_grad=True),
            "inplace: expected logits that were computed",
        ),
        ((torch.zeros(3, 2, requires_grad=True) * 1).t(), "inplace: expected rows that lie side"),
        ((torch.zeros(1, 3, requires_grad=True) * 1).expand(2, 3), "inplace: expected rows that"),
    ],
)
def test_logits_that_cannot_be_written_over_are_refused(logits, message):
    before = logits.detach().clone()
    with pytest.raises(ValueError, match=message):
        pskd_cross_entropy(logits, torch.tensor([0, 1]), None, 0.0, inplace=True)
    assert torch.equal(logits, before)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"target": torch.tensor([0, 6])}, r"target: expected labels in \[0, 5\], got \[0, 6\]"),
        ({"alpha": torch.tensor([0.5, 1.5])}, r"alpha: expected every row in \[0, 1\]"),
        (
            {"teacher_probs": TopK(torch.tensor([[0], [6]]), torch.ones(2, 1))},
            r"teacher_probs: expected TopK of classes in \[0, 5\], got \[0, 6\]",
        ),
        (
            {"teacher_probs": TopK(torch.tensor([[-1], [0]]), torch.ones(2, 1))},
            r"teacher_probs: expected TopK of classes in \[0, 5\], got \[-1, 0\]",
        ),
    ],
)
def test_bad_values_cost_no_logits(backend, changed, message):
    leaf = torch.randn(2, 6, requires_grad=True)
    logits = leaf * 1
    given = {"target": torch.tensor([0, 1]), "teacher_probs": torch.full((2, 6), 1 / 6)}
    with pytest.raises(ValueError, match=message):
        pskd_cross_entropy(logits, **{**given, "alpha": 0.5, **changed}, inplace=True)
    assert torch.equal(logits, leaf)


@pytest.mark.parametrize(
    "elsewhere",
    [
        {"target": torch.zeros(2, dtype=torch.int64, device="meta")},
        {"teacher_probs": torch.zeros(2, 6, device="meta")},
        {"teacher_probs": None, "teacher_logits": torch.zeros(2, 6, device="meta")},
        {"teacher_probs": TopK(torch.zeros(2, 1).long().to("meta"), torch.zeros(2, 1))},
        {"alpha": torch.zeros(2, device="meta")},
    ],
)
def test_a_tensor_on_another_device_is_named_and_not_read_by_its_address(backend, elsewhere):
    given = {"target": torch.tensor([0, 1]), "teacher_probs": torch.full((2, 6), 1 / 6)}
    with pytest.raises(ValueError, match="expected a tensor on cpu, got one on meta"):
        pskd_cross_entropy(torch.zeros(2, 6), **{**given, "alpha": 0.5, **elsewhere})


# -- Other ways to differentiate -------------------------------------------------------------------


@pytest.mark.parametrize(
    "transform",
    [
        lambda loss, z: torch.func.grad(loss)(z),
        lambda loss, z: torch.func.jacrev(loss)(z),
        lambda loss, z: torch.func.jvp(loss, (z,), (z,)),
        lambda loss, z: torch.vmap(loss)(z.expand(2, *z.shape)),
    ],
    ids=["grad", "jacrev", "jvp", "vmap"],
)
def test_transforms_of_torch_func_are_refused(backend, transform):
    student, past, target = random_rows(4, 6, 5)
    with pytest.raises(RuntimeError, match="expected plain autograd, got a torch.func transform"):
        transform(lambda z: pskd_cross_entropy(z, target, past.softmax(1), 0.5), student)


def test_forward_mode_is_refused_and_never_silently_left_out(backend):
    student, past, target = random_rows(4, 6, 5)
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="forward"):
        dual = forward_ad.make_dual(student, torch.ones_like(student))
        pskd_cross_entropy(dual, target, past.softmax(1), 0.5)


class Head(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(5, 7)

    def forward(self, x, target, past, alpha, inplace):
        logits = self.linear(x)
        return pskd_cross_entropy(
            logits, target, past, alpha, return_stats=True, label_smoothing=0.1, inplace=inplace
        )


@pytest.mark.parametrize("alpha", [0.5, torch.tensor(0.5), torch.tensor([0.5, 0.0, 1.0])])
@pytest.mark.parametrize("sparse", [False, True])
def test_a_compiled_model_has_no_graph_break(alpha, sparse):
    _, past, target = random_rows(3, 7, 6)
    past = TopK.from_logits(past, 2) if sparse else past.softmax(1)
    head, x = Head(), torch.randn(3, 5)
    found = []
    # The operator is what the whole graph is made of here: no compiler of C++ is needed.
    for forward in (head, torch.compile(head, fullgraph=True, backend="aot_eager")):
        head.zero_grad()
        loss, stats = forward(x, target, past, alpha, inplace=True)
        loss.backward()
        found.append((loss.detach(), *stats, head.linear.weight.grad.clone()))
    for plain, compiled in zip(*found, strict=True):
        torch.testing.assert_close(compiled, plain)


class Watch(TorchDispatchMode):
    """Notes the names of the operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(func.name())
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("inplace", [False, True])
def test_who_watches_operators_sees_the_loss_as_one(inplace):
    student, past, target = random_rows(3, 7, 6)

    def run():
        leaf = student.detach().clone().requires_grad_()
        loss = pskd_cross_entropy(leaf * 1.0, target, past.softmax(1), 0.5, inplace=inplace)
        grads = [torch.autograd.grad(3.0 * loss, leaf, retain_graph=True)[0] for _ in range(2)]
        without = pskd_cross_entropy(leaf.detach(), target, past.softmax(1), 0.5)
        return loss.detach(), without, *grads

    with Watch() as watch:
        watched = run()
    assert watch.seen.count("pskd::cross_entropy") == 2
    for found, expected in zip(watched, run(), strict=True):
        torch.testing.assert_close(found, expected)


def test_a_compiled_model_refuses_bad_labels():
    compiled = torch.compile(Head(), fullgraph=True, backend="aot_eager")
    past = torch.full((2, 7), 1 / 7)
    with pytest.raises(ValueError, match=r"target: expected labels in \[0, 6\], got \[0, 7\]"):
        compiled(torch.randn(2, 5), torch.tensor([0, 7]), past, 0.5, False)


def test_the_operator_keeps_torchs_rules():
    from pskd.kernels import operator  # noqa: F401  (registers it)

    student, past, target = random_rows(3, 7, 6)
    arguments = (None, None, None, 0.5, -100, 0.1, "none", True)
    torch.library.opcheck(
        torch.ops.pskd.cross_entropy.default,
        (student, target, past.softmax(1), *arguments),
        test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_static"),
    )


# -- The compiled form's library -------------------------------------------------------------------


@pytest.mark.parametrize("content", [None, b"no library"])
def test_a_library_of_another_machine_is_as_none(content, monkeypatch, tmp_path):
    if content is not None:
        (tmp_path / f"_native_rows{EXTENSION_SUFFIXES[0]}").write_bytes(content)
    monkeypatch.setattr(native, "__file__", str(tmp_path / "native.py"))
    native._library.cache_clear()
    try:
        assert native._library() is None
    finally:
        native._library.cache_clear()


@pytest.mark.parametrize("problem", [native._NO_MEMORY, 99])
def test_what_the_compiled_form_could_not_do_is_no_loss(problem, monkeypatch):
    library = mock.Mock(pskd_rows=lambda call: problem)
    monkeypatch.setattr(native, "_library", lambda: library)
    monkeypatch.setattr(native, "is_built", lambda: True)
    student, past, target = random_rows(3, 7, 6)
    error, text = AssertionError, r"refused what is good \(99\)"
    if problem == native._NO_MEMORY:
        error, text = MemoryError, "no memory for rows of 7 classes"
    with pytest.raises(error, match=text):
        pskd_cross_entropy(student, target, past.softmax(1), 0.5)
