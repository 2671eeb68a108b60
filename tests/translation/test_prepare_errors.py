"""prepare.py: what it refuses is named, and what fails or is killed leaves nothing."""

from __future__ import annotations

import gzip
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from prepare_toys import LANGUAGES, SCRIPT, bitext, cli, run_main, sentences, write
from pskd_fairseq.preparation.binaries import run_quietly
from pskd_fairseq.preparation.pieces import encode_lines
from pskd_fairseq.programs import ToolError


def spoil_utf8(path):
    path.write_bytes("gut\nschön\n".encode() + b"sch\xf6n\n" + b"gut\n" * 297)


def cut_gzip(path):
    whole = gzip.compress("".join(f"{n} Bälle {n * n}\n" for n in range(300)).encode())
    path.write_bytes(whole[: len(whole) // 2])


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


# ---- what fails or is killed ---------------------------------------------------------------------


def test_a_failing_tool_is_quoted(tmp_path):
    with pytest.raises(ToolError, match=r"(?s)exit status 3:.*the reason"):
        run_quietly([sys.executable, "-c", "print('the reason'); raise SystemExit(3)"], tmp_path)


def test_a_killed_worker_is_an_error_and_not_a_wait(tmp_path):
    with pytest.raises(ToolError, match="worker process was killed"):
        encode_lines(["a"] * 3000, make_suicide, (), workers=2)


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
