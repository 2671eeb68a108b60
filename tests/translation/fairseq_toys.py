"""fairseq's commands on a toy corpus: a process, what it logged and what it saved.

A process costs seconds to start and a fraction of one to train, so all fork one that has imported
fairseq (`fork_server.py`); the demo's trainings (`test_demo.py`) start as a user's do.
"""

from __future__ import annotations

import hashlib
import json
import os
import queue
import random
import re
import shutil
import subprocess
import sys
import uuid
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
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

SIZES = (
    "--encoder-layers 1 --encoder-embed-dim 32 --encoder-ffn-embed-dim 64 "
    "--encoder-attention-heads 2 "
    "--decoder-layers 1 --decoder-embed-dim 32 --decoder-ffn-embed-dim 64 "
    "--decoder-attention-heads 2"
).split()
MODEL = ["--arch", "transformer", "--share-decoder-input-output-embed", *SIZES]
#: With dropout: what is equal bit by bit has drawn the same random numbers.
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
    """Runs fairseq's commands, two at a time, in forks of a process that has imported fairseq."""

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

    def train(self, name: str, *flags: str, **options) -> Run:
        """Train in the folder ``name`` and wait; the last of equal flags wins.

        Options are limits of a job of `fork_server.py`.
        """
        return self.forked("train", *self.train_flags(name, *flags), name=name, **options)

    def train_flags(self, name: str, *flags: str) -> list[str]:
        data = [] if flags and not flags[0].startswith("-") else [str(self.data)]
        model = [] if "--arch" in flags else MODEL
        criterion = [] if "--criterion" in flags else PSKD
        save_dir = ["--save-dir", str(self.folder / name)]
        return [*data, *model, *TRAINING, *criterion, *save_dir, *flags]

    def forked(self, command: str, *flags: str, name: str, **options) -> Run:
        """Run a command, as ``python -m fairseq_cli.COMMAND`` would."""
        (run,) = self._fork([self._job(command, name, flags, **options)])
        return run

    def train_ranks(self, name: str, *flags: str, ranks: int = 2, machines: int = 1) -> list[Run]:
        """Train in several processes that reduce gradients by gloo, as fairseq allows on a CPU.

        Of several machines each has the same number of processes and a host name.
        """
        meeting = self.folder / f"{name}.rendezvous"
        world = (
            f"--distributed-world-size {ranks} --distributed-init-method file://{meeting} "
            "--distributed-no-spawn --distributed-backend gloo --ddp-backend legacy_ddp"
        ).split()
        flags = self.train_flags(name, *flags, *world)
        return self._fork(
            self._job(
                "train", name, [*flags, "--distributed-rank", str(rank)],
                host=f"host{rank * machines // ranks}",
            )
            for rank in range(ranks)
        )  # fmt: skip

    def _job(self, command: str, name: str, flags, *, limit_s: float = TIMEOUT_S, **more) -> dict:
        output = self.folder / f"{name}.{uuid.uuid4().hex}.log"
        job = {"module": f"fairseq_cli.{command}", "flags": flags, "output": str(output)}
        return job | {"limit_s": limit_s, "save_dir": str(self.folder / name)} | more

    def _fork(self, jobs: Iterable[dict]) -> list[Run]:
        """Run jobs of `fork_server.py` side by side."""
        jobs = list(jobs)
        server = self._servers.get() or self._serve()
        try:
            server.stdin.write(json.dumps(jobs) + "\n")
            server.stdin.flush()
            while not re.fullmatch(r"\[[-\d, ]+\]\n", answer := server.stdout.readline()):
                assert answer, "the fork server has ended"  # other lines are imports' messages
        finally:
            self._servers.put(server)
        return [
            Run(code, Path(job["output"]).read_text(encoding="utf-8"), Path(job["save_dir"]))
            for code, job in zip(json.loads(answer), jobs, strict=True)
        ]

    def _serve(self) -> subprocess.Popen:
        return subprocess.Popen(
            [sys.executable, "-W", "ignore", str(HERE / "fork_server.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=self.folder,
            env=environment(),
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


def config(save_dir, **changes):
    """Return the criterion's options, as fairseq fills them in."""
    from pskd_fairseq.config import PSKDCriterionConfig

    made = PSKDCriterionConfig(
        label_smoothing=0.1, sentence_avg=False, max_epoch=EPOCHS, max_update=0,
        save_dir=str(save_dir), restore_file="checkpoint_last.pt", reset_dataloader=False,
        train_subset="train", ddp_backend="pytorch_ddp", path=None, continue_once=None,
        checkpoint_suffix="", keep_best_checkpoints=-1, keep_last_epochs=-1,
        keep_interval_updates=-1, patience=-1, stop_min_lr=-1.0,
    )  # fmt: skip
    return replace(made, **changes)


def build_criterion(task, save_dir, **changes):
    """Build the plugin's criterion in this process, as fairseq's trainer does, in training mode."""
    from pskd_fairseq.criterion import PSKDCriterion

    return PSKDCriterion.build_criterion(config(save_dir, **changes), task).train()


def batch(task, subset: str = "valid") -> dict:
    """Return a whole part of the corpus as one padded batch."""
    task.load_dataset(subset)
    data = task.dataset(subset)
    return data.collater([data[index] for index in range(len(data))])


class Step(NamedTuple):
    """What a criterion made of a batch, the gradients, and the random numbers' state after it."""

    loss: Tensor
    size: int
    log: dict
    grads: dict[str, Tensor]
    random: Tensor

    @property
    def values(self) -> dict[str, float]:
        return {key: float(value) for key, value in self.log.items()}


def step(criterion, model, sample, **options) -> Step:
    """Run a criterion and the backward pass with a fixed seed."""
    import torch

    model.zero_grad()
    torch.manual_seed(7)
    loss, size, log = criterion(model, sample, **options)
    random = torch.get_rng_state()
    loss.sum().backward()
    grads = {name: weight.grad.clone() for name, weight in model.named_parameters()}
    return Step(loss.detach(), size, log, grads, random)


class Payload:
    """Runs a command where a pickle is trusted: it makes the file ``marker``."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch '{self.marker}'",)
