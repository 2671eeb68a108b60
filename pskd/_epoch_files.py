"""The files of a memory on one machine: one an epoch, each kept for as long as it is needed."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from pathlib import Path

from pskd._table import PART, FileTable, check_file, create_file, finish_file

__all__ = ["EpochFiles"]

_NAME = re.compile(rf"epoch_(\d+)\.pskd(?:{re.escape(PART)})?")


class EpochFiles:
    """A folder with the file of the epoch that is written and those of epochs that ended.

    Args:
        folder: is made with the first file.
        num_rows: M, of each file.
        record_bytes: B.
    """

    def __init__(self, folder: Path, num_rows: int, record_bytes: int) -> None:
        self._folder = folder
        self._shape = num_rows, record_bytes

    def _ended(self, epoch: int) -> Path:
        return self._folder / f"epoch_{epoch:05d}.pskd"

    def _part(self, epoch: int) -> Path:
        return self._folder / f"epoch_{epoch:05d}.pskd{PART}"

    def open(self, epoch: int, *, ended: bool = False) -> tuple[FileTable | None, FileTable | None]:
        """Return the table that an epoch reads, unless it has ended, and the one that it writes."""
        reads = epoch > 1 and not ended
        past = FileTable(self._ended(epoch - 1), *self._shape) if reads else None
        return past, FileTable(self._part(epoch), *self._shape) if epoch else None

    def turn(self, epoch: int, header: Mapping[str, object], needed: Collection[int]) -> None:
        """Complete an epoch's file, make the next one's, and delete what nobody needs.

        What another run left goes too, once this one has ended an epoch and so saved a state.

        Args:
            epoch: that ended; 0 before the first.
            header: of the files, but for the epoch.
            needed: the epochs whose files a saved state needs.

        Raises:
            OSError: ENOSPC where the disk has no room for another epoch.
            ValueError: if another training has put its own file in the place of the epoch's.
        """
        if epoch:
            self._check(self._part(epoch), header, epoch, whole=False)
            finish_file(self._part(epoch), self._ended(epoch))
        create_file(self._part(epoch + 1), {**header, "epoch": epoch + 1}, *self._shape)
        running = {self._ended(epoch), self._part(epoch + 1)}
        for file in self._folder.iterdir() if epoch else ():
            name = _NAME.fullmatch(file.name)
            if name and file not in running and int(name[1]) not in needed:
                file.unlink()

    def check(self, epoch: int, header: Mapping[str, object], *, ended: bool = False) -> None:
        """Raise ValueError unless the files are there that a run in this epoch goes on with.

        Args:
            epoch: of the run's state.
            header: as of `turn`.
            ended: whether the next epoch begins, which does not read what this one did.
        """
        if epoch > 1 and not ended:
            self._check(self._ended(epoch - 1), header, epoch - 1, whole=True)
        if epoch:
            # The run may have gone on to the epoch's end after its state was saved.
            path = self._part(epoch)
            ended = not path.exists() and self._ended(epoch).exists()
            self._check(self._ended(epoch) if ended else path, header, epoch, whole=ended)

    def _check(self, path: Path, header: Mapping[str, object], epoch: int, *, whole: bool) -> None:
        try:
            check_file(path, {**header, "epoch": epoch}, *self._shape, whole=whole)
        except (FileNotFoundError, IsADirectoryError) as error:
            got = "none" if isinstance(error, FileNotFoundError) else "a folder"
            raise ValueError(
                f"{path}: expected the predictions of epoch {epoch}, got {got}"
            ) from error

    def reopen(self, epoch: int) -> None:
        """Write on in an epoch's file, also if it was complete."""
        if epoch and not self._part(epoch).exists():
            self._ended(epoch).rename(self._part(epoch))
