"""Training from a LazyConfig, the parts that Detectron2's lazyconfig_train_net.py builds.

Such a config is one of Detectron2's with ``model.roi_heads._target_`` set to a PSKD head, and with
``train.pskd``: the options of `PSKDHook` by name. Without ``epoch_iters`` an epoch is as long as
``dataloader.train`` has images. A resume starts the stream of images anew, as Detectron2's does.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from typing import Any

from detectron2.config import LazyConfig, instantiate
from detectron2.data import DatasetMapper, get_detection_dataset_dicts
from detectron2.engine import (
    AMPTrainer,
    SimpleTrainer,
    create_ddp_model,
    default_setup,
    default_writers,
    hooks,
)
from detectron2.evaluation import DatasetEvaluators, inference_on_dataset, print_csv_format
from detectron2.utils import comm
from detectron2.utils.registry import locate
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from pskd_detectron2.config import recipe_path
from pskd_detectron2.data import (
    ImageMapper,
    PSKDDatasetMapper,
    check_image_files,
    count_annotations,
    epoch_length,
    training_fingerprint,
    training_records,
)
from pskd_detectron2.evaluation import (
    ConfidenceEvaluator,
    ground_truth_rois,
    scores_ground_truth,
)
from pskd_detectron2.hooks import PSKDHook
from pskd_detectron2.registered import check_sets, checked_source, has_boxes, register_specs
from pskd_detectron2.resume import (
    AsideCheckpointer,
    EvaluationCheckpointer,
    same_random_state_after,
)
from pskd_detectron2.trainer import ddp_options, seconds_per_iteration

#: Where a lazy model has its classes: ROI heads, and RetinaNet or FCOS.
_CLASS_COUNTS = ("model.roi_heads.num_classes", "model.num_classes")


def load_recipe(name: str) -> DictConfig:
    """Load one of Detectron2's own lazy configs, such as
    ``COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.py``."""
    return LazyConfig.load(recipe_path(f"detectron2:{name}"))


def run_lazy(args) -> tuple[dict, str, int]:
    """Train or evaluate as the command line says; return results, output folder and seed."""
    cfg = LazyConfig.load(args.config_file)
    try:
        cfg = LazyConfig.apply_overrides(cfg, args.opts)
    except (HydraException, OmegaConfBaseException) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"expected overrides as path.key=value: {reason}") from error
    use_specs(cfg, args)
    parts = ["test"] if args.eval_only else ["train", "test"]
    train_names = _names(cfg, "train") if "train" in parts else []
    check_sets(train_names, _names(cfg, "test"), _class_count(cfg), masks=_has_masks(cfg))
    default_setup(cfg, args)
    use_own_parts(cfg)
    if args.check_images:
        names = [name for part in parts for name in _names(cfg, part)]
        check_image_files(names, OmegaConf.select(cfg, "dataloader.train.num_workers", default=0))
    model = instantiate(cfg.model).to(cfg.train.device)
    if args.eval_only:
        if not cfg.train.init_checkpoint:
            raise ValueError("--eval-only: expected train.init_checkpoint, got none")
        EvaluationCheckpointer(model).load(cfg.train.init_checkpoint)
        results = evaluate(cfg, model)
    else:
        results = train(cfg, model, args.resume)
    return results, cfg.train.output_dir, OmegaConf.select(cfg, "train.seed", default=-1)


def use_specs(cfg: DictConfig, args) -> None:
    """Let --train and --test be the config's data sets, in place, as they are in a YAML config."""
    num_classes = register_specs(args, cfg.train.output_dir, _names(cfg, "train"))
    for part, spec in (("train", args.train), ("test", args.test)):
        if spec:
            cfg.dataloader[part].dataset.names = spec
    for key in _CLASS_COUNTS if num_classes is not None else ():
        if OmegaConf.select(cfg, key) is not None:
            OmegaConf.update(cfg, key, num_classes)


def _class_count(cfg: DictConfig) -> int | None:
    counts = (OmegaConf.select(cfg, key) for key in _CLASS_COUNTS)
    return next((count for count in counts if count is not None), None)


def _has_masks(cfg: DictConfig) -> bool:
    return bool(OmegaConf.select(cfg, "model.roi_heads.mask_head"))


def _names(cfg: DictConfig, part: str) -> list[str]:
    names = OmegaConf.select(cfg, f"dataloader.{part}.dataset.names", default=[])
    return [names] if isinstance(names, str) else list(names)


def evaluate(cfg: DictConfig, model) -> dict:
    """Run the config's evaluator, if it has one, and PS-KD's own on a single test set."""
    if "evaluator" not in cfg.dataloader:
        return {}
    evaluators, names = [instantiate(cfg.dataloader.evaluator)], _names(cfg, "test")
    if _class_count(cfg) is not None and len(names) == 1 and has_boxes(names[0]):
        folder = os.path.join(cfg.train.output_dir, "inference")
        evaluators.append(ConfidenceEvaluator(names[0], folder))
    with same_random_state_after():
        loader = instantiate(cfg.dataloader.test)
        results = inference_on_dataset(model, loader, DatasetEvaluators(evaluators))
        print_csv_format(results)
        if len(names) == 1 and scores_ground_truth(model, names[0]):
            results["ground_truth_rois"] = ground_truth_rois(model, loader, names[0])
    return results


def train(cfg: DictConfig, model, resume: bool) -> dict:
    """Train, and return the seconds of an iteration and the last evaluation.

    Detectron2 has the trainer of a LazyConfig in a script only, whose hooks cannot be added to.
    """
    cfg.optimizer.params.model = model
    optimizer = instantiate(cfg.optimizer)
    loader = instantiate(cfg.dataloader.train)
    model = create_ddp_model(model, **(ddp_options(cfg.train.device) | dict(cfg.train.ddp)))
    trainer = (AMPTrainer if cfg.train.amp.enabled else SimpleTrainer)(model, loader, optimizer)
    checkpointer = AsideCheckpointer(model, cfg.train.output_dir, trainer=trainer)
    results: dict = {}

    def test() -> dict:
        results.update(evaluate(cfg, model))
        return results

    _, records = checked_source(
        loader,
        model,
        _names(cfg, "train"),
        _class_count(cfg),
        lambda: instantiate(cfg.dataloader.train.dataset) if "pskd" in cfg.train else [],
        masks=_has_masks(cfg),
        mask_format=OmegaConf.select(
            cfg, "dataloader.train.mapper.instance_mask_format", default="polygon"
        ),
    )
    main = comm.is_main_process()
    writers = default_writers(cfg.train.output_dir, cfg.train.max_iter) if main else []
    trainer.register_hooks(
        [
            pskd_hook(cfg, model, records),
            hooks.IterationTimer(),
            hooks.LRScheduler(scheduler=instantiate(cfg.lr_multiplier)),
            hooks.PeriodicCheckpointer(checkpointer, **cfg.train.checkpointer) if main else None,
            hooks.EvalHook(cfg.train.eval_period, test),
            hooks.PeriodicWriter(writers, period=cfg.train.log_period) if main else None,
        ]
    )
    checkpointer.resume_or_load(cfg.train.init_checkpoint, resume=resume)
    resumed = resume and checkpointer.has_checkpoint()
    trainer.train(trainer.iter + 1 if resumed else 0, cfg.train.max_iter)
    return {"seconds_per_iteration": seconds_per_iteration(trainer.storage), **results}


def use_own_parts(cfg: DictConfig) -> None:
    """Let this project's mappers and records stand in for Detectron2's own, in place."""
    memory = OmegaConf.select(cfg, "train.pskd.teacher") == "memory"
    for path, stock, ours in (
        ("dataloader.train.dataset", get_detection_dataset_dicts, training_records),
        ("dataloader.train.mapper", DatasetMapper, PSKDDatasetMapper if memory else ImageMapper),
        ("dataloader.test.mapper", DatasetMapper, ImageMapper),
    ):
        part = OmegaConf.select(cfg, path)
        if part is not None and _located(part.get("_target_")) is stock:
            part._target_ = ours


def _located(target):
    """Return what a ``_target_`` names; a name of nothing as it is."""
    with contextlib.suppress(ImportError):
        return locate(target) if isinstance(target, str) else target
    return target


def pskd_hook(cfg: DictConfig, model, records: Sequence[dict]) -> PSKDHook | None:
    """Build the hook of ``train.pskd``; None if the config has no such section."""
    if "pskd" not in cfg.train:
        return None  # and an enabled PSKD head says that it trains as the stock one
    options: dict[str, Any] = dict(cfg.train.pskd)
    if not options.get("epoch_iters"):
        batch = cfg.dataloader.train.total_batch_size
        options["epoch_iters"] = epoch_length(len(records), batch)
    try:
        return PSKDHook(
            model,
            output_dir=os.fspath(cfg.train.output_dir),
            num_annotations=count_annotations(records),
            fingerprint=training_fingerprint(records),
            checkpoint_period=cfg.train.checkpointer.period,
            log_period=cfg.train.log_period,
            **options,
        )
    except TypeError as error:
        raise ValueError(f"train.pskd: expected options of PSKDHook: {error}") from error
