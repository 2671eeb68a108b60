"""Last epoch's predictions by row: a teacher that costs no second forward.

Shapes: M rows in the memory, N rows of a call, C classes, k kept classes.

A record is the k indices (none where all C classes are kept), the probabilities, and a byte that
says whether the row was written, here (1) or on another machine (2). It is double-buffered by
epoch: what is read is always what the last epoch wrote.
"""

from __future__ import annotations

import logging
import re
import secrets
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pskd._table import PART, FileTable, MemoryTable, check_file, create_file, finish_file
from pskd.distributed import Machines, Processes, barrier, on_first_process
from pskd.rows import check_count, check_range
from pskd.targets import TopK

__all__ = ["PredictionMemory"]

logger = logging.getLogger(__name__)

_DTYPES = {"float16": torch.float16, "float32": torch.float32}
# The last byte of a record; 0 is a row that nobody wrote.
_WRITTEN_HERE, _WRITTEN_ELSEWHERE = 1, 2
_EXCHANGE_BYTES = 1 << 24  # of each machine at a time
_NAME = re.compile(r"epoch_(\d+)\.pskd")


class PredictionMemory:
    """What the model predicted for each row one epoch ago, dense or as the k largest classes.

        memory = pskd.PredictionMemory(len(dataset), num_classes)
        for epoch in range(1, num_epochs + 1):
            memory.next_epoch()
            for rows, inputs, target in loader:
                logits = model(inputs)
                past, seen = memory.read(rows)
                loss = pskd.pskd_cross_entropy(logits, target, past, alpha * seen)
                memory.write(rows, logits.softmax(dim=1))

    In RAM each process holds it all and is sent the others' rows in `next_epoch` and `state_dict`,
    which all of them call together. With ``path`` it is a file an epoch, mapped into memory, that
    all processes of a machine read and write; then all of them make it, and call `next_epoch` and
    `load_state_dict` together. Several machines have a file each, in ``path/machine_0`` and so on,
    and exchange their rows in `next_epoch`. A file takes its final name when its epoch is complete,
    and is kept for as long as the first process's last `state_dict` needs it.

    Args:
        num_rows: M; rows are numbered from 0.
        num_classes: C.
        top_k: k, the classes that are kept of a prediction; the rest of its mass is spread evenly
            over the others. None keeps all.
        dtype: of the kept probabilities, float16 or float32.
        path: a folder for the files; None for RAM.
        momentum: weight of the past in what is written, in [0, 1): 0 is the paper's method, more
            an exponential average over the epochs, as in temporal ensembling.
        fingerprint: names the data set, whose rows these are.
        device: where the records lie, in RAM.

    Raises:
        ValueError: if a size, the dtype or the momentum is none, or ``path`` is a file.

    Source: Kim et al. 2021, section 3.1, the form that keeps all of last epoch's predictions; the
    average is that of Laine and Aila 2017, section 2.2, without its bias correction: a row's first
    prediction is taken whole.
    """

    def __init__(
        self,
        num_rows: int,
        num_classes: int,
        *,
        top_k: int | None = None,
        dtype: torch.dtype = torch.float16,
        path: str | Path | None = None,
        momentum: float = 0.0,
        fingerprint: str = "",
        device: torch.device | str = "cpu",
    ) -> None:
        num_rows = check_count("num_rows", num_rows)
        num_classes = check_count("num_classes", num_classes)
        _check_options(num_classes, top_k, dtype, momentum)
        if path is not None and torch.device(device).type != "cpu":
            raise ValueError(f"device: expected cpu for a memory in a file, got {device}")
        if path is not None and Path(path).exists() and not Path(path).is_dir():
            raise ValueError(f"path: expected a folder for the memory's files, got the file {path}")
        self.num_rows, self.num_classes, self.top_k = num_rows, num_classes, top_k
        self.dtype, self.momentum, self.fingerprint = dtype, momentum, fingerprint
        self.path = None if path is None else Path(path)
        #: The epoch that is being written, from 1; 0 before the first.
        self.epoch = 0
        self._device = device
        self._width = num_classes if top_k is None else top_k
        self._index_dtype = torch.uint8 if top_k is None else _index_dtype(num_classes)
        self._run: str | None = None
        self._peers: Machines | Processes | None = None  # known when the processes first meet
        self._past: MemoryTable | FileTable | None = None
        self._present: MemoryTable | FileTable | None = None
        self._saved_epoch: int | None = None

    @property
    def bytes_per_row(self) -> int:
        """The size of a record; two epochs are kept, in files for a moment three."""
        indices = 0 if self.top_k is None else self._width * self._index_dtype.itemsize
        return indices + self._width * self.dtype.itemsize + 1

    def next_epoch(self) -> None:
        """End the epoch that was written, which becomes what is read, and begin the next.

        Raises:
            OSError: ENOSPC where the disk has no room for another epoch; the last one stays.
            ValueError: if another training writes to the same folder.
        """
        peers, present = self._meet(), self._present
        if isinstance(peers, Processes):  # in RAM
            if peers.count > 1 and present is not None:
                self._exchange(present)
            self._past, self._present = present, self._new_table()
            self.epoch += 1
            return
        if self.epoch == 0:
            self._run = on_first_process(lambda: secrets.token_hex(8))
        if present is not None:
            present.flush()
            barrier()  # everybody has written
            if peers.count > 1:
                peers.on_each(lambda: self._exchange(present))
        self._close_tables()
        # A framework asks the first process alone for its state.
        saved = on_first_process(lambda: self._saved_epoch)
        peers.on_each(lambda: self._turn_files(saved))
        self.epoch += 1
        self._past = self._open(self._file(self.epoch - 1)) if self.epoch > 1 else None
        self._present = self._open(self._part(self.epoch))

    def read(self, rows: Tensor) -> tuple[Tensor | TopK, Tensor]:
        """Return last epoch's predictions of some rows.

        Args:
            rows: (N,) int64 in [0, M).

        Returns:
            (N, C) float32 probabilities, or a `TopK` of (N, k) int64 and float32; and the (N,)
            bool mask of the rows that were written in the last epoch. The others hold zeros: give
            them alpha 0. On the device of ``rows``.

        Raises:
            ValueError: if a row lies outside of the memory.
        """
        self._check_rows(rows)
        if self._past is None:
            records = rows.new_zeros(len(rows), self.bytes_per_row, dtype=torch.uint8)
        else:
            self._past.touched(len(rows))
            records = self._past.records.index_select(0, rows.to(self._past.records.device))
        return self._decode(records.to(rows.device))

    def write(self, rows: Tensor, probs: Tensor | TopK) -> None:
        """Keep this epoch's predictions of some rows, to be read in the next.

        A row that is written again keeps the later prediction. One that is not finite is not kept.

        Args:
            rows: (N,) int64 in [0, M), distinct.
            probs: (N, C) floating-point probabilities, or a `TopK` of k classes a row.

        Raises:
            ValueError: if a row lies outside of the memory, or the shape is another.
        """
        self._check_rows(rows)
        probs = self._to_kept_form(probs, len(rows))
        if self._present is None:
            self.next_epoch()
        if self.momentum and self._past is not None:
            probs = self._average(rows, probs)
        self._put(rows, self._encode(probs))

    def _put(self, rows: Tensor, records: Tensor) -> None:
        assert self._present is not None  # an epoch was begun
        table = self._present.records
        rows, records = rows.to(table.device), records.to(table.device)
        # A process that is killed in between leaves a row that was not written, not a torn one.
        table[:, -1].index_fill_(0, rows, 0)
        table[:, :-1].index_copy_(0, rows, records[:, :-1])
        table[:, -1].index_copy_(0, rows, records[:, -1])
        self._present.touched(len(rows))

    def carry_over(self, rows: Tensor) -> None:
        """Keep last epoch's predictions of some rows for another epoch, bit for bit.

        Args:
            rows: (N,) int64 in [0, M). One that was not written then stays unwritten.

        Raises:
            ValueError: if a row lies outside of the memory.
        """
        self._check_rows(rows)
        if self._past is None:
            return
        rows = rows.to(self._past.records.device)
        records = self._past.records.index_select(0, rows)
        records[:, -1].clamp_max_(_WRITTEN_HERE)
        self._put(rows, records)

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint keeps: plain values, and in RAM the records.

        With ``path`` the records stay in their files, which are brought to the disk here. In RAM
        it is a collective of all processes.
        """
        if self.path is None and self._meet().count > 1 and self._present is not None:
            self._exchange(self._present)
        state: dict[str, Any] = {"header": self._header(), "epoch": self.epoch}
        if self.path is not None:
            if self._present is not None:
                self._present.flush()
            self._saved_epoch = self.epoch
            return state
        for name, table in (("past", self._past), ("present", self._present)):
            state[name] = None if table is None else table.records.cpu().clone()
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state_dict` was called, in the middle of an epoch or at its end.

        Raises:
            ValueError: if it is the state of a memory of other rows, classes or data, or a file is
                missing, cut off, damaged or of another run: named, and nothing is changed.
        """
        if not isinstance(state, dict) or not {"header", "epoch"} <= state.keys():
            got = sorted(state) if isinstance(state, dict) else type(state).__name__
            raise ValueError(f"expected a memory's state with 'header' and 'epoch', got {got}")
        peers = self._meet()
        run = state["header"].get("run")
        for key, value in (self._header() | {"run": run}).items():
            if state["header"].get(key) != value:
                raise ValueError(
                    f"memory: expected {key} {value!r}, got {state['header'].get(key)!r}"
                )
        if isinstance(peers, Processes):  # in RAM
            if run is not None:
                raise ValueError("path: expected the folder of the state's files, got none")
            self._load_tables(state)
            return
        epoch, before = state["epoch"], self._run
        self._run = run
        try:
            peers.on_each(lambda: self._check_files(epoch))
        except Exception:
            self._run = before
            raise
        self._close_tables()
        peers.on_each(lambda: self._reopen_part(epoch))
        self.epoch = self._saved_epoch = epoch
        self._past = self._open(self._file(epoch - 1)) if epoch > 1 else None
        self._present = self._open(self._part(epoch)) if epoch else None

    def close(self) -> None:
        """Free the memory, or bring the files to the disk and unmap them; they stay."""
        if self._present is not None:
            self._present.flush()
        self._close_tables()

    # ---- records -------------------------------------------------------------------------------

    def _to_kept_form(self, probs: Tensor | TopK, rows: int) -> Tensor | TopK:
        if isinstance(probs, TopK):
            shape, width = tuple(probs.probs.shape), self.top_k
        else:
            shape, width = tuple(probs.shape), self.num_classes
        if shape != (rows, width):
            form = f"({rows}, {self.num_classes}) probabilities"
            if self.top_k is not None:
                form += f" or TopK of ({rows}, {self._width})"
            raise ValueError(f"probs: expected {form}, got {type(probs).__name__} of {shape}")
        if isinstance(probs, TopK):
            return TopK(probs.indices.detach().long(), probs.probs.detach().float())
        if self.top_k is None:
            return probs.detach().float()
        values, indices = probs.detach().topk(self._width, dim=1)
        return TopK(indices, values.float())

    def _average(self, rows: Tensor, new: Tensor | TopK) -> Tensor | TopK:
        past, seen = self.read(rows)
        weight = (self.momentum * seen)[:, None]
        if isinstance(new, Tensor) and isinstance(past, Tensor):
            return new.lerp(past, weight)
        assert isinstance(new, TopK) and isinstance(past, TopK)  # both in the kept form
        # No class outside of both lists can be larger in the mean than one of the k.
        indices = torch.cat([new.indices, past.indices], dim=1)
        mean = self._lookup(new, indices).lerp(self._lookup(past, indices), weight)
        mean[:, self._width :][_listed(past.indices, new.indices)] = -1.0  # counted already
        values, order = mean.topk(self._width, dim=1)
        return TopK(indices.gather(1, order), values)

    def _lookup(self, past: TopK, indices: Tensor) -> Tensor:
        """Return the (N, j) probabilities of some classes."""
        hit = indices[:, :, None] == past.indices[:, None, :]
        listed = (hit * past.probs[:, None, :]).sum(dim=2)
        return torch.where(hit.any(dim=2), listed, past.tail(self.num_classes)[:, None])

    def _encode(self, probs: Tensor | TopK) -> Tensor:
        """Return (N, B) uint8 records."""
        values = probs.probs if isinstance(probs, TopK) else probs
        mass = values.sum(dim=1, keepdim=True)  # not finite if one of them is not
        kept = mass.isfinite() & (mass > 0)
        parts = [values.to(self.dtype), kept]
        if isinstance(probs, TopK):
            parts.insert(0, probs.indices.to(self._index_dtype))
        return torch.cat([part.contiguous().view(torch.uint8) for part in parts], dim=1)

    def _decode(self, records: Tensor) -> tuple[Tensor | TopK, Tensor]:
        """Return the predictions of (N, B) uint8 records and whether there are any."""
        seen = records[:, -1] != 0
        start = 0 if self.top_k is None else self._width * self._index_dtype.itemsize
        values = _view(records[:, start:-1], self.dtype).float()
        # Rounded to half precision the parts of a whole may be a little more than that.
        is_whole = self._width == self.num_classes
        least = torch.finfo(torch.float32).tiny if is_whole else 1.0
        values /= values.sum(dim=1, keepdim=True).clamp_min(least)
        if self.top_k is None:
            return values, seen
        indices = _view(records[:, :start], self._index_dtype).long()
        if self._index_dtype is torch.int16:
            indices &= 0xFFFF
        return TopK(indices, values), seen

    def _check_rows(self, rows: Tensor) -> None:
        if rows.dim() != 1 or rows.dtype != torch.int64:
            raise ValueError(
                f"rows: expected int64 of shape (N,), got {rows.dtype} of {tuple(rows.shape)}"
            )
        # On a GPU, looking would wait for the device; there the gather asserts the range itself.
        check_range(rows, self.num_rows)

    # ---- epochs --------------------------------------------------------------------------------

    def _header(self) -> dict[str, object]:
        return {
            "rows": self.num_rows,
            "classes": self.num_classes,
            "top_k": self.top_k,
            "dtype": str(self.dtype).removeprefix("torch."),
            "fingerprint": self.fingerprint,
            "run": self._run,
            "machines": self._peers.count
            if self.path is not None and self._peers is not None
            else 1,
        }

    def _meet(self) -> Machines | Processes:
        """Find those who hold a table each: machines of files, processes in RAM.

        A collective, once.
        """
        if self._peers is None:
            self._peers = Processes() if self.path is None else Machines()
        return self._peers

    def _folder(self) -> Path:
        assert self.path is not None  # in RAM nobody asks
        if self._peers is None or self._peers.count == 1:
            return self.path
        return self.path / f"machine_{self._peers.number}"

    def _file(self, epoch: int) -> Path:
        return self._folder() / f"epoch_{epoch:05d}.pskd"

    def _part(self, epoch: int) -> Path:
        return self._folder() / f"epoch_{epoch:05d}.pskd{PART}"

    def _new_table(self) -> MemoryTable:
        return MemoryTable(self.num_rows, self.bytes_per_row, self._device)

    def _open(self, path: Path) -> FileTable:
        return FileTable(path, self.num_rows, self.bytes_per_row)

    def _close_tables(self) -> None:
        for table in (self._past, self._present):
            if table is not None:
                table.close()
        self._past = self._present = None

    def _exchange(self, table: MemoryTable | FileTable) -> None:
        """Give each peer (machine, or process in RAM) the rows that the others wrote.

        A row that several wrote is the last peer's everywhere. A received row is marked, so that
        after a resume it is not sent back over what its own machine has written since.
        """
        peers, step = self._meet(), max(1, _EXCHANGE_BYTES // self.bytes_per_row)
        for start in range(0, self.num_rows, step):
            part = table.records[start : start + step]
            rows = (part[:, -1] == _WRITTEN_HERE).nonzero()
            sent = torch.cat([_view(rows.int(), torch.uint8), part[rows[:, 0]]], dim=1)
            for peer, received in enumerate(peers.all_gather(sent)):
                if peer != peers.number:
                    received[:, -1] = _WRITTEN_ELSEWHERE
                part[_view(received[:, :4], torch.int32)[:, 0].long()] = received[:, 4:]
            table.touched(step)
        table.flush()

    def _turn_files(self, saved_epoch: int | None) -> None:
        """Complete this epoch's file, make the next one's, and delete what nobody needs."""
        if self.epoch:
            # Another training in this folder would have put its own file in its place.
            self._check_file(self._part(self.epoch), self.epoch, whole=False)
            finish_file(self._part(self.epoch), self._file(self.epoch))
        header = self._header() | {"epoch": self.epoch + 1}
        create_file(self._part(self.epoch + 1), header, self.num_rows, self.bytes_per_row)
        needed = self.epoch if saved_epoch is None else saved_epoch - 1
        for file in self._folder().iterdir():
            name = _NAME.fullmatch(file.name)
            if name and int(name[1]) < min(needed, self.epoch):
                file.unlink()

    def _check_files(self, epoch: int) -> None:
        if epoch > 1:
            self._check_file(self._file(epoch - 1), epoch - 1, whole=True)
        if epoch:
            # The run may have gone on to the epoch's end after its state was saved.
            path = self._part(epoch)
            ended = not path.exists() and self._file(epoch).exists()
            self._check_file(self._file(epoch) if ended else path, epoch, whole=ended)

    def _check_file(self, path: Path, epoch: int, *, whole: bool) -> None:
        expected = self._header() | {"epoch": epoch}
        try:
            check_file(path, expected, self.num_rows, self.bytes_per_row, whole=whole)
        except (FileNotFoundError, IsADirectoryError) as error:
            got = "none" if isinstance(error, FileNotFoundError) else "a folder"
            raise ValueError(
                f"{path}: expected the predictions of epoch {epoch}, got {got}"
            ) from error

    def _reopen_part(self, epoch: int) -> None:
        if epoch and not self._part(epoch).exists():
            self._file(epoch).rename(self._part(epoch))

    def _load_tables(self, state: dict[str, Any]) -> None:
        shape = (self.num_rows, self.bytes_per_row)
        for name in ("past", "present"):
            records = state.get(name)
            if records is None:
                continue
            kind = (records.dtype, tuple(records.shape)) if isinstance(records, Tensor) else None
            if kind != (torch.uint8, shape):
                got = type(records).__name__ if kind is None else f"{kind[0]} of {kind[1]}"
                raise ValueError(
                    f"memory: expected {name} records, torch.uint8 of {shape}, got {got}"
                )
        for name in ("past", "present"):
            table = None if state.get(name) is None else self._new_table()
            if table is not None:
                table.records.copy_(state[name])
            setattr(self, f"_{name}", table)
        if self._meet().count > 1 and self._present is not None:
            # All hold these now: sent again they would go over what another writes from here on.
            written = self._present.records[:, -1]
            written[written == _WRITTEN_HERE] = _WRITTEN_ELSEWHERE
        self.epoch = state["epoch"]


def _view(part: Tensor, dtype: torch.dtype) -> Tensor:
    """Return some columns of bytes as numbers of another type."""
    # A single row counts as contiguous whatever its stride; a clone has the one that is needed.
    return part.clone(memory_format=torch.contiguous_format).view(dtype)


def _listed(indices: Tensor, others: Tensor) -> Tensor:
    """Return the (N, j) mask of the indices that are among a row's others."""
    return (indices[:, :, None] == others[:, None, :]).any(dim=2)


def _index_dtype(num_classes: int) -> torch.dtype:
    # Read back without their sign; torch has few operations on unsigned integers of 16 bits.
    return torch.int16 if num_classes <= 1 << 16 else torch.int32


def _check_options(
    num_classes: int, top_k: int | None, dtype: torch.dtype, momentum: float
) -> None:
    if top_k is not None and not 1 <= top_k <= num_classes:
        raise ValueError(f"top_k: expected 1 to {num_classes} classes, got {top_k}")
    if dtype not in _DTYPES.values():
        raise ValueError(f"dtype: expected torch.float16 or torch.float32, got {dtype}")
    if not 0.0 <= momentum < 1.0:
        raise ValueError(f"momentum: expected a number in [0, 1), got {momentum}")
