"""prepare.py: what it makes can be trained on and scored."""

from __future__ import annotations

import hashlib
import json
from argparse import Namespace
from pathlib import Path

import pytest
from prepare_toys import LANGUAGES, bitext, cli, prepare, raw, sentences, write
from pskd_fairseq.preparation.text import sentence_key


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """One folder made for real, as a user would, from a foreign folder and relative paths."""
    folder = tmp_path_factory.mktemp("prepared")
    texts = [*bitext(folder, "a", 500, seed=1, suffix=".gz"), *bitext(folder, "b", 200, seed=2)]
    test = bitext(folder, "given", 60, seed=3)
    write(folder / "given.en", sentences(60, seed=3)[1], end="\r\n")
    names = [[Path(text).name for text in some] for some in (texts, test)]
    flags = ["--bpe-size", 300, "--workers", 2, "--out", "made/here"]
    done = cli([*names[0], *LANGUAGES, "--test", *names[1], *flags], cwd=folder)
    assert done.returncode == 0, done.stderr
    return Namespace(
        dir=folder / "made" / "here",
        texts=texts,
        test=test,
        log=done.stderr,
        record=json.loads((folder / "made" / "here" / "prepare.json").read_text()),
    )


@pytest.fixture(scope="module")
def dictionary(prepared):
    from fairseq.data import Dictionary

    return Dictionary.load(str(prepared.dir / "dict.de.txt"))


def binaries(folder, dictionary, part, language):
    from fairseq.data.data_utils import load_indexed_dataset

    return load_indexed_dataset(str(folder / f"{part}.de-en.{language}"), dictionary)


def read_back(folder, dictionary, part, language):
    """The sentences of a binary part, joined from pieces and detokenised."""
    from sacremoses import MosesDetokenizer

    detokenize = MosesDetokenizer(language).detokenize
    lines = [
        dictionary.string(ids, bpe_symbol="@@ ")
        for ids in binaries(folder, dictionary, part, language)
    ]
    return [detokenize(line.split()) for line in lines]


def test_folder_holds_what_fairseq_and_scoring_need(prepared, dictionary):
    pairs = [f"{part}.de-en.{side}" for part in ("train", "valid", "test") for side in ("de", "en")]
    expected = {f"{pair}.{kind}" for pair in pairs for kind in ("bin", "idx")}
    expected |= set("bpe.codes dict.de.txt dict.en.txt prepare.json preprocess.log raw".split())
    assert {path.name for path in prepared.dir.iterdir()} == expected
    raws = {path.name for path in (prepared.dir / "raw").iterdir()}
    assert raws == {"valid.de", "valid.en", "test.de", "test.en"}
    both = [(prepared.dir / f"dict.{side}.txt").read_bytes() for side in ("de", "en")]
    assert both[0] == both[1]
    assert prepared.record["dictionary_size"] == len(dictionary)
    assert [path.name for path in prepared.dir.parent.iterdir()] == ["here"]


def test_binaries_and_raw_text_are_aligned(prepared, dictionary):
    for part in ("train", "valid", "test"):
        note = prepared.record["parts"][part]
        for language in ("de", "en"):
            data = binaries(prepared.dir, dictionary, part, language)
            assert len(data) == note["pairs"]
            assert sum(len(ids) - 1 for ids in data) == note["pieces"][language]
            unknown = sum(int((ids == dictionary.unk()).sum()) for ids in data)
            assert unknown == note["unknown"][language]
            if part != "train":
                assert len(raw(prepared.dir, part, language)) == note["pairs"]


def test_given_text_is_kept_as_it_was(prepared):
    given = tuple(raw(prepared.dir, "test", language) for language in ("de", "en"))
    assert given == sentences(60, seed=3)
    assert b"\r" not in (prepared.dir / "raw" / "test.en").read_bytes()


def test_detokenised_pieces_are_the_raw_text(prepared, dictionary):
    from sacrebleu import corpus_bleu

    for language in ("de", "en"):
        back = read_back(prepared.dir, dictionary, "test", language)
        want = raw(prepared.dir, "test", language)
        # Moses does not restore every space around signs (10:30 becomes 10: 30), all else it must;
        # scoring, which splits there itself, must hardly notice.
        assert ["".join(line.split()) for line in back] == ["".join(line.split()) for line in want]
        assert corpus_bleu(back, [want]).score > 95


def test_fairseq_interactive_makes_the_same_pieces_from_raw_text(prepared, dictionary):
    from fairseq.data import encoders

    pair = {"source_lang": "de", "target_lang": "en"}
    defaults = {"moses_no_dash_splits": False, "moses_no_escape": False}
    moses = encoders.build_tokenizer(Namespace(tokenizer="moses", **pair, **defaults))
    codes = str(prepared.dir / "bpe.codes")
    bpe = encoders.build_bpe(Namespace(bpe="subword_nmt", bpe_separator="@@", bpe_codes=codes))
    for part in ("valid", "test"):
        stored = binaries(prepared.dir, dictionary, part, "de")
        for line, ids in zip(raw(prepared.dir, part, "de"), stored, strict=True):
            pieces = bpe.encode(moses.encode(line))
            assert dictionary.encode_line(pieces, add_if_not_exist=False).tolist() == ids.tolist()


def test_drawn_sentences_left_the_training_part(prepared, dictionary):
    train = set(read_back(prepared.dir, dictionary, "train", "de"))
    valid = read_back(prepared.dir, dictionary, "valid", "de")
    assert len(valid) == len(set(valid)) == prepared.record["parts"]["valid"]["pairs"]
    assert not train & set(valid)
    assert not {sentence_key(line) for line in raw(prepared.dir, "valid", "de")} & {
        sentence_key(line) for line in raw(prepared.dir, "test", "de")
    }


def test_record_says_how_it_was_made(prepared):
    record = prepared.record
    assert (record["source_lang"], record["target_lang"]) == ("de", "en")
    assert record["bpe"]["merges_asked"] == 300
    assert set(record["versions"]) >= {"sacremoses", "subword-nmt"}
    assert any(name.startswith("fairseq") for name in record["versions"])
    texts = prepared.texts + prepared.test
    hashes = [hashlib.sha256(Path(path).read_bytes()).hexdigest() for path in texts]
    assert [entry["sha256"] for entry in record["inputs"]] == hashes
    assert record["parts"]["valid"]["from"] == "drawn"
    assert record["parts"]["test"]["from"] == "given"


def test_log_is_one_line_a_step_and_names_the_log_file(prepared):
    assert str(prepared.dir / "preprocess.log") in prepared.log
    assert "it/s" not in prepared.log and "\r" not in prepared.log
    own = [line for line in prepared.log.splitlines() if "Warning" not in line and line[0] != " "]
    assert len(own) <= 10 and all(" | prepare | " in line for line in own)


def test_help_names_the_flags_for_raw_text(capsys):
    with pytest.raises(SystemExit) as stop:
        prepare.main(["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert "--tokenizer moses --bpe subword_nmt --bpe-codes DIR/bpe.codes" in text
