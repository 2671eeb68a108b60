"""Last epoch's predictions by row: a teacher that costs no second forward.

Shapes: M rows in the memory, N rows of a call, C classes, k kept classes.

It is double-buffered by epoch: what is read is always what the last epoch wrote.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pskd.checks import check_epoch, check_keys, check_tensors
from pskd.distributed import Machines, Processes, in_all_processes, on_first_process
from pskd.files import same_value, shown
from pskd.kernels.rows import Records
from pskd.memory.epoch_files import EpochFiles
from pskd.memory.exchange import exchange, mark_received
from pskd.memory.records import WRITTEN_HERE, RecordLayout
from pskd.memory.table import FileTable, MemoryTable, check_fingerprint
from pskd.rows import check_count, check_range
from pskd.targets import TopK, row_alphas

__all__ = ["PredictionMemory"]

_MOST_EPOCHS = 1 << 31


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
    and is kept for as long as the first process's last `state_dict` needs it: one of an epoch's end
    needs that epoch's, one from inside an epoch the file before it too. The folder is locked
    against other trainings from the first epoch to `close` or the end of the process. A copy or a
    pickle holds the folder's name, not the files: once used it maps those of its epoch, as another
    process does.

    With ``top_k``, classes that the student excludes (logits of -inf) get nothing of the rest.

    Args:
        num_rows: M; rows are numbered from 0.
        num_classes: C.
        top_k: k, the classes that are kept of a prediction; the rest of its mass is spread evenly
            over the others. None keeps all.
        dtype: of the kept probabilities, float16 or float32.
        path: a folder for the files; None for RAM.
        momentum: weight of the past in what is written, in [0, 1): 0 is the paper's method, more
            an exponential average over the epochs, as in temporal ensembling.
        fingerprint: names the data set, whose rows these are; at most 2,048 bytes as JSON.
        device: where the records lie, in RAM.

    Raises:
        ValueError: if a size, the dtype, the momentum or the fingerprint is none, or ``path`` is a
            file.

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
        self._layout = RecordLayout(num_classes, top_k, dtype)
        if not 0.0 <= momentum < 1.0:
            raise ValueError(f"momentum: expected a number in [0, 1), got {momentum}")
        if path is not None and torch.device(device).type != "cpu":
            raise ValueError(f"device: expected cpu for a memory in a file, got {device}")
        if path is not None and Path(path).exists() and not Path(path).is_dir():
            raise ValueError(f"path: expected a folder for the memory's files, got the file {path}")
        self.num_rows, self.num_classes, self.top_k = num_rows, num_classes, top_k
        self.dtype, self.momentum = dtype, momentum
        self.fingerprint = check_fingerprint(fingerprint)
        self.path = None if path is None else Path(path)
        #: The epoch that is being written, from 1; 0 before the first.
        self.epoch = 0
        self._device = device
        self._run: str | None = None
        self._peers: Machines | Processes | None = None  # known when the processes first meet
        self._epoch_files: EpochFiles | None = None
        self._past: MemoryTable | FileTable | None = None
        self._present: MemoryTable | FileTable | None = None
        self._saved: Mapping[str, Any] | None = None  # the last state, which names files

    def __getstate__(self) -> dict[str, Any]:
        files = {"_past": None, "_present": None, "_epoch_files": None}
        return vars(self) | ({} if self.path is None else files)

    @property
    def available(self) -> bool:
        """Whether an epoch was written before the one that is written now."""
        return self.epoch > 1

    def turn(self, ended: int = 0, student: object = None) -> None:
        """As `next_epoch`, for `pskd.driver`."""
        self.next_epoch()

    @property
    def bytes_per_row(self) -> int:
        """The size of a record; two epochs are kept, in files more as states need them."""
        return self._layout.record_bytes

    def next_epoch(self, kept: Iterable[Mapping[str, Any]] = ()) -> None:
        """End the epoch that was written, which becomes what is read, and begin the next.

        If it fails, the memory is as it was, and it may be called again.

        Args:
            kept: with ``path``, older states of `state_dict` on the first process, whose files stay
                as those of the last one do.

        Raises:
            OSError: ENOSPC where the disk has no room for another epoch.
            ValueError: if another training writes to the same folder.
        """
        peers, present = self._meet(), self._present
        if isinstance(peers, Processes):  # in RAM
            if peers.count > 1 and present is not None:
                exchange(present, peers)
            self._past, self._present = present, self._new_table()
            self.epoch += 1
            return
        run = self._run if self.epoch else on_first_process(lambda: secrets.token_hex(8))
        if present is not None:
            in_all_processes(present.flush)  # everybody has written
            if peers.count > 1:
                peers.on_each(lambda: exchange(present, peers))
        # A framework asks the first process alone for its state.
        needed = on_first_process(lambda: self._needed([self._saved, *kept]))
        files, ended = self._files(), self.epoch
        peers.on_each(lambda: files.turn(ended, self._header() | {"run": run}))
        self._go_on(in_all_processes(lambda: files.open(ended + 1)), ended + 1, run)
        if ended:  # what another run left goes too, now that this one can have saved a state
            peers.on_each(lambda: files.delete_but(ended + 1, needed))

    def read(self, rows: Tensor) -> tuple[Tensor | TopK, Tensor]:
        """Return last epoch's predictions of some rows.

        Args:
            rows: (N,) int64 in [0, M).

        Returns:
            (N, C) float32 probabilities, or a `TopK` of (N, k) int64 and float32; and the (N,)
            bool mask of the rows that were written in the last epoch. The others hold zeros: give
            them alpha 0. On the device of ``rows``.

        Raises:
            ValueError: if a row lies outside of the memory, or the epoch of the loaded state ended.
        """
        self._check_rows(rows)
        self._check_past()
        if self._past is None:
            records = rows.new_zeros(len(rows), self.bytes_per_row, dtype=torch.uint8)
        else:
            self._past.touched(len(rows))
            records = self._past.records.index_select(0, rows.to(self._past.records.device))
        return self._layout.decode(records.to(rows.device))

    def write(self, rows: Tensor, probs: Tensor | TopK) -> None:
        """Keep this epoch's predictions of some rows, to be read in the next.

        A row that is written again keeps the later prediction. One that is not finite is not kept.

        Args:
            rows: (N,) int64 in [0, M), distinct.
            probs: (N, C) floating-point probabilities, or a `TopK` of k classes a row.

        Raises:
            ValueError: if a row lies outside of the memory, the shape is another, or a `TopK` does
                not list distinct classes of [0, C).
        """
        self._check_rows(rows)
        probs = self._layout.kept_form(probs, len(rows))
        if self._present is None:
            self.next_epoch()
        if self.momentum and self._past is not None:
            past, seen = self.read(rows)
            weight = row_alphas(self.momentum, seen)[:, None]
            probs = self._layout.average(probs, past, weight)
        self._put(rows, self._layout.encode(probs))

    def _put(self, rows: Tensor, records: Tensor) -> None:
        assert self._present is not None  # an epoch was begun
        table = self._present.records
        rows, records = rows.to(table.device), records.to(table.device)
        # A process that is killed in between leaves a row that was not written, not a torn one.
        table[:, -1].index_fill_(0, rows, 0)
        table[:, :-1].index_copy_(0, rows, records[:, :-1])
        table[:, -1].index_copy_(0, rows, records[:, -1])
        self._present.touched(len(rows))

    def records(
        self, rows: Tensor, num_classes: int, alphas: Tensor | None = None
    ) -> Records | None:
        """Return the tables of this epoch, for the compiled loss to `read` and `write` as it goes.

        Args:
            rows: (N,) int64; whether each is in [0, M) and there once is not looked at.
            num_classes: of the loss.
            alphas: as of `Records`.

        Returns:
            None where the two have to be called: on another device than the CPU, with momentum, or
            to refuse another number of classes.

        Raises:
            ValueError: as `read`.
        """
        if self._present is None or self._past is None:
            self._check_rows(rows)  # opens the files of a copy
            self._check_past()
        if self._present is None:
            self.next_epoch()
        assert self._present is not None
        is_here = rows.is_cpu and self._present.records.is_cpu
        if self.momentum or not is_here or num_classes != self.num_classes:
            return None
        for table in (self._past, self._present):
            if table is not None:
                table.touched(rows.size(0))
        past = None if self._past is None else self._past.records
        # A copy: the rows that are checked are those that are used, whoever writes to the original.
        numbers = rows.clone(memory_format=torch.contiguous_format)
        tables = numbers, past, self._present.records
        return Records(*tables, *self._layout.form, alphas)

    def carry_over(self, rows: Tensor) -> None:
        """Keep last epoch's predictions of some rows for another epoch, bit for bit.

        Args:
            rows: (N,) int64 in [0, M). One that was not written then stays unwritten.

        Raises:
            ValueError: as `read`.
        """
        self._check_rows(rows)
        self._check_past()
        if self._past is None:
            return
        rows = rows.to(self._past.records.device)
        records = self._past.records.index_select(0, rows)
        records[:, -1].clamp_max_(WRITTEN_HERE)
        self._put(rows, records)

    def _needed(self, states: Iterable[Mapping[str, Any] | None]) -> set[int]:
        """Return the epochs whose files one of this run's states goes on with."""
        own = [s for s in states if s is not None and s["header"].get("run") == self._run]
        return {s["epoch"] for s in own} | {s["epoch"] - 1 for s in own if not s.get("ended")}

    def state_dict(self, *, ended: bool = False) -> dict[str, Any]:
        """Return what a checkpoint keeps: plain values, and in RAM the records.

        With ``path`` the records stay in their files, which are brought to the disk here. In RAM
        it is a collective of all processes.

        Args:
            ended: whether the epoch is over: whoever goes on from here calls `next_epoch` first,
                and the file that this epoch read is not needed any more.
        """
        if self.path is None and self._meet().count > 1 and self._present is not None:
            exchange(self._present, self._meet())
        state: dict[str, Any] = {"header": self._header(), "epoch": self.epoch}
        if self.path is not None:
            if self._present is not None:
                self._present.flush()
            self._saved = state | {"ended": ended}
            return dict(self._saved)
        for name, table in (("past", self._past), ("present", self._present)):
            state[name] = None if table is None else table.records.cpu().clone()
        return state

    def load_state_dict(self, state: dict[str, Any], student: object = None) -> None:
        """Go on where `state_dict` was called, in the middle of an epoch or at its end.

        If it fails, the memory is as it was.

        Args:
            state: of `state_dict`.
            student: is not asked.

        Raises:
            ValueError: if it is the state of a memory of other rows, classes or data, or a file is
                missing, cut off, damaged or of another run, or another training writes there.
            OSError: if a file cannot be read or written.
        """
        peers = self._meet()
        if isinstance(peers, Processes):  # in RAM, where each process loads by itself
            self._check_state(state)
            self._load_tables(state)
            return
        # One process that raised alone would leave the others waiting.
        header = in_all_processes(lambda: self._check_state(state))
        run, epoch = header["run"], state["epoch"]
        files, ended = self._files(), state.get("ended") is True
        peers.on_each(lambda: files.check(epoch, header, ended=ended))
        tables = in_all_processes(lambda: files.open(epoch, ended=ended))
        peers.on_each(lambda: files.reopen(epoch))
        self._go_on(tables, epoch, run)
        self._saved = dict(state)

    def _check_state(self, state: dict[str, Any]) -> dict[str, Any]:
        """Return the header of a state's files; raise ValueError if it is not this memory's."""
        check_keys("a memory's state", state, ("header", "epoch"))
        saved = state["header"]
        if not isinstance(saved, dict):
            raise ValueError(f"memory: expected the header as a dict, got {shown(saved)}")
        check_epoch(state["epoch"], _MOST_EPOCHS)
        run = saved.get("run")
        if not isinstance(run, str | None):
            raise ValueError(f"memory: expected the name of a run, got {shown(run)}")
        if run is not None and self.path is None:
            raise ValueError("path: expected the folder of the state's files, got none")
        header = self._header() | {"run": run}
        for key, value in header.items():
            if not same_value(saved.get(key), value):
                raise ValueError(f"memory: expected {key} {value!r}, got {shown(saved.get(key))}")
        return header

    def close(self) -> None:
        """Free the memory, or bring the files to the disk and unmap them; they stay."""
        if self._present is not None:
            self._present.flush()
        self._close_tables()
        if self._epoch_files is not None:
            self._epoch_files.release()

    def _check_past(self) -> None:
        if self._past is None and self.epoch > 1:
            raise ValueError(
                f"memory: expected next_epoch after the state of the end of epoch {self.epoch}; to "
                "go on inside an epoch, save the state without ended=True"
            )

    def _check_rows(self, rows: Tensor) -> None:
        check_tensors(rows=rows)
        if rows.dim() != 1 or rows.dtype != torch.int64:
            raise ValueError(
                f"rows: expected int64 of shape (N,), got {rows.dtype} of {tuple(rows.shape)}"
            )
        # On a GPU, looking would wait for the device; there the gather asserts the range itself.
        check_range(rows, self.num_rows)
        if self.path is not None and self.epoch and self._present is None:  # a copy
            self._past, self._present = self._files().open(self.epoch)

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

    def _files(self) -> EpochFiles:
        assert self.path is not None  # in RAM nobody asks
        if self._epoch_files is None:
            folder, peers = self.path, self._meet()
            if peers.count > 1:
                folder = folder / f"machine_{peers.number}"
            self._epoch_files = EpochFiles(folder, self.num_rows, self.bytes_per_row)
        return self._epoch_files

    def _new_table(self) -> MemoryTable:
        return MemoryTable(self.num_rows, self.bytes_per_row, self._device)

    def _go_on(
        self, tables: tuple[FileTable | None, FileTable | None], epoch: int, run: str | None
    ) -> None:
        """Take the files of an epoch, when nothing can fail any more."""
        self._close_tables()
        self._past, self._present = tables
        self.epoch, self._run = epoch, run

    def _close_tables(self) -> None:
        for table in (self._past, self._present):
            if table is not None:
                table.close()
        self._past = self._present = None

    def _load_tables(self, state: dict[str, Any]) -> None:
        shape, epoch = (self.num_rows, self.bytes_per_row), state["epoch"]
        for name, is_there in (("past", epoch > 1), ("present", epoch > 0)):
            records = state.get(name)
            if records is None and not is_there:
                continue
            kind = (records.dtype, tuple(records.shape)) if isinstance(records, Tensor) else None
            if kind != (torch.uint8, shape):
                got = type(records).__name__ if kind is None else f"{kind[0]} of {kind[1]}"
                raise ValueError(
                    f"memory: expected {name} records, torch.uint8 of {shape}, got {got}"
                )
        tables: list[MemoryTable | None] = []
        for name in ("past", "present"):
            table = None if state.get(name) is None else self._new_table()
            if table is not None:
                table.records.copy_(state[name])
            tables.append(table)
        self._past, self._present = tables
        if self._meet().count > 1 and self._present is not None:
            mark_received(self._present)
        self.epoch = epoch
