"""Last epoch's predictions of the target tokens: a teacher that costs no second forward.

A row is a target token: the tokens of a sentence lie side by side, sentences in the order of the
data set, in whatever order and batches they are trained. Shapes: B sentences, T target positions,
N = B * T, M tokens of the data set, k kept types.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from pskd import PredictionMemory, TokenRows, TopK
from pskd.kernels import Records
from pskd.loss import in_one_pass, loss_and_stats

logger = logging.getLogger(__name__)


class TokenMemory:
    """A `PredictionMemory` a data shard, and the rows that a batch has in it.

    fairseq trains on the shards of ``DATA1:DATA2`` in turns, an epoch each, and numbers the
    sentences of each from 0; the last prediction of a token is then as many epochs old.

    Args:
        folder: where the files are kept.
        num_types: V, the types of the target dictionary.
        top_k: k.
        num_shards: the folders of ``DATA``.
    """

    def __init__(self, folder: str, num_types: int, top_k: int, num_shards: int = 1) -> None:
        self._folder, self._num_types, self.top_k = folder, num_types, top_k
        self._num_shards = num_shards
        self._shards: dict[int, _Shard] = {}
        self._current: _Shard | None = None
        self._restored: dict[str, dict] = {}

    @property
    def available(self) -> bool:
        """Whether the running epoch has an earlier one to read."""
        return self._current is not None and self._current.memory.epoch > 1

    def begin_epoch(self, epoch: int, dataset, kept: Sequence[dict[str, dict]] = ()) -> None:
        """Turn to an epoch, or once more to the one that is running after a resume.

        Files of the states ``kept``, on the first process, stay. Raises ValueError for a data set
        without target lengths and files that cannot be used, OSError where there is no room.
        """
        index = (epoch - 1) % self._num_shards
        if index not in self._shards:
            self._shards[index] = self._open(index, epoch, dataset)
        shard = self._shards[index]
        if shard.epoch != epoch:
            shard.memory.next_epoch(of[str(index)]["memory"] for of in kept if str(index) in of)
            shard.epoch = epoch
        self._current = shard

    def rows(self, sample: dict, target: Tensor, padding_idx: int) -> tuple[Tensor, Tensor]:
        """Return the rows of a batch's target tokens.

        Args:
            sample: with (B,) ``id``, the sentences' places in the data set.
            target: (B, T) its padded targets.

        Returns:
            (B, T) int64 rows and the (B, T) bool mask of those that count: no padding, and no
            sentence whose length is not that of the data set (a task may cut or extend it). The
            others have the last row, which nobody reads.
        """
        assert self._current is not None  # begin_epoch comes before the first batch
        return self._current.rows.rows(sample["id"], target != padding_idx)

    def read(self, rows: Tensor, valid: Tensor) -> tuple[TopK, Tensor]:
        """Return the past predictions of (N,) rows and the (N,) mask of those that have one."""
        assert self._current is not None
        past, seen = self._current.memory.read(rows)
        assert isinstance(past, TopK)  # of a memory with top_k
        return past, seen & valid

    def write(self, rows: Tensor, probs: TopK) -> None:
        """Keep the predictions of (N,) rows, of `top_k` types each, for the next epoch."""
        assert self._current is not None
        self._current.memory.write(rows, probs)

    def records(self, rows: Tensor, num_types: int) -> Records | None:
        """As `PredictionMemory.records`, of which the loss writes those of (N,) rows."""
        assert self._current is not None
        memory = self._current.memory
        records = memory.records(rows, num_types)
        return records and records._replace(past=None, spare=memory.num_rows - 1)

    def state_dict(self, *, ended: bool = False) -> dict[str, dict]:
        """Return what a checkpoint keeps; of an ``ended`` epoch the file that it read can go."""

        def state(shard: _Shard) -> dict:
            over = ended or shard is not self._current
            memory = shard.memory.state_dict(ended=over)
            return {"epoch": shard.epoch, "memory": memory, "folder": os.path.abspath(self._folder)}

        # A shard that this run has not come to since it was resumed is as it was.
        return self._restored | {str(index): state(s) for index, s in self._shards.items()}

    def load_state_dict(self, state: dict[str, dict]) -> None:
        """Go on, from the next `begin_epoch`, where `state_dict` was called."""
        self._restored = dict(state)

    def _open(self, index: int, epoch: int, dataset) -> _Shard:
        rows = TokenRows(_target_sizes(dataset))
        memory = PredictionMemory(
            rows.num_rows,
            self._num_types,
            top_k=self.top_k,
            path=Path(self._folder) / f"shard_{index}",
            fingerprint=rows.fingerprint,
        )
        shard = _Shard(memory, rows)
        restored = self._restored.pop(str(index), None)
        if restored is not None:
            try:
                memory.load_state_dict(positioned(restored, epoch)["memory"])
            except ValueError as error:
                raise ValueError(f"{error}; {self._remedy(str(error), restored)}") from error
            shard.epoch = restored["epoch"]
            logger.info("PS-KD: restored the predictions that epoch %d reads", shard.epoch)
        elif epoch > self._num_shards:
            logger.warning("PS-KD: no predictions of an earlier epoch: hard targets in this one")
        logger.info(
            "PS-KD: memory of %s target tokens, %d bytes each, %.2f GB an epoch, in %s",
            f"{memory.num_rows - 1:,}", memory.bytes_per_row,
            memory.num_rows * memory.bytes_per_row / 1e9, memory.path,
        )  # fmt: skip
        return shard

    def _remedy(self, error: str, restored: dict) -> str:
        """Return what to do where a checkpoint's predictions cannot be used."""
        if error.startswith("memory:"):
            return (
                "resume with the data, --pskd-top-k and number of machines of the checkpoint, or "
                "start over with --reset-dataloader"
            )
        folder = restored.get("folder", "")  # older checkpoints do not tell
        if os.path.isdir(folder) and not os.path.isdir(self._folder):
            return (
                f"the checkpoint's are in {folder}: copy that folder to {self._folder}, or go on "
                f"in it with --pskd-memory {folder}"
            )
        return (
            "they stay for checkpoint_last.pt, checkpoint_best.pt and as many others as "
            "--keep-last-epochs and --keep-interval-updates say: name one of these with "
            "--restore-file, their folder with --pskd-memory, or start over with --reset-dataloader"
        )


def positioned(state: dict, epoch: int) -> dict:
    """Return a shard's state that says whether its epoch is over, for a training in ``epoch``.

    Older checkpoints do not say it, nor those of data in shards at an epoch's end.
    """
    return state | {"memory": state["memory"] | {"ended": state["epoch"] != epoch}}


class KeptRows(NamedTuple):
    """Where a memory keeps a batch's tokens: (N,) int64 rows, and (N,) bool which of them count."""

    memory: TokenMemory
    rows: Tensor
    valid: Tensor

    def records(self, scores: Tensor) -> Records | None:
        """Return where the loss of (N, V) scores keeps their predictions; None where it cannot."""
        if not in_one_pass(scores, self.rows, None):
            return None
        return self.memory.records(self.rows, scores.size(1))

    def write(self, scores: Tensor, logsumexp: Tensor | None = None) -> None:
        """Keep the predictions, the softmax of (N, V) scores, for the next epoch."""
        scores, records = scores.detach(), self.records(scores)
        if records is None:
            top_k = TopK.from_logits(scores, self.memory.top_k, logsumexp=logsumexp)
            self.memory.write(self.rows, top_k)
        else:
            labels = torch.where(self.valid, 0, -100)  # whatever they are
            loss_and_stats(scores, labels, None, 0.0, reduction="none", records=records)


@dataclass
class _Shard:
    memory: PredictionMemory
    rows: TokenRows
    #: The training's epoch that is being written, from 1; 0 before the first.
    epoch: int = 0


def _target_sizes(dataset) -> np.ndarray:
    """Return the (sentences,) int64 target lengths, end of sentence included."""
    sizes = getattr(dataset, "tgt_sizes", None)
    if sizes is None:
        raise ValueError(
            "--pskd-teacher memory: expected a data set of sentence pairs with tgt_sizes, got "
            f"{type(dataset).__name__}; --pskd-teacher snapshot takes any"
        )
    return np.asarray(sizes, dtype=np.int64)
