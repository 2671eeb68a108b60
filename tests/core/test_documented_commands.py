"""Every documented command is one that its program takes, and every such program is run by a test.

Here a command ends where its program has read it: its own parser gets the words, and what the words
name must exist. RUN says which test runs the program at a small size.
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
import tomllib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import documented_commands as documented
import pytest
from documented_commands import read

# Of hydra, and of modules of the demo that are run a second time.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::RuntimeWarning")

ROOT = documented.ROOT
COMMANDS = documented.all_commands()
#: Programs that are installed, and the function that each calls.
CONSOLE = {
    "fairseq-generate": "fairseq_cli.generate:cli_main",
    "fairseq-hydra-train": "fairseq_cli.hydra_train:cli_main",
    "fairseq-preprocess": "fairseq_cli.preprocess:cli_main",
    "fairseq-train": "fairseq_cli.train:cli_main",
    "pskd": "pskd.cli:main",
    "sacrebleu": "sacrebleu.sacrebleu:main",
}
#: Modules without which a command is skipped, as they are no part of the core.
OPTIONAL = {"babel", "detectron2", "fairseq", "fairseq_cli", "hydra", "pycocotools", "sacrebleu"}
OPTIONAL |= {"PIL", "matplotlib", "omegaconf", "sacremoses", "sklearn", "subword_nmt"}
OPTIONAL |= {"tensorboard", "torchvision", "tqdm", "yaml"}
#: What users have or get, by the names that commands give it. All other files must exist.
USERS = (
    "MULTI30K/*", "W/*", "data/*", "data-bin/*", "runs/*", "text/*", "SAVE_DIR/*",
    "train.*", "valid.*", "val.*", "test.*", "epochs.png", "loss.*", "loss_gpu_*.json",
    "my_faster_rcnn.yaml",
    "r50.pth", "resnet50.pth", "wmt14/full",
)  # fmt: skip
#: The config of a user's own, as it may be.
OWN_CONFIG = "detectron2:COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml"

#: Scripts without options, which parse nothing.
WITHOUT_OPTIONS = {"tests/bad_input/bad_input.py"}
#: What dots stand for, where a program cannot read its command line without it.
MORE_WORDS = {"fairseq-train": ["--arch", "transformer"]}

#: The tests that run the documented programs at a small size: file, test, programs.
RUN: dict[str, dict[str, list[str]]] = {
    "bad_input/test_bad_page.py": {
        "test_the_page_is_that_of_the_cases": ["tests/bad_input/bad_input.py"],
    },
    "classification/test_benchmark.py": {
        "test_tells_all_figures_and_ends_with_the_limit": ["benchmarks/classification_step.py"],
    },
    "classification/test_page.py": {
        "test_the_plot_of_the_page_is_drawn": ["python -c"],
    },
    "classification/test_training.py": {
        "test_two_processes_share_the_memory_and_go_on_as_one": [
            "classification/train.py",
            "torchrun classification/train.py",
        ],
    },
    "core/test_benchmark_linear.py": {
        "test_the_benchmark_tells_all_figures": ["benchmarks/linear_loss.py"],
    },
    "core/test_benchmark_loss.py": {
        "test_tells_all_figures": ["benchmarks/loss.py"],
    },
    "core/test_benchmark_memory.py": {
        "test_the_benchmark_tells_all_figures": ["benchmarks/prediction_memory.py"],
    },
    "core/test_doctor.py": {
        "test_real_run_tries_the_core_and_imports_no_framework": ["pskd doctor"],
    },
    "core/test_report.py": {
        "test_command_line": ["pskd report"],
    },
    "core/test_wheel.py": {
        "test_train_net_is_there_without_a_checkout": ["python -m pskd_detectron2.train_net"],
    },
    "detection/test_benchmark_detection.py": {
        "test_the_benchmark_tells_all_figures": ["benchmarks/detection_step.py"],
    },
    "detection/test_convert_backbone.py": {
        "test_script_runs_with_torch_alone": ["detection/convert_backbone.py"],
    },
    "detection/test_demo_detection.py": {
        "test_the_table_is_that_of_the_results": [
            "configs/detection/demo_torchvision.sh",
            "configs/detection/demo_torchvision_pskd.sh",
            "detection/train_net.py",
            "python -m demo.detection",
        ],
    },
    "detection/test_digits.py": {
        "test_command_line": ["python -m demo.digits"],
    },
    "detection/test_torchvision_training.py": {
        "test_results_tell_the_command_and_every_metric": ["detection/train_torchvision.py"],
        "test_two_processes_end_with_the_same_model_and_teacher": [
            "torchrun detection/train_torchvision.py"
        ],
    },
    "translation/test_benchmark_translation.py": {
        "test_the_benchmark_tells_all_figures": ["benchmarks/translation_step.py"],
    },
    "translation/test_demo.py": {
        "test_demo_prints_the_table_of_both_and_writes_results_and_plots": [
            "configs/translation/demo.sh",
            "configs/translation/demo_pskd.sh",
            "python -m demo.translation",
        ],
        "test_evaluation_scores_every_sentence_against_the_raw_reference": [
            "translation/evaluate.py"
        ],
    },
    "translation/test_demo_steps.py": {
        "test_the_whole_demo_tells_of_both_halves": [
            "make demo",
            "python -m demo",
        ],
    },
    "translation/test_locale_pairs.py": {
        "test_same_seed_same_bytes_in_another_process": ["python -m demo.locale_pairs"],
    },
    "translation/test_plugin_evaluation.py": {
        "test_generate_and_interactive_read_a_checkpoint_and_agree": ["fairseq-generate"],
    },
    "translation/test_prepare.py": {
        "test_folder_holds_what_fairseq_and_scoring_need": ["translation/prepare.py"],
    },
    "translation/test_recipes.py": {
        "test_a_log_becomes_a_plot_of_its_epochs": ["translation/plot_epochs.py"],
        "test_a_recipe_trains": [
            "configs/translation/iwslt.sh",
            "configs/translation/iwslt_pskd.sh",
            "configs/translation/multi30k_8k_de_en.sh",
            "configs/translation/multi30k_8k_de_en_pskd.sh",
            "configs/translation/multi30k_de_en.sh",
            "configs/translation/multi30k_de_en_pskd.sh",
            "configs/translation/wmt14.sh",
            "configs/translation/wmt14_pskd.sh",
            "fairseq-preprocess",
            "fairseq-train",
        ],
        "test_the_recipe_for_hydra_trains": ["fairseq-hydra-train"],
        "test_the_text_of_a_ted_release": ["configs/translation/iwslt_text.sh"],
    },
}
#: The documented programs that no test runs, and why.
NOT_RUN = {
    "make coverage": "runs this",
    "make lint": "reads code and runs none",
    "make setup": "installs what this needs",
    "make test": "runs this",
    "pip install": "needs a network",
    "sacrebleu": "needs a network",
}


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
    if words[0] in WITHOUT_OPTIONS:
        assert words[1:] == [], f"{words[0]}: expected no arguments"
        return

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


# ---- tests ---------------------------------------------------------------------------------------


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


#: What programs and this test raise at a word that they do not know.
WRONG = (AssertionError, KeyError, ValueError)


@pytest.mark.parametrize("command", COMMANDS, ids=str)
def test_a_documented_command_is_understood(command):
    assert not command.error, f"{command.place}: bash: {command.error}"
    words = full(command.words)
    missing = missing_files(words)
    assert not missing, f"{command.place}: {missing}: expected files of the repository, or of USERS"
    if not command.whole and words[0].endswith(".py"):
        words.insert(0, "python")
    try:
        check(words)
    except Incomplete as error:
        if not command.whole and not error.unknown:
            return
        told = f"{command.place}: {' '.join(words)}\n{error}; unknown: {error.unknown}"
    except WRONG as error:
        told = f"{command.place}: {' '.join(words)}\n{error}"
    else:
        return
    pytest.fail(told, pytrace=False)


PROGRAMS = {program_of(command.words) for command in COMMANDS if command.words} - {"torchrun"}


@pytest.mark.parametrize("program", sorted(PROGRAMS))
def test_a_documented_program_is_run_by_a_test(program):
    if program in NOT_RUN:
        return
    run_by = [(file, test) for file in RUN for test in RUN[file] if program in RUN[file][test]]
    assert run_by, f"{program}: expected a test in RUN, or a reason in NOT_RUN"
    for file, test in run_by:
        text = read(ROOT / "tests" / file)
        assert f"def {test}(" in text, f"{program}: expected {test} in {file}, which is not there"
        if program.endswith(".py"):
            assert Path(program).stem in text, f"{program}: expected it in {file}"


def test_no_entry_outlives_its_program():
    run = {each for tests in RUN.values() for found in tests.values() for each in found}
    assert (run | NOT_RUN.keys()) - PROGRAMS == set()
    assert not run & NOT_RUN.keys()


def test_the_programs_of_the_project_are_those_that_it_installs():
    ours = pyproject()["project"]["scripts"]
    assert ours.items() <= CONSOLE.items()


def test_commands_are_found_wherever_they_may_stand():
    pages = [str(path.relative_to(ROOT)) for path in documented.pages()]
    assert {"README.md", "detection/README.md", "docs/scaling.md"} <= set(pages)
    languages = {block[1] for path in documented.pages() for block in documented.fenced(read(path))}
    # A block of commands is told by its language.
    assert languages <= {"sh", "diff"} | documented.OTHER_LANGUAGES
    with_commands = {command.place.partition(":")[0] for command in COMMANDS}
    programs = [
        path for path in documented.scripts() if re.search("argument_?parser", read(path), re.I)
    ]
    programs += documented.files("configs/*/*.sh")
    assert len(programs) > 20
    assert {str(path.relative_to(ROOT)) for path in programs} <= with_commands
    assert {"README.md", "Makefile", "pskd/cli.py", "demo/__main__.py"} <= with_commands
    assert len(COMMANDS) > 100


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("python classification/train.py --learning-rate 1", "unrecognized arguments"),
        ("python classification/train.py --pskd-alpha 0.5", "unrecognized arguments"),
        ("python classification/train.py --pskd-alpha-final 5", "--pskd-alpha-final: expected"),
        ("python classification/trian.py", "expected a script"),
        ("torchrun --nproc-per-node 2 classification/train.py --no-flag", "unrecognized arguments"),
        ("torchrun --processes 2 classification/train.py", "unrecognized|required"),
        ("python -m demo.translation --pair 5", "unrecognized arguments"),
        ("pskd report runs/a --bins 5", "unrecognized arguments"),
        ("pskd compare runs/a", "invalid choice"),
        ("make all", "expected targets"),
        ("pip install '.[vision]'", "expected one of"),
        ("pip install --never .", "no such option"),
        ("tee runs/log", "add it to CONSOLE"),
        ("configs/translation/iwslt_text.sh a b", "expected FOLDER"),
        ("fairseq-train D ... --user-dir translation/pskd_fairseq --criterion pskd --pskd-alfa 1",
         "unrecognized arguments"),
        ("fairseq-hydra-train --config-dir $PWD/configs/translation/hydra --config-name iwslt_pskd "
         "criterion.pskd_alfa=1", "pskd_alfa"),
        ("python detection/train_net.py --config-file configs/detection/bccd.yaml MODEL.PSKD.ON 1",
         "MODEL.PSKD.ON"),
        ("configs/translation/wmt14.sh D S --fp15", "unrecognized arguments"),
    ],
)  # fmt: skip
def test_a_command_that_is_wrong_is_told(text, error):
    (command,) = documented.noted("here", text)
    with pytest.raises(WRONG, match=error):
        check(full(command.words))


def test_flags_of_half_a_command_are_looked_at():
    for flags, unknown in ((["--out"], []), (["--outt", "--beam", "3"], ["--outt"])):
        with pytest.raises(Incomplete) as told:
            check(["python", "translation/evaluate.py", *flags])
        assert told.value.unknown == unknown


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("python train.py $FOLDER", "FOLDER: unbound variable"),
        ("configs/translation/iwslt15.sh DATA SAVE_DIR", "No such file"),
        ("for x in 1 2; do\n    pskd doctor", "syntax error"),
    ],
)
def test_what_no_shell_takes_is_told(text, error):
    (command,) = documented.noted("here", text)
    assert error in command.error


def test_files_that_are_not_there_are_told():
    there = "classification/train.py --config configs/classification/digits.yaml --out runs/a"
    assert missing_files(["python", *there.split()]) == []
    gone = (
        "classification/train.py --config configs/classification/digit.yaml --train coco:a.json:b"
    )
    assert missing_files(["python", *gone.split()]) == [
        "configs/classification/digit.yaml", "a.json"
    ]  # fmt: skip


def test_a_shell_reads_the_commands():
    text = """\
        export OMP_NUM_THREADS=1  # a remark
        run() { python train.py "$@"; }
        name='a b'
        run --name "$name" \\
            --more ${name#a }
        for rank in 0 1; do
            X=1 fairseq-train $rank > log 2>&1 &
        done; wait
    """
    found = [command.words for command in documented.noted("here", text)]
    assert found[0] == ("python", "train.py", "--name", "a b", "--more", "b")
    assert sorted(found[1:]) == [("fairseq-train", "0"), ("fairseq-train", "1")]


@pytest.mark.parametrize(
    ("line", "command"),
    [
        (
            "pskd report RUN [RUN ...] [--preset paper|guo]",
            "pskd report RUN RUN ... --preset paper",
        ),
        ("a.sh DATA [any flag, the last wins]", "a.sh DATA "),
        ("b.py [--model M --sizes 1 2] [--json FILE]", "b.py --model M --sizes 1 2 --json FILE"),
    ],
)
def test_a_usage_line_becomes_a_command(line, command):
    assert documented.bare(line) == command
