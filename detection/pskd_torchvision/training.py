"""The training loop: batches of images, a learning rate by iterations, and a log of their losses.

The learning rate is a function of progress, so that there is no schedule to resume.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN

from pskd.distributed import World, take_buffers_of_first_process
from pskd.stats import Means
from pskd_tools import training
from pskd_torchvision.data import DetectionImages, collate
from pskd_torchvision.epoch import PSKDEpochs

WARMUP_START = 1e-3  # of the learning rate, as in torchvision's reference


@dataclass(frozen=True)
class LearningRate:
    """Linear warm-up within the first epoch, then a factor at some epochs' ends.

    Attributes:
        base: the learning rate after the warm-up.
        warmup_iters: iterations of the warm-up; it ends with the first epoch at the latest.
        steps: after how many epochs the rate is multiplied by ``gamma``.
        gamma: the factor.

    Source: torchvision's references/detection/train.py (LinearLR and MultiStepLR).
    """

    base: float
    warmup_iters: int = 0
    steps: Sequence[int] = ()
    gamma: float = 0.1

    def at(self, epoch: int, iteration: int, epoch_iters: int) -> float:
        """Return the rate of an iteration, counted from 0 in its epoch, which counts from 1."""
        rate = self.base * self.gamma ** sum(step < epoch for step in self.steps)
        warmup = min(self.warmup_iters, epoch_iters - 1)
        if epoch > 1 or iteration >= warmup:
            return rate
        return rate * (WARMUP_START + (1.0 - WARMUP_START) * iteration / warmup)


class Trainer(training.Trainer):
    """Trains a detector with PS-KD, in one process or several.

    Args:
        model: bare and on the device; has gone through `add_pskd`.
        images: the training set.
        optimizer: of the model's parameters.
        epochs: alpha and the teacher.
        learning_rate: of all parameters.
        world: the processes; each takes ``batch_size`` images an iteration.
        batch_size: images of an iteration and process.
        workers: that read images, a process.
        amp: mixed precision: float16 with a loss scale on a GPU, bfloat16 on a CPU.
        seed: of the order of images and of all sampling.
        print_freq: in iterations; how often losses are logged.
    """

    def __init__(
        self,
        model: nn.Module,
        images: DetectionImages,
        optimizer: torch.optim.Optimizer,
        epochs: PSKDEpochs,
        *,
        learning_rate: LearningRate,
        world: World,
        batch_size: int = 2,
        workers: int = 0,
        amp: bool = False,
        seed: int = 0,
        print_freq: int = 20,
    ) -> None:
        if amp:
            _keep_boxes_in_float32(model)
        super().__init__(model, images, optimizer, world=world, amp=amp, seed=seed)
        self.epochs = epochs
        self._images, self._learning_rate, self._print_freq = images, learning_rate, print_freq
        self._loader = DataLoader(
            images,
            batch_size=batch_size,
            sampler=self.sampler,
            num_workers=workers,
            collate_fn=collate,
            pin_memory=world.device.type == "cuda",
            generator=torch.Generator(),  # the seeds of workers do not come from the global one
        )
        self._losses = Means()
        self._seconds: list[float] = []

    @property
    def iterations(self) -> int:
        """Of an epoch."""
        return len(self._loader)

    def train_epoch(self, epoch: int) -> dict[str, float]:
        """Train one epoch, counted from 1, and log its losses; return no figures beside them.

        Raises:
            FloatingPointError: if a loss is not finite.
            ValueError: for an image that cannot be read.
        """
        self.begin_epoch(epoch)
        self._images.set_epoch(epoch)
        self.epochs.begin_epoch(epoch)
        self.network.train()
        start = time.perf_counter()
        for i, (images, targets) in enumerate(self._loader):
            rate = self._learning_rate.at(epoch, i, len(self._loader))
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            losses = self._step(images, targets)
            now = time.perf_counter()
            self._seconds.append(now - start)
            start = now
            self._report(epoch, i + 1, losses, rate)
        take_buffers_of_first_process(self.model)
        return {}

    def _step(self, images: list[Tensor], targets: list[dict]) -> dict[str, Tensor]:
        """Make one step; return the losses that it was made on."""
        device = self.world.device
        images = [image.to(device, non_blocking=True) for image in images]
        targets = [{k: v.to(device, non_blocking=True) for k, v in t.items()} for t in targets]
        with self.autocast():
            losses = self.network(images, targets)
            loss = sum(losses.values())
        self.step(loss)
        return {"total_loss": loss} | losses

    def _report(self, epoch: int, done: int, losses: dict[str, Tensor], rate: float) -> None:
        for name, value in losses.items():
            self._losses.add(name, value)
        total = len(self._loader)
        iteration = (epoch - 1) * total + done - 1  # from 0, as Detectron2 counts
        if self.world.device.type == "cpu":  # elsewhere to look at a loss would be to wait for it
            _check_finite({k: v.item() for k, v in losses.items()}, iteration, 1)
        if done % self._print_freq and done != total:
            return
        means = self._losses.take()
        _check_finite(means, iteration, (done - 1) % self._print_freq + 1)
        means |= self.epochs.take_means()
        seconds = median(self._seconds[-self._print_freq :])
        values = {"epoch": epoch, "iteration": iteration, "lr": rate} | means
        self.log.write(values | {"seconds_per_iteration": seconds})

    def seconds_per_iteration(self) -> float | None:
        """Return the median over the iterations of this run; None if there were none."""
        return median(self._seconds) if self._seconds else None


def _check_finite(losses: dict[str, float], iteration: int, count: int) -> None:
    bad = [f"{name} {value}" for name, value in losses.items() if not math.isfinite(value)]
    if bad:
        first = f"{iteration - count + 1} to " if count > 1 else ""
        raise FloatingPointError(
            f"iteration {first}{iteration}: expected finite losses, got {', '.join(bad)} (often "
            "--lr is too high)"
        )


def _keep_boxes_in_float32(model: GeneralizedRCNN) -> None:
    """Keep what boxes are computed from out of half precision.

    torchvision adds deltas to boxes in the precision of the deltas. A coordinate of 100 pixels in
    bfloat16 is off by up to a quarter of one, of 1000 by up to two.
    """
    model.rpn.head.register_forward_hook(_as_float32)
    model.roi_heads.box_predictor.register_forward_hook(_as_float32)


def _as_float32(_module: nn.Module, _args: tuple, output: tuple) -> tuple:
    return tuple(
        value.float() if isinstance(value, Tensor) else [level.float() for level in value]
        for value in output
    )
