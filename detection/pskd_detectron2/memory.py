"""Last epoch's class distribution of each annotated box: a teacher without a second forward.

Proposals differ in every epoch, so there is nothing to remember about one. What stays is the
annotation: the ROIs that were matched to it in an epoch are averaged, and in the next epoch that
mean is the past prediction of every ROI that is matched to it. Shapes: M rows, R ROIs, C classes.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping

import torch
from torch import Tensor

from pskd.distributed import is_first, sum_over_processes
from pskd.files import shown

_TENSORS = ("probs", "seen", "sums", "counts")


class AnnotationMemory:
    """Mean predictions by row, written in one epoch and read in the next.

    Its M = ``num_rows`` rows are one an annotation and stage of the head; ``fingerprint`` names the
    annotations that they belong to.
    """

    def __init__(
        self, num_rows: int, num_classes: int, fingerprint: str, device: torch.device | str = "cpu"
    ) -> None:
        self.fingerprint = fingerprint
        shape = (num_rows, num_classes)
        self.probs = torch.zeros(shape, dtype=torch.float32, device=device)
        self.seen = torch.zeros(num_rows, dtype=torch.bool, device=device)
        self.sums = torch.zeros(shape, dtype=torch.float32, device=device)
        self.counts = torch.zeros(num_rows, dtype=torch.int64, device=device)

    @property
    def available(self) -> bool:
        """Whether an epoch has ended."""
        return bool(self.seen.any())

    def turn(self, ended: int, student: object = None) -> None:
        """As `next_epoch`, for `pskd.driver`."""
        if ended:
            self.next_epoch()

    def read(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Return (R, C) past predictions of (R,) rows and whether there is one; zeros where not."""
        return self.probs[rows], self.seen[rows]

    def write(self, rows: Tensor, probs: Tensor, counts: Tensor) -> None:
        """Add (R, C) predictions to this epoch's means of (R,) rows, of which one may occur often.

        Left out are those without ``counts``, (R,) bool, and those that are not finite.
        """
        probs = probs.detach().to(self.sums.dtype)
        counts = counts & probs.isfinite().all(dim=1)
        self.sums.index_add_(0, rows, torch.where(counts[:, None], probs, 0.0))
        self.counts.index_add_(0, rows, counts.long())

    def next_epoch(self) -> None:
        """Turn what this epoch wrote, on all processes, into what the next one reads.

        A row that was not written keeps its last prediction: where images are held back by
        aspect-ratio buckets or drawn at random, some miss an epoch.
        """
        self._add_up()
        new = self.counts > 0
        means = self.sums / self.counts.clamp_min(1)[:, None]
        self.probs[new] = means[new].to(self.probs.dtype)
        self.seen |= new
        self.forget_unfinished_epoch()

    def collect(self) -> None:
        """Bring what all processes wrote in this epoch to the first, whose state is then whole.

        A collective: all processes call it, before one of them saves.
        """
        self._add_up()
        if not is_first():
            self.forget_unfinished_epoch()

    def forget_unfinished_epoch(self) -> None:
        """Drop what was written since the epoch began."""
        self.sums.zero_()
        self.counts.zero_()

    def _add_up(self) -> None:
        self.sums = sum_over_processes(self.sums)
        self.counts = sum_over_processes(self.counts)

    def state_dict(self, *, ended: bool = False) -> dict[str, str | int | Tensor]:
        """Return everything, this process's part of the unfinished epoch included, on the CPU."""
        tensors = {name: getattr(self, name).cpu().clone() for name in _TENSORS}
        return {"fingerprint": self.fingerprint, "crc32": _checksum(tensors), **tensors}

    def load_state_dict(self, state: dict[str, str | int | Tensor], student: object = None) -> None:
        """Restore what `state_dict` returned.

        Raises:
            ValueError: if it is that of other annotations or classes, damaged, or no memory.
        """
        keys = {"fingerprint", "crc32", *_TENSORS}
        if not isinstance(state, dict) or not keys <= state.keys():
            found = sorted(map(str, state)) if isinstance(state, dict) else type(state)
            raise ValueError(f"expected a memory with {sorted(keys)}, got {shown(found)}")
        for name in _TENSORS:
            own, new = getattr(self, name), state[name]
            if not isinstance(new, Tensor) or (new.shape, new.dtype) != (own.shape, own.dtype):
                got = (tuple(new.shape), new.dtype) if isinstance(new, Tensor) else shown(new)
                raise ValueError(
                    f"{name}: expected {own.dtype} of shape {tuple(own.shape)} (annotations x "
                    f"stages, classes), got {got}"
                )
        if state["fingerprint"] != self.fingerprint:
            raise ValueError(
                f"expected the annotations {self.fingerprint}, got {state['fingerprint']}: "
                "another training set"
            )
        checksum = _checksum(state)
        if state["crc32"] != checksum:
            raise ValueError(f"damaged: expected CRC-32 {state['crc32']:#x}, got {checksum:#x}")
        for name in _TENSORS:
            getattr(self, name).copy_(state[name])


def _checksum(state: Mapping[str, str | int | Tensor]) -> int:
    """Return the CRC-32 of a state's tensors; torch reads flipped bits without a word."""
    checksum = 0
    for name in _TENSORS:
        tensor = state[name]
        assert isinstance(tensor, Tensor)
        checksum = zlib.crc32(tensor.contiguous().numpy().data, checksum)
    return checksum
