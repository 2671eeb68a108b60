"""A case of bad input that does not do what it says is found."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from bad_input import Case, Part, check


def refused() -> None:
    raise ValueError("alpha: expected 1, got 2")


def refused_late():
    Path("half.part").write_text("half")
    refused()


def refused_with_a_loss():
    kept = torch.zeros(2)
    yield kept.clone
    kept += 1
    refused()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"says": "alpha: expected 1, got 3"}, "got 2"),
        ({"ends": TypeError}, "ValueError"),
        ({"ends": 2}, "ValueError"),
        ({"run": lambda: 0, "ends": 2}, "0: "),
        ({"run": lambda: None}, "None: "),
        ({"run": refused_late}, "new or changed: .*half.part"),
        ({"run": refused_with_a_loss}, "what had to stay"),
    ],
)
def test_a_case_that_is_otherwise_is_found(changes, message, tmp_path):
    good = {"tried": "two", "says": "alpha: expected ..., got 2", "run": refused}
    check(Case(**good), tmp_path)
    with pytest.raises(AssertionError, match=message):
        check(Case(**(good | changes)), tmp_path)


def test_a_case_of_what_is_not_installed_is_skipped_with_the_reason(tmp_path):
    part = Part("nothing", needs=("torch",))
    part.add("two", refused, "alpha", needs=("detectron2_of_tomorrow",))
    assert part.cases[0].needs == ("torch", "detectron2_of_tomorrow")
    with pytest.raises(pytest.skip.Exception, match="needs detectron2_of_tomorrow"):
        check(part.cases[0], tmp_path)
