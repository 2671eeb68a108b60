"""The commands that the repository documents, as lists of words.

A page's ``sh`` blocks are run by bash as they stand, and so are what a ``diff`` block leads to,
code within a line, and the usage lines of scripts, recipes and the Makefile. bash runs them in an
empty folder and finds no program: each command is noted, word by word, and does nothing. So
variables, functions, loops and quotes are those of a shell.
"""

from __future__ import annotations

import ast
import os
import re
import subprocess
import tempfile
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGES = ("README.md", "[!.]*/README.md", "docs/*.md")
#: Scripts whose docstrings hold commands: all lines that are indented.
SCRIPTS = (
    "benchmarks/*.py", "classification/*.py", "demo/*.py", "detection/*.py", "translation/*.py",
)  # fmt: skip
#: Packages with programs among their modules.
PACKAGES = ("pskd*/*.py", "*/pskd_*/*.py")
#: Files whose comments hold commands: all lines that are indented.
RECIPES = ("configs/**/*.sh", "configs/**/*.yaml", "configs/**/*.py")
#: What may be called by its path.
EXECUTABLES = ("configs/**/*.sh", "classification/*.py", "detection/*.py", "translation/*.py")
#: The languages of blocks in which there is no command.
OTHER_LANGUAGES = {"python", "yaml"}
#: Code within a line that begins as a command does: the program and a word.
BEGINS = re.compile(r"(pip|pskd|make|python3?|torchrun|sacrebleu|fairseq-[\w-]+|\S+\.(py|sh)) +\S")
#: What begins as a command and is none: what a memory's file begins with.
NO_COMMANDS = {"pskd memory 1"}
#: Variables that a page says the user has set.
VARIABLES = {"M": "MULTI30K"}
#: What a usage line leaves to the user, where a parser wants more than any word.
EXAMPLES = {
    "KEY": "SEED", "VALUE": "1", "PART": "core", "SECONDS": "60", "SPEC": "coco:train.json:images",
}  # fmt: skip

PRELUDE = """\
set -eu
exec 3>> "$NOTES"
note() { printf '%s\\0' "$#" "$@" >&3; }
command_not_found_handle() { note "$@"; }
"""


@dataclass(frozen=True)
class Command:
    """A command, or what bash said of it in its stead.

    Attributes:
        place: the file and the line at which it or its block begins.
        words: the program and its arguments; "..." stands for more of them.
        error: of bash; then there are no words.
        whole: whether it is to be run as it stands; within a line it may lack arguments.
    """

    place: str
    words: tuple[str, ...]
    error: str = ""
    whole: bool = True

    def __str__(self) -> str:
        return f"{self.place} {' '.join(self.words[:2])}"


def all_commands() -> list[Command]:
    """Return every documented command, those within a line last."""
    found: list[tuple[str, str]] = []
    for path in pages():
        found += blocks(path)
    for path in scripts():
        found += usage(path, docstring(path))
    for path in files(*RECIPES):
        found += usage(path, comments(path))
    found += [
        (f"Makefile:{number}", without_remark(line))
        for number, line in enumerate(comments(ROOT / "Makefile"), start=1)
        if line.startswith("make ")
    ]
    named = [place_and_text for path in pages() for place_and_text in inline(path)]
    return [
        replace(command, whole=whole)
        for whole, texts in ((True, found), (False, named))
        for place, text in texts
        for command in noted(place, text)
    ]


def pages() -> list[Path]:
    return files(*PAGES)


def scripts() -> list[Path]:
    """Return the scripts, and the modules that are programs."""
    programs = [path for path in files(*PACKAGES) if 'if __name__ == "__main__":' in read(path)]
    return files(*SCRIPTS) + programs


def read(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def files(*patterns: str) -> list[Path]:
    return [path for pattern in patterns for path in sorted(ROOT.glob(pattern))]


def name(path: Path, line: int) -> str:
    return f"{path.relative_to(ROOT)}:{line}"


# ---- where they stand ----------------------------------------------------------------------------


def fenced(text: str) -> Iterator[re.Match]:
    """Give a page's blocks: the language, and what is in it."""
    return re.finditer(r"^ *```(.*)\n((?:.*\n)*?) *```$", text, flags=re.MULTILINE)


def blocks(path: Path) -> Iterator[tuple[str, str]]:
    """Give the place and the text of a page's blocks of commands."""
    text = read(path)
    for block in fenced(text):
        language, code = block.groups()
        place = name(path, text.count("\n", 0, block.start()) + 2)
        if language == "diff":
            code = "\n".join(line[2:] for line in code.splitlines() if line[:1] != "-")
            if is_python(code):
                continue
        elif language in OTHER_LANGUAGES:
            continue
        yield place, textwrap.dedent(code)


def is_python(code: str) -> bool:
    try:
        compile(textwrap.dedent(code), "block", "exec")
    except SyntaxError:
        return False
    return True


def inline(path: Path) -> Iterator[tuple[str, str]]:
    """Give the place and the text of the commands within a page's lines."""
    text = read(path)
    for block in fenced(text):
        text = text.replace(block[0], "\n" * block[0].count("\n"))
    # An odd backtick must not turn code and text around beyond its paragraph.
    for part in re.finditer(r"(?:.+\n?)+", text):
        for code in re.finditer(r"(?<!`)`([^`]+)`(?!`)", part[0]):
            line = " ".join(code[1].split())
            if BEGINS.match(line) and line not in NO_COMMANDS:
                start = part.start() + code.start()
                yield name(path, text.count("\n", 0, start) + 1), bare(line)


def docstring(path: Path) -> list[str]:
    """Return a file's lines with the docstring's in their place, and no others."""
    module = ast.parse(read(path))
    text = ast.get_docstring(module, clean=False)
    return [] if text is None else [""] * (module.body[0].lineno - 1) + text.split("\n")


def comments(path: Path) -> list[str]:
    """Return a file's lines with what its comments say in their place, and no others."""
    lines = read(path).splitlines()
    return [line[2:] if line.startswith("# ") else "" for line in lines]


def usage(path: Path, lines: list[str]) -> Iterator[tuple[str, str]]:
    """Give the place and the text of the lines that are indented."""
    numbered = iter(enumerate(lines, start=1))
    for number, line in numbered:
        if not line.startswith("    ") or line.lstrip().startswith("_BASE_:"):  # a config's key
            continue
        while line.endswith("\\") or line.count("[") > line.count("]"):
            line = f"{line.rstrip(chr(92)).rstrip()} {next(numbered)[1].strip()}"
        yield name(path, number), bare(without_remark(line.strip()))


def without_remark(line: str) -> str:
    """Return a line up to where what it does is told beside it."""
    return re.split(r" {2,}", line)[0]


def bare(line: str) -> str:
    """Return a usage line as a command with all that is optional, and the first of each choice."""
    line = re.sub(r"\[any [^]]*\]", "", line)
    line = re.sub(r"(?<!\S)\[|\](?!\S)", "", line)
    line = re.sub(r"\b(\w+)(\|\w+)+", r"\1", line)
    return " ".join(EXAMPLES.get(word, word) for word in line.split(" "))


# ---- what bash makes of them ---------------------------------------------------------------------


def noted(place: str, text: str) -> list[Command]:
    """Return the commands of a text in the order in which bash comes to them."""
    known = "".join(
        f'{path}() {{ note {path} "$@"; }}\n'
        for path in (found.relative_to(ROOT) for found in files(*EXECUTABLES))
    )
    with tempfile.TemporaryDirectory() as made:
        folder = Path(os.path.realpath(made))
        (folder / ".venv/bin").mkdir(parents=True)
        (folder / ".venv/bin/activate").touch()
        notes = folder / ".venv/notes"
        notes.touch()
        done = subprocess.run(
            ["/bin/bash", "-c", PRELUDE + known + text],
            cwd=folder,
            env={"NOTES": str(notes), "PATH": "/nonexistent", **VARIABLES},
            capture_output=True,
            text=True,
            timeout=60,
        )
        said = notes.read_text(encoding="utf-8").replace(str(folder), str(ROOT))
    if done.returncode or done.stderr:
        return [Command(place, (), done.stderr or f"exit status {done.returncode}")]
    words = iter(said.split("\0")[:-1])
    return [Command(place, tuple(next(words) for _ in range(int(count)))) for count in words]
