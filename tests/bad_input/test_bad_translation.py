"""Bad input to the fairseq plugin, its memory and checkpoints, to data preparation and evaluation.

The plugin is asked as fairseq-train does it: command line, task, criterion; it refuses before the
data are read.
"""

from __future__ import annotations

import copy
import functools
import gzip
import os
import sys
from argparse import Namespace
from pathlib import Path
from unittest import mock

import torch
from bad_input import ROOT, Part, as_command, check, every_case, loaded

PLUGIN = ROOT / "translation" / "pskd_fairseq"
TYPES = 24  # four of fairseq's and twenty words

FLAGS = Part(
    "fairseq: options of the criterion `pskd`",
    "`fairseq-train` with a dictionary of 24 types and `--max-epoch 4`, before the data are read.",
    ("fairseq",),
)
RESUMED = Part(
    "fairseq: checkpoints and memory at a resume",
    "`run/checkpoint_last.pt` of a training with `--max-epoch 4`.",
    ("fairseq",),
)
PREPARATION = Part(
    "Translation: `prepare.py`",
    "No folder is made, and one that is there stays.",
    ("fairseq", "sacremoses", "subword_nmt"),
)
EVALUATION = Part(
    "Translation: `evaluate.py` and `plot_epochs.py`",
    "Before the model is loaded.",
    ("fairseq", "sacrebleu", "sacremoses"),
)
PARTS = [FLAGS, RESUMED, PREPARATION, EVALUATION]


# ---- the plugin ----------------------------------------------------------------------------------


def write_dictionaries() -> None:
    Path("data").mkdir()
    for language in ("de", "en"):
        words = "".join(f"w{number} 1\n" for number in range(TYPES - 4))
        Path(f"data/dict.{language}.txt").write_text(words)


def build(*flags: str) -> None:
    """Go as far as fairseq-train goes until it has a criterion."""
    from fairseq import tasks

    cfg = copy.deepcopy(parsed(*flags))
    tasks.setup_task(cfg.task).build_criterion(cfg.criterion)


@functools.cache
def parsed(*flags: str):
    """Return the configuration that fairseq-train makes of its command line."""
    from fairseq import options
    from fairseq.dataclass.utils import convert_namespace_to_omegaconf

    line = ["data", "-s", "de", "-t", "en", "--arch", "transformer", "--optimizer", "adam"]
    line += ["--criterion", "pskd", "--user-dir", str(PLUGIN), "--save-dir", "run", *flags]
    with mock.patch.object(sys, "argv", ["fairseq-train", *line]):
        args = options.parse_args_and_arch(options.get_training_parser(), input_args=line)
    return convert_namespace_to_omegaconf(args)


def flagged(tried: str, flags: str, says: str, *, ends=ValueError, end: str = "--max-epoch 4"):
    """Add a case of options that the plugin refuses."""

    def run():
        write_dictionaries()
        yield None
        build(*end.split(), *flags.split())

    FLAGS.add(tried, run, says, ends=ends)


flagged(
    "no end of the training",
    "",
    "expected --max-epoch or --max-update, got --max-epoch 0 --max-update 0 (no end)",
    end="",
)
flagged(
    "`--pskd-alpha-final 1.2`",
    "--pskd-alpha-final 1.2",
    "--pskd-alpha-final: expected a number in [0, 1], got 1.2",
)
flagged(
    "`--label-smoothing 2`",
    "--label-smoothing 2",
    "--label-smoothing: expected a number in [0, 1 - 1/24], got 2.0",
)
flagged(
    "`--ignore-prefix-size -1`",
    "--ignore-prefix-size=-1",
    "--ignore-prefix-size: expected a number of at least 0, got -1",
)
flagged(
    "`--pskd-start-epoch 9`",
    "--pskd-start-epoch 9",
    "--pskd-start-epoch: expected 1 to --max-epoch 4, got 9",
)
flagged(
    "the memory with `--pskd-top-k 0`",
    "--pskd-teacher memory --pskd-top-k 0",
    "--pskd-top-k: expected 1 to 24, got 0",
)
flagged(
    "the memory with more types than there are",
    "--pskd-teacher memory --pskd-top-k 25",
    "--pskd-top-k: expected 1 to 24, got 25",
)
flagged(
    "a snapshot of a sharded model",
    "--ddp-backend fully_sharded",
    "--pskd-teacher snapshot copies the whole model: expected --ddp-backend legacy_ddp or "
    "pytorch_ddp, got fully_sharded",
)
flagged(
    "`--restore-file nowhere.pt`",
    "--restore-file nowhere.pt",
    "--restore-file: expected a checkpoint (a path from the working directory, which "
    "--checkpoint-suffix is added to), got none: 'nowhere.pt'",
    ends=OSError,
)


def resumed(tried: str, says: str, change) -> None:
    """Add a case of a checkpoint that the plugin refuses."""

    def run():
        write_dictionaries()
        write_checkpoint(change)
        yield None
        build("--max-epoch", "4")

    RESUMED.add(tried, run, f"run/checkpoint_last.pt: {says}")


def write_checkpoint(change) -> None:
    from pskd_fairseq import checkpoint

    schedule = {"name": "linear", "alpha_final": 0.7, "unit": "epoch", "total": 4, "start_epoch": 1}
    entry = checkpoint.make_entry(
        epoch=2,
        schedule=schedule,
        vocabulary={"source": TYPES, "target": TYPES},
        teacher={"model": {"weight": torch.ones(2, 2)}},
    )
    state = {
        "train_iterator": {"epoch": 2, "iterations_in_epoch": 3},
        "TranslationTask": {"pskd": entry},
    }
    Path("run").mkdir()
    change(state, entry)
    torch.save({"extra_state": state}, "run/checkpoint_last.pt")


resumed(
    "a checkpoint of other dictionaries",
    "expected the dictionaries it was trained with, of {'source': 24, 'target': 99} types, got "
    "{'source': 24, 'target': 24}",
    lambda state, entry: entry["vocabulary"].update(target=99),
)
resumed(
    "the state of a later version",
    "expected PS-KD state 1, got 2",
    lambda state, entry: entry.update(format=2),
)


class Sentences:
    """What the memory asks of a data set."""

    def __init__(self, *lengths: int) -> None:
        self.tgt_sizes = list(lengths)


def token_memory(epochs: int):
    from pskd_fairseq.memory import TokenMemory

    made = TokenMemory("run/pskd_memory", TYPES, 4)
    for epoch in range(1, epochs + 1):
        made.begin_epoch(epoch, Sentences(3, 5))
    return made


def memory_resumed(tried: str, says: str, spoil=lambda file: None, lengths=(3, 5)) -> None:
    def run():
        state = token_memory(epochs=2).state_dict()
        spoil(Path("run/pskd_memory/shard_0/epoch_00001.pskd"))
        made = token_memory(epochs=0)
        made.load_state_dict(state)
        yield None
        made.begin_epoch(2, Sentences(*lengths))

    RESUMED.add(tried, run, says)


CODE = Namespace(arch="fconv", encoder_layers="[print()]")
NO_LITERAL = (
    "encoder_layers: expected a literal such as '[(512, 3)] * 20', since fairseq evaluates it, got "
    "'[print()]'"
)
resumed(
    "code for an argument that fairseq evaluates",
    NO_LITERAL,
    lambda state, entry: state.update(args=CODE),
)


memory_resumed(
    "the memory's file cut off",
    "run/pskd_memory/shard_0/epoch_00001.pskd: expected 4,249 bytes, got 4,149: cut off",
    lambda file: os.truncate(file, file.stat().st_size - 100),
)
memory_resumed(
    "the memory's file deleted",
    "run/pskd_memory/shard_0/epoch_00001.pskd: expected the predictions of epoch 1, got none",
    Path.unlink,
)
memory_resumed(
    "the memory of another text",
    "memory: expected fingerprint '...', got '...'",
    lengths=(4, 4),
)


@RESUMED.case(
    "the memory of a data set without targets' lengths",
    "--pskd-teacher memory: expected a data set of sentence pairs with tgt_sizes, got object; "
    "--pskd-teacher snapshot takes any",
)
def _no_target_sizes():
    token_memory(epochs=0).begin_epoch(1, object())


@RESUMED.case(
    "a file where the memory's folder should be",
    "Not a directory: 'run/pskd_memory/shard_0'",
    ends=OSError,
)
def _memory_is_a_file():
    Path("run").mkdir()
    Path("run/pskd_memory").write_text("notes")
    yield None
    token_memory(epochs=1)


# ---- prepare.py ----------------------------------------------------------------------------------


def write_text(name: str, lines: int = 40) -> None:
    text = "".join(f"sentence {number} of {name}\n" for number in range(lines))
    Path(name).write_text(text)


def prepared(tried: str, line: str, says: str, spoil=lambda: None) -> None:
    """Add a case of a text, an option or a folder that prepare.py refuses."""

    def run():
        for name in ("a.de", "a.en", "v.de", "v.en"):
            write_text(name)
        spoil()
        yield None
        with mock.patch("logging.basicConfig"):  # which would take pytest's handlers away
            words = f"--source-lang de --target-lang en --out data {line}".split()
            return as_command(loaded("translation/prepare.py").main, "prepare.py", *words)

    PREPARATION.add(tried, run, f"prepare.py: error: {says}", ends=2)


PAIR = "a.de a.en"
BLANK = "x\n" * 2 + "\x01 \t\n" + "x\n" * 37
LATIN = b"eins\n" + b"f\xfcnf\n" + b"x\n" * 38
PACKED = gzip.compress("".join(f"{n} ist {n * n}\n" for n in range(900)).encode())


def no_pair_of_symbols() -> None:
    Path("a.de").write_text("".join(chr(0x4E00 + number) + "\n" for number in range(40)))
    Path("a.en").write_text("a\n" * 40)


def other_folder(record: str | None) -> None:
    Path("data").mkdir()
    Path("data/thesis.txt").write_text("mine")
    if record is not None:
        Path("data/prepare.json").write_text(record)


NO_SET = "data: is not empty, and without prepare.json not a prepared set; choose another --out"
NO_RECORD = "data/prepare.json: cannot be read as a record of this program"
OWN_FILE = (
    "data: holds files that are not part of the prepared set, such as thesis.txt; --overwrite "
    "would delete them, move them away first"
)
TOO_FEW = (
    "too few pairs: the training text has 40 distinct source sentences, from which 30 valid and 10 "
    "test pairs cannot be held out; give --valid and --test, or smaller --valid-size and "
    "--test-size"
)
EMPTY = "empty sentence in text to be scored against"
for case in (
    ("a text that is not there", "a.de none.en", "none.en: No such file or directory"),
    ("a folder for a text", f"{PAIR} more a.en", "more: Is a directory", Path("more").mkdir),
    (
        "one more line in one language",
        PAIR,
        "unequal line counts: a.de has 41, a.en has 40",
        lambda: write_text("a.de", 41),
    ),
    (
        "an empty line in text to be scored against",
        f"{PAIR} --valid v.de v.en",
        f"v.en:3: {EMPTY}",
        lambda: Path("v.en").write_text(BLANK),
    ),
    ("an empty file", PAIR, "a.en: empty file", lambda: Path("a.en").write_text("")),
    (
        "a text of empty lines",
        PAIR,
        "a.de: no training pair is left: all have an empty side",
        lambda: Path("a.en").write_text(" \n" * 40),
    ),
    (
        "a text in Latin-1",
        PAIR,
        "a.de:2: not UTF-8: byte 0xfc at byte offset 1 of the line, 6 of the (unpacked) file",
        lambda: Path("a.de").write_bytes(LATIN),
    ),
    (
        "a damaged .gz",
        "a.de.gz a.en",
        "a.de.gz:...: damaged .gz: ...",
        lambda: Path("a.de.gz").write_bytes(PACKED[: len(PACKED) // 2]),
    ),
    (
        "a .gz that is none",
        "a.de.gz a.en",
        "a.de.gz:1: damaged .gz: ...",
        lambda: Path("a.de.gz").write_bytes(b"plain\n" * 300),
    ),
    ("no text", "", "texts come in pairs SRC_TEXT TGT_TEXT, but 0 were given"),
    ("one text only", "a.de", "texts come in pairs SRC_TEXT TGT_TEXT, but 1 was given"),
    (
        "one language twice",
        f"{PAIR} --target-lang de",
        "source and target language are both 'de'",
    ),
    (
        "a language that is no name of a file",
        f"{PAIR} --target-lang en-US",
        "language code 'en-US' must be letters, digits and _ only",
    ),
    ("no merges", f"{PAIR} --bpe-size 0", "--bpe-size must be at least 1, not 0"),
    ("fewer than no pairs", f"{PAIR} --test-size -4", "--test-size must be at least 1, not -4"),
    ("no process", f"{PAIR} --workers 0", "--workers must be at least 1, not 0"),
    (
        "a size of text that is given",
        f"{PAIR} --valid v.de v.en --valid-size 9",
        "--valid-size has no meaning beside --valid",
    ),
    (
        "a text in which no two symbols meet twice",
        PAIR,
        "the training text is too small for BPE: no two symbols meet twice",
        no_pair_of_symbols,
    ),
    ("all sentences held out", f"{PAIR} --valid-size 30 --test-size 10", TOO_FEW),
    ("a folder with other files", f"{PAIR} --overwrite", NO_SET, lambda: other_folder(None)),
    (
        "a record of another program",
        f"{PAIR} --overwrite",
        NO_RECORD,
        lambda: other_folder("[]"),
    ),
    (
        "a prepared folder with a file of one's own",
        f"{PAIR} --overwrite",
        OWN_FILE,
        lambda: other_folder('{"files": ["prepare.json"]}'),
    ),
):
    prepared(*case)


# ---- evaluate.py and plot_epochs.py --------------------------------------------------------------

RECORD = '{"source_lang": "de", "target_lang": "en", "lowercase": false}'


def evaluated(tried: str, line: str, says: str, spoil=lambda: None) -> None:
    """Add a case of a checkpoint, a folder or an option that evaluate.py refuses."""

    def run():
        Path("data/raw").mkdir(parents=True)
        Path("data/prepare.json").write_text(RECORD)
        Path("data/raw/test.en").write_text("a sentence\n")
        torch.save({"model": {}}, "model.pt")
        spoil()
        yield None
        with mock.patch("logging.basicConfig"):
            words = ["--data", "data", "--out", "out", *line.split()]
            return as_command(loaded("translation/evaluate.py").main, "evaluate.py", *words)

    EVALUATION.add(tried, run, f"evaluate.py: error: {says}", ends=2)


evaluated(
    "a folder that nobody prepared",
    "model.pt",
    "data: expected a folder that translation/prepare.py or fairseq-preprocess made, got no "
    "prepare.json and no dict.*.txt",
    lambda: Path("data/prepare.json").unlink(),
)
evaluated(
    "a damaged prepare.json",
    "model.pt",
    "data/prepare.json: expected JSON, got ...line 1 column ...",
    lambda: Path("data/prepare.json").write_text(RECORD[:20]),
)
evaluated(
    "a prepare.json of another program",
    "model.pt",
    "data/prepare.json: expected an object with ['lowercase', 'source_lang', 'target_lang'], got "
    "['files']",
    lambda: Path("data/prepare.json").write_text('{"files": []}'),
)
evaluated("no checkpoint", "none.pt", "none.pt: expected a checkpoint, got no such file")
evaluated(
    "a file that is not a checkpoint",
    "model.pt",
    "model.pt: expected a whole fairseq checkpoint that fits data, got ...",
)
evaluated(
    "a checkpoint with code for an argument that fairseq evaluates",
    "model.pt",
    f"model.pt: {NO_LITERAL}",
    lambda: torch.save({"model": {}, "args": CODE}, "model.pt"),
)
evaluated(
    "the raw reference deleted",
    "model.pt",
    "data/raw/test.en: expected the raw reference, got no such file",
    lambda: Path("data/raw/test.en").unlink(),
)
evaluated("`--beam 0`", "model.pt --beam 0", "--beam: expected at least 1, got 0")
evaluated("`--lenpen nan`", "model.pt --lenpen nan", "--lenpen: expected a finite number, got nan")


def plotted(tried: str, says: str, text: str | None, out: str = "epochs.png") -> None:
    def run():
        if text is not None:
            Path("train.log").write_text(text)
        yield None
        main = loaded("translation/plot_epochs.py").main
        return as_command(main, "plot_epochs.py", "train.log", "--out", out)

    EVALUATION.add(tried, run, says, ends=1, needs=("matplotlib",))


EPOCH = '2026-01-01 00:00:00 | INFO | train | {"epoch": 1, "train_alpha": "0.2"}\n'
plotted("no log", "No such file or directory: 'train.log'", None)
plotted(
    "a log without PS-KD",
    "train.log: records: expected an epoch with one of ['alpha', ...], got none",
    EPOCH.replace("alpha", "loss"),
)
plotted(
    "a log with a damaged line",
    "train.log: expected a log of fairseq-train, got Expecting ...: line 1 column ...",
    EPOCH[:-9] + "\n",
)
plotted(
    "a log with a line without its epoch",
    "train.log: expected a log of fairseq-train, got ...'epoch'",
    EPOCH.replace('"epoch": 1, ', ""),
)
plotted(
    "a picture of no known format",
    "path: expected a name that ends in one of ..., got epochs.doc",
    EPOCH,
    "epochs.doc",
)


@every_case(*PARTS)
def test_what_the_user_sees(case, tmp_path):
    check(case, tmp_path)
