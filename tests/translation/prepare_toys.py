"""Made-up parallel text with what tokenisers stumble over, and prepare.py on it."""

from __future__ import annotations

import gzip
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

for _module in ("fairseq", "sacremoses", "subword_nmt"):
    pytest.importorskip(_module, reason=f"needs {_module}: pip install '.[translation]'")

SCRIPT = Path(__file__).resolve().parents[2] / "translation" / "prepare.py"

from pskd_fairseq import prepare  # noqa: E402

NOUNS = [
    ("Hund", "dog"), ("Ball", "ball"), ("Turm", "tower"), ("Zug", "train"), ("Berg", "hill"),
    ("Baum", "tree"), ("Fluss", "river"), ("Tisch", "table"), ("Wald", "wood"),
]  # fmt: skip
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


def run_main(arguments, capsys):
    """Exit status and what was printed as an error; anything but one clear line fails here."""
    capsys.readouterr()
    status = prepare.main([str(argument) for argument in arguments])
    error = capsys.readouterr().err
    assert "Traceback" not in error
    return status, error


def raw(folder, part, language):
    return (folder / "raw" / f"{part}.{language}").read_text(encoding="utf-8").split("\n")[:-1]
