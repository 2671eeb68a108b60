"""The demo and evaluate.py from end to end, on a corpus that trains in seconds."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("fairseq", reason="needs fairseq: pip install 'pskd[translation]'")
pytest.importorskip("babel", reason="needs babel: pip install 'pskd[demo]'")

import sacrebleu  # noqa: E402

from pskd.calibration import aurc, reliability_bins  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "translation"))

import evaluate  # noqa: E402


def run(*command: str | Path) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
    )


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """The demo's output folder and what it printed, after two short epochs on 400 pairs."""
    out = tmp_path_factory.mktemp("demo")
    small = ["--encoder-layers", "1", "--decoder-layers", "1", "--max-epoch", "2"]
    done = run(
        "-m",
        "demo.translation",
        "--pairs",
        "400",
        "--held-out",
        "40",
        "--bpe-size",
        "300",
        "--out",
        out,
        "--",
        *small,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return out, done.stdout


def test_demo_prints_the_table_of_both_and_writes_results_and_plots(demo):
    out, printed = demo
    results = json.loads((out / "results.json").read_text())
    assert list(results) == ["baseline", "PS-KD"]
    for name, result in results.items():
        row = next(
            line.split()
            for line in printed.splitlines()
            if line.split()[:1] == [name] and "epoch" not in line
        )
        assert float(row[2]) == pytest.approx(result["nll"], abs=1e-4)
        assert result["seconds_per_epoch"] > 0
    for plot in ("reliability.png", "risk_coverage.png"):
        assert (out / plot).read_bytes().startswith(b"\x89PNG")


def test_demo_shows_progress_line_by_line_and_names_its_logs(demo):
    out, printed = demo
    assert sum("PS-KD     epoch" in line for line in printed.splitlines()) == 2
    assert "alpha 0.7" in printed
    for log in ("prepare.log", "baseline/train.log", "pskd/train.log", "pskd/evaluate.log"):
        assert str(out / log) in printed
        assert (out / log).stat().st_size > 0


def test_evaluation_scores_every_sentence_against_the_raw_reference(demo):
    out, _ = demo
    result = json.loads((out / "baseline" / "evaluation" / "evaluation.json").read_text())
    reference = (out / "data" / "raw" / "test.de").read_text(encoding="utf-8").splitlines()
    translations = out / "baseline" / "evaluation" / "translations.txt"
    lines = translations.read_text(encoding="utf-8").split("\n")[:-1]
    assert result["sentences"] == len(reference) == len(lines) == 40
    assert result["bleu"] == pytest.approx(sacrebleu.corpus_bleu(lines, [reference]).score)
    assert "tok:13a" in result["bleu_signature"]


def test_evaluation_measures_confidence_over_every_reference_token(demo):
    out, _ = demo
    result = json.loads((out / "baseline" / "evaluation" / "evaluation.json").read_text())
    pieces = json.loads((out / "data" / "prepare.json").read_text())["parts"]["test"]["pieces"]
    tokens = np.load(out / "baseline" / "evaluation" / "tokens.npz")
    confidence, correct = tokens["confidence"], tokens["correct"]
    # Every piece and the end of every sentence.
    assert result["tokens"] == len(confidence) == pieces["de"] + result["sentences"]
    assert result["aurc"] == pytest.approx(aurc(confidence, correct))
    bins = reliability_bins(confidence, correct)
    assert result["ece"] == pytest.approx(bins.expected_calibration_error)
    assert result["nll_bits"] == pytest.approx(result["nll"] / np.log(2.0))


def test_teacher_forced_nll_is_that_of_fairseqs_own_validation(demo, tmp_path):
    out, _ = demo
    words = [out / "pskd" / "checkpoint_last.pt", "--data", out / "data", "--out", tmp_path]
    args = evaluate.parse([str(word) for word in [*words, "--split", "valid"]])
    bits = evaluate.measure_confidence(args).compute()["nll"] / np.log(2.0)
    log = (out / "pskd" / "train.log").read_text().splitlines()
    valid = [json.loads(line.split("| valid | ")[1]) for line in log if "| valid | {" in line]
    assert bits == pytest.approx(float(valid[-1]["valid_nll_loss"]), abs=2e-3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"checkpoint": "missing.pt"}, "missing.pt: expected a checkpoint"),
        ({"data": "."}, "expected a folder that translation/prepare.py made"),
    ],
)
def test_evaluate_names_what_is_missing(demo, tmp_path, capsys, change, message):
    out, _ = demo
    words = {"checkpoint": out / "pskd" / "checkpoint_last.pt", "data": out / "data"} | change
    words = [words["checkpoint"], "--data", words["data"], "--out", tmp_path / "out"]
    assert evaluate.main([str(word) for word in words]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_demo_of_own_text_names_the_step_and_log_that_failed(tmp_path):
    source, target = tmp_path / "a.en", tmp_path / "a.de"
    source.write_text("one\ntwo\n")
    target.write_text("eins\n")
    done = run(
        "-m", "demo.translation", "--src", source, "--tgt", target, "--out", tmp_path / "out"
    )
    assert done.returncode == 1
    assert "prepare.log" in done.stderr and "unequal line counts" in done.stderr
    assert not (tmp_path / "out" / "data").exists()


def test_demo_wants_both_texts(tmp_path):
    done = run("-m", "demo.translation", "--src", tmp_path / "a.en")
    assert done.returncode == 2 and "--src and --tgt together" in done.stderr
