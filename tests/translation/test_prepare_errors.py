"""prepare.py: what fails or is killed leaves nothing; what it refuses is in tests/bad_input."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest
from prepare_toys import LANGUAGES, bitext, prepare
from pskd_fairseq.preparation.binaries import binarise
from pskd_fairseq.preparation.job import Job
from pskd_fairseq.preparation.pieces import encode_lines
from pskd_fairseq.programs import ToolError


def test_an_abbreviated_option_is_refused_by_the_parser(capsys):
    with pytest.raises(SystemExit, match="2"):
        prepare.main(["a", "b", *LANGUAGES, "--out", "out", "--bpe", "9"])
    assert "prepare.py: error: unrecognized arguments: --bpe" in capsys.readouterr().err


def test_a_failing_tool_is_quoted(tmp_path, monkeypatch):
    def fail(args):
        raise RuntimeError("the reason")

    monkeypatch.setattr("fairseq_cli.preprocess.main", fail)
    with pytest.raises(ToolError, match=r"fairseq-preprocess failed: RuntimeError: the reason"):
        binarise(Job([], "de", "en", tmp_path), tmp_path, tmp_path)


def test_a_killed_worker_is_an_error_and_not_a_wait(tmp_path):
    with pytest.raises(ToolError, match="worker process was killed"):
        encode_lines(["a"] * 3000, kill_self, workers=2)


def kill_self(line):
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("kill", [signal.SIGTERM, signal.SIGINT])
def test_a_killed_run_leaves_no_folder(kill, tmp_path):
    (tmp_path / "sets").mkdir()
    texts = bitext(tmp_path, "train", 300)
    out = str(tmp_path / "sets" / "out")
    module = [sys.executable, "-m", "pskd_fairseq.prepare"]  # as where there is no checkout
    process = subprocess.Popen(
        [*module, *texts, *LANGUAGES, "--out", out, "--bpe-size", "100"],
        stderr=subprocess.PIPE,
        text=True,
        # A shell starts what it runs in the background with this signal ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        for line in process.stderr:  # until the folder beside has been made
            if "tokenised" in line:
                break
        process.send_signal(kill)
        rest = process.communicate(timeout=30)[1]
    finally:
        process.kill()
    assert process.returncode == 128 + kill and "Traceback" not in rest
    assert list((tmp_path / "sets").iterdir()) == []
