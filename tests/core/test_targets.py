"""The materialised target and the sparse teacher, against their definition written as loops."""

from __future__ import annotations

import math
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pskd import TopK, mix_targets

torch.set_num_threads(1)  # tiny tensors: more threads would only wait for each other

few = settings(max_examples=25, deadline=None, derandomize=True)
sizes = {
    "rows": st.sampled_from([0, 1, 2, 6]),
    "classes": st.sampled_from([1, 2, 3, 7, 19]),
    "seed": st.integers(0, 2**20),
}
weights = st.sampled_from([0.0, 1.0]) | st.floats(0.0, 1.0)


def past(seed: int, rows: int, classes: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return labels and the teacher's probabilities in float64."""
    generator = torch.Generator().manual_seed(seed)
    probs = torch.randn(rows, classes, generator=generator, dtype=torch.float64).softmax(1)
    return torch.randint(classes, (rows,), generator=generator), probs


def top_k(probs: torch.Tensor, kept: int) -> TopK:
    values, indices = probs.topk(kept, dim=1)
    return TopK(indices, values)


def by_hand(target, probs, alphas, eps):
    """The target, entry by entry, as section 1 of the design and torch's smoothing define it."""
    rows, classes = probs.shape
    mixed = torch.empty(rows, classes, dtype=torch.float64)
    for i in range(rows):
        for c in range(classes):
            hard = (1 - eps) * float(c == int(target[i])) + eps / classes
            mixed[i, c] = (1 - alphas[i]) * hard + alphas[i] * probs[i, c]
    return mixed


def dense_by_hand(sparse: TopK, classes: int) -> torch.Tensor:
    full = torch.empty(len(sparse.probs), classes, dtype=torch.float64)
    for i, (indices, probs) in enumerate(zip(*(t.tolist() for t in sparse), strict=True)):
        listed = dict(zip(indices, probs, strict=True))
        rest = (1 - sum(probs)) / max(classes - len(listed), 1)
        full[i] = torch.tensor([listed.get(c, rest) for c in range(classes)], dtype=full.dtype)
    return full


@given(**sizes, alpha=weights, eps=weights)
@few
def test_mix_is_its_definition(rows, classes, seed, alpha, eps):
    target, probs = past(seed, rows, classes)
    mixed = mix_targets(target, probs, alpha, label_smoothing=eps)
    expected = by_hand(target, probs, [alpha] * rows, eps)
    torch.testing.assert_close(mixed, expected, rtol=0, atol=1e-14)


@given(**sizes, alpha=weights, eps=weights, form=st.sampled_from(["dense", "top_k", None]))
@few
def test_every_target_sums_to_one(rows, classes, seed, alpha, eps, form):
    target, probs = past(seed, rows, classes)
    teacher = {"dense": probs, "top_k": top_k(probs, (classes + 1) // 2), None: None}[form]
    mixed = mix_targets(target, teacher, alpha, num_classes=classes, label_smoothing=eps)
    assert mixed.shape == (rows, classes)
    assert (mixed >= 0).all()
    torch.testing.assert_close(mixed.sum(1).double(), torch.ones(rows).double())


@given(**sizes, eps=weights)
@few
def test_one_alpha_a_row_is_each_row_by_itself(rows, classes, seed, eps):
    target, probs = past(seed, rows, classes)
    alpha = torch.linspace(0, 1, rows, dtype=torch.float64)
    mixed = mix_targets(target, probs, alpha, label_smoothing=eps)
    expected = by_hand(target, probs, alpha.tolist(), eps)
    torch.testing.assert_close(mixed, expected, rtol=0, atol=1e-14)


@given(**sizes)
@few
def test_without_a_teacher_or_with_alpha_zero_it_is_the_label(rows, classes, seed):
    target, probs = past(seed, rows, classes)
    labels = torch.eye(classes)[target]
    assert torch.equal(mix_targets(target, None, 0.7, num_classes=classes), labels)
    assert torch.equal(mix_targets(target, probs.float(), 0.0), labels)
    assert torch.equal(mix_targets(target, probs, torch.zeros(rows)), labels.double())


@given(**sizes)
@few
def test_with_alpha_one_it_is_the_teacher(rows, classes, seed):
    target, probs = past(seed, rows, classes)
    assert torch.equal(mix_targets(target, probs, 1.0, label_smoothing=0.3), probs)


@given(**sizes, data=st.data())
@few
def test_top_k_spreads_what_is_left_evenly_and_sums_to_one(rows, classes, seed, data):
    kept = data.draw(st.integers(1, classes))
    sparse = top_k(past(seed, rows, classes)[1], kept)
    dense = sparse.dense(classes)
    torch.testing.assert_close(dense, dense_by_hand(sparse, classes), rtol=0, atol=1e-15)
    torch.testing.assert_close(dense.sum(1), torch.ones(rows).double())
    assert sparse.tail(classes).shape == (rows,)


@given(**sizes)
@few
def test_top_k_of_all_classes_is_the_dense_distribution(rows, classes, seed):
    probs = past(seed, rows, classes)[1]
    sparse = top_k(probs, classes)
    assert torch.equal(sparse.dense(classes), probs)
    assert torch.equal(sparse.tail(classes), torch.zeros(rows).double())


@given(**sizes, data=st.data())
@few
def test_mixing_top_k_is_mixing_its_dense_form(rows, classes, seed, data):
    target, probs = past(seed, rows, classes)
    sparse = top_k(probs, data.draw(st.integers(1, classes)))
    mixed = mix_targets(target, sparse, 0.6, num_classes=classes)
    assert torch.equal(mixed, mix_targets(target, sparse.dense(classes), 0.6))


def test_top_k_may_list_classes_in_any_order_and_integer_width():
    sparse = TopK(torch.tensor([[2, 0]], dtype=torch.int32), torch.tensor([[0.2, 0.5]]))
    torch.testing.assert_close(sparse.dense(4), torch.tensor([[0.5, 0.15, 0.2, 0.15]]))


def test_rounding_above_one_leaves_no_negative_probability():
    sparse = TopK(torch.tensor([[0, 1]]), torch.tensor([[0.75, 0.2505]], dtype=torch.float16))
    assert sparse.probs.float().sum() > 1
    assert sparse.tail(5).item() == 0.0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("alpha", [0.5, torch.full((4,), 0.5), torch.full((4,), 0.5).double()])
def test_result_is_float32_unless_the_teacher_is_float64(dtype, alpha):
    target, probs = past(0, 4, 5)
    expected = torch.float64 if dtype == torch.float64 else torch.float32
    assert mix_targets(target, probs.to(dtype), alpha).dtype == expected
    assert top_k(probs.to(dtype), 2).dense(5).dtype == expected
    assert top_k(probs.to(dtype), 2).tail(5).dtype == expected


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64])
def test_labels_may_be_of_any_integer_type(dtype):
    probs = torch.full((2, 200), 0.005)
    target = torch.tensor([3, 120])
    assert torch.equal(mix_targets(target.to(dtype), probs, 0.5), mix_targets(target, probs, 0.5))


def test_inputs_are_left_as_they_were():
    target, probs = past(0, 3, 4)
    sparse = top_k(probs, 2)
    before = [t.clone() for t in (target, probs, *sparse)]
    mix_targets(target, probs, 0.5, label_smoothing=0.1)
    mix_targets(target, sparse, 0.5, num_classes=4)
    assert all(map(torch.equal, before, (target, probs, *sparse)))


PROBS = torch.full((2, 3), 1 / 3)
INDICES = torch.tensor([[0, 1], [1, 2]])
GOOD = {"target": torch.tensor([0, 2]), "teacher_probs": PROBS, "alpha": 0.5}

# What is changed of the good arguments -> what the error says. Of each check one or two: the loss
# makes the same (test_loss_errors.py).
REFUSED = [
    ({"alpha": 1.5}, "alpha: expected a number in [0, 1], got 1.5"),
    ({"alpha": "x"}, "alpha: expected a number in [0, 1], got 'x'"),
    ({"alpha": torch.tensor(1.5)}, "alpha: expected a number in [0, 1], got 1.5"),
    ({"alpha": torch.zeros(3)}, "alpha: expected a number or shape (2,), got (3,)"),
    ({"alpha": torch.tensor([0.5, math.nan])}, "alpha: expected every row in [0, 1], got"),
    ({"label_smoothing": math.nan}, "label_smoothing: expected a number in [0, 1], got nan"),
    ({"target": [0, 1]}, "target: expected a tensor, got list"),
    ({"target": torch.tensor([0, 3])}, "target: expected labels in [0, 2], got [0, 3]"),
    ({"target": torch.tensor([-100, 1])}, "target: expected labels in [0, 2], got [-100, 1]"),
    ({"target": torch.zeros(2)}, "expected integer labels of shape (N,), got torch.float32"),
    ({"target": torch.ones(2, 2)}, "teacher: expected shape (2, 2) as the logits, got (2, 3)"),
    ({"teacher_probs": [[1.0]], "num_classes": 3}, "teacher: expected a tensor, got list"),
    ({"teacher_probs": PROBS[:1]}, "teacher: expected shape (2, 3) as the logits, got (1, 3)"),
    ({"num_classes": 4}, "teacher: expected shape (2, 4) as the logits, got (2, 3)"),
    ({"teacher_probs": None}, "num_classes: expected the number of classes, got None"),
    (
        {"teacher_probs": TopK(INDICES, PROBS[:, :2])},
        "num_classes: expected the number of classes, got None",
    ),
    (
        {"teacher_probs": TopK(INDICES.repeat(1, 2), torch.zeros(2, 4)), "num_classes": 3},
        "teacher_probs: expected 1 to 3 integer classes a row, got 4",
    ),
    (
        {"teacher_probs": TopK(INDICES + 1, PROBS[:, :2]), "num_classes": 3},
        "teacher_probs: expected TopK of classes in [0, 2], got [1, 3]",
    ),
    (
        {"teacher_probs": TopK(INDICES * 0 + 2, PROBS[:, :2]), "num_classes": 3},
        "teacher_probs: expected TopK of distinct classes in a row, got 2 twice",
    ),
]


def test_the_arguments_that_the_refused_ones_change_are_good():
    assert mix_targets(**GOOD).shape == (2, 3)


@pytest.mark.parametrize(("changed", "message"), REFUSED)
def test_bad_input_is_refused_with_what_was_expected_and_got(changed, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        mix_targets(**{**GOOD, **changed})


def test_top_k_of_logits_is_that_of_their_softmax():
    logits = torch.randn(5, 9)
    top = TopK.from_logits(logits, 3)
    probs, indices = logits.softmax(dim=1).topk(3, dim=1)
    assert torch.equal(top.indices, indices)
    torch.testing.assert_close(top.probs, probs)
    torch.testing.assert_close(TopK.from_logits(logits, 9).dense(9), logits.softmax(dim=1))
    assert TopK.from_logits(logits.half(), 3).probs.dtype == torch.float32
    known = TopK.from_logits(logits, 3, logsumexp=logits.logsumexp(dim=1))
    assert torch.equal(known.probs, top.probs)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_rows_of_alpha_zero_may_hold_anything(bad):
    target, probs = past(0, 4, 3)
    seen = torch.tensor([True, False, True, False])
    clean = mix_targets(target, probs, 0.7 * seen)
    probs[~seen] = bad
    assert torch.equal(mix_targets(target, probs, 0.7 * seen), clean)
    assert torch.equal(
        mix_targets(target, torch.full_like(probs, bad), 0.0),
        mix_targets(target, torch.zeros_like(probs), 0.0),
    )


@given(**sizes, alpha=weights, eps=weights)
@few
def test_probabilities_take_the_place_of_the_one_hot(rows, classes, seed, alpha, eps):
    target, probs = past(seed, rows, classes)
    onehot = torch.eye(classes).double()[target]
    got = mix_targets(onehot, probs, alpha, label_smoothing=eps)
    expected = mix_targets(target, probs, alpha, label_smoothing=eps)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-15)
    alone = mix_targets(onehot, None, 0.0, label_smoothing=eps)
    torch.testing.assert_close(alone, mix_targets(onehot, onehot, 0.0, label_smoothing=eps))


def test_the_tail_may_be_kept_from_some_classes():
    sparse = TopK(torch.tensor([[0, 1]]), torch.tensor([[0.5, 0.1]]))
    allowed = torch.tensor([[True, True, False, True, True]])
    dense = sparse.dense(5, allowed)
    torch.testing.assert_close(dense, torch.tensor([[0.5, 0.1, 0.0, 0.2, 0.2]]))
    nobody = sparse.dense(5, torch.zeros_like(allowed))
    torch.testing.assert_close(nobody, torch.tensor([[0.5, 0.1, 0.0, 0.0, 0.0]]))


def test_a_row_of_alpha_zero_may_list_any_class_twice():
    """As a memory gives it, zeros for a row without a past."""
    sparse = TopK(torch.tensor([[0, 1], [0, 0]]), torch.tensor([[0.5, 0.2], [0.0, 0.0]]))
    alpha = torch.tensor([0.5, 0.0])
    got = mix_targets(torch.tensor([0, 1]), sparse, alpha, num_classes=3)
    torch.testing.assert_close(got, torch.tensor([[0.75, 0.1, 0.15], [0.0, 1.0, 0.0]]))


@pytest.mark.parametrize(
    ("indices", "message"),
    [
        (torch.tensor([[0, 3]]), "dense: expected TopK of classes in [0, 2], got [0, 3]"),
        (torch.tensor([[-1, 0]]), "dense: expected TopK of classes in [0, 2], got [-1, 0]"),
        (torch.tensor([[0.0, 1.0]]), "dense: expected 1 to 3 integer classes a row, got 2 of torc"),
    ],
)
def test_a_distribution_of_other_classes_is_refused(indices, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        TopK(indices, torch.full((1, 2), 0.5)).dense(3)


@pytest.mark.parametrize("dtype", [torch.uint16, torch.uint32, torch.uint64, torch.uint8])
def test_labels_and_kept_classes_may_be_of_any_unsigned_integers(dtype):
    target, sparse = torch.tensor([0, 2]), TopK(torch.tensor([[0, 1]] * 2), torch.ones(2, 2) / 3)
    expected = mix_targets(target, sparse, 0.5, num_classes=3)
    given = TopK(sparse.indices.to(dtype), sparse.probs)
    assert torch.equal(mix_targets(target.to(dtype), given, 0.5, num_classes=3), expected)
