"""Bad input as data: what is tried, what the user sees, and that nothing is lost by it."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import inspect
import io
import re
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from unittest import mock

import pytest
import torch

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
#: How to get what a case needs, where a package is not called like its module.
SOURCES = {
    "detectron2": "https://detectron2.readthedocs.io/tutorials/install.html",
    "fairseq": "pip install '.[translation]'",
    "sklearn": "pip install scikit-learn",
    "subword_nmt": "pip install subword-nmt",
    "yaml": "pip install pyyaml",
}


@dataclass(frozen=True)
class Case:
    """One thing that a user may do wrong.

    Attributes:
        tried: what is done.
        says: what the user sees; "..." stands for any text.
        run: does it, in an empty folder, and returns the exit status of a command line. One that
            is a generator makes itself ready, yields once, and then does it; what it yields, if
            not None, is a function whose value must be the same before and after.
        ends: the exception, or the exit status.
        leaves: names of the files that may be new or changed, as `Path.match` takes them.
        needs: modules without which it is skipped.
    """

    tried: str
    says: str
    run: Callable[[], object]
    ends: type[Exception] | int = ValueError
    leaves: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()


@dataclass
class Part:
    """Cases that are tried with the same things.

    Attributes:
        title, text: what these are, for the reader of the cases.
        needs: what all its cases need.
    """

    title: str
    text: str = ""
    needs: tuple[str, ...] = ()
    cases: list[Case] = field(default_factory=list)

    def add(self, tried: str, run: Callable[[], object], says: str, **options) -> None:
        """Add a case that has nothing to make ready."""
        needs = (*self.needs, *options.pop("needs", ()))
        self.cases.append(Case(tried, says, run, needs=needs, **options))

    def case(self, tried: str, says: str, **options) -> Callable:
        """Return a decorator that adds a function as a case."""

        def added(run: Callable[[], object]) -> Callable[[], object]:
            self.add(tried, run, says, **options)
            return run

        return added


def every_case(*parts: Part) -> pytest.MarkDecorator:
    """Return the parameters of a test over all cases of some parts."""
    cases = [case for part in parts for case in part.cases]
    return pytest.mark.parametrize("case", cases, ids=[case.tried for case in cases])


def check(case: Case, folder: Path) -> None:
    """Try a case in an empty folder, and see that it ends as it should and that nothing is lost."""
    for name in case.needs:
        reason = f"needs {name}: {SOURCES.get(name, f'pip install {name}')}"
        pytest.importorskip(name, reason=reason, exc_type=ImportError)
    with contextlib.chdir(folder):
        attempt, kept = _made_ready(case.run)
        files, value = _digests(), kept()
        end, told = _end_of(attempt)
        found, left = _digests(), kept()
    if isinstance(case.ends, int):
        assert end == case.ends, f"{end}: {told[-999:]}"
    else:
        assert isinstance(end, type) and issubclass(end, case.ends), f"{end}: {told[-999:]}"
    pattern = ".*".join(map(re.escape, case.says.split("...")))
    assert re.search(pattern, told, re.DOTALL), told[-999:]
    assert same(left, value), "what had to stay is another"
    assert not (changed := _changed(files, found, case.leaves)), f"new or changed: {changed}"


def as_command(main: Callable[..., object], name: str, *words: str) -> object:
    """Call the main function of a program as a command line that begins with its name."""
    with mock.patch.object(sys, "argv", [name, *words]):
        return main()


def toys(folder: str, name: str) -> ModuleType:
    """Return what other tests share, such as detectron2_tiny of tests/detection."""
    with mock.patch.object(sys, "path", [str(HERE.parent / folder), *sys.path]):
        return importlib.import_module(name)


def loaded(path: str) -> ModuleType:
    """Return a script of the project as a module, made once."""
    name = f"bad_input_{Path(path).stem}"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, ROOT / path)
        sys.modules[name] = importlib.util.module_from_spec(spec)
        folder = str((ROOT / path).parent)  # as of a script that is run
        with mock.patch.object(sys, "path", [folder, *sys.path]):
            spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


def _made_ready(run: Callable[[], object]) -> tuple[Callable[[], object], Callable[[], object]]:
    """Return what does a case, and what must be the same before and after."""
    if not inspect.isgeneratorfunction(run):
        return run, lambda: None
    steps = run()
    kept = next(steps)

    def attempt() -> object:
        try:
            next(steps)
        except StopIteration as end:
            return end.value
        raise AssertionError("expected a case that yields once")

    return attempt, kept or (lambda: None)


def _end_of(attempt: Callable[[], object]) -> tuple[object, str]:
    """Return the exception's type or the exit status, and what it says."""
    told = io.StringIO()
    try:
        with contextlib.redirect_stderr(told), contextlib.redirect_stdout(io.StringIO()):
            status = attempt()
    except SystemExit as end:
        # Of a text the interpreter makes the standard error and the status 1.
        return (1, end.code) if isinstance(end.code, str) else (end.code, told.getvalue())
    except Exception as error:
        return type(error), str(error)
    return status, told.getvalue()


def _digests() -> dict[Path, str]:
    files = (path for path in Path().rglob("*") if path.is_file())
    return {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def _changed(before: dict[Path, str], after: dict[Path, str], but: Iterable[str]) -> list[str]:
    changed = [path for path in before | after if before.get(path) != after.get(path)]
    return [str(path) for path in changed if not any(path.match(name) for name in but)]


def same(one: object, other: object) -> bool:
    """Whether two nested values are equal to the last bit."""
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and torch.equal(one, other)
    if isinstance(one, dict):
        return (
            isinstance(other, dict)
            and one.keys() == other.keys()
            and all(same(one[key], other[key]) for key in one)
        )
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other
