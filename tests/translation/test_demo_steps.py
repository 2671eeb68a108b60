"""The demo's steps in the background, the folders it may delete, and its command line."""

from __future__ import annotations

import importlib
import json
import os
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
from demo.part import Report, printer, read_metrics  # noqa: E402
from demo.steps import StepFailed, check_folder, fresh_folder, run_all  # noqa: E402

both = importlib.import_module("demo.__main__")
PARTS = ("classification", "translation", "detection")


# --- steps ------------------------------------------------------------------------------------


def run(folder: Path, code: dict[str, str], *watch) -> None:
    """Run lines of Python as steps."""
    commands = {name: [sys.executable, "-c", line] for name, line in code.items()}
    run_all(commands, {name: folder / f"{name}.log" for name in code}, *watch)


@pytest.mark.parametrize("order", [1, -1])
def test_a_step_that_fails_stops_the_others_at_once(tmp_path, order):
    log = str(tmp_path / "waiting.log")
    code = {
        "waiting": "import os, time; print(os.getpid(), flush=True); time.sleep(60)",
        "failing": f"import os\nwhile not (os.path.exists({log!r}) and os.path.getsize({log!r})):\n"
        "    pass\nraise SystemExit('no such word')",
    }
    start = time.monotonic()
    with pytest.raises(StepFailed, match=r"failing failed \(1\), see .*: no such word"):
        run(tmp_path, dict(list(code.items())[::order]))
    assert time.monotonic() - start < 30
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "waiting.log").read_text()), 0)


def test_steps_that_end_at_different_times_are_all_watched_to_their_end(tmp_path):
    seen = {}
    code = {"short": "print('a')", "long": "import time; time.sleep(1); print('b')"}
    run(tmp_path, code, lambda name, log: seen.update({name: log.read_text()}))
    assert seen == {"short": "a\n", "long": "b\n"}


def test_a_record_is_printed_once_when_its_line_is_whole(tmp_path, capsys):
    log = tmp_path / "train.log"
    watch = printer(read_metrics, lambda record, last: f"{last.get('epoch')} {record['epoch']}")
    for text in ('{"epoch": 1}\n{"epo', '{"epoch": 1}\n{"epoch": 2}\n'):
        (tmp_path / "metrics.json").write_text(text)
        watch("run", log)
    assert capsys.readouterr().out == "    run           None 1\n    run           1 2\n"
    line = '2026-01-01 | INFO | train | {"epoch": 1}\n'
    for text, found in ((line[:-3], []), (line, [{"epoch": 1}])):
        log.write_text(text)
        assert translation.epoch_records(log) == found


# --- folders ----------------------------------------------------------------------------------


def test_a_folder_that_is_absent_empty_or_of_an_earlier_run_is_made_fresh(tmp_path):
    for name in ("empty", "earlier"):
        (tmp_path / name).mkdir()
    (tmp_path / "earlier" / "inner").mkdir()
    (tmp_path / "earlier" / "inner" / "checkpoint_last.pt").write_text("old")
    (tmp_path / "earlier" / "train.log").write_text("old")
    for name in ("absent", "empty", "earlier"):
        assert list(fresh_folder(tmp_path / name).iterdir()) == []


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


@pytest.mark.parametrize("part", PARTS)
def test_a_part_that_would_delete_a_package_stops_before_it_writes(tmp_path, capsys, part):
    """--out . in a clone, where pskd is the core."""
    package = tmp_path / "pskd"
    package.mkdir()
    (package / "__init__.py").write_text("core")
    assert getattr(both, part).main(["--out", str(tmp_path)]) == 1
    told = f"demo: error: {package}: expected a folder that the demo made"
    assert told in capsys.readouterr().err
    assert [path.name for path in tmp_path.rglob("*")] == ["pskd", "__init__.py"]


# --- all of it --------------------------------------------------------------------------------


@pytest.mark.parametrize("word, code", [("--help", 0), ("--no-such-flag", 2), ("translation", 2)])
def test_the_whole_demo_reads_its_command_line(monkeypatch, capsys, word, code):
    monkeypatch.setattr(sys, "argv", ["demo", word])
    with pytest.raises(SystemExit) as ended:
        both.main()
    assert ended.value.code == code
    shown = capsys.readouterr()
    assert "python -m demo" in (shown.out if code == 0 else shown.err)


def test_the_whole_demo_tells_of_both_halves(monkeypatch, capsys, tmp_path):
    """As `make demo` runs it; the parts have tests of their own from end to end."""
    results = {"baseline": {"nll": 1}, "PS-KD": {"nll": 2}}
    for name in PARTS:
        told = Report(name, {"nll": ("NLL", ".2f")}, results, "", [])
        monkeypatch.setattr(getattr(both, name), "run", lambda args, told=told: told)
    monkeypatch.setattr(Report, "verdict", lambda report: f"verdict on {report.title}")
    (tmp_path / "runs/demo").mkdir(parents=True)  # by the parts
    monkeypatch.chdir(tmp_path)
    assert both.main([]) == 0
    written = json.loads((tmp_path / "runs/demo/results.json").read_text())
    assert written == dict.fromkeys(PARTS, results)
    printed = capsys.readouterr().out
    order = [printed.index(f"verdict on {name}") for name in PARTS]
    assert order == sorted(order)
    assert printed.count("PS-KD     2.00") == 3 and str(tmp_path / "runs/demo") in printed
    makefile = (ROOT / "Makefile").read_text()
    assert re.search(r"^demo: .*\n\t\$\(BIN\)/python -m demo$", makefile, flags=re.MULTILINE)

    def refuses(args):
        raise ValueError("runs/demo/translation/pskd: expected a folder")

    monkeypatch.setattr(both.classification, "run", refuses)
    assert both.main([]) == 1
    assert "demo: error: runs/demo/translation/pskd" in capsys.readouterr().err
