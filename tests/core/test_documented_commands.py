"""A program takes every command of a page's code blocks, and a test runs each program.

bash runs the blocks of ``sh``, and what a ``diff`` of commands leads to, in an empty folder where
each program is a stand-in that notes its words; so loops, variables and recipes are a shell's. Then
the program's own parser is given the words, and ends it. Code within a line is not looked at.
"""

from __future__ import annotations

import argparse
import contextlib
import fnmatch
import importlib
import io
import logging
import os
import re
import runpy
import subprocess
import sys
import tempfile
import textwrap
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest

# Of hydra, and of modules of the demo that are run a second time.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::RuntimeWarning")

ROOT = Path(__file__).resolve().parents[2]
PAGES = [path for pattern in ("README.md", "[!.]*/README.md", "docs/*.md")
         for path in sorted(ROOT.glob(pattern))]  # fmt: skip
FOLDERS = [path.parent.name for path in ROOT.glob("[!.]*/README.md")]
FOLDERS += ["benchmarks", "configs", "demo", "docs"]
#: Installed programs, and the function that each calls.
CONSOLE = {
    "fairseq-generate": "fairseq_cli.generate:cli_main",
    "fairseq-hydra-train": "fairseq_cli.hydra_train:cli_main",
    "fairseq-train": "fairseq_cli.train:cli_main",
    "pskd": "pskd_tools.cli:main",
    "sacrebleu": "sacrebleu.sacrebleu:main",
}
#: The tests that run a program at a small size; of those that none runs, why.
RUN = {
    "benchmarks/classification_step.py": "classification/test_benchmark.py",
    "benchmarks/classification_throughput.py": "classification/test_benchmark_throughput.py",
    "benchmarks/detection_step.py": "detection/test_benchmark_detection.py",
    "benchmarks/linear_loss.py": "core/test_benchmark_linear.py",
    "benchmarks/loss.py": "core/test_benchmark_loss.py",
    "benchmarks/prediction_memory.py": "core/test_benchmark_memory.py",
    "benchmarks/translation_step.py": "translation/test_benchmark_translation.py",
    "classification/compare.py": "classification/test_compare.py",
    "classification/train.py": "classification/test_training.py",
    "configs/detection/*.sh": "detection/test_demo_detection.py",
    "configs/translation/*.sh": "translation/test_recipes.py",
    "demo.detection": "detection/test_demo_detection.py",
    "demo.digits": "detection/test_digits.py",
    "demo.noise": "detection/test_noise.py",
    "demo.translation": "translation/test_demo.py",
    "detection/convert_backbone.py": "detection/test_convert_backbone.py",
    "detection/train_net.py": "detection/test_demo_detection.py",
    "detection/train_torchvision.py": "detection/test_torchvision_training.py",
    "fairseq-generate": "translation/test_plugin_evaluation.py",
    "fairseq-hydra-train": "translation/test_recipes.py",
    "fairseq-train": "translation/test_recipes.py",
    "make": "it runs this",
    "pip": "it needs a network",
    "pskd": "core/test_doctor.py",
    "python -c": "classification/test_page.py",
    "sacrebleu": "it needs a network",
    "translation/evaluate.py": "translation/test_demo.py",
    "translation/plot_epochs.py": "translation/test_recipes.py",
    "translation/prepare.py": "translation/test_prepare.py",
}
STAND_IN = '#!/bin/sh\nprintf \'%s\\0\' $(($# + 1)) {} "$@" >> "$NOTES"\n'
# A recipe is run as it stands; this one calls no program, and reads files.
PRELUDE = "set -eu\nconfigs/translation/iwslt_text.sh() { [ $# = 4 ]; }\n"


class Wrong(ValueError):
    """A command that its program does not take."""


class Parsed(BaseException):
    """What a program's parser returned; it ends the program, which does not catch it."""


# ---- the commands --------------------------------------------------------------------------------


def blocks(text: str) -> list[tuple[str, str]]:
    """Return language and content of a page's blocks."""
    found = re.findall(r"^ *```(.*)\n((?:.*\n)*?) *```$", text, flags=re.MULTILINE)
    return [(language, textwrap.dedent(code)) for language, code in found]


def commands(text: str) -> list[list[str]]:
    """Return the words of each command of a page, in order; each once."""
    found = []
    for language, code in blocks(text):
        if language == "diff":
            code = "".join(f"{line[2:]}\n" for line in code.splitlines() if line[:1] != "-")
        if language == "sh" or (language == "diff" and not is_python(code)):
            found += noted(code)
    return [words for number, words in enumerate(found) if words not in found[:number]]


def is_python(code: str) -> bool:
    try:
        compile(textwrap.dedent(code), "block", "exec")
    except SyntaxError:
        return False
    return True


def noted(code: str) -> list[list[str]]:
    """Return the commands of a block in the order in which bash comes to them."""
    with tempfile.TemporaryDirectory() as made:
        folder = Path(os.path.realpath(made))
        notes, programs = folder / ".notes", folder / ".venv/bin"
        programs.mkdir(parents=True)
        for file in (notes, programs / "activate"):
            file.touch()
        for name in (*CONSOLE, "make", "pip", "python", "torchrun"):
            (programs / name).write_text(STAND_IN.format(name))
            (programs / name).chmod(0o755)
        (folder / "configs").symlink_to(ROOT / "configs")
        done = subprocess.run(
            ["/bin/bash", "-c", PRELUDE + code],
            cwd=folder,
            env={"NOTES": str(notes), "PATH": f"{programs}:{os.defpath}", "M": "data/multi30k"},
            capture_output=True,
            text=True,
            timeout=60,
        )
        told = notes.read_text(encoding="utf-8").replace(str(folder), str(ROOT))
    if done.returncode:
        raise Wrong(f"bash: {done.stderr or done.returncode}")
    words = iter(told.split("\0")[:-1])
    return [[next(words) for _ in range(int(count))] for count in words]


# ---- what their programs say ---------------------------------------------------------------------


def program_of(words: list[str]) -> str:
    """Return what a command is called in RUN."""
    program, *rest = words
    if program == "torchrun":
        program, *rest = "python", *(word for word in rest if word.endswith(".py"))
    if program != "python":
        return program
    if rest[0] == "-m":
        return rest[1]
    return "python -c" if rest[0] == "-c" else str((ROOT / rest[0]).resolve().relative_to(ROOT))


def check(words: list[str]) -> None:
    """Raise Wrong unless a program knows all that a command line gives to it."""
    program, *rest = words
    pieces = [] if rest[:1] == ["-c"] else re.split(r"[\s=:]", " ".join(rest))
    for piece in (piece.removeprefix(f"{ROOT}/") for piece in pieces):
        if piece.startswith(tuple(f"{folder}/" for folder in FOLDERS)):
            if not (ROOT / piece).exists():
                raise Wrong(f"{piece}: expected a file of the repository")
    if program == "make":
        targets = re.findall(r"^([\w-]+):", read("Makefile"), flags=re.MULTILINE)
        if not {*rest} <= {*targets}:
            raise Wrong(f"expected targets of {targets}")
    elif program == "pip":
        extras = tomllib.loads(read("pyproject.toml"))["project"]["optional-dependencies"]
        wanted = re.findall(r"(?:\.|pskd)\[(.*?)\]", " ".join(rest))
        if rest[0] != "install" or not {*",".join(wanted).split(",")} <= {*extras, ""}:
            raise Wrong(f"expected extras of {[*extras]}")
    elif program == "torchrun":
        from torch.distributed import run

        args = options(lambda: run.parse_args(rest), words)
        check(["python", args.training_script, *args.training_script_args])
    elif rest[:1] == ["-c"]:
        compile(rest[1], "-c", "exec")
    elif program == "python":
        run, *words = (runpy.run_module, *rest[1:]) if rest[0] == "-m" else (run_file, *rest)
        keys_of(options(lambda: run(words[0], run_name="__main__"), words))
    elif "..." in rest and "--arch" not in rest:  # which fairseq needs
        check([*words, "--arch", "transformer"])
    else:
        module, _, function = CONSOLE[program].partition(":")
        words = [word for word in words if word != "..."]
        options(lambda: getattr(importlib.import_module(module), function)(), words)


def run_file(name: str, run_name: str) -> None:
    sys.path.insert(0, str(ROOT / name).rpartition("/")[0])
    runpy.run_path(str(ROOT / name), run_name=run_name)


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def options(program: Callable[[], object], words: list[str]) -> argparse.Namespace:
    """Return what a program's own parser makes of a command line."""
    parse = argparse.ArgumentParser.parse_args

    def stop(self, *args, **kwargs):
        raise Parsed(parse(self, *args, **kwargs))

    root, said = logging.getLogger(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stderr(said):
        patch.setattr(argparse.ArgumentParser, "parse_args", stop)
        patch.setattr(sys, "argv", words)
        patch.setattr(sys, "path", [str(ROOT), *sys.path])
        patch.setattr(root, "handlers", [*root.handlers])
        patch.setattr(root, "level", root.level)
        patch.chdir(ROOT)
        try:
            program()
        except Parsed as found:
            return found.args[0]
        except SystemExit:
            raise Wrong(said.getvalue().strip().rpartition("\n")[2]) from None
        except ModuleNotFoundError as error:
            module = (error.name or "").partition(".")[0]
            if module.startswith("pskd") or module in FOLDERS:
                raise
            pytest.skip(f"{module} is not installed")
    raise Wrong("no command line was parsed")


def keys_of(args: argparse.Namespace) -> None:
    """Merge Detectron2's KEY VALUE pairs into its config, which refuses a key that it has not."""
    file = getattr(args, "config_file", None)
    if not (file and hasattr(args, "opts")):
        return
    from pskd_detectron2 import load_config
    from pskd_detectron2.config import check_pskd_config, recipe_path

    if file == "my_faster_rcnn.yaml":  # a user's own, such as
        file = "detectron2:COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml"
    with contextlib.chdir(ROOT):
        path = recipe_path(file)
        if path.endswith(".py"):
            from detectron2.config import LazyConfig

            LazyConfig.apply_overrides(LazyConfig.load(path), args.opts)
        else:
            check_pskd_config(load_config(path, args.opts))


# ---- the tests -----------------------------------------------------------------------------------

COMMANDS = [
    (path.relative_to(ROOT), words) for path in PAGES for words in commands(path.read_text())
]


@pytest.mark.parametrize(("page", "words"), COMMANDS, ids=lambda part: " ".join(part[:2])
                         if isinstance(part, list) else str(part))  # fmt: skip
def test_a_documented_command_is_understood(page, words):
    check(words)


def test_every_documented_program_is_run_by_a_test():
    programs = {program_of(words) for _, words in COMMANDS} | {
        str(path.relative_to(ROOT)) for path in ROOT.glob("configs/*/*.sh")
    }
    without = {p for p in programs if not any(fnmatch.fnmatch(p, known) for known in RUN)}
    assert without == set()
    assert {known for known in RUN if not fnmatch.filter(programs, known)} == set()
    for program, test in RUN.items():
        if test.startswith("it "):
            continue
        name = re.sub(r".*/|demo\.|fairseq-|\.py$|\*.*|[ -].*", "", program)
        assert name in read(f"tests/{test}"), (program, test)


def test_commands_are_found_on_all_pages():
    assert len(COMMANDS) > 100
    assert {"README.md", "detection/README.md", "docs/scaling.md"} <= {str(p) for p, _ in COMMANDS}
    # A block of commands is told by its language.
    languages = {language for path in PAGES for language, _ in blocks(path.read_text())}
    assert languages <= {"sh", "diff", "mermaid", "python", "yaml"}


@pytest.mark.parametrize(
    ("code", "error"),
    [
        ("python classification/train.py --learning-rate 1", "unrecognized arguments"),
        ("python classification/trian.py", "expected a file of the repository"),
        ("python classification/train.py --config configs/digit.yaml", "expected a file of the re"),
        ("torchrun --nproc-per-node 2 classification/train.py --no-flag", "unrecognized arguments"),
        ("pskd compare runs/a", "invalid choice"),
        ("make all", "expected targets"),
        ("pip install '.[vision]'", "expected extras"),
        ("tee runs/log/a", "bash: .*No such file"),
        ("python train.py $FOLDER", "FOLDER: unbound variable"),
        ("configs/translation/wmt14.sh D S --fp15", "unrecognized arguments"),
        ("python detection/train_net.py --config-file configs/detection/bccd.yaml MODEL.PSKD.ON 1",
         "MODEL.PSKD.ON"),
    ],
)  # fmt: skip
def test_a_command_that_is_wrong_is_told(code, error):
    with pytest.raises(ValueError, match=error):
        for words in noted(code):
            check(words)
