"""Gives a documented command to its program's own parser, and looks for the files that it names."""

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
import tomllib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import documented_commands as documented
import pytest
from documented_commands import read

ROOT = documented.ROOT
#: What programs and this test raise at a word that they do not know.
WRONG = (AssertionError, KeyError, ValueError)
#: Programs that are installed, and the function that each calls.
CONSOLE = {
    "fairseq-generate": "fairseq_cli.generate:cli_main",
    "fairseq-hydra-train": "fairseq_cli.hydra_train:cli_main",
    "fairseq-preprocess": "fairseq_cli.preprocess:cli_main",
    "fairseq-train": "fairseq_cli.train:cli_main",
    "pskd": "pskd_tools.cli:main",
    "pskd-classify": "pskd_classification.train:main",
    "pskd-detect-torchvision": "pskd_torchvision.train:main",
    "sacrebleu": "sacrebleu.sacrebleu:main",
}
#: Modules without which a command is skipped, as they are no part of the core.
OPTIONAL = {"babel", "detectron2", "fairseq", "fairseq_cli", "hydra", "pycocotools", "sacrebleu"}
OPTIONAL |= {"PIL", "matplotlib", "omegaconf", "sacremoses", "scipy", "sklearn"}
OPTIONAL |= {"subword_nmt", "tensorboard", "torchvision", "tqdm", "yaml"}
#: What users have or get, by the names that commands give it. All other files must exist.
USERS = (
    "MULTI30K/*", "W/*", "data/*", "data-bin/*", "runs/*", "text/*", "SAVE_DIR/*",
    "train.*", "valid.*", "val.*", "test.*", "epochs.png", "loss.*", "loss_gpu_*.json",
    "my_faster_rcnn.yaml",
    "r50.pth", "resnet50.pth", "wmt14/full",
)  # fmt: skip
#: The config of a user's own, as it may be.
OWN_CONFIG = "detectron2:COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml"

#: What dots stand for, where a program cannot read its command line without it.
MORE_WORDS = {"fairseq-train": ["--arch", "transformer"]}


# ---- a program's parser --------------------------------------------------------------------------


class Parsed(BaseException):
    """What a program's parser returned; it ends the program. No program catches it."""

    def __init__(self, options: argparse.Namespace) -> None:
        super().__init__()
        self.options = options


class Incomplete(AssertionError):
    """A command line that lacks arguments.

    Attributes:
        unknown: its flags that no parser of the program has.
    """

    def __init__(self, told: str, unknown: list[str]) -> None:
        super().__init__(told)
        self.unknown = unknown


@contextlib.contextmanager
def as_it_was() -> Iterator[None]:
    """Undo what programs do to the process when they start."""
    path, folder, root = list(sys.path), os.getcwd(), logging.getLogger()
    handlers, level = list(root.handlers), root.level
    try:
        yield
    finally:
        sys.path[:] = path
        os.chdir(folder)
        root.handlers[:] = handlers
        root.setLevel(level)


def parsed(program: Callable[[], object], words: list[str]) -> argparse.Namespace:
    """Return the options that a program's own parser makes of a command line."""
    known, all_of = argparse.ArgumentParser.parse_known_args, argparse.ArgumentParser.parse_args

    parsers: list[argparse.ArgumentParser] = []

    def unabbreviated(self, *args, **options):
        self.allow_abbrev = False
        parsers.append(self)
        return known(self, *args, **options)

    def stop(self, *args, **options):
        raise Parsed(all_of(self, *args, **options))

    said = io.StringIO()
    with as_it_was(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_known_args", unabbreviated)
        patch.setattr(argparse.ArgumentParser, "parse_args", stop)
        patch.setattr(sys, "argv", words)
        os.chdir(ROOT)
        try:
            with contextlib.redirect_stderr(said):
                program()
        except Parsed as found:
            return found.options
        except SystemExit:
            told = last_line(said)
            if re.search("arguments are required|expected .*argument", told):
                flags = {flag for parser in parsers for flag in parser._option_string_actions}
                unknown = [word for word in words if word[:2] == "--" and word not in flags]
                raise Incomplete(told, unknown) from None
            raise AssertionError(told) from None
        except ModuleNotFoundError as error:
            if (error.name or "").partition(".")[0] in OPTIONAL:
                pytest.skip(f"{error.name} is not installed")
            raise
    raise AssertionError(last_line(said) or "no command line was parsed")


def last_line(said: io.StringIO) -> str:
    """Return what a parser says of an error; the usage is above it."""
    return said.getvalue().strip().rpartition("\n")[2]


def called(name: str) -> Callable[[], object]:
    """Return a function that does what the program of a function's name does."""

    def call() -> object:
        module, _, function = name.partition(":")
        return getattr(importlib.import_module(module), function)()

    return call


# ---- programs ------------------------------------------------------------------------------------


def check(words: list[str]) -> None:
    """Raise AssertionError unless a program knows all that a command line gives to it."""
    program = words[0]
    if program in CHECKS:
        CHECKS[program](words)
    elif program in CONSOLE:
        parsed(called(CONSOLE[program]), words)
    elif program.endswith((".py", ".sh")):
        assert os.access(ROOT / program, os.X_OK), f"{program}: expected a file that may be run"
        (check_script if program.endswith(".py") else check_recipe)(words)
    else:
        raise AssertionError(
            f"{program}: expected a program that this test knows; add it to CONSOLE with the "
            "function that it calls, or to CHECKS with one that reads its command line"
        )


def check_python(words: list[str]) -> None:
    if words[1] == "-c":
        compile(words[2], "-c", "exec")
    elif words[1] == "-m":
        check_module(words[2:])
    else:
        check_script(words[1:])


def check_module(words: list[str]) -> None:
    def program() -> None:
        sys.path.insert(0, str(ROOT))
        runpy.run_module(words[0], run_name="__main__", alter_sys=True)

    check_more(words[0], parsed(program, words))


def check_more(program: str, args: argparse.Namespace) -> None:
    if program in MORE:
        with contextlib.chdir(ROOT):
            MORE[program](args)


def check_script(words: list[str]) -> None:
    script = (ROOT / words[0]).resolve()
    assert script.is_file(), f"{words[0]}: expected a script of the repository"

    def program() -> None:
        sys.path.insert(0, str(script.parent))
        runpy.run_path(str(script), run_name="__main__")

    check_more(str(script.relative_to(ROOT)), parsed(program, words))


def check_torchrun(words: list[str]) -> None:
    from torch.distributed import run

    args = parsed(lambda: run.parse_args(words[1:]), words)
    check_script([args.training_script, *args.training_script_args])


def check_hydra(words: list[str]) -> None:
    """Compose the config: a key that it does not have cannot be given."""
    args = parsed(called(CONSOLE["fairseq-hydra-train"]), words)
    from fairseq.dataclass.initialize import hydra_init
    from hydra import compose, initialize_config_dir
    from hydra.errors import HydraException

    hydra_init(args.config_name)
    with initialize_config_dir(args.config_dir, version_base="1.1"):
        try:
            compose(args.config_name, args.overrides)
        except HydraException as error:
            raise AssertionError(f"{error}: {error.__cause__}") from error


def check_make(words: list[str]) -> None:
    targets = re.findall(r"^([\w-]+):", read(ROOT / "Makefile"), flags=re.MULTILINE)
    assert set(words[1:]) <= set(targets), f"expected targets of {targets}"


def check_pip(words: list[str]) -> None:
    """Its own options, and the extras of this project."""
    create = pytest.importorskip("pip._internal.commands", reason="needs pip").create_command
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            options, wanted = create(words[1]).parse_args(words[2:])
    except SystemExit:
        raise AssertionError(last_line(said)) from None
    extras = pyproject()["project"]["optional-dependencies"]
    for requirement in wanted + options.editables:
        ours = re.fullmatch(r"(?:\.|pskd)\[(.*)\]", requirement)
        if ours:
            assert set(ours[1].split(",")) <= set(extras), (
                f"{requirement}: expected one of {extras}"
            )
        elif "://" not in requirement and requirement != ".":
            from packaging.requirements import Requirement

            Requirement(requirement)


def check_recipe(words: list[str]) -> None:
    """What a recipe of configs/ calls is a command again."""
    recipe, *arguments = words
    if recipe.endswith("iwslt_text.sh"):  # calls none
        assert len(arguments) == 4, "expected FOLDER SOURCE TARGET OUT"
        return
    note = '#!/bin/sh\nfor word in {} "$@"; do printf "%s\\0" "$word"; done > "$NOTES"\n'
    with tempfile.TemporaryDirectory() as folder:
        notes = Path(folder, "notes")
        for program in ("fairseq-train", "python"):
            Path(folder, program).write_text(note.format(program))
            Path(folder, program).chmod(0o755)
        subprocess.run(
            [ROOT / recipe, *arguments],
            env={"NOTES": str(notes), "PATH": f"{folder}:{os.defpath}"},
            cwd=folder,
            capture_output=True,  # to its end: a recipe's log is written by a process of its own
            check=True,
        )
        noted = read(notes)
    check(noted.split("\0")[:-1])


def check_detectron2_config(args: argparse.Namespace) -> None:
    """Merge the config file and the KEY VALUE pairs."""
    if not (args.config_file or args.opts):  # the program is only named
        return
    from pskd_detectron2 import load_config
    from pskd_detectron2.config import check_pskd_config, recipe_path

    own = args.config_file == "my_faster_rcnn.yaml"
    file = OWN_CONFIG if own else recipe_path(args.config_file)
    if file.endswith(".py"):
        from detectron2.config import LazyConfig

        LazyConfig.apply_overrides(LazyConfig.load(file), args.opts)
    else:
        check_pskd_config(load_config(file, args.opts))


def check_options_of(package: str) -> Callable[[argparse.Namespace], None]:
    """Return what a train script does with its options before it builds anything."""
    return lambda args: importlib.import_module(f"{package}.options").check(args)


CHECKS = {
    "fairseq-hydra-train": check_hydra,
    "make": check_make,
    "pip": check_pip,
    "python": check_python,
    "torchrun": check_torchrun,
}
#: What of a program's command line its parser does not see.
MORE = {
    "benchmarks/detection_step.py": check_detectron2_config,
    "classification/train.py": check_options_of("pskd_classification"),
    "detection/train_net.py": check_detectron2_config,
    "detection/train_torchvision.py": check_options_of("pskd_torchvision"),
    "pskd_detectron2.train_net": check_detectron2_config,
}


def pyproject() -> dict:
    return tomllib.loads(read(ROOT / "pyproject.toml"))


# ---- files ---------------------------------------------------------------------------------------


def missing_files(words: list[str]) -> list[str]:
    """Return what of a command line has the form of a file and is neither there nor a user's."""
    if words[:2] == ["python", "-c"]:
        return []
    words = words[3:] if words[:2] == ["python", "-m"] else words[1:]
    values = [word.rpartition("=")[2] for word in words if "://" not in word]
    pieces = [piece.removeprefix(f"{ROOT}/") for value in values for piece in value.split(":")]
    return [
        piece
        for piece in pieces
        if ("/" in piece or re.search(r"\w\.[a-z]+\d*$", piece))
        and not any(fnmatch.fnmatch(piece, pattern) for pattern in USERS)
        and not (ROOT / piece).exists()
    ]


# ---- words --------------------------------------------------------------------------------------


def full(words: Sequence[str]) -> list[str]:
    """Return a command line with what its dots stand for."""
    more = [] if "--arch" in words else MORE_WORDS.get(words[0], [])
    return [each for word in words for each in (more if word == "..." else [word])]


def program_of(words: Sequence[str]) -> str:
    """Return what a command is called in RUN."""
    program, *arguments = words
    if program in ("make", "pip", "pskd") or arguments[:1] == ["-c"]:
        return f"{program} {arguments[0]}"
    if program == "torchrun":
        return " ".join([program, *(word for word in arguments if word.endswith(".py"))])
    if arguments[:1] == ["-m"]:
        return f"python -m {arguments[1]}"
    return arguments[0] if program == "python" else program
