"""How those who hold a table each, processes or machines, come to hold the same rows."""

from __future__ import annotations

import torch

from pskd.distributed import Machines, Processes
from pskd.memory.records import WRITTEN_ELSEWHERE, WRITTEN_HERE, bytes_as
from pskd.memory.table import FileTable, MemoryTable

__all__ = ["exchange", "mark_received"]

_BYTES = 1 << 24  # of each peer at a time


def exchange(table: MemoryTable | FileTable, peers: Machines | Processes) -> None:
    """Give each peer the rows that the others wrote; a collective of those that hold a table.

    A row that several wrote is the last peer's everywhere. A received row is marked, so that after
    a resume it is not sent back over what its own peer has written since.
    """
    num_rows, record_bytes = table.records.shape
    step = max(1, _BYTES // record_bytes)
    for start in range(0, num_rows, step):
        part = table.records[start : start + step]
        rows = (part[:, -1] == WRITTEN_HERE).nonzero()
        sent = torch.cat([bytes_as(rows.int(), torch.uint8), part[rows[:, 0]]], dim=1)
        for peer, received in enumerate(peers.all_gather(sent)):
            if peer != peers.number:
                received[:, -1] = WRITTEN_ELSEWHERE
            part[bytes_as(received[:, :4], torch.int32)[:, 0].long()] = received[:, 4:]
        table.touched(step)
    table.flush()


def mark_received(table: MemoryTable | FileTable) -> None:
    """Mark all rows as received, where all peers loaded the same."""
    # Sent again they would go over what another writes from here on.
    written = table.records[:, -1]
    written[written == WRITTEN_HERE] = WRITTEN_ELSEWHERE
