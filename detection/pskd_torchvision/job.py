"""From the command line to the parts of a run: all that can be refused is refused here."""

from __future__ import annotations

import argparse
import logging
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from pskd_detection import DetectionDataset, load_dataset
from torch import nn

from pskd.distributed import World
from pskd_tools.checkpoint import check_is_new
from pskd_tools.images import check_images
from pskd_tools.log import MetricsLog
from pskd_torchvision import checkpoint
from pskd_torchvision.build import build_detector, has_masks, load_weights
from pskd_torchvision.data import DetectionImages, read_image
from pskd_torchvision.epoch import PSKDEpochs
from pskd_torchvision.options import check, recorded
from pskd_torchvision.roi_heads import add_pskd
from pskd_torchvision.training import LearningRate, Trainer

__all__ = ["Job", "build_trainer", "prepare"]

logger = logging.getLogger(__name__)


@dataclass
class Job:
    """What a run works on.

    Attributes:
        args: the command line.
        world: the processes.
        class_names: of the training set.
        train: the training set; None if nothing is trained.
        test: the test set's images; None if nothing is evaluated.
        model: with PS-KD and its weights, on the device.
        recorded: the options that a checkpoint keeps.
        saved: the checkpoint that the run goes on from, if any.
        path: of the checkpoint.
    """

    args: argparse.Namespace
    world: World
    class_names: tuple[str, ...]
    train: DetectionDataset | None
    test: DetectionImages | None
    model: nn.Module
    recorded: dict[str, object]
    saved: dict | None
    path: Path


def prepare(args: argparse.Namespace, world: World) -> Job:
    """Read the data sets and the checkpoint or weights, and build the model.

    Raises:
        ValueError: for anything that could not be trained on or evaluated, naming what was
            expected and what came.
    """
    check(args)
    path = Path(args.output_dir) / checkpoint.NAME
    if not args.test_only:
        check_is_new(path, resume=args.resume, overwrite=args.overwrite)
    saved = _saved(args, path)
    read = partial(load_dataset, strict=args.strict_data)
    train = read(args.train) if args.train else None
    class_names = train.class_names if train else tuple(saved["class_names"] if saved else ())
    if not class_names:
        raise ValueError("--train: expected a training set, which tells the classes, got none")
    test = DetectionImages(read(args.test, class_names)) if args.test else None
    if args.check_images:
        sets = [None if args.test_only else train, test.dataset if test else None]
        every = [(own, image) for own in sets if own for image in own.coco["images"]]
        logger.info("--check-images: read %d images", check_images(every, read_image, args.workers))
    options = recorded(args, world, train)
    model = _model(args, len(class_names))
    if saved is not None:
        checkpoint.load_model(path, saved, model, options, class_names)
    elif args.weights:
        random = load_weights(model, args.weights)
        if args.test_only and random:
            raise ValueError(
                f"--weights: expected all weights of a detector of {len(class_names)} classes to "
                f"evaluate, got a file that lacks {len(random)} of them: {random[0]}, ..."
            )
        logger.info("%s: loaded; random values stay in %d tensors", args.weights, len(random))
    model.to(world.device)
    return Job(args, world, class_names, train, test, model, options, saved, path)


def _saved(args: argparse.Namespace, path: Path) -> dict | None:
    if not args.resume:
        return None
    if path.exists():
        return checkpoint.read(path)
    if args.test_only and not args.weights:
        raise ValueError(f"--resume: expected a checkpoint to evaluate, got no {path}")
    logger.info("--resume: no %s, so from the start", path)
    return None


def _model(args: argparse.Namespace, num_classes: int) -> nn.Module:
    torch.manual_seed(args.seed)  # the same weights in every process
    model = build_detector(
        args.model,
        num_classes,
        min_size=args.min_size,
        max_size=args.max_size,
        anchor_sizes=args.anchor_sizes,
        rois_per_image=args.rois_per_image,
        frozen_bn=args.frozen_bn,
    )
    return add_pskd(
        model,
        foreground_only=args.pskd_foreground_only,
        label_smoothing=args.pskd_label_smoothing,
    )


def build_trainer(job: Job) -> tuple[Trainer, int]:
    """Return the trainer, and the number of epochs that lie behind it.

    Raises:
        ValueError: for a training set without the masks that the model learns, or a checkpoint of
            another training.
    """
    args, world = job.args, job.world
    assert job.train is not None
    masks = has_masks(args.model)
    images = DetectionImages(job.train, hflip=args.hflip, masks=masks, seed=args.seed)
    done = job.saved["epoch"] if job.saved else 0
    if done > args.epochs:
        raise ValueError(f"--epochs: expected at least {done}, as in {job.path}, got {args.epochs}")
    epochs = PSKDEpochs(
        job.model,
        num_epochs=args.epochs,
        alpha_final=args.pskd_alpha_final,
        alpha_schedule=args.pskd_alpha_schedule,
        allow_schedule_change=args.pskd_allow_schedule_change,
    )
    trainer = Trainer(
        job.model,
        images,
        _optimizer(args, job.model),
        epochs,
        learning_rate=LearningRate(args.lr, args.warmup_iters, args.lr_steps, args.lr_gamma),
        world=world,
        batch_size=args.batch_size,
        workers=args.workers,
        amp=args.amp,
        seed=args.seed,
        print_freq=args.print_freq,
    )
    if job.saved is not None:
        checkpoint.load_training(job.path, job.saved, trainer, job.recorded)
        logger.info("%s: goes on after epoch %d of %d", job.path, done, args.epochs)
    if world.is_first:
        trainer.log = MetricsLog(args.output_dir, done)
    return trainer, done


def _optimizer(args: argparse.Namespace, model: nn.Module) -> torch.optim.Optimizer:
    weights = [p for p in model.parameters() if p.requires_grad]
    if args.opt == "adamw":
        return torch.optim.AdamW(weights, lr=args.lr, weight_decay=args.weight_decay)
    return torch.optim.SGD(
        weights, lr=args.lr, momentum=args.momentum, weight_decay=args.weight_decay
    )
