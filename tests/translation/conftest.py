"""What the tests of the fairseq plugin share: data, processes and the runs that many of them read.

A process costs seconds to start and a fraction of one to train, so runs that several tests look at
are made once a session, and independent ones two at a time.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PLUGIN = ROOT / "translation" / "pskd_fairseq"
WORDS = 40
EPOCHS = 4
ALPHA_FINAL = 0.7
BATCHES = 6
#: Every sentence of the training part has a length of its own. fairseq breaks ties among equal
#: lengths anew after a restart; without ties a resumed run can be compared bit by bit.
LENGTHS = {"train": range(3, 27), "valid": range(4, 12), "test": range(4, 12)}
TIMEOUT_S = 240

for folder in (ROOT, ROOT / "translation"):
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))

MODEL = (
    "--arch transformer --share-decoder-input-output-embed "
    "--encoder-layers 1 --encoder-embed-dim 32 --encoder-ffn-embed-dim 64 "
    "--encoder-attention-heads 2 "
    "--decoder-layers 1 --decoder-embed-dim 32 --decoder-ffn-embed-dim 64 "
    "--decoder-attention-heads 2"
).split()
TRAINING = (
    "--optimizer adam --lr 5e-3 --dropout 0.3 --label-smoothing 0.1 --seed 3 --batch-size 4 "
    "--required-batch-size-multiple 1 --num-workers 0 --cpu --no-progress-bar --log-format json "
    "--log-interval 1"
).split()
PSKD = ["--criterion", "pskd", "--user-dir", str(PLUGIN)]
STOCK = ["--criterion", "label_smoothed_cross_entropy"]


@dataclass(frozen=True)
class Run:
    """A finished process of one of fairseq's commands."""

    code: int
    output: str
    save_dir: Path

    def log(self, tag: str) -> list[dict]:
        """Return the lines that were logged as json under a tag: train, train_inner or valid."""
        found = re.findall(rf"[|\[] ?{tag}(?: \||\]\[INFO\] -) (\{{.*\}})$", self.output, re.M)
        return [json.loads(line) for line in found]

    def column(self, name: str, tag: str = "train") -> list[float]:
        """Return one logged quantity, a value a line; lines without it are left out."""
        key = f"{tag}_{name}"
        return [float(line[key]) for line in self.log(tag) if key in line]

    def checkpoint(self, name: str = "checkpoint_last.pt") -> dict:
        import torch

        return torch.load(self.save_dir / name, map_location="cpu", weights_only=False)

    def model(self, name: str = "checkpoint_last.pt") -> dict:
        return self.checkpoint(name)["model"]

    def teacher(self, name: str) -> dict | None:
        return entry(self.checkpoint(name))["teacher"]["model"]

    def expect_success(self) -> Run:
        assert self.code == 0, self.output[-4000:]
        return self

    def expect_refusal(self, *parts: str) -> None:
        """Assert that it ended in an error that says every part, before the first update."""
        assert self.code != 0, self.output[-4000:]
        error = self.output[max(self.output.rfind("Error"), 0) - 60 :]
        if "Error: " not in self.output:  # argparse
            error = self.output[self.output.rfind(": error: ") :]
        missing = [part for part in parts if part not in error]
        assert not missing, f"not in the error: {missing}\n{self.output[-4000:]}"
        assert not self.log("train_inner")


def entry(checkpoint: dict) -> dict:
    """Return what PS-KD keeps in a checkpoint."""
    return checkpoint["extra_state"]["TranslationTask"]["pskd"]


def same(left: dict, right: dict) -> bool:
    """Whether two state dicts hold the same tensors, bit for bit."""
    import torch

    return left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)


def digests(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of every file of a folder."""
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.iterdir())
        if path.is_file()
    }


def continued_from(source: Path, save_dir: Path) -> Path:
    """Return a new save folder whose last checkpoint is a copy of ``source``."""
    save_dir.mkdir()
    shutil.copyfile(source, save_dir / "checkpoint_last.pt")
    return save_dir


class Fairseq:
    """Starts fairseq's commands as a user would, two at a time."""

    def __init__(self, data: Path, folder: Path) -> None:
        self.data = data
        self.folder = folder
        self._pool = ThreadPoolExecutor(processes_at_a_time())

    def close(self) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)

    def submit(self, function, *args) -> Future:
        """Run a function that makes a chain of runs beside another one."""
        return self._pool.submit(function, *args)

    def train(self, name: str, *flags: str, **options) -> Run:
        """Train in the folder ``name`` and wait; the last of equal flags wins."""
        return self.command("train", *self.train_flags(name, *flags), name=name, **options)

    def start(self, name: str, *flags: str, **options) -> Future:
        """As `train`, without waiting."""
        return self._pool.submit(lambda: self.train(name, *flags, **options))

    def train_flags(self, name: str, *flags: str) -> list[str]:
        data = [] if flags and not flags[0].startswith("-") else [str(self.data)]
        model = [] if "--arch" in flags else MODEL
        criterion = [] if "--criterion" in flags else PSKD
        save_dir = ["--save-dir", str(self.folder / name)]
        return [*data, *model, *TRAINING, *criterion, *save_dir, *flags]

    def command(self, module: str, *flags: str, name: str = "", stdin: str = "", **options) -> Run:
        process = self.popen(module, *flags, **options)
        try:
            output, _ = process.communicate(stdin, timeout=TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            output, _ = process.communicate()
            raise AssertionError(f"no end after {TIMEOUT_S} s:\n{output[-4000:]}") from None
        return Run(process.returncode, output, self.folder / name)

    def popen(self, module: str, *flags: str, **options) -> subprocess.Popen:
        return subprocess.Popen(
            [sys.executable, "-W", "ignore", "-m", f"fairseq_cli.{module}", *flags],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=self.folder,
            env=environment(),
            **options,
        )

    def train_ranks(self, name: str, *flags: str, ranks: int = 2) -> list[Run]:
        """Train in several processes that reduce gradients by gloo, as fairseq allows on a CPU."""
        meeting = self.folder / f"{name}.rendezvous"
        meeting.unlink(missing_ok=True)
        world = (
            f"--distributed-world-size {ranks} --distributed-init-method file://{meeting} "
            "--distributed-no-spawn --distributed-backend gloo --ddp-backend legacy_ddp"
        ).split()
        processes = [
            self.popen(
                "train", *self.train_flags(name, *flags, *world, "--distributed-rank", str(rank))
            )
            for rank in range(ranks)
        ]
        try:
            outputs = [process.communicate(timeout=TIMEOUT_S)[0] for process in processes]
        finally:
            for process in processes:
                if process.poll() is None:
                    process.send_signal(signal.SIGKILL)
        return [
            Run(process.returncode, output, self.folder / name)
            for process, output in zip(processes, outputs, strict=True)
        ]

    def validate(self, checkpoint: Path, subset: str, *flags: str) -> Future:
        return self._pool.submit(
            lambda: self.command(
                "validate", str(self.data), "--task", "translation", "--path", str(checkpoint),
                "--valid-subset", subset, "--batch-size", "4", "--required-batch-size-multiple",
                "1", "--num-workers", "0", "--cpu", "--log-format", "json", *flags,
            )
        )


def processes_at_a_time() -> int:
    """Return 2, shared among the workers of pytest-xdist."""
    return max(1, 2 // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1")))


def environment() -> dict[str, str]:
    """Return the environment of a user's shell with torch's protection on, and no GPU."""
    kept = {
        key: value
        for key, value in os.environ.items()
        if key not in ("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "TORCH_FORCE_WEIGHTS_ONLY_LOAD")
    }
    paths = [str(ROOT), str(ROOT / "translation")]
    return {
        **kept,
        "PYTHONPATH": os.pathsep.join(paths),
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "COLUMNS": "200",
    }


def write_corpus(folder: Path) -> None:
    """Write a language pair in which word s7 means t7, and every sentence is of another length."""
    draw = random.Random(0)
    for part, lengths in LENGTHS.items():
        lines = [[draw.randrange(WORDS) for _ in range(length)] for length in lengths]
        for language, letter in (("de", "s"), ("en", "t")):
            text = "".join(" ".join(f"{letter}{word}" for word in line) + "\n" for line in lines)
            (folder / f"{part}.{language}").write_text(text, encoding="utf-8")


@pytest.fixture(scope="session")
def fairseq(tmp_path_factory):
    """fairseq's commands on a binarised toy corpus."""
    folder = tmp_path_factory.mktemp("fairseq")
    write_corpus(folder)
    tool = Fairseq(folder / "data", folder)
    tool.command(
        "preprocess", "-s", "de", "-t", "en", "--trainpref", "train", "--validpref", "valid",
        "--testpref", "test", "--destdir", "data", "--workers", "1",
    ).expect_success()  # fmt: skip
    yield tool
    tool.close()


@pytest.fixture(scope="session")
def _baselines(fairseq):
    epochs = ["--max-epoch", str(EPOCHS), "--save-interval-updates", "4"]
    board = ["--tensorboard-logdir", str(fairseq.folder / "board")]
    return {
        "straight": fairseq.start("straight", *epochs, *board),
        "stock": fairseq.start("stock", *STOCK, *epochs),
    }


@pytest.fixture(scope="session")
def straight(_baselines):
    """A PS-KD training of 4 epochs of 6 updates, with a checkpoint every 4 updates and epoch."""
    return _baselines["straight"].result().expect_success()


@pytest.fixture(scope="session")
def stock(_baselines):
    """The same training with fairseq's label-smoothed cross-entropy."""
    return _baselines["stock"].result().expect_success()


@pytest.fixture
def task(fairseq):
    """A translation task of its own, for criterions built in this process."""
    from fairseq.tasks.translation import TranslationConfig, TranslationTask

    config = TranslationConfig(
        data=str(fairseq.data), source_lang="de", target_lang="en", train_subset="train",
        dataset_impl=None, required_seq_len_multiple=1,
    )  # fmt: skip
    return TranslationTask.setup_task(config)


def build_criterion(task, save_dir, **changes):
    """Build the plugin's criterion in this process, as fairseq's trainer does, in training mode."""
    from pskd_fairseq.criterion import PSKDCriterion, PSKDCriterionConfig

    config = PSKDCriterionConfig(
        label_smoothing=0.1, sentence_avg=False, max_epoch=EPOCHS, max_update=0,
        save_dir=str(save_dir), restore_file="checkpoint_last.pt", reset_dataloader=False,
        train_subset="train", ddp_backend="pytorch_ddp", path=None,
    )  # fmt: skip
    for name, value in changes.items():
        setattr(config, name, value)
    return PSKDCriterion.build_criterion(config, task).train()


class Payload:
    """Runs a command where a pickle is trusted: it makes the file ``marker``."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch '{self.marker}'",)
