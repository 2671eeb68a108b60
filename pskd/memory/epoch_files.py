"""The files of a memory on one machine: one an epoch, each kept for as long as it is needed."""

from __future__ import annotations

import contextlib
import logging
import re
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

from pskd.memory.folder_lock import FolderLock
from pskd.memory.table import PART, FileTable, check_file, create_file, finish_file

__all__ = ["EpochFiles"]

logger = logging.getLogger(__name__)

_NAME = re.compile(rf"epoch_(\d+)\.pskd(?:{re.escape(PART)})?")


class EpochFiles:
    """A folder with the file of the epoch that is written and those of epochs that ended.

    Who writes there holds the lock of the folder, from `turn` or `reopen` to `release`.

    Args:
        folder: is made with the first file.
        num_rows: M, of each file.
        record_bytes: B.
    """

    def __init__(self, folder: Path, num_rows: int, record_bytes: int) -> None:
        self._folder = folder
        self._shape = num_rows, record_bytes
        self._lock: FolderLock | None = None

    def _ended(self, epoch: int) -> Path:
        return self._folder / f"epoch_{epoch:05d}.pskd"

    def _part(self, epoch: int) -> Path:
        return self._folder / f"epoch_{epoch:05d}.pskd{PART}"

    def _written(self, epoch: int) -> Path:
        """Return the file that an epoch writes: the run may have gone on to the epoch's end."""
        path = self._part(epoch)
        return self._ended(epoch) if not path.exists() and self._ended(epoch).exists() else path

    def open(self, epoch: int, *, ended: bool = False) -> tuple[FileTable | None, FileTable | None]:
        """Return the table that an epoch reads, unless it has ended, and the one that it writes."""
        reads = epoch > 1 and not ended
        past = FileTable(self._ended(epoch - 1), *self._shape) if reads else None
        return past, FileTable(self._written(epoch), *self._shape) if epoch else None

    def turn(self, epoch: int, header: Mapping[str, object]) -> None:
        """Complete an epoch's file and make the next one's; may be called again if it failed.

        Args:
            epoch: that ended; 0 before the first.
            header: of the files, but for the epoch.

        Raises:
            OSError: ENOSPC where the disk has no room for another epoch.
            ValueError: if another training writes there, or has put its own file in the place of
                the epoch's.
        """
        with self._locked():
            if epoch:
                self._check(self._written(epoch), header, epoch, whole=False)
                self._unfinish(epoch)
            # First what may fail: the room for the next epoch.
            following = self._part(epoch + 1)
            create_file(following, {**header, "epoch": epoch + 1}, *self._shape)
            if epoch:
                try:
                    finish_file(self._part(epoch), self._ended(epoch))
                except BaseException:
                    following.unlink(missing_ok=True)
                    raise

    def delete_but(self, epoch: int, needed: Collection[int]) -> None:
        """Delete all files, also another run's, but for the running epoch's and those needed.

        What fails is logged: the epoch has begun.

        Args:
            epoch: that runs.
            needed: the epochs whose files a saved state needs.
        """
        running = {self._ended(epoch - 1), self._part(epoch)}
        try:
            files = list(self._folder.iterdir())
        except OSError as error:
            logger.warning("files that nobody needs could not be looked for: %s", error)
            return
        for file in files:
            name = _NAME.fullmatch(file.name)
            if name and file not in running and int(name[1]) not in needed:
                try:
                    file.unlink()
                except OSError as error:  # tried again an epoch later
                    logger.warning("a file that nobody needs could not be deleted: %s", error)

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
            path = self._written(epoch)
            self._check(path, header, epoch, whole=path == self._ended(epoch))

    def _check(self, path: Path, header: Mapping[str, object], epoch: int, *, whole: bool) -> None:
        try:
            check_file(path, {**header, "epoch": epoch}, *self._shape, whole=whole)
        except (FileNotFoundError, IsADirectoryError) as error:
            got = "none" if isinstance(error, FileNotFoundError) else "a folder"
            raise ValueError(
                f"{path}: expected the predictions of epoch {epoch}, got {got}"
            ) from error

    def reopen(self, epoch: int) -> None:
        """Write on in an epoch's file, also if it was complete.

        Raises:
            ValueError: if another training writes there.
        """
        with self._locked():
            if epoch:
                self._unfinish(epoch)

    def _unfinish(self, epoch: int) -> None:
        if (path := self._written(epoch)) != self._part(epoch):
            path.rename(self._part(epoch))

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """Hold the folder's lock from here on, unless what is done fails."""
        if self._lock is not None:
            yield
            return
        self._lock = FolderLock.of(self._folder)
        try:
            yield
        except BaseException:
            self.release()
            raise

    def release(self) -> None:
        """Let another training write to the folder; the end of the process does it too."""
        self._lock = None
