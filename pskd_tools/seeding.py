"""Random states as a function of the seed, the epoch and the process."""

from __future__ import annotations

import random

import numpy as np
import torch

__all__ = ["seed_epoch"]


def seed_epoch(seed: int, epoch: int, rank: int) -> None:
    """Set the random states of Python, numpy and torch for one process and epoch."""
    # Mixed: neighbouring seeds, epochs and ranks must not share a stream.
    mixed = int(np.random.SeedSequence((seed, epoch, rank)).generate_state(1)[0])
    random.seed(mixed)
    np.random.seed(mixed)
    torch.manual_seed(mixed)
