"""The types of a fairseq checkpoint that torch may read with its protection on."""

from __future__ import annotations

import argparse
import collections
import typing

import numpy as np
import omegaconf
import torch
from fairseq.distributed.utils import _TensorPlaceholder

from pskd_fairseq.evaluated import check_arguments


def allow_fairseq_types() -> None:
    """Let torch >= 2.6 read fairseq checkpoints with its protection on.

    fairseq pickles its command line (`argparse.Namespace`), numpy counters of validation BLEU and,
    between processes, its omegaconf configuration. These types and no others join torch's
    allow-list, so a checkpoint that holds any other object is still refused; so is a command line
    with an argument that fairseq would evaluate and that is no literal.
    """
    torch.serialization.add_safe_globals(_plain_types() + _numpy_types() + _omegaconf_types())


class _CommandLine(argparse.Namespace):
    """Stands in torch's allow-list for `argparse.Namespace`, and becomes one when it is checked."""

    __module__, __qualname__ = "argparse", "Namespace"  # the name that torch looks for

    def __setstate__(self, state: dict[str, object]) -> None:
        check_arguments(state)
        vars(self).update(state)
        self.__class__ = argparse.Namespace  # type: ignore[assignment]


def _plain_types() -> list:
    return [
        _CommandLine,
        collections.defaultdict,
        dict,
        int,
        list,
        typing.Any,
        _TensorPlaceholder,
    ]


def _numpy_types() -> list:
    multiarray = getattr(np, "_core", None) or np.core  # numpy < 2 has the latter only
    dtypes = {type(np.dtype(name)) for name in ("int32", "int64", "float32", "float64", "bool")}
    return [
        multiarray.multiarray._reconstruct,
        multiarray.multiarray.scalar,
        np.ndarray,
        np.dtype,
        *dtypes,
    ]


def _omegaconf_types() -> list:
    return [
        omegaconf.DictConfig,
        omegaconf.ListConfig,
        omegaconf.base.ContainerMetadata,
        omegaconf.base.Metadata,
        omegaconf.nodes.AnyNode,
    ]
