"""From the command line to the parts of a run: all that can be refused is refused here."""

from __future__ import annotations

import argparse
import logging
from dataclasses import dataclass
from functools import partial

import torch
from pskd_detection import DetectionDataset, load_dataset
from torch import nn

from pskd.distributed import World
from pskd_tools.images import check_images
from pskd_tools.job import Job, checkpoint_path, find_saved
from pskd_tools.training import build_optimizer
from pskd_torchvision.build import build_detector, has_masks, load_weights
from pskd_torchvision.data import DetectionImages, read_image
from pskd_torchvision.epoch import PSKDEpochs
from pskd_torchvision.options import check, recorded
from pskd_torchvision.roi_heads import add_pskd
from pskd_torchvision.training import LearningRate, Trainer

logger = logging.getLogger(__name__)

#: Options that shape the weights.
MODEL_OPTIONS = ("model", "frozen_bn")


@dataclass
class DetectorJob(Job):
    """What a run works on; the model has PS-KD.

    Attributes:
        train: the training set; None if nothing is trained.
        test: the test set's images; None if nothing is evaluated.
    """

    train: DetectionDataset | None
    test: DetectionImages | None


def prepare(args: argparse.Namespace, world: World) -> DetectorJob:
    """Read the data sets and the checkpoint or weights, and build the model.

    Raises:
        ValueError: for anything that could not be trained on or evaluated, naming what was
            expected and what came.
    """
    check(args)
    saved = find_saved(args, {"pskd"})
    if args.test_only and saved is None and not args.weights:
        raise ValueError(
            f"--resume: expected a checkpoint to evaluate, got no {checkpoint_path(args)}"
        )
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
    model, options = _model(args, len(class_names)), recorded(args, world, train)
    job = DetectorJob(args, world, model, class_names, options, saved, train, test)
    job.load_model(MODEL_OPTIONS)
    if args.weights and saved is None:
        random = load_weights(model, args.weights)
        if args.test_only and random:
            raise ValueError(
                f"--weights: expected all weights of a detector of {len(class_names)} classes to "
                f"evaluate, got a file that lacks {len(random)} of them: {random[0]}, ..."
            )
        logger.info("%s: loaded; random values stay in %d tensors", args.weights, len(random))
    model.to(world.device)
    return job


def _model(args: argparse.Namespace, num_classes: int) -> nn.Module:
    torch.manual_seed(args.seed)  # the same weights in every process
    model = build_detector(
        args.model,
        num_classes,
        min_size=args.min_size,
        max_size=args.max_size,
        frozen_bn=args.frozen_bn,
    )
    return add_pskd(
        model,
        foreground_only=args.pskd_foreground_only,
        label_smoothing=args.pskd_label_smoothing,
    )


def build_trainer(job: DetectorJob) -> Trainer:
    """Return the trainer of a job, at its beginning."""
    args = job.args
    assert job.train is not None
    images = DetectionImages(
        job.train, hflip=args.hflip, masks=has_masks(args.model), seed=args.seed
    )
    epochs = PSKDEpochs(
        job.model,
        num_epochs=args.epochs,
        alpha_final=args.pskd_alpha_final,
        alpha_schedule=args.pskd_alpha_schedule,
        teacher=args.pskd_teacher,
        allow_schedule_change=args.pskd_allow_schedule_change,
    )
    return Trainer(
        job.model,
        images,
        build_optimizer(args, job.model),
        epochs,
        learning_rate=LearningRate(args.lr, args.warmup_iters, args.lr_steps, args.lr_gamma),
        world=job.world,
        batch_size=args.batch_size,
        workers=args.workers,
        amp=args.amp,
        seed=args.seed,
        print_freq=args.print_freq,
    )
