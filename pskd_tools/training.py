"""Training by epochs: what a trainer of any task shares with the others, and the loop around it.

An epoch follows from the state at its start, the seed and its number alone: all random states are
set anew at its start, and checkpoints are written at its end. So a resumed run equals one that was
not stopped.
"""

from __future__ import annotations

import argparse
import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Container, Mapping, Sized
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DistributedSampler

from pskd.distributed import World
from pskd_tools.checkpoint import load_optimizer
from pskd_tools.log import MetricsLog

__all__ = [
    "AMP",
    "Trainer",
    "amp_dtype",
    "autocast",
    "build_optimizer",
    "every",
    "run_epochs",
    "seed_epoch",
]

#: The types that ``--amp`` takes; a bare one is float16 on a GPU and bfloat16 on a CPU.
AMP = {"bf16": torch.bfloat16, "fp16": torch.float16}


def amp_dtype(amp: bool | str, device: torch.device) -> torch.dtype | None:
    """Return the type of mixed precision, or None without one."""
    if isinstance(amp, str):
        return AMP[amp]
    if not amp:
        return None
    return torch.float16 if device.type == "cuda" else torch.bfloat16


def autocast(amp: bool | str, device: torch.device) -> AbstractContextManager[Any]:
    """Return the context of a forward pass."""
    dtype = amp_dtype(amp, device)
    return nullcontext() if dtype is None else torch.autocast(device.type, dtype)


def build_optimizer(
    args: argparse.Namespace, model: nn.Module, *, nesterov: bool = False, fused: bool | None = None
) -> torch.optim.Optimizer:
    """Return ``--opt`` of all weights that are trained.

    Args:
        args: the command line.
        model: on the device.
        nesterov, fused: as of torch; the former is for sgd with momentum.
    """
    weights = [p for p in model.parameters() if p.requires_grad]
    if args.opt == "adamw":
        return torch.optim.AdamW(weights, args.lr, weight_decay=args.weight_decay, fused=fused)
    return torch.optim.SGD(
        weights,
        args.lr,
        momentum=args.momentum,
        weight_decay=args.weight_decay,
        nesterov=nesterov and args.momentum > 0,
        fused=fused,
    )


def seed_epoch(seed: int, epoch: int, rank: int) -> None:
    """Set the random states of Python, numpy and torch for one process and epoch."""
    # Mixed: neighbouring seeds, epochs and ranks must not share a stream.
    mixed = int(np.random.SeedSequence((seed, epoch, rank)).generate_state(1)[0])
    random.seed(mixed)
    np.random.seed(mixed)
    torch.manual_seed(mixed)


class Trainer(ABC):
    """Trains a model epoch by epoch, in one process or several; a task adds batches and losses.

    Args:
        model: bare and on the device.
        samples: the training set, of which the length alone is asked.
        optimizer: of the model's parameters.
        world: the processes.
        amp: mixed precision, as of `amp_dtype`; float16 has a loss scale.
        seed: of the order of samples and of all that is random.

    Attributes:
        network: the model, in several processes wrapped in DDP.
        sampler: of this process's samples of an epoch.
        log: where `run_epochs` and the trainer itself write figures; nowhere unless it is set.
    """

    def __init__(
        self,
        model: nn.Module,
        samples: Sized,
        optimizer: torch.optim.Optimizer,
        *,
        world: World,
        amp: bool | str = False,
        seed: int = 0,
    ) -> None:
        self.model, self.optimizer, self.world = model, optimizer, world
        self.log = MetricsLog(None)
        self._amp, self._seed = amp, seed
        device = world.device
        is_half = amp_dtype(amp, device) is torch.float16
        self.scaler = torch.amp.GradScaler(device.type, enabled=is_half)
        self.network: nn.Module = model
        if world.size > 1:
            devices = [device] if device.type == "cuda" else None
            self.network = DistributedDataParallel(model, device_ids=devices)
        self.sampler: DistributedSampler[int] = DistributedSampler(
            samples,  # type: ignore[arg-type]
            world.size,
            world.rank,
            seed=seed,
        )

    @property
    @abstractmethod
    def iterations(self) -> int:
        """Of an epoch."""

    @abstractmethod
    def train_epoch(self, epoch: int) -> dict[str, float]:
        """Train one epoch, counted from 1, and return its figures for the log; a collective.

        Afterwards all processes have the same model.
        """

    def begin_epoch(self, epoch: int) -> None:
        """Set all random states, and the order of samples."""
        seed_epoch(self._seed, epoch, self.world.rank)
        self.sampler.set_epoch(epoch)

    def autocast(self) -> AbstractContextManager[Any]:
        """Return the context of a forward pass and its loss."""
        return autocast(self._amp, self.world.device)

    def step(self, loss: Tensor) -> None:
        """Make a step on the loss of a batch."""
        self.optimizer.zero_grad()
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()

    def write(self, epoch: int, figures: Mapping[str, float]) -> None:
        """Log figures of an epoch's end, if there are any."""
        if figures:
            where = {"epoch": epoch, "iteration": epoch * self.iterations - 1}
            self.log.write(where | dict(figures))

    def state_dict(self) -> dict[str, Any]:
        """Return what goes on beside the model."""
        return {"optimizer": self.optimizer.state_dict(), "scaler": self.scaler.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict`; rates and decays are those of this run."""
        load_optimizer(self.optimizer, state["optimizer"])
        if state["scaler"]:  # empty without float16
            self.scaler.load_state_dict(state["scaler"])


def every(count: int, epochs: int) -> set[int]:
    """Return each count-th of the epochs, and the last."""
    return {*range(count, epochs + 1, count), epochs}


def run_epochs(
    trainer: Trainer,
    epochs: range,
    *,
    evaluate: Callable[[int], Mapping[str, float]],
    evaluated: Container[int],
    save: Callable[[int], None],
    saved: Container[int],
    saves_first: bool = False,
) -> None:
    """Train epochs, and after each evaluate, log and save.

    Args:
        trainer: trains them.
        epochs: those that are left.
        evaluate: returns figures of an epoch, in all but the first process none.
        evaluated: after which epochs.
        save: writes the state at an epoch's end; a collective.
        saved: after which epochs.
        saves_first: before the evaluation, which may take long or fail. Not for a task whose
            evaluation is part of the state.
    """
    for epoch in epochs:
        figures = trainer.train_epoch(epoch)
        if saves_first and epoch in saved:
            save(epoch)
        if epoch in evaluated:
            figures |= evaluate(epoch)
        trainer.write(epoch, figures)
        if not saves_first and epoch in saved:
            save(epoch)
