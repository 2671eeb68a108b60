"""docs/bad_input.md is what the cases of the tests beside this file say."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from bad_input import MODULES, PAGE, Case, Part, all_parts, check, page


def test_the_page_is_that_of_the_cases():
    hint = "out of date: python tests/bad_input/bad_input.py"
    assert PAGE.read_text(encoding="utf-8") == page(), hint


def test_every_test_of_cases_is_on_the_page():
    files = {path.stem for path in Path(__file__).parent.glob("test_*.py")}
    assert files == {*MODULES, Path(__file__).stem}


def test_there_are_cases_and_none_is_there_twice():
    parts = all_parts()
    assert sum(len(part.cases) for part in parts) >= 250
    for part in parts:
        tried = [case.tried for case in part.cases]
        assert len(set(tried)) == len(tried) > 2, part.title


# ---- a case that is not what it says fails -------------------------------------------------------


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
