"""State dicts in files, as torchvision's training scripts and those of others write them."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from pskd_tools.checkpoint import load_archive

PREFIXES = ("module.", "_orig_mod.")  # of DataParallel and torch.compile, in any nesting
CONTAINERS = ("model", "state_dict")
SHOWN_KEYS = 5  # in an error


def read_state_dict(path: str | os.PathLike) -> dict[str, Tensor]:
    """Return the state dict of a checkpoint, without a prefix that all its keys share.

    Raises:
        OSError, ValueError: it cannot be opened, or is no checkpoint with a state dict.
    """
    # torchvision's own training script keeps its argparse.Namespace beside the model.
    with torch.serialization.safe_globals(_not_yet_safe(argparse.Namespace)):
        value = load_archive(path, "a checkpoint that torch.load reads with weights_only=True")
    for container in CONTAINERS:
        if isinstance(value, Mapping) and isinstance(value.get(container), Mapping):
            value = value[container]
            break
    is_named = isinstance(value, Mapping) and all(isinstance(key, str) for key in value)
    if not is_named or not value or not all(isinstance(v, Tensor) for v in value.values()):
        got = f"keys {some(value)}" if isinstance(value, Mapping) else type(value).__name__
        raise ValueError(
            f"{path}: expected a state dict, bare or under {' or '.join(CONTAINERS)}, got {got}"
        )
    return _without_prefix(value)


def _not_yet_safe(*types: type) -> list[Any]:
    """Those that torch's allow-list lacks: its context would take the others off it at its end."""
    known = torch.serialization.get_safe_globals()
    return [kind for kind in types if kind not in known]


def _without_prefix(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    state_dict = dict(state_dict)
    while shared := [p for p in PREFIXES if all(key.startswith(p) for key in state_dict)]:
        state_dict = {key.removeprefix(shared[0]): value for key, value in state_dict.items()}
    return state_dict


def some(keys: Iterable[object]) -> str:
    """A few of many keys, for an error."""
    names = [str(key) for key in keys]
    more = f" and {len(names) - SHOWN_KEYS} more" if len(names) > SHOWN_KEYS else ""
    return ", ".join(names[:SHOWN_KEYS]) + more if names else "none"
