"""A folder that one training at a time writes to."""

from __future__ import annotations

import errno
import logging
import os
import weakref
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows, where two trainings are not kept apart
    fcntl = None  # type: ignore[assignment]

__all__ = ["FolderLock"]

logger = logging.getLogger(__name__)

_NAME = ".lock"


class FolderLock:
    """A lock that a process holds for as long as the object lives; its death releases it too.

    The file stays: whoever deleted it could leave two processes with a lock each.

    Args:
        folder: is made if there is none.

    Raises:
        ValueError: if another process holds it.
        OSError: if the file of the lock cannot be made.
    """

    _held: weakref.WeakValueDictionary[str, FolderLock] = weakref.WeakValueDictionary()
    _descriptor = -1  # of one that could not be opened

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._descriptor = os.open(folder / _NAME, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            if fcntl is not None:
                fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                self.close()
                raise ValueError(
                    f"{folder}: expected a folder for this training alone, got one that another "
                    "training writes to"
                ) from None
            # Some file systems have no locks.
            logger.warning("%s: another training here would not be noticed: %s", folder, error)

    @classmethod
    def of(cls, folder: Path) -> FolderLock:
        """Return this process's lock of a folder: a memory that resumes another one shares it."""
        name = os.path.realpath(folder)
        lock = cls._held.get(name)
        if lock is None or not lock._is_of(folder):
            lock = cls._held[name] = cls(folder)
        return lock

    def _is_of(self, folder: Path) -> bool:
        """Return whether it is the folder's lock still: the folder may have been made anew."""
        try:
            return os.path.samestat(os.fstat(self._descriptor), os.stat(folder / _NAME))
        except OSError:
            return False

    def close(self) -> None:
        """Release the lock, of which a forked process has a copy."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
        self._descriptor = -1

    def __del__(self) -> None:
        self.close()

    @classmethod
    def forget(cls) -> None:
        """Drop the copies in a forked process: a loader's worker may outlive the training."""
        for lock in list(cls._held.values()):
            lock.close()
        cls._held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=FolderLock.forget)
