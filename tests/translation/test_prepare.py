"""prepare.py: what it makes can be trained on and scored, and what it refuses leaves nothing."""

from __future__ import annotations

import gzip
import hashlib
import importlib.util
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from argparse import Namespace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

for _module, _package in (
    ("fairseq_cli", "fairseq-fixed"),
    ("sacremoses", "sacremoses"),
    ("subword_nmt", "subword-nmt"),
):
    pytest.importorskip(_module, reason=f"{_package} is not installed: pip install {_package}")

SCRIPT = Path(__file__).resolve().parents[2] / "translation" / "prepare.py"


def load_script():
    spec = importlib.util.spec_from_file_location("pskd_translation_prepare", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


prepare = load_script()


# ---- made-up parallel text with what tokenisers stumble over ------------------------------------

NOUNS = [
    ("Hund", "dog"),
    ("Ball", "ball"),
    ("Turm", "tower"),
    ("Zug", "train"),
    ("Berg", "hill"),
    ("Baum", "tree"),
    ("Fluss", "river"),
    ("Tisch", "table"),
    ("Wald", "wood"),
]
COLOURS = [("rote", "red"), ("grüne", "green"), ("weiße", "white"), ("blau-graue", "blue-grey")]
PHRASES = [
    (
        "Der {0} {1} kostet 1.234,50 € (z. B. am 3. Mai).",
        "The {0} {1} costs €1,234.50 (e.g. on May 3rd).",
    ),
    ('"Der {0} {1}", sagte Dr. Groß, "ist hier!"', '"The {0} {1}", said Dr. Gross, "is here!"'),
    ("Ist's der {0} {1} & {2} Freunde?", "Isn't it the {0} {1} & {2} friends?"),
    ("Der {0} {1} fährt um 10:{2:02d} Uhr ab...", "The {0} {1} leaves at 10:{2:02d} a.m..."),
    ("Drei <{0}> {1}-Bilder | {2} % davon", "Three <{0}> {1} pictures | {2}% of them"),
]


def sentences(number, seed=0):
    """So many distinct German and English sentences."""
    rng = random.Random(seed)
    pairs = {}
    while len(pairs) < number:
        german, english = rng.choice(PHRASES)
        noun, colour, count = rng.choice(NOUNS), rng.choice(COLOURS), rng.randrange(2, 60)
        pairs[german.format(colour[0], noun[0], count)] = english.format(colour[1], noun[1], count)
    return list(pairs), list(pairs.values())


def write(path, lines, end="\n"):
    data = "".join(line + end for line in lines).encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def bitext(folder, name, number, seed=0, suffix=""):
    """Two text files; returns their paths as strings."""
    german, english = sentences(number, seed)
    return [
        str(write(folder / f"{name}.{language}{suffix}", side))
        for language, side in (("de", german), ("en", english))
    ]


LANGUAGES = ["--source-lang", "de", "--target-lang", "en"]


def cli(arguments, cwd):
    return subprocess.run(
        [sys.executable, str(SCRIPT), *map(str, arguments)],
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """One folder made for real, as a user would, from a foreign folder and relative paths."""
    folder = tmp_path_factory.mktemp("prepared")
    texts = [*bitext(folder, "a", 500, seed=1, suffix=".gz"), *bitext(folder, "b", 200, seed=2)]
    test = bitext(folder, "given", 60, seed=3)
    write(folder / "given.en", sentences(60, seed=3)[1], end="\r\n")
    done = cli(
        [
            *(Path(text).name for text in texts),
            *LANGUAGES,
            "--test",
            *(Path(text).name for text in test),
            "--bpe-size",
            300,
            "--workers",
            2,
            "--out",
            "made/here",
        ],
        cwd=folder,
    )
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


def raw(folder, part, language):
    return (folder / "raw" / f"{part}.{language}").read_text(encoding="utf-8").split("\n")[:-1]


def read_back(folder, dictionary, part, language):
    """The sentences of a binary part, joined from pieces and detokenised."""
    from sacremoses import MosesDetokenizer

    detokenize = MosesDetokenizer(language).detokenize
    lines = [
        dictionary.string(ids, bpe_symbol="@@ ")
        for ids in binaries(folder, dictionary, part, language)
    ]
    return [detokenize(line.split()) for line in lines]


# ---- what comes out -----------------------------------------------------------------------------


def test_folder_holds_what_fairseq_and_scoring_need(prepared, dictionary):
    names = {path.name for path in prepared.dir.iterdir()}
    assert names == {
        "bpe.codes",
        "dict.de.txt",
        "dict.en.txt",
        "prepare.json",
        "preprocess.log",
        "raw",
    } | {
        f"{part}.de-en.{language}.{kind}"
        for part in ("train", "valid", "test")
        for language in ("de", "en")
        for kind in ("bin", "idx")
    }
    assert {path.name for path in (prepared.dir / "raw").iterdir()} == {
        "valid.de",
        "valid.en",
        "test.de",
        "test.en",
    }
    assert (prepared.dir / "dict.de.txt").read_bytes() == (
        prepared.dir / "dict.en.txt"
    ).read_bytes()
    assert prepared.record["dictionary_size"] == len(dictionary)
    assert [path.name for path in prepared.dir.parent.iterdir()] == ["here"]


def test_binaries_and_raw_text_are_aligned(prepared, dictionary):
    for part in ("train", "valid", "test"):
        note = prepared.record["parts"][part]
        for language in ("de", "en"):
            data = binaries(prepared.dir, dictionary, part, language)
            assert len(data) == note["pairs"]
            assert sum(len(ids) - 1 for ids in data) == note["pieces"][language]
            assert (
                sum(int((ids == dictionary.unk()).sum()) for ids in data)
                == (note["unknown"][language])
            )
            if part != "train":
                assert len(raw(prepared.dir, part, language)) == note["pairs"]


def test_given_text_is_kept_as_it_was(prepared):
    assert raw(prepared.dir, "test", "de"), raw(prepared.dir, "test", "en") == sentences(60, seed=3)
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

    moses = encoders.build_tokenizer(
        Namespace(
            tokenizer="moses",
            source_lang="de",
            target_lang="en",
            moses_no_dash_splits=False,
            moses_no_escape=False,
        )
    )
    bpe = encoders.build_bpe(
        Namespace(bpe="subword_nmt", bpe_separator="@@", bpe_codes=str(prepared.dir / "bpe.codes"))
    )
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
    assert not {prepare.sentence_key(line) for line in raw(prepared.dir, "valid", "de")} & {
        prepare.sentence_key(line) for line in raw(prepared.dir, "test", "de")
    }


def test_record_says_how_it_was_made(prepared):
    record = prepared.record
    assert (record["source_lang"], record["target_lang"]) == ("de", "en")
    assert record["bpe"]["merges_asked"] == 300
    assert set(record["versions"]) >= {"sacremoses", "subword-nmt"}
    assert any(name.startswith("fairseq") for name in record["versions"])
    hashes = [entry["sha256"] for entry in record["inputs"]]
    assert hashes == [
        hashlib.sha256(Path(path).read_bytes()).hexdigest()
        for path in prepared.texts + prepared.test
    ]
    assert record["parts"]["valid"]["from"] == "drawn"
    assert record["parts"]["test"]["from"] == "given"


def test_log_is_one_line_a_step_and_names_the_log_file(prepared):
    assert str(prepared.dir / "preprocess.log") in prepared.log
    assert "it/s" not in prepared.log and "\r" not in prepared.log
    assert len(prepared.log.splitlines()) <= 10


def test_help_names_the_flags_for_raw_text(capsys):
    with pytest.raises(SystemExit) as stop:
        prepare.main(["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert "--tokenizer moses --bpe subword_nmt --bpe-codes DIR/bpe.codes" in text


@pytest.mark.skipif(
    "PSKD_DATA" not in os.environ, reason="PSKD_DATA does not name a folder that contains multi30k/"
)
def test_multi30k(tmp_path):
    from fairseq.data import Dictionary

    data = Path(os.environ["PSKD_DATA"]).resolve() / "multi30k"

    def pair(name):
        return [data / f"{name}.{language}.gz" for language in ("de", "en")]

    done = cli(
        [
            *pair("train"),
            *LANGUAGES,
            "--valid",
            *pair("val"),
            "--test",
            *pair("test_2016_flickr"),
            "--max-train",
            2000,
            "--bpe-size",
            2000,
            "--out",
            tmp_path / "out",
        ],
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    out = tmp_path / "out"
    record = json.loads((out / "prepare.json").read_text())
    assert [part["pairs"] for part in record["parts"].values()] == [2000, 1014, 1000]
    dictionary = Dictionary.load(str(out / "dict.en.txt"))
    for language in ("de", "en"):
        assert record["parts"]["test"]["unknown"][language] < 50
        with gzip.open(data / f"test_2016_flickr.{language}.gz", "rt", encoding="utf-8") as text:
            want = [line.rstrip("\n") for line in text]
        assert raw(out, "test", language) == want
        back = read_back(out, dictionary, "test", language)
        assert sum(a == b.strip() for a, b in zip(back, want, strict=True)) >= 950


# ---- what is refused ----------------------------------------------------------------------------


def spoil_utf8(path):
    path.write_bytes("gut\nschön\n".encode() + b"sch\xf6n\n" + b"gut\n" * 297)


def cut_gzip(path):
    whole = gzip.compress("".join(f"{n} Bälle {n * n}\n" for n in range(300)).encode())
    path.write_bytes(whole[: len(whole) // 2])


def run_main(arguments, capsys):
    """Exit status and what was printed as an error; anything but one clear line fails here."""
    capsys.readouterr()
    status = prepare.main([str(argument) for argument in arguments])
    error = capsys.readouterr().err
    assert "Traceback" not in error
    return status, error


BAD_TEXTS = {
    "unequal": (lambda de, en: write(en, ["x"] * 299), ["unequal", "{de} has 300", "{en} has 299"]),
    "empty": (lambda de, en: en.write_bytes(b""), ["{en}: empty file"]),
    "missing": (lambda de, en: de.unlink(), ["{de}: No such file"]),
    "folder": (lambda de, en: (de.unlink(), de.mkdir()), ["{de}: Is a directory"]),
    "latin-1": (
        lambda de, en: spoil_utf8(de),
        ["{de}:3: not UTF-8", "0xf6", "offset 3 of the line", "14 of the (unpacked) file"],
    ),
    "all blank": (lambda de, en: write(en, [" "] * 300), ["no training pair is left"]),
    "no merges": (
        lambda de, en: (write(de, map(chr, range(0x4E00, 0x4E00 + 300))), write(en, ["a"] * 300)),
        ["too small for BPE"],
    ),
}


@pytest.mark.parametrize("case", BAD_TEXTS)
def test_bad_text_is_named_and_nothing_is_made(case, tmp_path, capsys):
    de, en = map(Path, bitext(tmp_path, "train", 300))
    spoil, wanted = BAD_TEXTS[case]
    spoil(de, en)
    before = sorted(tmp_path.iterdir())
    status, error = run_main([de, en, *LANGUAGES, "--out", tmp_path / "out"], capsys)
    assert status == 2
    assert error.splitlines()[-1].startswith("prepare.py: error: ")
    for part in wanted:
        assert part.format(de=de, en=en) in error
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("damage", [cut_gzip, lambda path: path.write_bytes(b"plain\n" * 300)])
def test_damaged_gzip_is_named(damage, tmp_path, capsys):
    de, en = map(Path, bitext(tmp_path, "train", 300, suffix=".gz"))
    damage(de)
    status, error = run_main([de, en, *LANGUAGES, "--out", tmp_path / "out"], capsys)
    assert status == 2
    assert re.search(re.escape(str(de)) + r":\d+: damaged \.gz", error)


@pytest.mark.parametrize("part", ["valid", "test"])
def test_blank_line_in_held_out_text_is_an_error(part, tmp_path, capsys):
    texts = bitext(tmp_path, "train", 300)
    de, en = bitext(tmp_path, "held", 30, seed=5)
    write(Path(en), [*sentences(30, seed=5)[1][:-1], "\x01 \t"])
    status, error = run_main(
        [*texts, *LANGUAGES, f"--{part}", de, en, "--out", tmp_path / "out"], capsys
    )
    assert status == 2
    assert f"{en}:30: empty sentence" in error


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        ([], "texts come in pairs SRC_TEXT TGT_TEXT, but 0 were given"),
        (["one"], "but 1 was given"),
        (["a", "b", "c"], "but 3 were given"),
        (["a", "b", "--target-lang", "de"], "both 'de'"),
        (["a", "b", "--target-lang", "en-US"], "'en-US'"),
        (["a", "b", "--bpe-size", "0"], "--bpe-size must be at least 1, not 0"),
        (["a", "b", "--test-size", "-4"], "--test-size must be at least 1, not -4"),
        (["a", "b", "--workers", "0"], "--workers must be at least 1"),
        (["a", "b", "--valid", "c", "d", "--valid-size", "9"], "--valid-size has no meaning"),
    ],
)
def test_bad_options_are_named(arguments, wanted, tmp_path, capsys):
    status, error = run_main([*LANGUAGES, "--out", tmp_path / "out", *arguments], capsys)
    assert (status, wanted in error) == (2, True), error


def test_unknown_option_is_refused_by_the_parser(tmp_path):
    done = cli(["a", "b", *LANGUAGES, "--out", "out", "--bpe", "9"], cwd=tmp_path)
    assert done.returncode == 2
    assert "prepare.py: error: unrecognized arguments: --bpe" in done.stderr


def test_too_few_pairs_to_hold_out(tmp_path, capsys):
    texts = bitext(tmp_path, "train", 40)
    status, error = run_main(
        [*texts, *LANGUAGES, "--out", tmp_path / "out", "--valid-size", 30, "--test-size", 10],
        capsys,
    )
    assert status == 2
    assert "40 distinct source sentences" in error and "30 valid and 10 test" in error


# ---- with a stand-in for fairseq-preprocess: the rest of the way, in milliseconds ---------------


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


def test_byte_order_mark_and_stray_carriage_returns_do_no_harm(tmp_path):
    path = tmp_path / "text"
    path.write_bytes("\ufeffeins\r\nzwei\rdrei\r\nvier\u2028fünf".encode())
    assert prepare.read_lines(path) == ["eins", "zwei drei", "vier\u2028fünf"]


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
    taken = {prepare.sentence_key(pairs[0][0])}
    free = prepare.source_keys(pairs) - taken
    if len(free) <= valid + test:
        with pytest.raises(prepare.PrepareError, match="too few pairs"):
            prepare.hold_out(pairs, sizes, seed, taken)
        return
    parts, rest = prepare.hold_out(pairs, sizes, seed, taken)
    keys = [prepare.source_keys(some) for some in (rest, parts["valid"], parts["test"])]
    assert not keys[0] & keys[1] and not keys[0] & keys[2] and not keys[1] & keys[2]
    assert set.union(*keys) == free | taken and taken <= keys[0]
    assert [len(parts["valid"]), len(parts["test"])] == [valid, test]
    assert len(keys[1]) == valid and len(keys[2]) == test
    assert set(parts["valid"]) | set(parts["test"]) | set(rest) <= set(pairs)


@given(st.text(max_size=40))
@settings(max_examples=100, deadline=None)
def test_a_sentence_that_is_not_empty_has_tokens_that_fairseq_counts_alike(text):
    """fairseq splits pieces at any white space; a token with some inside would shift its count."""
    tokens = prepare.moses_encoder("de", False)(text)
    assert tokens.split() == [token for token in tokens.split(" ") if token]
    assert bool(tokens.split()) == (not prepare.EMPTY.fullmatch(text))


# ---- the folder: never half-made, never somebody else's -----------------------------------------


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
    make(tmp_path, capsys, "--seed", 1)
    assert make(tmp_path, capsys, "--seed", 2, "--overwrite")["seed"] == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "train.de", "train.en"]


@pytest.mark.parametrize("marked", [False, True])
def test_overwrite_spares_files_of_somebody_else(marked, no_fairseq, tmp_path, capsys):
    out = tmp_path / "out"
    if marked:
        make(tmp_path, capsys)
    else:
        out.mkdir()
    (out / "checkpoints").mkdir()
    (out / "checkpoints" / "best.pt").write_bytes(b"a week of work")
    before = everything_in(out)
    status, error = run_main(
        [*bitext(tmp_path, "train", 300), *LANGUAGES, "--out", out, "--overwrite"], capsys
    )
    assert status == 2
    assert ("checkpoints/best.pt" if marked else "not a prepared set") in error
    assert everything_in(out) == before


def test_a_record_that_cannot_be_read_is_not_overwritten(tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "prepare.json").write_text("[]")
    status, error = run_main(
        [*bitext(tmp_path, "train", 300), *LANGUAGES, "--out", tmp_path / "out", "--overwrite"],
        capsys,
    )
    assert status == 2 and "prepare.json: cannot be read as a record" in error


def test_an_empty_folder_may_be_filled(no_fairseq, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    make(tmp_path, capsys)


@pytest.mark.parametrize("error", [prepare.ToolError("it broke"), OSError(28, "No space left")])
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
    with pytest.raises(OSError, match="went away"), prepare.staging(out):
        pass
    assert everything_in(tmp_path) == {Path("out/old"): b"old"}


def test_what_a_killed_run_left_is_named(tmp_path, caplog):
    left = tmp_path / ".out.abc.partial"
    left.mkdir()
    with prepare.staging(tmp_path / "out"):
        pass
    assert str(left) in caplog.text
    assert sorted(path.name for path in tmp_path.iterdir()) == [left.name, "out"]


def test_a_failing_tool_is_quoted(tmp_path):
    with pytest.raises(prepare.ToolError, match=r"(?s)exit status 3:.*the reason"):
        prepare.run_quietly(
            [sys.executable, "-c", "print('the reason'); raise SystemExit(3)"], tmp_path
        )


def test_a_killed_worker_is_an_error_and_not_a_wait(tmp_path):
    with pytest.raises(prepare.ToolError, match="worker process was killed"):
        prepare.encode_lines(["a"] * 3000, make_suicide, (), workers=2)


def make_suicide():
    return lambda line: os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("kill", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_a_killed_run_leaves_no_folder(kill, tmp_path):
    (tmp_path / "sets").mkdir()
    texts = bitext(tmp_path, "train", 300)
    process = subprocess.Popen(
        [
            sys.executable,
            str(SCRIPT),
            *texts,
            *LANGUAGES,
            "--out",
            str(tmp_path / "sets" / "out"),
            "--bpe-size",
            "100",
        ],
        stderr=subprocess.PIPE,
        text=True,
        # A shell starts what it runs in the background with this signal ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        for line in process.stderr:  # until fairseq-preprocess, its longest part by far, runs
            if "running fairseq-preprocess" in line:
                break
        time.sleep(0.3)
        process.send_signal(kill)
        rest = process.communicate(timeout=30)[1]
    finally:
        process.kill()
    left = [path.name for path in (tmp_path / "sets").iterdir()]
    assert "out" not in left
    if kill == signal.SIGKILL:
        assert process.returncode == -kill
    else:
        assert process.returncode == 128 + kill
        assert left == [] and "Traceback" not in rest
