"""The training loop: batches of a data set, the loss of an objective, a scheduler's rate."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from pskd import WithRows
from pskd.distributed import World, take_buffers_of_first_process
from pskd.stats import Means
from pskd_classification.data import Images
from pskd_classification.objective import Objective
from pskd_classification.on_device import DeviceImages, DeviceLoader
from pskd_tools import training

__all__ = ["Trainer"]

CHECK_EVERY = 1000  # iterations, on a GPU: to look at a loss is to wait for the device


class Trainer(training.Trainer):
    """Trains a classifier, in one process or several.

    Args:
        model: bare and on the device.
        images: the training set, read by a DataLoader or on the device.
        objective: the loss; its criterion is told when an epoch begins.
        optimizer, scheduler: the scheduler makes a step an epoch.
        world: the processes; each takes ``batch_size`` images an iteration.
        batch_size: images of an iteration and process.
        workers: that read images, a process.
        compiled: run the model through torch.compile. A smaller last batch runs without, so that
            it is compiled for one shape.
        compile_mode: torch.compile's; None for its default.
        channels_last: the memory format of images and weights.
        options: of `pskd_tools.training.Trainer`: ``amp`` and ``seed``.
    """

    def __init__(
        self,
        model: nn.Module,
        images: Images | DeviceImages,
        objective: Objective,
        optimizer: torch.optim.Optimizer,
        scheduler: torch.optim.lr_scheduler.LRScheduler,
        *,
        world: World,
        batch_size: int = 128,
        workers: int = 0,
        compiled: bool = False,
        compile_mode: str | None = None,
        channels_last: bool = False,
        **options: Any,
    ) -> None:
        self._format = torch.channels_last if channels_last else torch.contiguous_format
        model.to(memory_format=self._format)
        super().__init__(model, images, optimizer, world=world, **options)
        self.objective, self.scheduler = objective, scheduler
        self._compiled: Any = self.network
        if compiled:
            self._compiled = torch.compile(self.network, mode=compile_mode)
        self._batch_size, self._generator = batch_size, torch.Generator()
        batches: dict[str, Any] = {
            "batch_size": batch_size,
            "sampler": self.sampler,
            # A last batch of one image has no variance for batch norm.
            "drop_last": len(self.sampler) % batch_size == 1 and len(self.sampler) > 1,
            "generator": self._generator,
        }
        self._loader: DataLoader | DeviceLoader
        if isinstance(images, DeviceImages):
            self._loader = DeviceLoader(images, **batches)
        else:
            pinned = world.device.type == "cuda"
            self._loader = DataLoader(
                WithRows(images), num_workers=workers, pin_memory=pinned, **batches
            )
        self._means = Means()

    @property
    def iterations(self) -> int:
        """Of an epoch."""
        return len(self._loader)

    def train_epoch(self, epoch: int) -> dict[str, float]:
        """Train one epoch, counted from 1; afterwards all processes have the same model.

        Returns:
            The means of the epoch, for a log; a collective.

        Raises:
            FloatingPointError: if a loss is not finite.
        """
        self.begin_epoch(epoch)
        # From this the workers' seeds are drawn, or crops and flips on the device.
        self._generator.manual_seed(int(torch.randint(2**62, (), dtype=torch.int64, device="cpu")))
        self.objective.criterion.begin_epoch(epoch)
        rate = self.optimizer.param_groups[0]["lr"]
        self._compiled.train()
        start = time.perf_counter()
        hidden = None if self.world.is_first else True  # None: hidden where there is no terminal
        bar = tqdm(self._loader, desc=f"epoch {epoch}", leave=False, disable=hidden)
        for i, (rows, images, target) in enumerate(bar):
            loss = self._step(rows, images, target)
            self._means.add("train/loss", loss * len(target), float(len(target)))
            if self.world.device.type == "cpu" or (i + 1) % CHECK_EVERY == 0:
                _check_finite(loss, epoch, i + 1)
        take_buffers_of_first_process(self.model)
        means = self._means.take()
        seconds = time.perf_counter() - start
        _check_finite(means["train/loss"], epoch, self.iterations)
        self.scheduler.step()
        told = self.objective.criterion.take_means()
        return {"lr": rate, "seconds": seconds} | means | told

    def _step(self, rows: Tensor, images: Tensor, target: Tensor) -> Tensor:
        device = self.world.device
        images = images.to(device, non_blocking=True, memory_format=self._format)
        rows, target = rows.to(device, non_blocking=True), target.to(device, non_blocking=True)
        model = self._compiled if len(target) == self._batch_size else self.network
        with self.autocast():
            loss = self.objective(model, rows, images, target)
        self.step(loss)
        return loss.detach()

    def state_dict(self) -> dict[str, Any]:
        """Return what goes on beside the model and the criterion."""
        return super().state_dict() | {"scheduler": self.scheduler.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict`; the rate is the scheduler's."""
        super().load_state_dict(state)
        self.scheduler.load_state_dict(state["scheduler"])
        rates = self.scheduler.get_last_lr()
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate


def _check_finite(loss: Tensor | float, epoch: int, iteration: int) -> None:
    value = float(loss)
    if not math.isfinite(value):
        raise FloatingPointError(
            f"epoch {epoch}, iteration {iteration}: expected a finite loss, got {value} (often "
            "--lr is too high)"
        )
