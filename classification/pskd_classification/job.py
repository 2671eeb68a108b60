"""From the command line to the parts of a run: all that can be refused is refused here."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import lr_scheduler

from pskd import ExampleStats, MemoryCriterion, SnapshotCriterion
from pskd.distributed import World
from pskd_classification.data import Images, Splits, load_splits
from pskd_classification.evaluation import predict
from pskd_classification.label_noise import LabelNoise
from pskd_classification.mixing import Mixer
from pskd_classification.models import build_model
from pskd_classification.objective import Objective, VirtualTeacher
from pskd_classification.on_device import DeviceImages, place
from pskd_classification.options import check, recorded
from pskd_classification.training import Trainer
from pskd_classification.transforms import stats_of
from pskd_tools import checkpoint
from pskd_tools.images import check_images

__all__ = [
    "BEST",
    "LAST",
    "Data",
    "Job",
    "build_trainer",
    "keep_best",
    "predict_part",
    "prepare",
    "read_data",
    "save",
]

logger = logging.getLogger(__name__)

LAST, BEST = "checkpoint.pth", "best.pth"
KEYS = {"model", "optimizer", "scheduler", "scaler", "criterion", "epoch", "best", "options"}
#: Options that shape the weights or the data; others may change, which is said in the log.
FIXED = (
    "model", "num_classes", "train_per_class", "label_noise", "label_noise_seed", "samples",
    "fingerprint", "mean", "std", "opt", "epochs", "lr", "lr_schedule", "lr_steps", "lr_gamma",
    "lr_warmup_epochs",
)  # fmt: skip


@dataclass
class Job:
    """What a run works on.

    Attributes:
        args: the command line.
        world: the processes.
        splits: the data.
        images: ``train``, ``validation`` and ``test``, as far as there are any, as they are read.
        model: on the device.
        options: that a checkpoint keeps.
        epoch: after which the weights are; 0 for random ones.
        best: the epoch and error of the best checkpoint so far; None if there is none.
    """

    args: argparse.Namespace
    world: World
    splits: Splits
    images: Mapping[str, Images | DeviceImages]
    model: nn.Module
    options: dict[str, object]
    epoch: int = 0
    best: dict | None = None

    @property
    def folder(self) -> Path:
        """Where the run writes."""
        return Path(self.args.output_dir)


class Data(NamedTuple):
    """A data set, and its images as they are read."""

    splits: Splits
    images: Mapping[str, Images | DeviceImages]


def read_data(args: argparse.Namespace, world: World) -> Data:
    """Read the data set, of small images onto the device.

    Raises:
        ValueError: as `prepare`.
    """
    splits = load_splits(
        args.dataset,
        args.data_dir,
        val_fraction=args.val_fraction,
        split_seed=args.split_seed,
        augment=args.augment,
        image_size=args.image_size,
        hflip=args.hflip,
        mean=args.mean,
        std=args.std,
        download=args.download,
        num_classes=args.num_classes,
        train_per_class=args.train_per_class,
        label_noise=LabelNoise.parse(args.label_noise, args.label_noise_seed),
    )
    parts = {"validation": splits.validation, "test": splits.test}
    if not args.test_only:
        parts["train"] = splits.train
    images = {part: own for part, own in parts.items() if own is not None}
    if args.check_images:
        every = [(own, row) for own in images.values() for row in range(len(own))]
        count = check_images(every, Images.picture, args.workers)
        logger.info("--check-images: read %d images", count)
    resize = args.image_size is not None
    placed = place(images, splits.view, world.device, wanted=_on_device(args), resize=resize)
    return Data(splits, images if placed is None else placed)


def _on_device(args: argparse.Namespace) -> bool | None:
    """Return whether images are wanted on the device; a run that is resumed goes on as it began."""
    last = Path(args.output_dir) / LAST
    if args.data_on_device is None and args.resume and last.exists():
        options = checkpoint.read_checkpoint(last, KEYS)["options"]
        with checkpoint.naming(last):
            return options.get("data_on_device", False)  # there was no choice once
    return args.data_on_device


def prepare(args: argparse.Namespace, world: World, data: Data | None = None) -> Job:
    """Read the data set, if it is not there yet, and build the model.

    Raises:
        ValueError: for anything that could not be trained on or evaluated, naming what was
            expected and what came.
    """
    check(args)
    if not args.test_only:
        last = Path(args.output_dir) / LAST
        checkpoint.check_is_new(last, resume=args.resume, overwrite=args.overwrite)
    splits, images = data or read_data(args, world)
    torch.manual_seed(args.seed)  # the same weights in every process
    model = build_model(
        args.model,
        len(splits.class_names),
        dropout=args.dropout,
        stochastic_depth=args.stochastic_depth,
    ).to(world.device)
    options = recorded(args, world, splits)
    options["data_on_device"] = isinstance(images["test"], DeviceImages)
    job = Job(args, world, splits, images, model, options)
    if args.weights:
        path = Path(args.weights)
        content = checkpoint.read_checkpoint(path, {"model", "class_names", "epoch"})
        with checkpoint.naming(path):
            checkpoint.check_classes(path, content["class_names"], splits.class_names)
            checkpoint.load_weights(path, model, content["model"])
            saved = content.get("options", {})
            seen = {name: saved[name] for name in ("mean", "std") if name in saved}
            checkpoint.tell_changes(path, seen, job.options)
            job.epoch = int(content["epoch"])
    return job


def build_trainer(job: Job) -> tuple[Trainer, int]:
    """Return the trainer, and the number of epochs that lie behind it.

    Raises:
        ValueError: for a checkpoint of another training.
    """
    args = job.args
    optimizer = _optimizer(args, job.model)
    if job.world.device.type == "cuda":  # all batches but the last have one shape
        torch.backends.cudnn.benchmark = True
    trainer = Trainer(
        job.model,
        job.images["train"],
        _objective(job),
        optimizer,
        _scheduler(args, optimizer),
        world=job.world,
        batch_size=args.batch_size,
        workers=args.workers,
        amp=args.amp,
        compiled=args.compile,
        compile_mode=args.compile_mode,
        channels_last=args.channels_last,
        clip_grad_norm=args.clip_grad_norm,
        seed=args.seed,
    )
    path = job.folder / LAST
    if not args.resume:
        return trainer, 0
    if not path.exists():
        logger.info("--resume: no %s, so from the start", path)
        return trainer, 0
    return trainer, _load(job, trainer, path)


def _load(job: Job, trainer: Trainer, path: Path) -> int:
    content = checkpoint.read_checkpoint(path, KEYS)
    with checkpoint.naming(path):
        return _load_content(job, trainer, path, content)


def _load_content(job: Job, trainer: Trainer, path: Path, content: dict) -> int:
    mean, std = stats_of(job.args.dataset)
    before = {"mean": list(mean), "std": list(std)}  # what there was before it was an option
    checkpoint.check_same(path, before | content["options"], job.options, FIXED)
    checkpoint.check_classes(path, content["class_names"], job.splits.class_names)
    trainer.objective.criterion.load_state_dict(content["criterion"])
    checkpoint.load_weights(path, job.model, content["model"])
    checkpoint.load_optimizer(trainer.optimizer, content["optimizer"])
    trainer.scheduler.load_state_dict(content["scheduler"])
    for group, rate in zip(
        trainer.optimizer.param_groups, trainer.scheduler.get_last_lr(), strict=True
    ):
        group["lr"] = rate  # load_optimizer set that of the first epoch
    if content["scaler"]:  # empty without mixed precision
        trainer.scaler.load_state_dict(content["scaler"])
    job.best = content["best"]
    checkpoint.tell_changes(path, content["options"], job.options)
    logger.info("%s: goes on after epoch %d of %d", path, content["epoch"], job.args.epochs)
    return content["epoch"]


def predict_part(job: Job, part: str) -> tuple[Tensor, Tensor] | None:
    """Return `predict` of ``validation`` or ``test``; None where there is none; a collective."""
    if part not in job.images:
        return None
    args = job.args
    options = {"batch_size": args.batch_size, "workers": args.workers, "amp": args.amp}
    return predict(job.model, job.images[part], job.world, **options)


def keep_best(job: Job, epoch: int, error: float | None) -> None:
    """Save the weights if they are the best so far.

    Args:
        error: on the validation set; None without one, and in all but the first process.
    """
    if error is not None and (job.best is None or error < job.best["top1_error"]):
        job.best = {"epoch": epoch, "top1_error": error}
        checkpoint.write_checkpoint(job.folder / BEST, _weights(job, epoch))


def save(job: Job, trainer: Trainer, epoch: int) -> None:
    """Save the state at an epoch's end; a collective."""
    criterion = trainer.objective.criterion.state_dict()
    if not job.world.is_first:
        return
    content = _weights(job, epoch) | {
        "optimizer": trainer.optimizer.state_dict(),
        "scheduler": trainer.scheduler.state_dict(),
        "scaler": trainer.scaler.state_dict(),
        "criterion": criterion,
        "best": job.best,
    }
    checkpoint.write_checkpoint(job.folder / LAST, content)


def _weights(job: Job, epoch: int) -> dict[str, object]:
    return {
        "model": job.model.state_dict(),
        "class_names": list(job.splits.class_names),
        "options": job.options,
        "epoch": epoch,
    }


def _objective(job: Job) -> Objective:
    args, train = job.args, job.splits.train
    device = job.world.device
    examples = ExampleStats(len(train), device)
    common = {
        "num_epochs": args.epochs,
        "alpha_final": args.pskd_alpha_final,
        "alpha_schedule": args.pskd_alpha_schedule,
        "label_smoothing": args.label_smoothing,
        "examples": examples,
    }
    criterion: MemoryCriterion | SnapshotCriterion
    if args.pskd_teacher == "snapshot":
        criterion = SnapshotCriterion(job.model, **common)
    else:
        criterion = MemoryCriterion(
            len(train),
            len(job.splits.class_names),
            top_k=args.pskd_top_k,
            momentum=args.pskd_momentum,
            fingerprint=job.splits.fingerprint,
            device=device,
            **common,
        )
    virtual = None
    if args.tf_kd_alpha:
        virtual = VirtualTeacher(
            len(job.splits.class_names),
            args.tf_kd_alpha,
            correct=args.tf_kd_correct,
            temperature=args.tf_kd_temperature,
        )
    return Objective(criterion, Mixer(args.cutmix_alpha, args.mixup_alpha, args.mix_prob), virtual)


def _optimizer(args: argparse.Namespace, model: nn.Module) -> torch.optim.Optimizer:
    parameters = list(model.parameters())
    # One kernel for all weights, which with float16's loss scale does not wait for the device.
    fused = True if parameters[0].device.type == "cuda" else None
    if args.opt == "adamw":
        return torch.optim.AdamW(parameters, args.lr, weight_decay=args.weight_decay, fused=fused)
    return torch.optim.SGD(
        parameters,
        args.lr,
        momentum=args.momentum,
        weight_decay=args.weight_decay,
        nesterov=args.momentum > 0,
        fused=fused,
    )


def _scheduler(
    args: argparse.Namespace, optimizer: torch.optim.Optimizer
) -> lr_scheduler.LRScheduler:
    warmup = args.lr_warmup_epochs
    main: lr_scheduler.LRScheduler
    if args.lr_schedule == "cosine":
        main = lr_scheduler.CosineAnnealingLR(optimizer, max(1, args.epochs - warmup))
    else:
        steps = [step - warmup for step in args.lr_steps]
        main = lr_scheduler.MultiStepLR(optimizer, steps, args.lr_gamma)
    if not warmup:
        return main
    ramp = lr_scheduler.LinearLR(optimizer, 1.0 / (warmup + 1), total_iters=warmup)
    return lr_scheduler.SequentialLR(optimizer, [ramp, main], [warmup])
