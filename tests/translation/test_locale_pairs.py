"""The demo's corpus: held-out combinations stay held out, and every build gives the same text."""

from __future__ import annotations

import datetime
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("babel", reason="Babel is not installed: pip install babel")

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from demo import locale_items, locale_pairs  # noqa: E402

PARTS = ("train", "valid", "test")


@pytest.fixture(scope="module")
def corpus():
    """Some pairs of every part."""
    sizes = {"train": 6000, "valid": 400, "test": 400}
    return {part: list(locale_pairs.draw_pairs(part, size)) for part, size in sizes.items()}


def combinations(pairs):
    return {combination for pair in pairs for combination in pair.combinations}


def test_no_held_out_sentence_or_combination_is_in_another_part(corpus):
    for part, other in (("valid", "train"), ("valid", "test"), ("test", "train")):
        for said in (
            combinations,
            lambda pairs: {pair.en for pair in pairs},
            lambda pairs: {pair.de for pair in pairs},
        ):
            assert said(corpus[part]).isdisjoint(said(corpus[other]))
    other_seed = locale_pairs.draw_pairs("test", 200, seed=2)
    assert combinations(other_seed).isdisjoint(combinations(corpus["train"]))


def test_held_out_days_are_not_written_in_the_training_text(corpus):
    """The same promise, read from the text alone and not from what the generator says of it."""
    english = {
        match.groups()
        for pair in corpus["train"]
        for pattern in (r"\b([A-Z][a-z]+) (\d+)\b", r"\b(\d+)/(\d+)/\d")
        for match in re.finditer(pattern, pair.en)
    }
    german = {
        match.groups()
        for pair in corpus["train"]
        for match in re.finditer(r"\b(\d\d)\.(\d\d)\.\d", pair.de)
    }
    held_out = seen = 0
    for number in range(366):
        day = datetime.date(2000, 1, 1) + datetime.timedelta(days=number)
        found = [
            (f"{day:%B}", str(day.day)) in english,
            (str(day.month), str(day.day)) in english,
            (f"{day:%d}", f"{day:%m}") in german,
        ]
        if locale_items.split_of(("date", day.month, day.day)) == "train":
            seen += any(found)
        else:
            held_out += 1
            assert not any(found), day
    assert 20 <= held_out <= 55
    assert seen > 300


def test_every_kind_word_and_connective_of_the_held_out_text_is_in_the_training_text(corpus):
    """What is new in the test text is the combination, hardly ever a word (given enough text)."""
    kinds = {"date", "time", "relative", "quantity", "money", "names"}
    words = {}
    for part, pairs in corpus.items():
        assert {combination[0] for combination in combinations(pairs)} == kinds, part
        words[part] = {word for pair in pairs for word in re.findall(r"[^\W\d_]+", pair.de)}
        assert {"oder", "und"} <= words[part]
        for text in (text for pair in pairs for text in (pair.en, pair.de)):
            assert text and text == " ".join(text.split())
            assert text.count("–") == text.count(" – ")
    assert len(words["test"] - words["train"]) <= 0.05 * len(words["test"])


def test_both_sides_say_the_same_number_of_digits_in_quantities(corpus):
    """English 1,234.5 is German 1.234,5: separators swap, digits stay."""
    alone = [
        pair
        for pair in corpus["train"]
        if len(pair.combinations) == 1 and pair.combinations[0][0] in ("quantity", "money")
    ]
    assert len(alone) > 100
    for pair in alone:
        numbers = [re.search(r"\d[\d.,]*", text).group() for text in (pair.en, pair.de)]
        assert numbers[0].translate(str.maketrans(",.", ".,")) == numbers[1], pair


def test_same_seed_same_bytes_in_another_process(tmp_path):
    sizes = {"num_train": 300, "num_valid": 20, "num_test": 20}
    locale_pairs.write_pairs(tmp_path / "one", seed=7, **sizes)
    locale_pairs.write_pairs(tmp_path / "other", seed=8, **sizes)
    code = "import pathlib, sys; from demo.locale_pairs import write_pairs; "
    code += f"write_pairs(pathlib.Path(sys.argv[1]), seed=7, **{sizes})"
    env = {**os.environ, "PYTHONHASHSEED": "123", "TZ": "Asia/Tokyo"}
    command = [sys.executable, "-c", code, tmp_path / "two"]
    subprocess.run(command, cwd=ROOT, check=True, env=env)
    names = sorted(f"{part}.{language}" for part in PARTS for language in ("en", "de"))
    assert sorted(path.name for path in (tmp_path / "one").iterdir()) == names
    for name in names:
        text = (tmp_path / "one" / name).read_bytes()
        assert text == (tmp_path / "two" / name).read_bytes()
        assert text != (tmp_path / "other" / name).read_bytes()
        assert text.count(b"\n") == sizes[f"num_{name.split('.')[0]}"]


def test_more_pairs_than_there_are_is_an_error(monkeypatch):
    monkeypatch.setattr(locale_items, "DRAWS", [(locale_items.draw_relative, 1)])
    monkeypatch.setattr(locale_pairs, "MAX_ENTRIES", 1)
    monkeypatch.setattr(locale_pairs, "MAX_TRIES", 300)
    with pytest.raises(ValueError, match="cannot find 5000 distinct train"):
        list(locale_pairs.draw_pairs("train", 5000))
