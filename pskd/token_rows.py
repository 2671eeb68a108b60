"""Row numbers of tokens: a sequence's first row plus the place in it.

Shapes: S sequences of the data set, M tokens of it, B sequences of a batch, T positions.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pskd.checks import check_tensors
from pskd.rows import check_given

__all__ = ["TokenRows"]


class TokenRows:
    """The rows that the tokens of a data set have in a memory, sequences one after the other.

        token_rows = pskd.TokenRows([len(labels) for labels in dataset])
        memory = pskd.PredictionMemory(token_rows.num_rows, num_classes, top_k=8)
        rows, valid = token_rows.rows(ids, labels != -100)

    Args:
        lengths: (S,) how many tokens each sequence has, in the order of the data set.

    Raises:
        ValueError: if a length is no count, or there is no sequence.
    """

    def __init__(self, lengths: Sequence[int] | NDArray[np.integer] | Tensor) -> None:
        if isinstance(lengths, np.ndarray) and lengths.dtype.kind == "u":
            lengths = lengths.astype(np.int64)  # torch finds no extremes of unsigned integers
        sizes = torch.as_tensor(lengths, device="cpu")
        if sizes.dim() != 1 or not len(sizes) or sizes.dtype.is_floating_point or sizes.min() < 0:
            got = f"{sizes.dtype} of shape {tuple(sizes.shape)}"
            if sizes.numel():
                got += f", the smallest {sizes.min()}"
            raise ValueError(f"lengths: expected a count for each sequence, got {got}")
        sizes = sizes.long()
        self._starts = torch.cat([sizes.new_zeros(1), sizes.cumsum(0)])
        #: M + 1: the last row takes what has no row, and nobody reads it.
        self.num_rows = int(self._starts[-1]) + 1
        #: Names the lengths, from which the numbers follow; for the memory's ``fingerprint``.
        self.fingerprint = hashlib.sha256(sizes.numpy().tobytes()).hexdigest()[:16]

    @classmethod
    def of_labels(
        cls, labels: Iterable[object], num_classes: int | None = None, ignore_index: int = -100
    ) -> TokenRows:
        """Return the rows of the labels that count, in one pass over a data set's.

        Args:
            labels: of each sequence, lists or arrays of integers.
            num_classes: C; None if the values are not to be looked at.
            ignore_index: label of the tokens that do not count.

        Raises:
            ValueError: naming the first sequence with a label outside [0, C).
        """
        lengths = []
        for place, values in enumerate(labels):
            counted = np.asarray(values)
            counted = counted[counted != ignore_index]
            lengths.append(counted.size)
            if num_classes is None or not counted.size:
                continue
            low, high = counted.min(), counted.max()
            if low < 0 or high >= num_classes:
                raise ValueError(
                    f"labels: expected classes of 0 to {num_classes - 1} or {ignore_index}, got "
                    f"{low if low < 0 else high} in sequence {place}"
                )
        return cls(lengths)

    def rows(self, ids: Tensor, is_token: Tensor) -> tuple[Tensor, Tensor]:
        """Return the rows of a batch's tokens, on whichever side its padding is.

        Args:
            ids: (B,) integers, the places of the sequences in the data set.
            is_token: (B, T) bool, what is no padding.

        Returns:
            (B, T) int64 rows and the (B, T) bool mask of the tokens that have one, on the device of
            ``is_token``. A sequence that is not of the data set, or with another number of tokens
            there, has none: the data may have been cut or extended since. All else has the last
            row.

        Raises:
            ValueError: if they are not B integers and a (B, T) mask.
        """
        check_tensors(is_token=is_token)
        if is_token.dim() != 2 or is_token.dtype != torch.bool:
            raise ValueError(
                f"is_token: expected bool of shape (B, T), got {is_token.dtype} of shape "
                f"{tuple(is_token.shape)}"
            )
        ids = check_given(ids, len(is_token)).to(is_token.device)
        starts = self._starts = self._starts.to(is_token.device)
        known = ids.clamp(0, len(starts) - 2)
        first, end = starts[known], starts[known + 1]
        fits = (is_token.sum(dim=1) == end - first) & (ids == known)
        valid = is_token & fits[:, None]
        place = is_token.cumsum(dim=1) - 1
        return torch.where(valid, first[:, None] + place, starts[-1]), valid
