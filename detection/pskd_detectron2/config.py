"""The keys of ``cfg.MODEL.PSKD``, and what is refused before anything is built."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence

import detectron2
from detectron2.config import CfgNode, get_cfg
from detectron2.modeling import META_ARCH_REGISTRY, ROI_HEADS_REGISTRY
from detectron2.modeling.meta_arch import GeneralizedRCNN, RetinaNet

from pskd.schedule import SCHEDULES, check_alpha
from pskd.teachers import TEACHERS

logger = logging.getLogger("detectron2." + __name__)

HEADS = {
    "StandardROIHeads": "PSKDROIHeads",
    "Res5ROIHeads": "PSKDRes5ROIHeads",
    "CascadeROIHeads": "PSKDCascadeROIHeads",
}


def add_pskd_config(cfg: CfgNode) -> None:
    """Add the keys of PS-KD to a Detectron2 config, in place; call it before merging a file."""
    cfg.MODEL.PSKD = CfgNode()
    # Off: the PSKD heads train as the stock ones do.
    cfg.MODEL.PSKD.ENABLED = False
    # Weight of the teacher at the end of training (the paper's alpha_T), 0 to 1.
    cfg.MODEL.PSKD.ALPHA_FINAL = 0.7
    # "linear" (the paper: alpha_T * epoch / epochs), "constant" or "cosine".
    cfg.MODEL.PSKD.ALPHA_SCHEDULE = "linear"
    # "snapshot": last epoch's weights score the same ROIs (one more forward of backbone and box
    # head). "memory": last epoch's class distribution of each annotated box, at no extra forward.
    cfg.MODEL.PSKD.TEACHER = "snapshot"
    # Iterations of an epoch. 0: images of the training set / SOLVER.IMS_PER_BATCH.
    cfg.MODEL.PSKD.EPOCH_ITERS = 0
    # Keep the hard target of background ROIs. The memory teacher always does.
    cfg.MODEL.PSKD.FOREGROUND_ONLY = False
    # torch's label smoothing of the hard part of the target, over all K + 1 classes.
    cfg.MODEL.PSKD.LABEL_SMOOTHING = 0.0
    # Resume with another alpha, schedule or length than those of the checkpoint.
    cfg.MODEL.PSKD.ALLOW_SCHEDULE_CHANGE = False


def recipe_path(name: str) -> str:
    """Return the file of ``detectron2:NAME``, a config installed with Detectron2; else the name.

    The folder in front, which a base gets from its config, is dropped.
    """
    _, found, recipe = name.partition("detectron2:")
    is_recipe = found and not recipe.startswith("//")  # which are paths of its PathManager
    folder = os.path.join(os.path.dirname(detectron2.__file__), "model_zoo", "configs")
    return os.path.join(folder, recipe) if is_recipe else name


class _RecipeNode(CfgNode):
    """Opens ``_BASE_: detectron2:COCO-Detection/...yaml`` among Detectron2's installed configs."""

    @classmethod
    def _open_cfg(cls, filename: str):
        return super()._open_cfg(recipe_path(filename))


def load_config(config_file: str | os.PathLike, opts: Sequence[str] = ()) -> CfgNode:
    """Return Detectron2's defaults with PS-KD's keys, a config file and KEY VALUE pairs merged in.

    The file and its ``_BASE_`` may be ``detectron2:`` and the name of one of Detectron2's own.

    Raises:
        ValueError: if there is no such file, or for a key that is none or has no value.
    """
    path = recipe_path(os.fspath(config_file))
    cfg = get_cfg()
    add_pskd_config(cfg)
    # As `merge_from_file` does: some of Detectron2's own recipes hold Python expressions.
    try:
        loaded = _RecipeNode.load_yaml_with_base(path, allow_unsafe=True)
    except (FileNotFoundError, IsADirectoryError) as error:
        found = error.filename or path  # it may be the base's
        raise ValueError(
            f"--config-file: expected a YAML or LazyConfig file, got {found!r}"
        ) from error
    try:
        cfg.merge_from_other_cfg(CfgNode(loaded))
        cfg.merge_from_list(list(opts))
    except (AssertionError, KeyError) as error:  # as yacs tells of a key that it does not have
        raise ValueError(str(error.args[0])) from error
    return cfg


def check_options(alpha_final: float, alpha_schedule: str, teacher: str) -> None:
    """Raise ValueError for a value that its option does not allow."""
    check_alpha(alpha_final, "MODEL.PSKD.ALPHA_FINAL")
    choices = ("ALPHA_SCHEDULE", alpha_schedule, SCHEDULES), ("TEACHER", teacher, TEACHERS)
    for key, value, known in choices:
        if value not in known:
            expected = ", ".join(known)
            raise ValueError(f"MODEL.PSKD.{key}: expected one of {expected}, got {value!r}")


def check_label_smoothing(
    label_smoothing: float, sigmoid: bool = False, name: str = "MODEL.PSKD.LABEL_SMOOTHING"
) -> None:
    """Refuse a label smoothing outside [0, 1], or above 0 for a sigmoid head, which ignores it."""
    check_alpha(label_smoothing, name)
    if sigmoid and label_smoothing:
        raise ValueError(
            f"{name}: expected 0 with a sigmoid head (USE_SIGMOID_CE), got {label_smoothing}"
        )


def check_pskd_config(cfg: CfgNode) -> None:
    """Refuse a config under which PS-KD could not do what it says.

    Raises:
        ValueError: naming the key, what was expected and what came.
    """
    pskd = cfg.MODEL.PSKD
    check_options(pskd.ALPHA_FINAL, pskd.ALPHA_SCHEDULE, pskd.TEACHER)
    check_label_smoothing(pskd.LABEL_SMOOTHING)
    if pskd.EPOCH_ITERS < 0:
        raise ValueError(f"MODEL.PSKD.EPOCH_ITERS: expected 0 or more, got {pskd.EPOCH_ITERS}")
    if not pskd.ENABLED:
        return
    name = cfg.MODEL.ROI_HEADS.NAME
    if not has_pskd_heads(cfg):
        wanted = HEADS.get(name, " or ".join(HEADS.values()) + ", or one derived from them")
        raise ValueError(f"MODEL.ROI_HEADS.NAME: with PS-KD expected {wanted}, got {name}")
    check_label_smoothing(pskd.LABEL_SMOOTHING, cfg.MODEL.ROI_BOX_HEAD.USE_SIGMOID_CE)
    if cfg.SOLVER.MAX_ITER < 1:
        raise ValueError(f"SOLVER.MAX_ITER: expected 1 or more, got {cfg.SOLVER.MAX_ITER}")


def class_count(cfg: CfgNode) -> int | None:
    """Return the K of a detector; None for an architecture whose classes no key of these tells."""
    architecture = META_ARCH_REGISTRY.get(cfg.MODEL.META_ARCHITECTURE)
    kind = architecture if isinstance(architecture, type) else object
    if issubclass(kind, RetinaNet):
        return cfg.MODEL.RETINANET.NUM_CLASSES
    if issubclass(kind, GeneralizedRCNN) or has_pskd_heads(cfg):
        return cfg.MODEL.ROI_HEADS.NUM_CLASSES
    return None


def has_pskd_heads(cfg: CfgNode) -> bool:
    """Return whether MODEL.ROI_HEADS.NAME is one of PS-KD's heads or derived from one."""
    ours = tuple(ROI_HEADS_REGISTRY.get(name) for name in HEADS.values())
    name = cfg.MODEL.ROI_HEADS.NAME
    heads = ROI_HEADS_REGISTRY.get(name) if name in ROI_HEADS_REGISTRY else None
    return isinstance(heads, type) and issubclass(heads, ours)


def warn_of_unused_keys(cfg: CfgNode) -> None:
    """Say in the log which keys ask for PS-KD where ``MODEL.PSKD.ENABLED`` is False."""
    if cfg.MODEL.PSKD.ENABLED:
        return
    defaults = CfgNode({"MODEL": {}})
    add_pskd_config(defaults)
    unused = [
        f"MODEL.PSKD.{key} {value}"
        for key, value in cfg.MODEL.PSKD.items()
        if value != defaults.MODEL.PSKD[key]
    ]
    if has_pskd_heads(cfg):
        unused.insert(0, f"MODEL.ROI_HEADS.NAME {cfg.MODEL.ROI_HEADS.NAME}")
    if unused:
        logger.warning(
            "MODEL.PSKD.ENABLED is False: the head trains as the stock one, in spite of %s",
            ", ".join(unused),
        )
