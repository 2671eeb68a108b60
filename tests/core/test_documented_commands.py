"""Every documented command is one that its program takes, and every such program is run by a test.

Here a command ends where its program has read it: its own parser gets the words, and what the words
name must exist. RUN says which test runs the program at a small size.
"""

from __future__ import annotations

import re
from pathlib import Path

import documented_commands as documented
import pytest
from documented_commands import read
from documented_programs import (
    CONSOLE,
    WRONG,
    Incomplete,
    check,
    full,
    missing_files,
    program_of,
    pyproject,
)
from documented_runs import NOT_RUN, RUN

# Of hydra, and of modules of the demo that are run a second time.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::RuntimeWarning")

ROOT = documented.ROOT
COMMANDS = documented.all_commands()


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
    assert {"README.md", "Makefile", "pskd_tools/cli.py", "demo/__main__.py"} <= with_commands
    assert len(COMMANDS) > 100


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("python classification/train.py --learning-rate 1", "unrecognized arguments"),
        ("python classification/train.py --pskd-alpha 0.5", "unrecognized arguments"),
        ("python classification/train.py --pskd-alpha-final 5", "expected 0 to 1, got 5.0"),
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
