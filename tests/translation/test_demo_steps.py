"""The demo's steps in the background, the folders it may delete, and its command lines."""

from __future__ import annotations

import importlib
import json
import re
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("babel", reason="needs babel: pip install '.[demo]'")
pytest.importorskip("torchvision", reason="needs torchvision: pip install '.[detection]'")

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from demo import translation  # noqa: E402
from demo.report import Report  # noqa: E402
from demo.steps import Step, StepFailed, check_folder, fresh_folder, run_all  # noqa: E402

both = importlib.import_module("demo.__main__")


def step(name: str, code: str, folder: Path) -> Step:
    return Step(name, [sys.executable, "-c", code], folder / f"{name}.log")


# --- steps ------------------------------------------------------------------------------------


@pytest.mark.parametrize("failing", [0, 1])
def test_a_step_that_fails_stops_the_others_at_once(tmp_path, failing):
    code = ["import time; time.sleep(60)"] * 2
    code[failing] = "print('begun'); raise SystemExit('no such word')"
    steps = [step(f"step{number}", line, tmp_path) for number, line in enumerate(code)]
    start = time.monotonic()
    with pytest.raises(StepFailed, match=rf"step{failing} failed \(1\), see .*: no such word"):
        run_all(steps)
    assert time.monotonic() - start < 30
    assert not any(each.running() for each in steps)


def test_steps_that_end_at_different_times_are_all_watched_to_their_end(tmp_path):
    seen = {}
    code = {"short": "print('a')", "long": "import time; time.sleep(1); print('b')"}
    run_all(
        [step(name, line, tmp_path) for name, line in code.items()],
        lambda watched: seen.update({watched.name: watched.log.read_text()}),
    )
    assert seen == {"short": "a\n", "long": "b\n"}


def test_half_a_line_of_a_log_is_read_once_it_is_whole(tmp_path):
    line = '2026-01-01 | INFO | train | {"epoch": 1}'
    log = tmp_path / "train.log"
    log.write_text(line[:-3])
    assert translation.epoch_records(log) == []
    log.write_text(line + "\n")
    assert translation.epoch_records(log) == [{"epoch": 1}]


# --- folders ----------------------------------------------------------------------------------


def test_an_absent_and_an_empty_folder_are_made_fresh(tmp_path):
    for name in ("absent", "empty"):
        (tmp_path / "empty").mkdir(exist_ok=True)
        assert list(fresh_folder(tmp_path / name).iterdir()) == []


def test_what_an_earlier_run_left_is_deleted(tmp_path):
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner" / "checkpoint_last.pt").write_text("old")
    (tmp_path / "train.log").write_text("old")
    assert list(fresh_folder(tmp_path).iterdir()) == []


@pytest.mark.parametrize("kind", ["folder", "file", "link"])
def test_what_the_demo_did_not_make_is_left_and_named(tmp_path, kind):
    other, path = tmp_path / "other", tmp_path / "pskd"
    other.mkdir()
    (other / "loss.py").write_text("mine")
    (other / "train.log").mkdir()  # a folder of that name tells nothing
    if kind == "folder":
        other.rename(path)
    elif kind == "file":
        path.write_text("mine")
    else:
        path.symlink_to(other)
    for refuse in (check_folder, fresh_folder):
        with pytest.raises(ValueError, match=f"{path}: expected a folder.*, got .*--out"):
            refuse(path)
    assert "mine" in {p.read_text() for p in (path, *tmp_path.glob("*/loss.py")) if p.is_file()}


def test_a_demo_that_would_delete_a_package_stops_before_it_writes(tmp_path, capsys):
    """--out . in a clone, where pskd is the core."""
    package = tmp_path / "pskd"
    package.mkdir()
    (package / "__init__.py").write_text("core")
    assert translation.main(["--pairs", "20", "--held-out", "5", "--out", str(tmp_path)]) == 1
    assert (
        f"demo: error: {package}: expected a folder that the demo made" in capsys.readouterr().err
    )
    assert [path.name for path in tmp_path.rglob("*")] == ["pskd", "__init__.py"]


# --- command lines ----------------------------------------------------------------------------


@pytest.mark.parametrize("option", ["--held-out", "--pairs", "--bpe-size"])
@pytest.mark.parametrize("number", ["-1", "0"])
def test_numbers_below_1_are_refused_before_anything_is_written(tmp_path, capsys, option, number):
    with pytest.raises(SystemExit) as ended:
        translation.main(["--out", str(tmp_path / "out"), option, number])
    assert ended.value.code == 2
    assert f"{option}: expected at least 1, got {number}" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("word, code", [("--help", 0), ("--no-such-flag", 2), ("translation", 2)])
def test_the_whole_demo_reads_its_command_line(monkeypatch, capsys, word, code):
    def trains(args):
        raise AssertionError("the demo has begun")

    monkeypatch.setattr(both.classification, "run", trains)
    monkeypatch.setattr(both.translation, "run", trains)
    monkeypatch.setattr(both.detection, "run", trains)
    monkeypatch.setattr(sys, "argv", ["demo", word])
    with pytest.raises(SystemExit) as ended:
        both.main()
    assert ended.value.code == code
    shown = capsys.readouterr()
    assert "python -m demo" in (shown.out if code == 0 else shown.err)


def test_the_whole_demo_names_a_folder_that_it_may_not_delete(monkeypatch, capsys):
    def refuses(args):
        raise ValueError("runs/demo/translation/pskd: expected a folder")

    monkeypatch.setattr(both.classification, "run", refuses)
    assert both.main([]) == 1
    assert "demo: error: runs/demo/translation/pskd" in capsys.readouterr().err


def test_the_whole_demo_tells_of_both_halves(monkeypatch, capsys, tmp_path):
    """As `make demo` runs it; the halves have tests of their own from end to end."""
    for name in ("classification", "translation", "detection"):
        results = {"baseline": {"nll": 1}, "PS-KD": {"nll": 2}}
        told = Report(name, {"nll": ("NLL", ".2f")}, results, "", {})
        monkeypatch.setattr(getattr(both, name), "run", lambda args, told=told: told)
    monkeypatch.setattr(Report, "verdict", lambda report: f"verdict on {report.title}")
    (tmp_path / "runs/demo").mkdir(parents=True)  # by the halves
    monkeypatch.chdir(tmp_path)
    assert both.main([]) == 0
    results = {"baseline": {"nll": 1}, "PS-KD": {"nll": 2}}
    written = json.loads((tmp_path / "runs/demo/results.json").read_text())
    assert written == {name: results for name in ("classification", "translation", "detection")}
    printed = capsys.readouterr().out
    order = [printed.index(f"verdict on {name}") for name in written]
    assert order == sorted(order)
    assert printed.count("PS-KD      2.00") == 3 and str(tmp_path / "runs/demo") in printed
    makefile = (ROOT / "Makefile").read_text()
    assert re.search(r"^demo: .*\n\t\$\(BIN\)/python -m demo$", makefile, flags=re.MULTILINE)
