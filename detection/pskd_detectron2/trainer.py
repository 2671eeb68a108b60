"""Detectron2's default trainer with PS-KD, a resume that resumes, and training on CPUs."""

from __future__ import annotations

import logging
import os
import weakref
from functools import partial
from unittest.mock import patch

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import build_detection_test_loader, build_detection_train_loader
from detectron2.engine import DefaultTrainer, create_ddp_model, defaults
from detectron2.engine.hooks import EvalHook
from detectron2.evaluation import DatasetEvaluators
from detectron2.modeling import GeneralizedRCNNWithTTA
from detectron2.utils.events import EventStorage
from pskd_detection.confidence import SCORE_THRESHOLD

from pskd_detectron2.config import check_pskd_config, class_count, warn_of_unused_keys
from pskd_detectron2.data import (
    ImageMapper,
    PSKDDatasetMapper,
    count_annotations,
    epoch_length,
    training_fingerprint,
    training_records,
)
from pskd_detectron2.evaluation import (
    ConfidenceEvaluator,
    build_evaluators,
    ground_truth_rois,
    scores_ground_truth,
)
from pskd_detectron2.hooks import PSKDHook
from pskd_detectron2.registered import (
    check_keypoints,
    check_sets,
    checked_source,
    evaluator_type,
    has_boxes,
)
from pskd_detectron2.resume import (
    AsideCheckpointer,
    RandomStateHook,
    ResumableTrainingSampler,
    same_random_state_after,
)

logger = logging.getLogger("detectron2." + __name__)


def ddp_options(device: torch.device | str) -> dict[str, None]:
    """Return what `create_ddp_model` needs for a model on the CPU: it has no device of a rank."""
    return {"device_ids": None} if torch.device(device).type == "cpu" else {}


class Trainer(DefaultTrainer):
    """`DefaultTrainer` for a config with `add_pskd_config`'s keys.

    The parts are the stock ones but for `PSKDHook`, a checkpointer that writes aside, the dataset
    mappers, and ``DATALOADER.SAMPLER_TRAIN: ResumableTrainingSampler``.

    Raises:
        ValueError: for a config, dataset or model that PS-KD cannot train, before the first
            iteration.
    """

    def __init__(self, cfg: CfgNode) -> None:
        check_config(cfg)
        warn_of_unused_keys(cfg)
        self._tta_results: dict = {}
        # `DefaultTrainer.__init__` has no method to override for it.
        ddp = partial(create_ddp_model, **ddp_options(cfg.MODEL.DEVICE))
        with patch.object(defaults, "create_ddp_model", ddp):
            super().__init__(cfg)

    @classmethod
    def build_model(cls, cfg: CfgNode):
        """As `DefaultTrainer`; a model that TEST.AUG cannot use is refused."""
        model = super().build_model(cfg)
        if cfg.TEST.AUG.ENABLED:
            try:
                GeneralizedRCNNWithTTA(cfg, model)
            except AssertionError as error:  # which else came after the training
                raise ValueError(f"TEST.AUG.ENABLED: {error}") from error
        return model

    @classmethod
    def build_train_loader(cls, cfg: CfgNode):
        """As `DefaultTrainer`, with the resumable sampler, `ImageMapper` and what the memory
        teacher needs.

        An override with a mapper of its own derives it, for that teacher, from `PSKDDatasetMapper`
        and numbers its annotations (`number_annotations`).
        """
        records, options = training_dicts(cfg), {}
        remembers = cfg.MODEL.PSKD.ENABLED and cfg.MODEL.PSKD.TEACHER == "memory"
        mapper = (PSKDDatasetMapper if remembers else ImageMapper)(cfg, is_train=True)
        if cfg.DATALOADER.SAMPLER_TRAIN == ResumableTrainingSampler.__name__:
            # Seeds for the workers from a generator of their own: the global one is then where
            # it was at the stop.
            sampler = ResumableTrainingSampler(len(records), seed=cfg.SEED)
            options = {"sampler": sampler, "seed": cfg.SEED}
        return build_detection_train_loader(cfg, dataset=records, mapper=mapper, **options)

    @classmethod
    def build_test_loader(cls, cfg: CfgNode, dataset_name: str):
        """As `DefaultTrainer`, with `ImageMapper`."""
        mapper = ImageMapper(cfg, is_train=False)
        return build_detection_test_loader(cfg, dataset_name, mapper=mapper)

    def build_hooks(self) -> list:
        """As `DefaultTrainer`, with PS-KD's first: it acts before a checkpoint is written."""
        cfg = self.cfg
        # There is no method that makes it; the hooks hold it from here on.
        self.checkpointer = AsideCheckpointer(
            self.model, cfg.OUTPUT_DIR, trainer=weakref.proxy(self)
        )
        self._sampler, self._records = checked_source(
            self.data_loader,
            self.model,
            cfg.DATASETS.TRAIN,
            class_count(cfg),
            lambda: training_dicts(cfg) if cfg.MODEL.PSKD.ENABLED else [],
            masks=cfg.MODEL.MASK_ON,
            mask_format=cfg.INPUT.MASK_FORMAT,
        )
        ours = [self._pskd_hook()] if cfg.MODEL.PSKD.ENABLED else []
        if self._sampler is not None:
            ours.append(RandomStateHook())
        theirs = super().build_hooks()
        if cfg.TEST.AUG.ENABLED:
            theirs.append(EvalHook(0, self._test_with_tta))
        return ours + theirs

    def _pskd_hook(self) -> PSKDHook:
        cfg, options = self.cfg, self.cfg.MODEL.PSKD
        return PSKDHook(
            self.model,
            epoch_iters=epoch_iters(cfg, len(self._records)),
            alpha_final=options.ALPHA_FINAL,
            alpha_schedule=options.ALPHA_SCHEDULE,
            teacher=options.TEACHER,
            output_dir=cfg.OUTPUT_DIR,
            num_annotations=count_annotations(self._records),
            fingerprint=training_fingerprint(self._records),
            checkpoint_period=cfg.SOLVER.CHECKPOINT_PERIOD,
            allow_schedule_change=options.ALLOW_SCHEDULE_CHANGE,
        )

    def _test_with_tta(self) -> dict:
        self._tta_results = self.test_with_TTA(self.cfg, self.model)
        return self._tta_results

    def resume_or_load(self, resume: bool = True) -> None:
        """As `DefaultTrainer`; a resumable sampler then starts where the run stopped."""
        super().resume_or_load(resume)
        if self._sampler is not None:
            self._sampler.start_at(self.start_iter * self.cfg.SOLVER.IMS_PER_BATCH)

    @classmethod
    def build_evaluator(cls, cfg: CfgNode, dataset_name: str, output_folder: str | None = None):
        """As in Detectron2's train_net.py, and the confidence of a detector's boxes."""
        output_folder = output_folder or os.path.join(cfg.OUTPUT_DIR, "inference")
        evaluators = build_evaluators(dataset_name, output_folder, cfg.TEST.KEYPOINT_OKS_SIGMAS)
        if class_count(cfg) is not None and has_boxes(dataset_name):
            is_dense = cfg.MODEL.META_ARCHITECTURE == "RetinaNet"
            options = cfg.MODEL.RETINANET if is_dense else cfg.MODEL.ROI_HEADS
            least = max(SCORE_THRESHOLD, options.SCORE_THRESH_TEST)
            confidence = ConfidenceEvaluator(dataset_name, output_folder, score_threshold=least)
            evaluators.append(confidence)
        return DatasetEvaluators(evaluators)

    @classmethod
    def test(cls, cfg: CfgNode, model, evaluators=None) -> dict:
        """As `DefaultTrainer.test`, and the NLL of ROI heads on the ground-truth boxes."""
        with same_random_state_after():
            results = super().test(cfg, model, evaluators)
            for name in dict.fromkeys(cfg.DATASETS.TEST):
                if not scores_ground_truth(model, name):
                    continue
                scores = ground_truth_rois(model, cls.build_test_loader(cfg, name), name)
                part = results if len(set(cfg.DATASETS.TEST)) == 1 else results[name]
                part["ground_truth_rois"] = scores
                logger.info("Scores of the ground-truth ROIs of %s: %s", name, scores)
        return results

    @classmethod
    def test_with_TTA(cls, cfg: CfgNode, model) -> dict:  # noqa: N802, as in Detectron2's own
        """As in Detectron2's train_net.py: `test` under test-time augmentation; keys have _TTA."""
        folder = os.path.join(cfg.OUTPUT_DIR, "inference_TTA")
        evaluators = [cls.build_evaluator(cfg, name, folder) for name in cfg.DATASETS.TEST]
        results = cls.test(cfg, GeneralizedRCNNWithTTA(cfg, model), evaluators)
        return {f"{name}_TTA": value for name, value in results.items()}

    def results(self) -> dict:
        """Return the last evaluation, and the median seconds of an iteration of this run."""
        plain = getattr(self, "_last_eval_results", {})
        seconds = seconds_per_iteration(self.storage)
        return {"seconds_per_iteration": seconds, **plain, **self._tta_results}


def seconds_per_iteration(storage: EventStorage) -> float | None:
    """Return the median of what `hooks.IterationTimer` logged; None where it logged nothing, as in
    the first three iterations."""
    times = storage.histories().get("time")
    return None if times is None else float(np.median([t for t, _ in times.values()]))


def check_config(cfg: CfgNode, *, training: bool = True) -> None:
    """Refuse a config or data sets that would stop the run later, before anything is built."""
    check_pskd_config(cfg)
    train, test = cfg.DATASETS.TRAIN if training else (), cfg.DATASETS.TEST
    check_sets(train, test, class_count(cfg), masks=cfg.MODEL.MASK_ON)
    if cfg.MODEL.KEYPOINT_ON:
        count = cfg.MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS
        check_keypoints(train, test, count, cfg.TEST.KEYPOINT_OKS_SIGMAS)
    for name in test if cfg.TEST.AUG.ENABLED else ():
        if evaluator_type(name) in ("sem_seg", "cityscapes_sem_seg", "coco_panoptic_seg"):
            raise ValueError(
                f"TEST.AUG.ENABLED: expected a test set of boxes and masks, got {name} "
                f"({evaluator_type(name)})"
            )


def training_dicts(cfg: CfgNode) -> list[dict]:
    """Return the images and annotations that are trained on, as the stock loader has them."""
    model = cfg.MODEL
    min_keypoints = model.ROI_KEYPOINT_HEAD.MIN_KEYPOINTS_PER_IMAGE if model.KEYPOINT_ON else 0
    return training_records(
        cfg.DATASETS.TRAIN,
        filter_empty=cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS,
        min_keypoints=min_keypoints,
        proposal_files=cfg.DATASETS.PROPOSAL_FILES_TRAIN if model.LOAD_PROPOSALS else None,
    )


def epoch_iters(cfg: CfgNode, num_images: int) -> int:
    """Return the iterations of an epoch."""
    if cfg.MODEL.PSKD.EPOCH_ITERS:
        return cfg.MODEL.PSKD.EPOCH_ITERS
    known = ("TrainingSampler", ResumableTrainingSampler.__name__)
    if cfg.DATALOADER.SAMPLER_TRAIN not in known:
        raise ValueError(
            "MODEL.PSKD.EPOCH_ITERS: expected a number of iterations with DATALOADER.SAMPLER_TRAIN "
            f"{cfg.DATALOADER.SAMPLER_TRAIN}, whose epochs have no size of their own, got 0"
        )
    return epoch_length(num_images, cfg.SOLVER.IMS_PER_BATCH)
