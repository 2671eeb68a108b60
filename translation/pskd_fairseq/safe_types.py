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


class _CommandLine(argparse.Namespace):
    """Stands in torch's allow-list for `argparse.Namespace`, and becomes one when it is checked."""

    __module__, __qualname__ = "argparse", "Namespace"  # the name that torch looks for

    def __setstate__(self, state: dict[str, object]) -> None:
        check_arguments(state)
        vars(self).update(state)
        self.__class__ = argparse.Namespace  # type: ignore[assignment]


def allow_fairseq_types() -> None:
    """Let torch >= 2.6 read fairseq checkpoints with its protection on.

    fairseq pickles its command line (`argparse.Namespace`), numpy counters of validation BLEU and,
    between processes, its omegaconf configuration. These types and no others join torch's
    allow-list, so a checkpoint that holds any other object is still refused; so is a command line
    with an argument that fairseq would evaluate and that is no literal.
    """
    plain = [_CommandLine, collections.defaultdict, dict, int, list, typing.Any, _TensorPlaceholder]
    multiarray = (getattr(np, "_core", None) or np.core).multiarray  # numpy < 2 has the latter only
    arrays = [multiarray._reconstruct, multiarray.scalar, np.ndarray, np.dtype]
    arrays += {type(np.dtype(name)) for name in ("int32", "int64", "float32", "float64", "bool")}
    config: list = [omegaconf.DictConfig, omegaconf.ListConfig, omegaconf.nodes.AnyNode]
    config += [omegaconf.base.ContainerMetadata, omegaconf.base.Metadata]
    torch.serialization.add_safe_globals([*plain, *arrays, *config])
