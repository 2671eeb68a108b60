"""Bad input to the loss is refused with what was expected and got."""

from __future__ import annotations

import math
import re

import pytest
import torch

from pskd import TopK, pskd_cross_entropy

LOGITS, THIRDS = torch.zeros(2, 3), torch.full((2, 3), 1 / 3)
INDICES = torch.tensor([[0, 1], [1, 2]])
GOOD = {
    "logits": LOGITS,
    "target": torch.tensor([0, 2]),
    "teacher_probs": THIRDS,
    "teacher_logits": None,
    "alpha": 0.5,
}

# What is changed of the good arguments -> what the error says.
REFUSED = [
    ({"alpha": -0.1}, "alpha: expected a number in [0, 1], got -0.1"),
    ({"alpha": 1.0001}, "alpha: expected a number in [0, 1], got 1.0001"),
    ({"alpha": math.nan}, "alpha: expected a number in [0, 1], got nan"),
    ({"alpha": math.nan, "teacher_probs": None}, "alpha: expected a number in [0, 1], got nan"),
    ({"alpha": None}, "alpha: expected a number in [0, 1], got None"),
    ({"alpha": torch.tensor(math.nan)}, "alpha: expected a number in [0, 1], got nan"),
    ({"alpha": torch.zeros(1)}, "alpha: expected a number or shape (2,), got (1,)"),
    ({"alpha": torch.zeros(2, 1)}, "alpha: expected a number or shape (2,), got (2, 1)"),
    ({"alpha": torch.tensor([0.5, math.nan])}, "alpha: expected every row in [0, 1], got"),
    ({"alpha": torch.tensor([0.5, 1.5])}, "alpha: expected every row in [0, 1], got"),
    ({"alpha": torch.tensor([-0.5, 0.5])}, "alpha: expected every row in [0, 1], got"),
    ({"label_smoothing": -0.1}, "label_smoothing: expected a number in [0, 1], got -0.1"),
    ({"label_smoothing": 1.1}, "label_smoothing: expected a number in [0, 1], got 1.1"),
    ({"label_smoothing": math.nan}, "label_smoothing: expected a number in [0, 1], got nan"),
    ({"reduction": "avg"}, "reduction: expected 'none', 'mean' or 'sum', got 'avg'"),
    ({"reduction": None}, "reduction: expected 'none', 'mean' or 'sum', got None"),
    ({"teacher_logits": LOGITS}, "expected teacher_probs or teacher_logits, got both"),
    ({"logits": (LOGITS,)}, "logits: expected a tensor, got tuple"),
    ({"target": [0, 2]}, "target: expected a tensor, got list"),
    (
        {"logits": torch.zeros(3)},
        "logits: expected a floating-point tensor of shape (N, C), got torch.float32 of shape (3,)",
    ),
    ({"logits": LOGITS[None]}, "tensor of shape (N, C), got torch.float32 of shape (1, 2, 3)"),
    (
        {"logits": LOGITS.long()},
        "expected a floating-point tensor of shape (N, C), got torch.int64",
    ),
    ({"target": torch.tensor([0, 3])}, "target: expected labels in [0, 2], got [0, 3]"),
    ({"target": torch.tensor([-1, 2])}, "target: expected labels in [0, 2], got [-1, 2]"),
    ({"target": torch.tensor([156, 2]).byte()}, "expected labels in [0, 2], got [2, 156]"),
    ({"ignore_index": 0, "target": torch.tensor([0, -100])}, "labels in [0, 2], got [-100, -100]"),
    ({"target": torch.zeros(2)}, "expected integer labels of shape (N,), got torch.float32"),
    (
        {"target": THIRDS[:, :2]},
        "target: expected probabilities of shape (2, 3) as the logits, got (2, 2)",
    ),
    ({"target": torch.ones(2) > 0}, "expected integer labels of shape (N,), got torch.bool"),
    ({"target": INDICES}, "integer labels of shape (N,), got torch.int64 of shape (2, 2)"),
    ({"target": torch.tensor(1)}, "integer labels of shape (N,), got torch.int64 of shape ()"),
    ({"target": torch.tensor([0, 1, 2])}, "target: expected 2 labels, got 3"),
    ({"teacher_probs": THIRDS[:1]}, "teacher: expected shape (2, 3) as the logits, got (1, 3)"),
    ({"teacher_probs": THIRDS[:, :2]}, "teacher: expected shape (2, 3) as the logits, got (2, 2)"),
    ({"teacher_probs": THIRDS[0]}, "teacher: expected shape (2, 3) as the logits, got (3,)"),
    ({"teacher_probs": LOGITS.long()}, "expected a floating-point tensor, got torch.int64"),
    (
        {"teacher_probs": None, "teacher_logits": LOGITS.t()},
        "teacher: expected shape (2, 3) as the logits, got (3, 2)",
    ),
    (
        {"teacher_probs": None, "teacher_logits": TopK(INDICES, THIRDS[:, :2])},
        "teacher_logits: expected a tensor, got TopK",
    ),
    (
        {"teacher_probs": TopK(torch.zeros(2, 4).long(), torch.zeros(2, 4))},
        "teacher_probs: expected 1 to 3 integer classes a row, got 4",
    ),
    (
        {"teacher_probs": TopK(INDICES[:, :0], THIRDS[:, :0])},
        "teacher_probs: expected 1 to 3 integer classes a row, got 0",
    ),
    (
        {"teacher_probs": TopK(INDICES.float(), THIRDS[:, :2])},
        "teacher_probs: expected 1 to 3 integer classes a row, got 2 of torch.float32",
    ),
    (
        {"teacher_probs": TopK(INDICES, INDICES)},
        "teacher: expected a floating-point tensor, got torch.int64",
    ),
    (
        {"teacher_probs": TopK(INDICES, THIRDS)},
        "teacher_probs: expected TopK of two tensors of shape (2, k), got (2, 2) and (2, 3)",
    ),
    (
        {"teacher_probs": TopK(INDICES[:1], THIRDS[:1, :2])},
        "teacher_probs: expected TopK of two tensors of shape (2, k), got (1, 2) and (1, 2)",
    ),
    (
        {"teacher_probs": TopK(INDICES[0], THIRDS[0, :2])},
        "teacher_probs: expected TopK of two tensors of shape (2, k), got (2,) and (2,)",
    ),
]

ONES = torch.ones(3)
REFUSED += [
    ({"weight": [1, 1, 1]}, "weight: expected a tensor, got list"),
    ({"weight": ONES[:2]}, "weight: expected a floating-point tensor of shape (3,), got"),
    ({"weight": ONES.long()}, "of shape (3,), got torch.int64 of shape (3,)"),
    (
        {"weight": ONES, "label_smoothing": 0.1},
        "weight: expected labels without smoothing, got label_smoothing 0.1",
    ),
    (
        {"weight": ONES, "target": THIRDS},
        "weight: expected labels without smoothing, got probabilities",
    ),
    (
        {"target": THIRDS, "alpha": torch.tensor([0.5, 1.5])},
        "alpha: expected every row in [0, 1], got",
    ),
    (
        {"target": THIRDS, "teacher_probs": TopK(INDICES + 1, THIRDS[:, :2])},
        "teacher_probs: expected TopK of classes in [0, 2], got [1, 3]",
    ),
    ({"teacher_probs": THIRDS.tolist()}, "teacher: expected a tensor, got list"),
    ({"target": torch.tensor([0, 2]).numpy()}, "target: expected a tensor, got ndarray"),
    ({"ignore_index": 1 << 64}, "ignore_index: expected an integer of 64 bits, got 18446744073"),
    ({"ignore_index": 1.0}, "ignore_index: expected an integer, got 1.0"),
    (
        {"target": THIRDS, "teacher_probs": TopK(INDICES * 0, THIRDS[:, :2])},
        "teacher_probs: expected TopK of distinct classes in a row, got 0 twice",
    ),
    (
        {name: torch.zeros(2, 0) for name in ("logits", "target", "teacher_probs")},
        "target: expected labels in [0, -1], got",
    ),
]


def test_the_arguments_that_the_refused_ones_change_are_good():
    torch.testing.assert_close(pskd_cross_entropy(**GOOD), torch.tensor(math.log(3)))


@pytest.mark.parametrize(("changed", "message"), REFUSED)
def test_bad_input_is_refused_with_what_was_expected_and_got(changed, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        pskd_cross_entropy(**{**GOOD, **changed})


@pytest.mark.parametrize("alpha", [0.0, 0.5])
def test_a_label_out_of_range_is_no_error_where_it_is_ignored(alpha):
    changed = {**GOOD, "target": torch.tensor([7, 2]), "alpha": alpha, "ignore_index": 7}
    torch.testing.assert_close(pskd_cross_entropy(**changed), torch.tensor(math.log(3)))
