"""The training loop: an epoch follows from the state at its start, the seed and its number alone.

That is what makes a resumed run equal to one that was not stopped: all random states are set anew
at each epoch's start, and checkpoints are written at its end.
"""

from __future__ import annotations

import logging
import math
import time
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler
from tqdm import tqdm

from pskd import WithRows
from pskd.distributed import World, take_buffers_of_first_process
from pskd.stats import Means
from pskd_classification.data import Images
from pskd_classification.objective import Objective
from pskd_classification.on_device import DeviceImages, DeviceLoader
from pskd_classification.precision import amp_dtype, autocast
from pskd_tools.seeding import seed_epoch

__all__ = ["Trainer"]

logger = logging.getLogger(__name__)

CHECK_EVERY = 1000  # iterations, on a GPU: to look at a loss is to wait for the device


class Trainer:
    """Trains a classifier, in one process or several.

    Args:
        model: bare and on the device.
        images: the training set, read by a DataLoader or on the device.
        objective: the loss; its criterion is told when an epoch begins.
        optimizer, scheduler: the scheduler makes a step an epoch.
        world: the processes; each takes ``batch_size`` images an iteration.
        batch_size: images of an iteration and process.
        workers: that read images, a process.
        amp: mixed precision, as of `pskd_classification.precision`; float16 with a loss scale.
        compiled: run the model through torch.compile. A smaller last batch runs without, so that
            it is compiled for one shape.
        compile_mode: torch.compile's; None for its default.
        channels_last: the memory format of images and weights.
        clip_grad_norm: the largest norm of the gradient; None for any.
        seed: of the order of images and of all sampling.
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
        amp: bool | str = False,
        compiled: bool = False,
        compile_mode: str | None = None,
        channels_last: bool = False,
        clip_grad_norm: float | None = None,
        seed: int = 0,
    ) -> None:
        self.model, self.objective = model, objective
        self.optimizer, self.scheduler = optimizer, scheduler
        self._world, self._amp, self._seed = world, amp, seed
        self._clip_grad_norm = clip_grad_norm
        on_gpu = world.device.type == "cuda"
        is_half = amp_dtype(amp, world.device) is torch.float16
        self.scaler = torch.amp.GradScaler(world.device.type, enabled=is_half)
        self._format = torch.channels_last if channels_last else torch.contiguous_format
        model.to(memory_format=self._format)
        self._network: nn.Module = model
        if world.size > 1:
            devices = [world.device] if on_gpu else None
            self._network = DistributedDataParallel(model, device_ids=devices)
        self._compiled = self._network
        if compiled:
            options: dict[str, Any] = {"mode": compile_mode} if compile_mode else {}
            compiled_model = torch.compile(self._network, **options)
            assert isinstance(compiled_model, nn.Module)  # of one, though not by its types
            self._compiled = compiled_model
        self._sampler: DistributedSampler[int] = DistributedSampler(
            images,  # type: ignore[arg-type]  # only its length is asked
            world.size,
            world.rank,
            seed=seed,
        )
        self._batch_size, self._generator = batch_size, torch.Generator()
        batches: dict[str, Any] = {
            "batch_size": batch_size,
            "sampler": self._sampler,
            # A last batch of one image has no variance for batch norm.
            "drop_last": len(self._sampler) % batch_size == 1 and len(self._sampler) > 1,
            "generator": self._generator,
        }
        self._loader: DataLoader | DeviceLoader
        if isinstance(images, DeviceImages):
            self._loader = DeviceLoader(images, **batches)
        else:
            self._loader = DataLoader(
                WithRows(images), num_workers=workers, pin_memory=on_gpu, **batches
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
        seed_epoch(self._seed, epoch, self._world.rank)
        # From this the workers' seeds are drawn, or crops and flips on the device.
        self._generator.manual_seed(int(torch.randint(2**62, (), dtype=torch.int64, device="cpu")))
        self._sampler.set_epoch(epoch)
        self.objective.criterion.begin_epoch(epoch)
        rate = self.optimizer.param_groups[0]["lr"]
        self._compiled.train()
        start = time.perf_counter()
        hidden = None if self._world.is_first else True  # None: hidden where there is no terminal
        bar = tqdm(self._loader, desc=f"epoch {epoch}", leave=False, disable=hidden)
        for i, (rows, images, target) in enumerate(bar):
            loss = self._step(rows, images, target)
            self._means.add("train/loss", loss * len(target), float(len(target)))
            if self._world.device.type == "cpu" or (i + 1) % CHECK_EVERY == 0:
                _check_finite(loss, epoch, i + 1)
        take_buffers_of_first_process(self.model)
        means = self._means.take()
        seconds = time.perf_counter() - start
        _check_finite(means["train/loss"], epoch, self.iterations)
        self.scheduler.step()
        told = self.objective.criterion.take_means()
        return {"lr": rate, "seconds": seconds} | means | told

    def _step(self, rows: Tensor, images: Tensor, target: Tensor) -> Tensor:
        device = self._world.device
        images = images.to(device, non_blocking=True, memory_format=self._format)
        rows, target = rows.to(device, non_blocking=True), target.to(device, non_blocking=True)
        model = self._compiled if len(target) == self._batch_size else self._network
        self.optimizer.zero_grad()
        with autocast(self._amp, device):
            loss = self.objective(model, rows, images, target)
        self.scaler.scale(loss).backward()
        if self._clip_grad_norm is not None:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters(), self._clip_grad_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return loss.detach()


def _check_finite(loss: Tensor | float, epoch: int, iteration: int) -> None:
    value = float(loss)
    if not math.isfinite(value):
        raise FloatingPointError(
            f"epoch {epoch}, iteration {iteration}: expected a finite loss, got {value} (often "
            "--lr is too high)"
        )
