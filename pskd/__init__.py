"""Progressive self-knowledge distillation: a model's targets softened by its own past predictions.

The core needs torch and numpy only. The adapters are packages of their own: ``pskd_detectron2`` and
``pskd_torchvision`` (object detection), ``pskd_fairseq`` (machine translation).

A name is imported when it is first used, so that ``pskd doctor`` can tell of a torch that does not
load.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from pskd.version import __version__ as __version__

if TYPE_CHECKING:
    from pskd import calibration, loss, memory, plots, schedule, targets, teacher  # noqa: F401
    from pskd.criterion import MemoryCriterion, SnapshotCriterion
    from pskd.effect import gradient_rescaling
    from pskd.examples import ExampleStats
    from pskd.linear import LinearStats, LinearTeacher, pskd_linear_cross_entropy
    from pskd.loss import PSKDStats, pskd_cross_entropy
    from pskd.memory import PredictionMemory
    from pskd.rows import WithRows
    from pskd.schedule import constant_alpha, cosine_alpha, linear_alpha
    from pskd.targets import TopK, mix_targets
    from pskd.teacher import SnapshotTeacher

__all__ = [
    "ExampleStats",
    "LinearStats",
    "LinearTeacher",
    "MemoryCriterion",
    "PSKDStats",
    "PredictionMemory",
    "SnapshotCriterion",
    "SnapshotTeacher",
    "TopK",
    "WithRows",
    "constant_alpha",
    "cosine_alpha",
    "gradient_rescaling",
    "linear_alpha",
    "mix_targets",
    "pskd_cross_entropy",
    "pskd_linear_cross_entropy",
]

_MODULES = ("calibration", "loss", "memory", "plots", "schedule", "targets", "teacher")
_MODULE_OF = {
    "ExampleStats": "examples",
    "LinearStats": "linear",
    "LinearTeacher": "linear",
    "MemoryCriterion": "criterion",
    "PSKDStats": "loss",
    "PredictionMemory": "memory",
    "SnapshotCriterion": "criterion",
    "SnapshotTeacher": "teacher",
    "TopK": "targets",
    "WithRows": "rows",
    "constant_alpha": "schedule",
    "cosine_alpha": "schedule",
    "gradient_rescaling": "effect",
    "linear_alpha": "schedule",
    "mix_targets": "targets",
    "pskd_cross_entropy": "loss",
    "pskd_linear_cross_entropy": "linear",
}


def __getattr__(name: str) -> object:
    if name in _MODULES:
        return import_module(f"{__name__}.{name}")  # which also sets the attribute
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
    globals()[name] = value  # found directly from now on
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES, *_MODULE_OF})
