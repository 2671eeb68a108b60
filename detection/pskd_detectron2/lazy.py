"""Training from a LazyConfig, the parts that Detectron2's lazyconfig_train_net.py builds.

Such a config is one of Detectron2's with ``model.roi_heads._target_`` set to a PSKD head, and with
``train.pskd``: the options of `PSKDHook` by name. Without ``epoch_iters`` an epoch is as long as
``dataloader.train`` has images. A resume starts the stream of images anew, as Detectron2's does.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from collections.abc import Sequence
from typing import Any

from detectron2.config import LazyConfig, instantiate
from detectron2.data import DatasetMapper, get_detection_dataset_dicts
from detectron2.engine import default_setup, default_writers, hooks
from detectron2.engine.defaults import create_ddp_model
from detectron2.evaluation import DatasetEvaluators, inference_on_dataset, print_csv_format
from detectron2.utils import comm
from detectron2.utils.registry import locate
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from pskd_detectron2.config import recipe_path
from pskd_detectron2.data import (
    BOXES,
    ImageMapper,
    PSKDDatasetMapper,
    check_classes,
    check_image_files,
    check_records,
    check_registered,
    check_test_sets,
    class_names_of,
    count_annotations,
    evaluator_type,
    number_annotations,
    register_spec,
    training_fingerprint,
    training_records,
)
from pskd_detectron2.evaluation import (
    ConfidenceEvaluator,
    ground_truth_rois,
    scores_ground_truth,
)
from pskd_detectron2.files import save_results
from pskd_detectron2.hooks import PSKDHook
from pskd_detectron2.resume import (
    AsideCheckpointer,
    EvaluationCheckpointer,
    same_random_state_after,
)
from pskd_detectron2.state import PSKDState
from pskd_detectron2.trainer import (
    ddp_options,
    epoch_length,
    seconds_per_iteration,
    step_trainer,
)

__all__ = ["load_recipe", "run_lazy"]

logger = logging.getLogger("detectron2." + __name__)
STOCK_DICTS = get_detection_dataset_dicts


def load_recipe(name: str) -> DictConfig:
    """Load one of Detectron2's own lazy configs, such as
    ``COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.py``."""
    return LazyConfig.load(recipe_path(f"detectron2:{name}"))


def run_lazy(args) -> None:
    """Train or evaluate; ``args`` are those of Detectron2's default parser.

    Raises:
        ValueError: for overrides that are none, or options that PS-KD does not have.
    """
    cfg = LazyConfig.load(args.config_file)
    try:
        cfg = LazyConfig.apply_overrides(cfg, args.opts)
    except (HydraException, OmegaConfBaseException) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"expected overrides as path.key=value: {reason}") from error
    use_specs(cfg, args.train, args.test, strict=args.strict_data, evaluation=args.eval_only)
    check_data(cfg, training=not args.eval_only)
    default_setup(cfg, args)
    if args.check_images:
        parts = ["test"] if args.eval_only else ["train", "test"]
        names = [name for part in parts for name in _names(cfg, part)]
        check_image_files(names, OmegaConf.select(cfg, "dataloader.train.num_workers", default=0))
    model = instantiate(cfg.model).to(cfg.train.device)
    if args.eval_only:
        if not cfg.train.init_checkpoint:
            raise ValueError("--eval-only: expected train.init_checkpoint, got none")
        EvaluationCheckpointer(model).load(cfg.train.init_checkpoint)
        results = evaluate(cfg, model)
    else:
        results = train(args, cfg, model)
    if comm.is_main_process():
        seed = OmegaConf.select(cfg, "train.seed", default=-1)
        results = {"command": sys.argv, "seed": seed} | results
        save_results(cfg.train.output_dir, results, evaluation=args.eval_only)


def use_specs(
    cfg: DictConfig,
    train: str | None,
    test: str | None,
    *,
    strict: bool = False,
    evaluation: bool = False,
) -> None:
    """Let --train and --test be the config's data sets, in place, as they are in a YAML config."""
    class_names: Sequence[str] | None = None
    if train:
        class_names = register_spec(train, cfg.train.output_dir, strict=strict).class_names
        cfg.dataloader.train.dataset.names = train
        _set_class_count(cfg, len(class_names))
    elif test and not evaluation:
        class_names = class_names_of(_names(cfg, "train"))
    if test:
        dataset = register_spec(test, cfg.train.output_dir, class_names, strict=strict)
        cfg.dataloader.test.dataset.names = test
        if evaluation and class_names is None:
            _set_class_count(cfg, len(dataset.class_names))


#: Where a lazy model has its classes: ROI heads, and RetinaNet or FCOS.
_CLASS_COUNTS = ("model.roi_heads.num_classes", "model.num_classes")


def _class_count(cfg: DictConfig) -> int | None:
    counts = (OmegaConf.select(cfg, key) for key in _CLASS_COUNTS)
    return next((count for count in counts if count is not None), None)


def _set_class_count(cfg: DictConfig, num_classes: int) -> None:
    for key in _CLASS_COUNTS:
        if OmegaConf.select(cfg, key) is not None:
            OmegaConf.update(cfg, key, num_classes)


def check_data(cfg: DictConfig, *, training: bool = True) -> None:
    """Refuse data sets that would stop the run later; nothing is asked of an unused training set.

    Raises:
        ValueError: naming the set, what was expected and what came.
    """
    if training:
        check_registered(_names(cfg, "train"))
        check_classes(_names(cfg, "train"), _class_count(cfg))
    check_registered(_names(cfg, "test"))
    check_test_sets(_names(cfg, "test"), _class_count(cfg), masks=_has_masks(cfg))


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
    is_detector = _class_count(cfg) is not None
    if is_detector and len(names) == 1 and evaluator_type(names[0]) in BOXES:
        folder = os.path.join(cfg.train.output_dir, "inference")
        evaluators.append(ConfidenceEvaluator(names[0], folder))
    with same_random_state_after():
        read_images(cfg.dataloader.test)
        loader = instantiate(cfg.dataloader.test)
        results = inference_on_dataset(model, loader, DatasetEvaluators(evaluators))
        print_csv_format(results)
        if len(names) == 1 and scores_ground_truth(model, names[0]):
            results["ground_truth_rois"] = ground_truth_rois(model, loader, names[0])
    return results


def train(args, cfg: DictConfig, model) -> dict:
    """Train, and return the seconds of an iteration and the last evaluation."""
    cfg.optimizer.params.model = model
    optimizer = instantiate(cfg.optimizer)
    if OmegaConf.select(cfg, "train.pskd.teacher") == "memory":
        carry_rows(cfg)
    elif _located(cfg.dataloader.train.dataset._target_) is STOCK_DICTS:
        cfg.dataloader.train.dataset._target_ = training_records
    read_images(cfg.dataloader.train)
    loader = instantiate(cfg.dataloader.train)
    model = create_ddp_model(model, **(dict(cfg.train.ddp) | ddp_options(cfg.train.device)))
    trainer = step_trainer(cfg.train.device, cfg.train.amp.enabled)(model, loader, optimizer)
    checkpointer = AsideCheckpointer(model, cfg.train.output_dir, trainer=trainer)
    main = comm.is_main_process()
    results: dict = {}

    def test() -> dict:
        results.update(evaluate(cfg, model))
        return results

    writers = default_writers(cfg.train.output_dir, cfg.train.max_iter) if main else []
    trainer.register_hooks(
        [
            pskd_hook(cfg, model),
            hooks.IterationTimer(),
            hooks.LRScheduler(scheduler=instantiate(cfg.lr_multiplier)),
            hooks.PeriodicCheckpointer(checkpointer, **cfg.train.checkpointer) if main else None,
            hooks.EvalHook(cfg.train.eval_period, test),
            hooks.PeriodicWriter(writers, period=cfg.train.log_period) if main else None,
        ]
    )
    checkpointer.resume_or_load(cfg.train.init_checkpoint, resume=args.resume)
    resumed = args.resume and checkpointer.has_checkpoint()
    trainer.train(trainer.iter + 1 if resumed else 0, cfg.train.max_iter)
    return {"seconds_per_iteration": seconds_per_iteration(trainer.storage), **results}


def numbered_dicts(**kwargs) -> list[dict]:
    """`training_records`, every annotation with its row of the memory."""
    return number_annotations(training_records(**kwargs))


def carry_rows(cfg: DictConfig) -> None:
    """Let the training data tell the rows of its annotations, in place; the memory needs them.

    Raises:
        ValueError: for a dataset other than Detectron2's own, or a mapper that is neither its own
            nor derived from `PSKDDatasetMapper`.
    """
    loader = cfg.dataloader.train
    stock = {"dataset": STOCK_DICTS, "mapper": DatasetMapper}
    ours = {"dataset": numbered_dicts, "mapper": PSKDDatasetMapper}
    for part, expected in stock.items():
        got = _located(loader[part]._target_)
        if got is expected:
            loader[part]._target_ = ours[part]
        elif not (isinstance(got, type) and issubclass(got, PSKDDatasetMapper)):
            raise ValueError(
                f"dataloader.train.{part}: with the memory teacher expected "
                f"{expected.__module__}.{expected.__qualname__}, got {loader[part]._target_}"
            )


def read_images(loader: DictConfig) -> None:
    """Let `ImageMapper` stand in for Detectron2's own mapper, in place."""
    if _located(OmegaConf.select(loader, "mapper._target_")) is DatasetMapper:
        loader.mapper._target_ = ImageMapper


def _located(target):
    """Return what a ``_target_`` names; a name of nothing as it is."""
    with contextlib.suppress(ImportError):
        return locate(target) if isinstance(target, str) else target
    return target


def pskd_hook(cfg: DictConfig, model) -> PSKDHook | None:
    """Build the hook of ``train.pskd``; None if the config has no such section.

    Args:
        cfg: a LazyConfig.
        model: built from it; may be wrapped in DDP.

    Raises:
        ValueError: for options that `PSKDHook` does not have or refuses, a model without PSKD
            heads, or a training set that would stop the run later.
    """
    section = OmegaConf.select(cfg, "train.pskd")
    if section is None:
        heads = getattr(getattr(model, "module", model), "roi_heads", None)
        state = getattr(heads, "pskd", None)
        if isinstance(state, PSKDState) and state.enabled:
            logger.warning("train.pskd is missing: the PSKD head trains without a teacher")
        return None
    options: dict[str, Any] = dict(section)
    dicts = instantiate(cfg.dataloader.train.dataset)
    mask_format = OmegaConf.select(
        cfg, "dataloader.train.mapper.instance_mask_format", default="polygon"
    )
    check_classes(_names(cfg, "train"), _class_count(cfg))  # known when the data is loaded
    check_records(dicts, _class_count(cfg), masks=_has_masks(cfg), mask_format=mask_format)
    if not options.get("epoch_iters"):
        batch = cfg.dataloader.train.total_batch_size
        options["epoch_iters"] = epoch_length(len(dicts), batch)
    try:
        return PSKDHook(
            model,
            output_dir=os.fspath(cfg.train.output_dir),
            num_annotations=count_annotations(dicts),
            fingerprint=training_fingerprint(dicts),
            checkpoint_period=cfg.train.checkpointer.period,
            log_period=cfg.train.log_period,
            **options,
        )
    except TypeError as error:
        raise ValueError(f"train.pskd: expected options of PSKDHook: {error}") from error
