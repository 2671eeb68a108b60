"""A tiny module and its data, and what two processes of DDP do."""

from __future__ import annotations

from pathlib import Path

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy
from pskd_lightning import PSKDCallback
from torch import nn
from torch.utils.data import DataLoader, Sampler, TensorDataset

import pskd

M, C, BATCH, EPOCHS = 22, 5, 6, 4
_made = torch.Generator().manual_seed(0)
DATA = TensorDataset(torch.randn(M, 3, generator=_made), torch.randint(C, (M,), generator=_made))


class Shuffled(Sampler):
    """An order of its own in each epoch, also after a resume."""

    def __init__(self) -> None:
        self.epoch = 0

    def __len__(self) -> int:
        return M

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self):
        order = torch.Generator().manual_seed(self.epoch)
        return iter(torch.randperm(M, generator=order).tolist())


def net(dropout: float = 0.2) -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Linear(3, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(dropout), nn.Linear(8, C)
    )


class Module(LightningModule):
    """What a user has, with its losses recorded."""

    def __init__(self, *, snapshot: bool = False) -> None:
        super().__init__()
        self.net, self.snapshot = net(), snapshot
        self.losses: list[float] = []
        self.validated: list[float] = []
        self.told: list[dict[str, float]] = []

    def forward(self, inputs):
        return self.net(inputs)

    def training_step(self, batch, batch_idx):
        # Dropout of its own in each step, also after a resume.
        torch.manual_seed(1000 * self.current_epoch + batch_idx)
        if self.snapshot:
            inputs, target = batch
            loss = self.pskd(self(inputs), target, inputs)
        else:
            rows, inputs, target = batch
            loss = self.pskd(self(inputs), target, rows)
        self.losses.append(loss.item())
        return loss

    def validation_step(self, batch, batch_idx):
        inputs, target = batch
        self.validated.append(self.pskd(self(inputs), target).item())

    def on_train_epoch_end(self):
        told = self.trainer.callback_metrics.items()
        self.told.append({name: float(value) for name, value in told})

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.5, momentum=0.9)


def trainer(folder: Path, callback: PSKDCallback, *more, **options) -> Trainer:
    quiet = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary"), False)
    options = {"max_epochs": EPOCHS, "enable_checkpointing": bool(more)} | quiet | options
    return Trainer(
        accelerator="cpu", default_root_dir=folder, callbacks=[callback, *more], **options
    )


def train_in_two_processes(folder: Path) -> None:
    """Be one of two processes, as torchrun starts them."""
    torch.set_num_threads(1)
    module, callback = Module(), PSKDCallback(C, alpha_final=0.9)
    module.net = net(dropout=0.0)
    strategy = DDPStrategy(process_group_backend="gloo")
    run = trainer(folder, callback, strategy=strategy, devices=2)
    run.fit(module, DataLoader(pskd.WithRows(DATA), batch_size=4, shuffle=True))
    rows = callback.criterion.memory.read(torch.arange(M))
    run.save_checkpoint(folder / "checkpoint")
    left = {"weights": module.net.state_dict(), "rows": rows, "told": module.told}
    torch.save(left, folder / f"{run.global_rank}.pt")
