"""evaluate.py's scores: sacreBLEU's for the target language and its paired bootstrap; COMET."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest

pytest.importorskip("fairseq", reason="needs fairseq: pip install '.[translation]'")

import fairseq_toys  # noqa: E402, F401
import sacrebleu  # noqa: E402
from pskd_fairseq import evaluate  # noqa: E402
from pskd_fairseq.evaluation.metrics import corpus_metrics, language_of  # noqa: E402
from pskd_fairseq.evaluation.translations import detokenised, score  # noqa: E402

from pskd_tools.report.sentences import SentenceMetrics  # noqa: E402

CHINESE = ["我们今天去公园看花和树。", "这本书非常有意思，我读了两遍。"]
TRANSLATED = ["我们今天去公园看花和草。", "这本书非常有趣，我读了两遍。"]


def scored(tmp_path, language: str, reference=CHINESE, translations=TRANSLATED, source=()):
    raw = tmp_path / "data" / "raw"
    raw.mkdir(parents=True)
    (raw / f"test.{language}").write_text("\n".join([*reference, ""]), encoding="utf-8")
    if source:
        (raw / "test.en").write_text("\n".join([*source, ""]), encoding="utf-8")
    args = Namespace(data=tmp_path / "data", split="test", cpu=True)
    preparation = {"source_lang": "en", "target_lang": language, "lowercase": False}
    return score(list(translations), args, preparation)


@pytest.mark.parametrize(
    ("tokens", "codes"),
    [
        ("zh", "zh zh_CN zh-cn zh-Hant ZH zho_Hans cmn"),
        ("char", "th th_TH my_MM khm_Khmr lo shn_Mymr dzo_Tibt"),  # others without spaces
        ("13a", "de de_DE en_XX pt-br deu_Latn x"),
    ],
)
def test_tokens_are_those_of_the_language_whatever_its_region(tokens, codes):
    for code in codes.split():
        bleu, _ = corpus_metrics(code, lowercase=False)
        bleu.corpus_score(TRANSLATED, [CHINESE])
        assert f"|tok:{tokens}|" in str(bleu.get_signature()), code


def test_chinese_is_counted_by_character(tmp_path):
    scores, sentences = scored(tmp_path, "zh_CN")
    expected = sacrebleu.BLEU(trg_lang="zh").corpus_score(TRANSLATED, [CHINESE]).score
    assert scores["bleu"] == expected > 60.0
    assert "|tok:zh|" in scores["bleu_signature"]
    counts = np.array(sentences["bleu"]), np.array(sentences["chrf"])
    drawn = SentenceMetrics(*counts)(np.ones(2, dtype=np.int64))  # as the report's bootstrap
    assert drawn == pytest.approx({key: scores[key] for key in ("bleu", "chrf")})


@pytest.mark.parametrize(
    ("code", "language", "tokenizer"),
    [("ja", "ja", "ja"), ("ja_XX", "ja", "ja"), ("jpn_Jpan", "ja", "ja"), ("ko-KR", "ko", "ko")],
)
def test_a_missing_package_is_named_before_anything_is_translated(
    code, language, tokenizer, tmp_path, monkeypatch, capsys
):
    module = f"sacrebleu.tokenizers.tokenizer_{tokenizer}_mecab"
    __import__(module)
    monkeypatch.setattr(f"{module}.MeCab", None)
    assert language_of(code) == language
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / f"test.{code}").write_text("\n")
    preparation = {"source_lang": "en", "target_lang": code, "lowercase": False}
    (tmp_path / "prepare.json").write_text(json.dumps(preparation))
    (tmp_path / "model.pt").write_text("not read")
    words = [tmp_path / "model.pt", "--data", tmp_path, "--out", tmp_path / "out"]
    assert evaluate.main([str(word) for word in words]) == 2
    error = capsys.readouterr().err
    assert f"BLEU of target language {code}:" in error
    assert f"pip install sacrebleu[{language}]" in error
    assert not (tmp_path / "out").exists()


def test_korean_words_stay_apart_whatever_the_region():
    for code in ("ko", "ko_KR"):
        assert detokenised(["오늘 공원에 갔다 ."], {"target_lang": code}) == ["오늘 공원에 갔다."]


# ---- COMET ---------------------------------------------------------------------------------------


@pytest.fixture
def comet(monkeypatch):
    """A stand-in for unbabel-comet, whose score is the number of rows."""
    seen = SimpleNamespace(rows=None, options=None, asked=None)

    def predict(rows, **options):
        seen.rows, seen.options = rows, options
        return SimpleNamespace(scores=[], system_score=0.5 * len(rows))

    def download_model(name, *, local_files_only=False):
        seen.asked = name, local_files_only
        return "model.ckpt"

    module = ModuleType("comet")
    module.download_model = download_model
    module.load_from_checkpoint = lambda path: SimpleNamespace(predict=predict)
    monkeypatch.setitem(sys.modules, "comet", module)
    return SimpleNamespace(module=module, seen=seen)


def test_comet_is_of_source_translation_and_reference(comet, tmp_path):
    scores, _ = scored(tmp_path, "zh", source=["one", "two"])
    assert scores["comet"] == 1.0 and scores["comet_model"] == "Unbabel/wmt22-comet-da"
    assert comet.seen.asked == ("Unbabel/wmt22-comet-da", True)  # nothing is downloaded
    assert comet.seen.rows[1] == {"src": "two", "mt": TRANSLATED[1], "ref": CHINESE[1]}
    assert comet.seen.options["gpus"] == 0


def test_without_sources_there_is_no_comet(comet, tmp_path):
    assert "comet" not in scored(tmp_path, "zh")[0] and comet.seen.asked is None


def test_without_unbabel_comet_there_is_no_comet(monkeypatch, tmp_path, caplog):
    monkeypatch.setitem(sys.modules, "comet", None)
    assert "comet" not in scored(tmp_path, "zh", source=["one", "two"])[0]
    assert "COMET" not in caplog.text


def test_a_missing_model_of_comet_costs_no_other_score(comet, tmp_path, caplog):
    def missing(name, **_):
        raise KeyError(f"Model '{name}' not supported by COMET.")

    comet.module.download_model = missing
    scores, _ = scored(tmp_path, "zh", source=["one", "two"])
    assert "comet" not in scores and scores["bleu"] > 60.0
    assert "no COMET: KeyError" in caplog.text
    assert "fetch it once: python -c 'import comet; comet.download_model(\"Unb" in caplog.text


# ---- compare -------------------------------------------------------------------------------------


def evaluation(folder, translations, reference, *, language="en", lowercase=False):
    metrics = corpus_metrics(language, lowercase)
    numbers = {"task": "translation"}
    counts = {}
    for name, metric in zip(("bleu", "chrf"), metrics, strict=True):
        numbers[name] = metric.corpus_score(translations, [reference]).score
        numbers[f"{name}_signature"] = str(metric.get_signature())
        counts[name] = metric._extract_corpus_statistics(translations, [reference])
    texts = {"source": [], "reference": reference, "translation": translations}
    folder.mkdir()
    (folder / "evaluation.json").write_text(json.dumps(numbers))
    (folder / "sentences.json").write_text(json.dumps(texts | counts))
    return str(folder)


@pytest.fixture
def texts():
    draw = np.random.default_rng(0)
    reference = [" ".join(draw.choice(list("abcdefgh"), 9)) for _ in range(60)]

    def damaged(share):
        return [
            " ".join("x" if draw.random() < share else word for word in line.split())
            for line in reference
        ]

    return reference, damaged(0.3), damaged(0.15)


@pytest.mark.parametrize("language", ["en", "zh_CN"])
def test_compare_is_sacrebleus_paired_bootstrap(tmp_path, capsys, texts, language):
    reference, *systems = texts
    if language == "zh_CN":
        reference, *systems = ([line.replace("a", "花").replace(" ", "") for line in text]
                               for text in texts)  # fmt: skip
    folders = []
    for name, lines in zip("AB", systems, strict=True):
        folders.append(evaluation(tmp_path / name, lines, reference, language=language))
        (tmp_path / f"{name}.txt").write_text("\n".join([*lines, ""]), encoding="utf-8")
    (tmp_path / "ref.txt").write_text("\n".join([*reference, ""]), encoding="utf-8")
    command = [sys.executable, "-m", "sacrebleu", "ref.txt", "-i", "A.txt", "B.txt", "-w", "2"]
    command += ["-m", "bleu", "chrf", "--paired-bs", "-f", "text"]
    command += ["-tok", "zh" if language != "en" else "13a"]
    output = subprocess.run(command, cwd=tmp_path, capture_output=True, encoding="utf-8",
                            env=os.environ | {"PYTHONIOENCODING": "utf-8"}, check=True)  # fmt: skip
    theirs = re.findall(r"[\d.]+ \([\d.]+ ± [\d.]+\)|p = [\d.]+", output.stdout)
    assert len(theirs) == 6
    assert evaluate.main(["compare", *folders]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["BLEU", "chrF2"]
    assert [line.split()[0] for line in lines[1:3]] == ["A", "B"]
    ours = re.findall(r"[\d.]+ \([\d.]+ ± [\d.]+\)|p [\d.]+", "\n".join(lines[1:3]))
    assert sorted(ours) == sorted(found.replace("p = ", "p ") for found in theirs)
    assert "|bs:1000|seed:12345|" in lines[3] and "|tok:" in lines[3]


def test_compare_refuses_what_cannot_be_compared(tmp_path, capsys, texts):
    reference, first, second = texts
    a = evaluation(tmp_path / "A", first, reference)
    other = evaluation(tmp_path / "other", second[:-1], reference[:-1])
    cased = evaluation(tmp_path / "cased", second, reference, lowercase=True)
    chinese = evaluation(tmp_path / "chinese", second, reference, language="zh")
    unknown = [evaluation(tmp_path / name, first, reference) for name in ("U", "V")]
    for folder in unknown:
        numbers = Path(folder, "evaluation.json")
        numbers.write_text(numbers.read_text().replace("tok:13a", "tok:mine"))
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "evaluation.json").write_text('{"task": "translation", "bleu": 1.0}')
    cases = {
        (a,): "compare: expected two evaluations or more, got 1",
        (a, str(tmp_path / "no")): f"{tmp_path / 'no'}: expected the folder of a run",
        (a, other): f"{other}: expected the references of {a}, got others",
        (a, cased): "expected BLEU of nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp as",
        (a, chinese): "got nrefs:1|case:mixed|eff:no|tok:zh|smooth:exp",
        tuple(unknown): "expected a tokeniser of sacreBLEU's, got tok:mine",
        (a, str(bare)): f"{bare}: expected an evaluation with sentences.json",
        (str(bare), a): f"{bare}: expected an evaluation with sentences.json",
    }
    for folders, message in cases.items():
        assert evaluate.main(["compare", *folders]) == 2
        assert message in capsys.readouterr().err
