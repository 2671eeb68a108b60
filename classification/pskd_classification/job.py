"""From the command line to the parts of a run: all that can be refused is refused here."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.optim import lr_scheduler

from pskd import ExampleStats, MemoryCriterion, SnapshotCriterion
from pskd.distributed import World
from pskd.teachers import MODEL_TEACHERS
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
from pskd_tools.job import Job, checkpoint_path, find_saved
from pskd_tools.training import build_optimizer

__all__ = ["ClassifierJob", "Data", "build_trainer", "prepare", "read_data"]

logger = logging.getLogger(__name__)

#: Options that shape the weights or the data; others may change, which is said in the log.
FIXED = (
    "model", "num_classes", "train_per_class", "label_noise", "label_noise_seed", "samples",
    "fingerprint", "mean", "std", "opt", "epochs", "lr", "lr_schedule", "lr_steps", "lr_gamma",
)  # fmt: skip


class Data(NamedTuple):
    """A data set, and its images as they are read.

    Attributes:
        splits: the data.
        images: ``train``, ``validation`` and ``test``, as far as there are any.
    """

    splits: Splits
    images: Mapping[str, Images | DeviceImages]


@dataclass
class ClassifierJob(Job):
    """What a run works on.

    Attributes:
        data: the data set.
        epoch: after which the weights are; 0 for random ones.
        best: the epoch and error of the best checkpoint so far; None if there is none.
    """

    data: Data
    epoch: int = 0
    best: dict | None = None

    @property
    def best_path(self) -> Path:
        """Where the weights that are best on the validation set are written."""
        return self.folder / "best.pth"

    def predict(self, part: str) -> tuple[Tensor, Tensor] | None:
        """Return `predict` of ``validation`` or ``test``; None if there is none; a collective."""
        if part not in self.data.images:
            return None
        args = self.args
        options = {"batch_size": args.batch_size, "workers": args.workers, "amp": args.amp}
        return predict(self.model, self.data.images[part], self.world, **options)

    def keep_best(self, epoch: int, error: float) -> None:
        """Save the weights if their error on the validation set is the least so far."""
        if self.best is None or error < self.best["top1_error"]:
            self.best = {"epoch": epoch, "top1_error": error}
            checkpoint.write_archive(self.best_path, self.weights(epoch))


def read_data(args: argparse.Namespace, world: World, on_device: bool | None) -> Data:
    """Read the data set, and its images onto the device if they are wanted there or small."""
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
        samples = [(own, row) for own in images.values() for row in range(len(own))]
        count = check_images(samples, Images.picture, args.workers)
        logger.info("--check-images: read %d images", count)
    resize = args.image_size is not None
    placed = place(images, splits.view, world.device, wanted=on_device, resize=resize)
    return Data(splits, images if placed is None else placed)


def prepare(args: argparse.Namespace, world: World, data: Data | None = None) -> ClassifierJob:
    """Read the data set, if it is not there yet, and build the model.

    Raises:
        ValueError: for anything that could not be trained on or evaluated, naming what was
            expected and what came.
    """
    check(args)
    saved, on_device = find_saved(args, {"scheduler", "criterion", "best"}), args.data_on_device
    if saved is not None:
        with checkpoint.naming(checkpoint_path(args)):
            mean, std = stats_of(args.dataset)
            # What there was before these were options.
            before = {"mean": list(mean), "std": list(std), "data_on_device": False}
            saved["options"] = before | saved["options"]
            on_device = saved["options"]["data_on_device"] if on_device is None else on_device
    data = data or read_data(args, world, on_device)
    class_names = data.splits.class_names
    torch.manual_seed(args.seed)  # the same weights in every process
    model = build_model(args.model, len(class_names), dropout=args.dropout).to(world.device)
    options = recorded(args, world, data.splits)
    options["data_on_device"] = isinstance(data.images["test"], DeviceImages)
    job = ClassifierJob(args, world, model, class_names, options, saved, data)
    job.load_model(FIXED)
    if args.weights:
        _load_weights(job, Path(args.weights))
    return job


def _load_weights(job: ClassifierJob, path: Path) -> None:
    content = checkpoint.read_checkpoint(path, {"model", "class_names", "epoch"})
    with checkpoint.naming(path):
        checkpoint.check_classes(path, content["class_names"], job.class_names)
        checkpoint.load_weights(path, job.model, content["model"])
        saved = content.get("options", {})
        seen = {name: saved[name] for name in ("mean", "std") if name in saved}
        checkpoint.tell_changes(path, seen, job.options)
        job.epoch = int(content["epoch"])


def build_trainer(job: ClassifierJob) -> Trainer:
    """Return the trainer of a job, at its beginning.

    Raises:
        ValueError: for an option of PS-KD that does not fit the data.
    """
    args, device = job.args, job.world.device
    # One kernel for all weights, which with float16's loss scale does not wait for the device.
    fused = True if device.type == "cuda" else None
    optimizer = build_optimizer(args, job.model, nesterov=True, fused=fused)
    if device.type == "cuda":  # all batches but the last have one shape
        torch.backends.cudnn.benchmark = True
    return Trainer(
        job.model,
        job.data.images["train"],
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
        seed=args.seed,
    )


def _objective(job: ClassifierJob) -> Objective:
    args, splits, device = job.args, job.data.splits, job.world.device
    samples, classes = len(splits.train), len(job.class_names)
    common = {
        "num_epochs": args.epochs,
        "alpha_final": args.pskd_alpha_final,
        "alpha_schedule": args.pskd_alpha_schedule,
        "label_smoothing": args.label_smoothing,
        "examples": ExampleStats(samples, device),
    }
    criterion: MemoryCriterion | SnapshotCriterion
    if args.pskd_teacher in MODEL_TEACHERS:
        criterion = SnapshotCriterion(job.model, teacher=args.pskd_teacher, **common)
    else:
        criterion = MemoryCriterion(
            samples,
            classes,
            top_k=args.pskd_top_k,
            momentum=args.pskd_momentum,
            fingerprint=splits.fingerprint,
            device=device,
            **common,
        )
    virtual = VirtualTeacher(classes, args.tf_kd_alpha) if args.tf_kd_alpha else None
    return Objective(criterion, Mixer(args.cutmix_alpha, args.mixup_alpha, args.mix_prob), virtual)


def _scheduler(
    args: argparse.Namespace, optimizer: torch.optim.Optimizer
) -> lr_scheduler.LRScheduler:
    if args.lr_schedule == "cosine":
        return lr_scheduler.CosineAnnealingLR(optimizer, args.epochs)
    return lr_scheduler.MultiStepLR(optimizer, args.lr_steps, args.lr_gamma)
