"""Tables of records of one size: in memory, or in a file that is complete or not used.

A file begins with a header (JSON, padded to one page), then come the records. It is written beside
its final name, with room for all records taken on the disk before the first is written: a full disk
shows then, as an error, and not as a signal in the middle of an epoch. When it is complete its
checksum joins the header and it takes its name. Shapes: M rows, B bytes a record.
"""

from __future__ import annotations

import errno
import json
import mmap
import os
import shutil
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch

from pskd.files import open_regular, parse_json, shown

__all__ = [
    "PART",
    "FileTable",
    "MemoryTable",
    "check_file",
    "check_fingerprint",
    "create_file",
    "finish_file",
]

#: Ends the name of a file whose epoch has not ended.
PART = ".part"
FORMAT = "pskd memory 1"
_HEADER_BYTES = 4096
_FINGERPRINT_BYTES = 2048  # of the header; the rest needs less than 400
_CHUNK_BYTES = 1 << 24
# Pages that were touched count as resident until they are given back to the system's cache; a fault
# maps the pages around it too, on Linux 64 KiB of them.
_RESIDENT_BYTES = 1 << 28
_FAULT_BYTES = 1 << 16


class MemoryTable:
    """M records of zeros on a device.

    Attributes:
        records: (M, B) uint8.
    """

    def __init__(self, rows: int, record_bytes: int, device: torch.device | str) -> None:
        if torch.device(device).type == "cpu":  # numpy's zeros take no memory until written
            self.records = torch.from_numpy(np.zeros((rows, record_bytes), dtype=np.uint8))
        else:
            self.records = torch.zeros(rows, record_bytes, dtype=torch.uint8, device=device)

    def touched(self, rows: int) -> None:
        """Take note of an access; nothing to do here."""

    def flush(self) -> None:
        """Bring what was written to the disk; nothing to do here."""

    def close(self) -> None:
        """Free the records."""
        self.records = self.records.new_empty(0, self.records.size(1))


class FileTable:
    """M records in a mapped file that `create_file` made.

    Several processes of one machine may map the same file and write different rows of it.

    Attributes:
        records: (M, B) uint8 on the CPU, backed by the file.
    """

    def __init__(self, path: Path, rows: int, record_bytes: int) -> None:
        self.path = path
        with open(path, "r+b") as file:
            self._map = mmap.mmap(file.fileno(), 0)
        body = np.frombuffer(self._map, dtype=np.uint8, offset=_HEADER_BYTES)
        self.records = torch.from_numpy(body.reshape(rows, record_bytes))
        self._touched = 0

    def touched(self, rows: int) -> None:
        """Take note that so many rows were read or written, and bound the resident memory."""
        self._touched += rows * _FAULT_BYTES
        if min(self._touched, len(self._map)) > _RESIDENT_BYTES and hasattr(self._map, "madvise"):
            self._map.madvise(mmap.MADV_DONTNEED)  # of a file: its pages stay in the cache
            self._touched = 0

    def flush(self) -> None:
        """Bring what was written to the disk."""
        self._map.flush()

    def close(self) -> None:
        """Unmap the file; what was written stays in it."""
        self.records = self.records.new_empty(0, self.records.size(1))
        self._map.close()


def create_file(path: Path, header: Mapping[str, object], rows: int, record_bytes: int) -> None:
    """Write a header and take room for M records of zeros.

    Raises:
        OSError: ENOSPC where the disk has no room, with nothing left behind.
    """
    size = _HEADER_BYTES + rows * record_bytes
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    try:
        with open(path, "xb") as file:
            file.write(_encode(header))
            _allocate(file.fileno(), size)
    except BaseException as error:
        path.unlink(missing_ok=True)
        number = errno.EFBIG if isinstance(error, OverflowError) else getattr(error, "errno", None)
        if number not in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT):
            raise
        free = shutil.disk_usage(path.parent).free
        raise OSError(
            number,
            f"no room for an epoch's predictions: expected {size:,} free bytes, got {free:,}; "
            "what is there stays as it is",
            str(path),
        ) from error


def finish_file(part: Path, path: Path) -> None:
    """Turn a file whose records are all written into one that may be read, under its own name."""
    header = _read_header(part)
    with open(part, "r+b") as file:
        header["crc32"] = _checksum(file)
        file.seek(0)
        file.write(_encode(header))
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)


def check_file(
    path: Path, expected: Mapping[str, object], rows: int, record_bytes: int, *, whole: bool
) -> None:
    """Look at a file before its records are used.

    Args:
        path: the file.
        expected: the header that `create_file` was given.
        rows: M.
        record_bytes: B.
        whole: whether it must be complete; else the checksum is not looked at.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: if it is no such file, one of other rows, classes, data or run, cut off,
            not complete, or damaged.
    """
    header = _read_header(path)
    for key, value in expected.items():
        if header.get(key) != value:
            hint = ", that of another training" if key == "run" else ""
            raise ValueError(
                f"{path}: expected {key} {value!r}, got {shown(header.get(key))}{hint}"
            )
    size = _HEADER_BYTES + rows * record_bytes
    if path.stat().st_size != size:
        raise ValueError(f"{path}: expected {size:,} bytes, got {path.stat().st_size:,}: cut off")
    if not whole:
        return
    if "crc32" not in header:
        raise ValueError(f"{path}: expected a complete epoch, got one that has not ended")
    with open(path, "rb") as file:
        found = _checksum(file)
    if found != (saved := header["crc32"]):
        crc = f"{saved:#x}" if isinstance(saved, int) and 0 <= saved < 1 << 32 else shown(saved)
        raise ValueError(f"{path}: damaged: expected CRC-32 {crc}, got {found:#x}")


def check_fingerprint(fingerprint: str) -> str:
    """Return the name of a data set; raise ValueError unless it is text that a header can hold."""
    if not isinstance(fingerprint, str):
        raise ValueError(f"fingerprint: expected text, got {shown(fingerprint)}")
    if (size := len(json.dumps(fingerprint))) > _FINGERPRINT_BYTES:
        raise ValueError(
            f"fingerprint: expected at most {_FINGERPRINT_BYTES:,} bytes as JSON, got {size:,}"
        )
    return fingerprint


def _encode(header: Mapping[str, object]) -> bytes:
    text = json.dumps({"format": FORMAT, **header}).encode()
    assert len(text) < _HEADER_BYTES
    return text.ljust(_HEADER_BYTES)


def _read_header(path: Path) -> dict[str, object]:
    with open_regular(path) as file:
        text = file.read(_HEADER_BYTES)
    try:
        header = parse_json(text)
    except ValueError as error:
        raise ValueError(f"{path}: expected a file of {FORMAT!r}, got another") from error
    found = header.get("format") if isinstance(header, dict) else None
    if not isinstance(header, dict) or found != FORMAT:
        got = "another" if found is None else shown(found)
        raise ValueError(f"{path}: expected a file of {FORMAT!r}, got {got}")
    return header


def _checksum(file: BinaryIO) -> int:
    checksum = 0
    file.seek(_HEADER_BYTES)
    while chunk := file.read(_CHUNK_BYTES):
        checksum = zlib.crc32(chunk, checksum)
    return checksum


def _allocate(descriptor: int, size: int) -> None:
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(descriptor, 0, size)
    else:  # macOS
        os.ftruncate(descriptor, size)
