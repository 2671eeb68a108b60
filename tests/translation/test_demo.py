"""The demo and evaluate.py from end to end, on a corpus that trains in seconds."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("fairseq", reason="needs fairseq: pip install '.[translation]'")
pytest.importorskip("babel", reason="needs babel: pip install '.[demo]'")

import sacrebleu  # noqa: E402

from pskd.calibration import aurc, reliability_bins  # noqa: E402
from pskd_tools.report.files import read_sentences  # noqa: E402
from pskd_tools.report.runs import read_run  # noqa: E402
from pskd_tools.report.sentences import bleu, chrf  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "translation")]

from fairseq.data import Dictionary  # noqa: E402
from pskd_fairseq import evaluate  # noqa: E402
from pskd_fairseq.evaluation import confidence  # noqa: E402
from pskd_fairseq.evaluation.inputs import load, subwords_of  # noqa: E402
from pskd_fairseq.prepare import build_parser  # noqa: E402

from demo import part, translation  # noqa: E402


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """The demo's output folder and what it printed, after two short epochs on 400 pairs."""
    out = tmp_path_factory.mktemp("demo")
    small = ["--encoder-layers", "1", "--decoder-layers", "1", "--max-epoch", "2"]
    # Enough updates to translate some words: a score of nothing would show no mistake in scoring.
    small += ["--max-tokens", "192", "--warmup-updates", "20"]
    command = "-m demo.translation --pairs 400 --held-out 40 --bpe-size 300 --out".split()
    done = subprocess.run(
        [sys.executable, *command, str(out), "--", *small], cwd=ROOT, capture_output=True, text=True
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
    for plot in ("reliability.png", "risk_coverage.png"):
        assert (out / plot).read_bytes().startswith(b"\x89PNG")
    assert [line for line in printed.splitlines() if "PS-KD         epoch 2  training NLL" in line]
    assert "alpha 0.7" in printed and "PS-KD against baseline:" in printed
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
    assert result["chrf"] == pytest.approx(sacrebleu.corpus_chrf(lines, [reference]).score)
    assert result["chrf"] > 0.0


def in_order(pattern: str, log: str) -> list[str]:
    """Return what fairseq-generate prints of each sentence, in the order of the text."""
    found = re.findall(pattern, log, re.M)
    return [text for _, text in sorted((int(key), text) for key, text in found)]


def test_tokenised_bleu_is_that_of_the_tokens_of_all_sentences(demo):
    out, _ = demo
    folder = out / "pskd" / "evaluation"
    log = (folder / "generate.log").read_text(encoding="utf-8")
    translations = in_order(r"^H-(\d+)\t[^\t]*\t(.*)$", log)
    references = in_order(r"^T-(\d+)\t(.*)$", log)
    assert len(translations) == len(references) == 40
    bleu = sacrebleu.BLEU(tokenize="none", smooth_method="none", force=True)
    expected = bleu.corpus_score(translations, [references])
    result = json.loads((folder / "evaluation.json").read_text())
    assert result["tokenised_bleu"] == pytest.approx(expected.score, abs=0.006)
    # Two epochs bring no four words in a row, so the parts of the score tell more.
    line = result["tokenised_bleu_line"]
    precisions, lengths = re.search(r", ([\d./]+) \(", line)[1], re.findall(r"len=(\d+)", line)
    precisions = [float(precision) for precision in precisions.split("/")]
    assert precisions == pytest.approx(expected.precisions, abs=0.051)
    assert [int(length) for length in lengths] == [expected.sys_len, expected.ref_len]
    assert precisions[0] > 0.0


def test_the_scores_can_be_made_of_the_sentences_that_are_kept(demo):
    out, _ = demo
    folder = out / "pskd" / "evaluation"
    result = json.loads((folder / "evaluation.json").read_text())
    kept = read_sentences(folder / "sentences.json")
    text = (folder / "translations.txt").read_text(encoding="utf-8")
    assert kept.translation == text.split("\n")[:-1]
    raw = {side: (out / "data" / "raw" / f"test.{side}").read_text(encoding="utf-8")
           for side in ("en", "de")}  # fmt: skip
    assert {"\n".join([*kept.source, ""]), "\n".join([*kept.reference, ""])} == set(raw.values())
    assert bleu(kept.bleu.sum(axis=0)) == pytest.approx(result["bleu"])
    assert chrf(kept.chrf.sum(axis=0)) == pytest.approx(result["chrf"])


def test_evaluation_measures_confidence_over_every_reference_token(demo):
    out, _ = demo
    result = json.loads((out / "baseline" / "evaluation" / "evaluation.json").read_text())
    pieces = json.loads((out / "data" / "prepare.json").read_text())["parts"]["test"]["pieces"]
    tokens = np.load(out / "baseline" / "evaluation" / "confidence.npz")
    confidence, correct = tokens["confidence"], tokens["correct"]
    # Every piece and the end of every sentence.
    assert result["tokens"] == len(confidence) == pieces["de"] + result["sentences"]
    assert result["aurc"] == pytest.approx(aurc(confidence, correct))
    # As many tokens of each sentence as pieces and its end.
    assert np.unique(tokens["ids"]).tolist() == list(range(result["sentences"]))
    assert np.bincount(tokens["ids"]).min() >= 2
    bins = reliability_bins(confidence, correct)
    assert result["ece"] == pytest.approx(bins.expected_calibration_error)
    assert result["nll_bits"] == pytest.approx(result["nll"] / np.log(2.0))


def test_teacher_forced_nll_is_that_of_fairseqs_own_validation(demo, tmp_path):
    out, _ = demo
    words = [out / "pskd" / "checkpoint_last.pt", "--data", out / "data", "--out", tmp_path]
    args = evaluate.parse([str(word) for word in [*words, "--split", "valid"]])
    tokens = confidence.measure_confidence(args, *load(args))
    bits = tokens["nll"].mean() / np.log(2.0)
    log = (out / "pskd" / "train.log").read_text().splitlines()
    valid = [json.loads(line.split("| valid | ")[1]) for line in log if "| valid | {" in line]
    assert bits == pytest.approx(float(valid[-1]["valid_nll_loss"]), abs=2e-3)


def test_temperature_scaling_is_fitted_on_the_validation_split(demo, tmp_path):
    out, _ = demo
    result = json.loads((out / "pskd" / "evaluation" / "evaluation.json").read_text())
    tokens = np.load(out / "pskd" / "evaluation" / "confidence.npz")
    assert tokens["temperature"] == result["temperature"]
    assert result["nll"] == pytest.approx(tokens["nll"].mean(dtype=float))
    assert result["scaled"]["nll"] == pytest.approx(tokens["scaled_nll"].mean(dtype=float))
    pair = tokens["scaled_confidence"], tokens["correct"]
    assert result["scaled"]["aurc"] == pytest.approx(aurc(*pair))
    words = [out / "pskd" / "checkpoint_last.pt", "--data", out / "data", "--out", tmp_path]
    args = evaluate.parse([str(word) for word in [*words, "--split", "valid"]])
    valid = confidence.measure_confidence(args, *load(args), result["temperature"])
    # Of few tokens all are fitted to, so there is no better one.
    assert valid["scaled_nll"].mean() <= valid["nll"].mean()
    for other in (0.98, 1.02):
        worse = confidence.measure_confidence(args, *load(args), other * result["temperature"])
        assert worse["scaled_nll"].mean() >= valid["scaled_nll"].mean() - 1e-6


def test_many_tokens_are_fitted_to_evenly(demo, tmp_path, monkeypatch):
    out, _ = demo
    words = [out / "pskd" / "checkpoint_last.pt", "--data", out / "data", "--out", tmp_path]
    args = evaluate.parse([str(word) for word in [*words, "--max-tokens", "64"]])
    monkeypatch.setattr(confidence, "_TEMPERATURE_TOKENS", 50)
    fitted = []
    monkeypatch.setattr(confidence, "fit_temperature", lambda *pair: fitted.append(pair) or 1.0)
    loaded = load(args)
    assert confidence.fit_temperature_on_valid(args, *loaded) == 1.0
    ((lprobs, target),) = fitted
    every = [label for _, labels, _ in confidence.scored_tokens(args, "valid", *loaded)
             for label in labels.tolist()]  # fmt: skip
    step = -(-len(every) // 50)
    assert step > 1 and target.tolist() == every[::step]
    assert 25 <= len(lprobs) == len(target) <= 50


def evaluation(demo, out: Path, **changes: Path) -> list[str]:
    """Return evaluate.py's words for the demo's PS-KD model."""
    folder, _ = demo
    given = {"checkpoint": folder / "pskd" / "checkpoint_last.pt", "data": folder / "data"}
    given |= changes
    return [str(given["checkpoint"]), "--data", str(given["data"]), "--out", str(out)]


def test_evaluate_takes_data_of_fairseq_preprocess_alone(
    demo, tmp_path, monkeypatch, capsys, caplog
):
    """It asks fairseq-generate what it asked in the demo, which is not run once more."""
    data = shutil.copytree(demo[0] / "data", tmp_path / "data")
    (data / "prepare.json").unlink()
    shutil.rmtree(data / "raw")
    log = (demo[0] / "pskd" / "evaluation" / "generate.log").read_text(encoding="utf-8")
    tokenised = in_order(r"^H-(\d+)\t[^\t]*\t(.*)$", log)

    def generated(args, pair, subwords):
        assert (args.data, pair, subwords) == (data, ("en", "de"), "subword_nmt")
        return tokenised, re.search("^Generate .*$", log, re.M)[0]

    monkeypatch.setattr(evaluate, "generate", generated)
    caplog.set_level("INFO")
    out = tmp_path / "run"
    assert evaluate.main(evaluation(demo, out, data=data)) == 0
    assert f"{data} has no prepare.json: no BLEU and chrF" in caplog.text
    assert "tokenised_bleu=" in (printed := capsys.readouterr().out) and " bleu=" not in printed
    result = json.loads((out / "evaluation.json").read_text())
    whole = json.loads((demo[0] / "pskd" / "evaluation" / "evaluation.json").read_text())
    assert {"bleu", "bleu_signature", "chrf", "chrf_signature"} == whole.keys() - result.keys()
    assert result == {key: whole[key] for key in result}
    words = (out / "translations.txt").read_text(encoding="utf-8").split("\n")[:-1]
    assert words == tokenised and len(words) == 40
    run = read_run(out, "run")
    assert run.task == "translation" and len(run.rows["confidence"]) == result["tokens"]
    assert len(run.epochs) == 2  # of the log beside the checkpoint


@pytest.mark.parametrize(
    ("words", "cut"),
    [
        (["ein", "Wo@@", "rt"], "subword_nmt"),
        (["\u2581ein", "\u2581Wo", "rt"], "sentencepiece"),
        (["ein", "Wort"], None),
    ],
)
def test_a_dictionary_tells_how_words_were_cut(words, cut):
    dictionary = Dictionary()
    for word in words:
        dictionary.add_symbol(word)
    assert subwords_of(dictionary) == cut


def test_evaluate_names_a_checkpoint_of_other_data(demo, tmp_path, capsys):
    data = shutil.copytree(demo[0] / "data", tmp_path / "data")
    for words in data.glob("dict.*.txt"):
        words.write_text(words.read_text(encoding="utf-8") + "more 1\n", encoding="utf-8")
    assert evaluate.main(evaluation(demo, tmp_path / "out", data=data)) == 2
    shown = capsys.readouterr().err
    assert f"checkpoint_last.pt: expected a whole fairseq checkpoint that fits {data}" in shown


def test_an_out_that_is_a_file_is_an_error_that_names_it(demo, tmp_path, capsys):
    out = tmp_path / "out"
    out.write_text("mine")
    assert evaluate.main(evaluation(demo, out)) == 1
    assert f"evaluate.py: error: [Errno 17] File exists: '{out}'" in capsys.readouterr().err
    assert out.read_text() == "mine"


def test_the_demo_prepares_own_text_in_its_own_languages(tmp_path, monkeypatch):
    """What follows is the embedded corpus's path, which the tests above run to its end."""
    commands = []
    monkeypatch.setattr(part, "run_all", lambda given, logs: commands.extend(given.values()))
    texts = [tmp_path / "a.en", tmp_path / "a.fr"]
    words = ["--src", texts[0], "--tgt", texts[1], "--target-lang", "fr", "--bpe-size", "40"]
    args = translation.parse([str(word) for word in words])
    data = translation.prepare(args, tmp_path / "out")
    ((python, script, *words),) = commands
    assert (python, script) == (sys.executable, ROOT / "translation" / "prepare.py")
    job = build_parser().parse_args([str(word) for word in words])
    assert (job.texts, job.source_lang, job.target_lang) == (texts, "en", "fr")
    assert (job.valid, job.test, job.bpe_size, job.out) == (None, None, 40, data)
