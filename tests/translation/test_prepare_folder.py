"""prepare.py: what is drawn and dropped, and the folder, never half made and never another's.

All but fairseq-preprocess, which a stand-in replaces.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prepare_toys import LANGUAGES, bitext, prepare, raw, run_main, sentences, write
from pskd_fairseq.preparation.folder import staging
from pskd_fairseq.preparation.pieces import moses_tokens
from pskd_fairseq.preparation.text import EMPTY, hold_out, read_lines, sentence_key, source_keys
from pskd_fairseq.programs import ToolError, UserError


@pytest.fixture
def no_fairseq(monkeypatch):
    """Replace the binaries by a dictionary file; gives the training pieces that were written."""
    seen = {}

    def stand_in(job, text, data):
        pieces = {
            language: (text / f"train.{language}").read_text(encoding="utf-8")
            for language in job.languages
        }
        seen.update(pieces)
        known = dict.fromkeys(" ".join(pieces.values()).split())
        for language in job.languages:
            (data / f"dict.{language}.txt").write_text(
                "".join(f"{piece} 1\n" for piece in known), encoding="utf-8"
            )

    monkeypatch.setattr(prepare, "binarise", stand_in)
    return seen


def make(tmp_path, capsys, *options, number=300):
    texts = bitext(tmp_path, "train", number)
    arguments = [*texts, *LANGUAGES, "--out", tmp_path / "out", "--bpe-size", 100, *options]
    status, error = run_main(arguments, capsys)
    assert status == 0, error
    return json.loads((tmp_path / "out" / "prepare.json").read_text())


def test_lowercase_changes_the_pieces_and_not_the_raw_text(no_fairseq, tmp_path, capsys):
    record = make(tmp_path, capsys, "--lowercase")
    assert record["lowercase"] is True
    assert no_fairseq["de"] == no_fairseq["de"].lower()
    assert any(line != line.lower() for line in raw(tmp_path / "out", "test", "de"))


def test_max_train_keeps_the_first_pairs_and_the_same_held_out_parts(no_fairseq, tmp_path, capsys):
    make(tmp_path, capsys)
    everything = no_fairseq["en"].replace("@@ ", "").splitlines()
    held_out = raw(tmp_path / "out", "valid", "de"), raw(tmp_path / "out", "test", "en")
    record = make(tmp_path, capsys, "--max-train", 50, "--overwrite")
    assert record["parts"]["train"]["pairs"] == 50
    assert no_fairseq["en"].replace("@@ ", "").splitlines() == everything[:50]
    assert held_out == (raw(tmp_path / "out", "valid", "de"), raw(tmp_path / "out", "test", "en"))


def test_the_seed_decides_what_is_drawn(no_fairseq, tmp_path, capsys):
    drawn = []
    for seed in (1, 1, 2):
        make(tmp_path, capsys, "--seed", seed, "--overwrite")
        drawn.append(raw(tmp_path / "out", "valid", "de"))
    assert drawn[0] == drawn[1] != drawn[2]


def test_bpe_size_beyond_the_text_is_said(no_fairseq, tmp_path, capsys, caplog):
    record = make(tmp_path, capsys, "--bpe-size", 100_000)
    assert 0 < record["bpe"]["merges_learned"] < 100_000
    assert f"only {record['bpe']['merges_learned']} of 100000 BPE merges" in caplog.text


def test_empty_training_pairs_are_dropped_and_counted(no_fairseq, tmp_path, capsys, caplog):
    german, english = sentences(300)
    german[4], english[9], english[10] = "", "  ", "\x02"
    texts = [write(tmp_path / "t.de", german), write(tmp_path / "t.en", english)]
    status, error = run_main([*texts, *LANGUAGES, "--out", tmp_path / "out"], capsys)
    assert status == 0, error
    record = json.loads((tmp_path / "out" / "prepare.json").read_text())
    assert record["parts"]["train"]["dropped_empty"] == 3
    assert sum(part["pairs"] for part in record["parts"].values()) == 297
    assert f"dropped 3 training pairs with an empty side (first: {texts[0]}:5)" in caplog.text


def test_given_text_that_is_in_training_too_is_said(no_fairseq, tmp_path, capsys, caplog):
    texts = bitext(tmp_path, "train", 300)
    test = bitext(tmp_path, "test", 5)
    status, error = run_main(
        [*texts, *LANGUAGES, "--test", *test, "--out", tmp_path / "out", "--valid-size", 290],
        capsys,
    )
    assert status == 0, error
    assert "5 source sentences of the test text are in the training text too" in caplog.text
    # Nor may the validation text be drawn from sentences of the test text.
    assert not set(raw(tmp_path / "out", "valid", "de")) & set(sentences(5)[0])


# ---- parts ---------------------------------------------------------------------------------------


def test_byte_order_mark_and_stray_carriage_returns_do_no_harm(tmp_path):
    path = tmp_path / "text"
    path.write_bytes("\ufeffeins\r\nzwei\rdrei\r\nvier\u2028fünf".encode())
    assert read_lines(path) == ["eins", "zwei drei", "vier\u2028fünf"]


@given(
    st.lists(
        st.tuples(st.text("aB \u2009", max_size=4), st.text("xy", max_size=2)),
        min_size=4,
        max_size=60,
    ),
    st.integers(0, 3),
    st.integers(1, 3),
    st.integers(1, 3),
)
@settings(max_examples=60, deadline=None)
def test_held_out_parts_are_disjoint_whatever_the_text(pairs, seed, valid, test):
    sizes = {"valid": valid, "test": test}
    taken = {sentence_key(pairs[0][0])}
    free = source_keys(pairs) - taken
    if len(free) <= valid + test:
        with pytest.raises(UserError, match="too few pairs"):
            hold_out(pairs, sizes, seed, taken)
        return
    parts, rest = hold_out(pairs, sizes, seed, taken)
    keys = [source_keys(some) for some in (rest, parts["valid"], parts["test"])]
    assert not keys[0] & keys[1] and not keys[0] & keys[2] and not keys[1] & keys[2]
    assert set.union(*keys) == free | taken and taken <= keys[0]
    assert [len(parts["valid"]), len(parts["test"])] == [valid, test]
    assert len(keys[1]) == valid and len(keys[2]) == test
    assert set(parts["valid"]) | set(parts["test"]) | set(rest) <= set(pairs)


@given(st.text(max_size=40))
@settings(max_examples=100, deadline=None)
def test_a_sentence_that_is_not_empty_has_tokens_that_fairseq_counts_alike(text):
    """fairseq splits pieces at any white space; a token with some inside would shift its count."""
    tokens = moses_tokens("de", False, text)
    assert tokens.split() == [token for token in tokens.split(" ") if token]
    assert bool(tokens.split()) == (not EMPTY.fullmatch(text))


# ---- the folder ----------------------------------------------------------------------------------


def everything_in(folder):
    return {
        path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()
    }


def test_a_prepared_set_is_not_replaced_without_being_asked(no_fairseq, tmp_path, capsys):
    make(tmp_path, capsys)
    before = everything_in(tmp_path)
    arguments = [*bitext(tmp_path, "train", 300), *LANGUAGES, "--out", tmp_path / "out"]
    status, error = run_main(arguments, capsys)
    assert status == 2 and f"{tmp_path / 'out'}: already holds a prepared set" in error
    assert everything_in(tmp_path) == before


def test_overwrite_replaces_the_whole_set(no_fairseq, tmp_path, capsys):
    (tmp_path / "out").mkdir()  # an empty folder may be filled
    make(tmp_path, capsys, "--seed", 1)
    assert make(tmp_path, capsys, "--seed", 2, "--overwrite")["seed"] == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "train.de", "train.en"]


@pytest.mark.parametrize("error", [ToolError("it broke"), OSError(28, "No space left")])
def test_failure_leaves_nothing_and_keeps_the_old_set(
    error, no_fairseq, tmp_path, capsys, monkeypatch
):
    make(tmp_path, capsys)
    before = everything_in(tmp_path)

    def fail(*_):
        raise error

    monkeypatch.setattr(prepare, "binarise", fail)
    arguments = [*bitext(tmp_path, "train", 300), *LANGUAGES]
    for out in ("out", "other"):
        status, shown = run_main([*arguments, "--out", tmp_path / out, "--overwrite"], capsys)
        assert status == 1
        assert shown.startswith(f"prepare.py: error: {error}")
    assert everything_in(tmp_path) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "train.de", "train.en"]


def test_a_swap_that_fails_half_way_puts_the_old_set_back(tmp_path, monkeypatch):
    out = tmp_path / "out"
    out.mkdir()
    (out / "old").write_text("old")
    rename = Path.rename

    def fail_for_new(self, target):
        if self.name == "data":
            raise OSError("the disk went away")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail_for_new)
    with pytest.raises(OSError, match="went away"), staging(out):
        pass
    assert everything_in(tmp_path) == {Path("out/old"): b"old"}


def test_what_a_killed_run_left_is_named(tmp_path, caplog):
    left = tmp_path / ".out.abc.partial"
    left.mkdir()
    with staging(tmp_path / "out"):
        pass
    assert str(left) in caplog.text
    assert sorted(path.name for path in tmp_path.iterdir()) == [left.name, "out"]
