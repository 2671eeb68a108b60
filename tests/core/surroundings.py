"""A pytest plugin: pskd is called under another default dtype and another default device.

    pytest -p surroundings --dtype bfloat16 --device meta FILE ...

The tests themselves make their tensors as ever; what they call of pskd, and what autograd calls,
finds the defaults changed, as in a model that is trained in half precision throughout.
"""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable
from typing import Any

import torch

FUNCTIONS = {
    "pskd.loss": ["pskd_cross_entropy"],
    "pskd.linear": ["pskd_linear_cross_entropy"],
    "pskd.targets": ["mix_targets"],
    "pskd.stats": ["agreement", "gradient_rescaling", "teacher_effect"],
}
CLASSES = {
    "pskd.memory": ["PredictionMemory"],
    "pskd.criterion.memory": ["MemoryCriterion"],
    "pskd.criterion.snapshot": ["SnapshotCriterion"],
    "pskd.criterion.base": ["Criterion"],
    "pskd.teachers": ["SnapshotTeacher"],
    "pskd.stats": ["ExampleStats", "Means"],
}
BACKWARD = {"pskd.loss": "_CrossEntropy", "pskd.kernels.linear_chunks": "LinearCrossEntropy"}


def pytest_addoption(parser) -> None:
    parser.addoption("--dtype", default="float32")
    parser.addoption("--device", default="cpu")


def pytest_configure(config) -> None:
    dtype, device = getattr(torch, config.getoption("--dtype")), config.getoption("--device")
    around = functools.partial(_around, dtype, device)
    for module, names in FUNCTIONS.items():
        loaded = importlib.import_module(module)
        for name in names:
            setattr(loaded, name, around(getattr(loaded, name)))
    for module, names in CLASSES.items():
        for name in names:
            _wrap_methods(getattr(importlib.import_module(module), name), around)
    for module, name in BACKWARD.items():
        kind = getattr(importlib.import_module(module), name)
        kind.backward = staticmethod(around(kind.backward))


def _wrap_methods(kind: type, around: Callable) -> None:
    for name, member in vars(kind).items():
        is_special = name.startswith("__") and name not in ("__init__", "__call__")
        if inspect.isfunction(member) and not is_special:
            setattr(kind, name, around(member))


def _around(dtype: torch.dtype, device: str, function: Callable) -> Callable:
    @functools.wraps(function)
    def called(*args: Any, **kwargs: Any) -> Any:
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            with torch.device(device):
                return function(*args, **kwargs)
        finally:
            torch.set_default_dtype(before)

    return called
