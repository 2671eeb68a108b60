"""What the tests of the fairseq plugin share: data, processes and the runs that many of them read.

Runs that several tests look at are made once a session, and independent ones two at a time. A
process costs seconds to start and a fraction of one to train, so the runs that define a behaviour
have a process of their own from the interpreter's start, and variants fork one that has imported
fairseq (`fork_server.py`).
"""

from __future__ import annotations

import hashlib
import json
import os
import queue
import random
import re
import shutil
import signal
import subprocess
import sys
import uuid
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
PYTHON = [sys.executable, "-W", "ignore"]
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
ON_HOST = """
import runpy, socket
socket.gethostname = lambda: "{}"
runpy.run_module("fairseq_cli.train", run_name="__main__")
"""
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
        self._servers: queue.SimpleQueue[subprocess.Popen | None] = queue.SimpleQueue()
        for _ in range(processes_at_a_time()):
            self._servers.put(None)

    def close(self) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)
        for _ in range(processes_at_a_time()):
            server = self._servers.get()
            if server is not None:
                server.communicate()

    def submit(self, function, *args) -> Future:
        """Run a function that makes a chain of runs beside another one."""
        return self._pool.submit(function, *args)

    def start(self, name: str, *flags: str) -> Future:
        """As `train`, without waiting."""
        return self._pool.submit(self.train, name, *flags)

    def train(self, name: str, *flags: str, limit_s: float = TIMEOUT_S) -> Run:
        """Train in the folder ``name`` and wait; the last of equal flags wins."""
        return self.forked("train", *self.train_flags(name, *flags), name=name, limit_s=limit_s)

    def train_flags(self, name: str, *flags: str) -> list[str]:
        data = [] if flags and not flags[0].startswith("-") else [str(self.data)]
        model = [] if "--arch" in flags else MODEL
        criterion = [] if "--criterion" in flags else PSKD
        save_dir = ["--save-dir", str(self.folder / name)]
        return [*data, *model, *TRAINING, *criterion, *save_dir, *flags]

    def forked(self, command: str, *flags: str, name: str, limit_s: float = TIMEOUT_S) -> Run:
        """Run a command in a fork of a process that has imported fairseq."""
        server = self._servers.get() or self.popen(PYTHON + [str(HERE / "fork_server.py")])
        output = self.folder / f"{name}.{uuid.uuid4().hex}.log"
        job = {"module": f"fairseq_cli.{command}", "flags": flags, "output": str(output)}
        try:
            server.stdin.write(json.dumps({**job, "limit_s": limit_s}) + "\n")
            server.stdin.flush()
            while not re.fullmatch(r"-?\d+\n", answer := server.stdout.readline()):
                assert answer, "the fork server has ended"  # other lines are imports' messages
        finally:
            self._servers.put(server)
        return Run(int(answer), output.read_text(encoding="utf-8"), self.folder / name)

    def command(self, command: str, *flags: str, name: str = "", stdin: str = "", **options) -> Run:
        """Run a command in a process of its own, from the interpreter's start on."""
        process = self.popen(PYTHON + ["-m", f"fairseq_cli.{command}", *flags], **options)
        try:
            output, _ = process.communicate(stdin, timeout=TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            output, _ = process.communicate()
            raise AssertionError(f"no end after {TIMEOUT_S} s:\n{output[-4000:]}") from None
        return Run(process.returncode, output, self.folder / name)

    def popen(self, command: list[str], **options) -> subprocess.Popen:
        return subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=self.folder,
            env=environment(),
            **options,
        )

    def train_ranks(self, name: str, *flags: str, ranks: int = 2, machines: int = 1) -> list[Run]:
        """Train in several processes that reduce gradients by gloo, as fairseq allows on a CPU.

        Of several machines each has the same number of processes and a host name.
        """
        meeting = self.folder / f"{name}.rendezvous"
        meeting.unlink(missing_ok=True)
        world = (
            f"--distributed-world-size {ranks} --distributed-init-method file://{meeting} "
            "--distributed-no-spawn --distributed-backend gloo --ddp-backend legacy_ddp"
        ).split()
        processes = [
            self.popen(
                PYTHON
                + ["-c", ON_HOST.format(f"host{rank * machines // ranks}")]
                + self.train_flags(name, *flags, *world, "--distributed-rank", str(rank))
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

    flags = fairseq.train_flags("straight", *epochs, *board)
    return {
        "straight": fairseq.submit(lambda: fairseq.command("train", *flags, name="straight")),
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
    import torch
    from fairseq.tasks.translation import TranslationConfig, TranslationTask

    torch.set_num_threads(1)  # models this small are faster so
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
        train_subset="train", ddp_backend="pytorch_ddp", path=None, continue_once=None,
        checkpoint_suffix="", keep_best_checkpoints=-1,
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
