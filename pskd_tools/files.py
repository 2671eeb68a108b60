"""Files that are read within bounds, and written so that a reader finds them whole or not at all.

What is read may be damaged or made to do harm: every reader raises ValueError, naming the file, and
allocates no more than the file can need. What is written is written aside, then renamed.
"""

from __future__ import annotations

import contextlib
import csv
import io
import json
import math
import os
import secrets
import shutil
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pskd.files import Name, open_regular, parse_json, shown

__all__ = [
    "csv_text",
    "named",
    "read_json",
    "read_npz",
    "read_yaml",
    "write_json",
    "written_aside",
    "written_together",
]

_MOST_BYTES = 1 << 30  # of the arrays of a file
_MOST_NESTED = 100  # collections of a YAML file
_MOST_ALIASES = 32  # of a YAML file: nested, they stand for at most 130,000 nodes

_MOST_TOLD = 300  # characters of an error

# ---- reading -------------------------------------------------------------------------------------


@contextlib.contextmanager
def named(
    name: object,
    expected: str,
    errors: type[Exception] | tuple[type[Exception], ...] = Exception,
) -> Iterator[None]:
    """Turn an error of what a file holds into a ValueError: ``NAME: EXPECTED ERROR``, in one line.

    Args:
        name: of the file.
        expected: such as "expected an image, got".
        errors: kinds to turn; all by default, since readers of damaged files raise many kinds.
    """
    try:
        yield
    except errors as error:
        # A KeyError says no more than the key.
        is_bare = isinstance(error, LookupError | EOFError) or not str(error)
        told = " ".join((repr(error) if is_bare else str(error)).split())
        if len(told) > _MOST_TOLD:
            told = f"{told[:_MOST_TOLD]}..."
        raise ValueError(f"{name}: {expected} {told}") from error


def read_json(path: Name) -> dict[str, Any]:
    """Read a file that holds one JSON object.

    Raises:
        ValueError: naming the file, if it holds something else.
        OSError: if it cannot be read.
    """
    with open_regular(path) as file:
        text = file.read()
    with named(path, "expected JSON, got"):
        value = parse_json(text)
    if not isinstance(value, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(value).__name__}")
    return value


def read_yaml(path: Name) -> Any:
    """Read a YAML file; no code in it is run.

    Raises:
        ValueError: naming the file, if it is none, is nested too deeply, or has so many aliases
            that a small file could stand for a huge value.
        OSError: if it cannot be read.
    """
    import yaml  # which only those need who read such files

    with open_regular(path) as file:
        content = file.read()
    with named(path, "expected YAML, got"):
        text = content.decode()
        aliases = depth = 0
        for event in yaml.parse(text):
            aliases += isinstance(event, yaml.AliasEvent)
            depth += isinstance(event, yaml.CollectionStartEvent)
            depth -= isinstance(event, yaml.CollectionEndEvent)
            if depth > _MOST_NESTED:  # to parse more of them takes the square of their number
                raise ValueError("values nested too deeply")
        if aliases > _MOST_ALIASES:
            raise ValueError(f"{aliases} aliases, more than {_MOST_ALIASES}")
        return yaml.safe_load(text)


def read_npz(path: Name) -> dict[str, np.ndarray]:
    """Read the arrays of a file that numpy.savez wrote; never a pickle.

    Raises:
        ValueError: naming the file, if it is none, is damaged, holds more than 1 GiB, or an array
            that claims to be larger than its bytes.
        OSError: if it cannot be read.
    """
    with (
        open_regular(path) as file,
        named(path, "expected arrays as numpy.savez writes them:"),
        zipfile.ZipFile(file) as archive,
    ):
        members = archive.infolist()
        if (size := sum(member.file_size for member in members)) > _MOST_BYTES:
            raise ValueError(f"{size:,} bytes of arrays, more than {_MOST_BYTES:,}")
        return {
            member.filename.removesuffix(".npy"): _read_array(archive, member) for member in members
        }


def _read_array(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> np.ndarray:
    with archive.open(member) as stream:
        # numpy takes the memory that the header asks for before it reads.
        if np.lib.format.read_magic(stream) == (1, 0):
            shape, _, dtype = np.lib.format.read_array_header_1_0(stream)
        else:
            shape, _, dtype = np.lib.format.read_array_header_2_0(stream)
        if math.prod(shape) * max(dtype.itemsize, 1) > member.file_size:
            raise ValueError(
                f"{member.filename}: shape {shown(shape)} and dtype {dtype} in "
                f"{member.file_size:,} bytes"
            )
        stream.seek(0)
        array: np.ndarray = np.lib.format.read_array(stream, allow_pickle=False)
        return array


# ---- writing -------------------------------------------------------------------------------------


@contextlib.contextmanager
def written_aside(path: Name) -> Iterator[Path]:
    """Give a new, empty file to write to, which becomes ``path`` if all goes well.

    Raises:
        OSError: naming ``path`` and the cause, if it cannot be written; what was there stays, and
            nothing is left beside it.
    """
    path = Path(path)
    with _aside(path) as aside:
        yield aside
        os.replace(aside, path)


@contextlib.contextmanager
def written_together(paths: Sequence[Name]) -> Iterator[list[Path]]:
    """As `written_aside`, for files that belong together: all are replaced, or none is.

    Of those that are there a copy is kept for as long as the others may fail.
    """
    targets = [Path(path) for path in paths]
    with contextlib.ExitStack() as stack:
        asides = [stack.enter_context(_aside(path)) for path in targets]
        yield asides
        before = {path: stack.enter_context(_aside(path)) for path in targets if path.exists()}
        for path, copy in before.items():
            shutil.copy(path, copy)
        done = []
        try:
            for aside, path in zip(asides, targets, strict=True):
                os.replace(aside, path)
                done.append(path)
        except BaseException:
            for path in done:
                os.replace(before[path], path) if path in before else path.unlink()
            raise


@contextlib.contextmanager
def _aside(path: Path) -> Iterator[Path]:
    """Make a file beside another, and remove it in the end if it is still there."""
    # A name that nobody can guess, and O_EXCL: no link of somebody else's is followed.
    aside = path.with_name(f"{path.stem}.{secrets.token_hex(8)}.part{path.suffix}")
    try:
        os.close(os.open(aside, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
        yield aside
    except (OSError, RuntimeError) as error:
        cause = _cause(error)
        if cause is None or cause.filename not in (None, aside, os.fspath(aside)):
            raise
        if cause.errno is None:
            raise OSError(f"{path}: {cause}") from error
        raise OSError(cause.errno, cause.strerror, os.fspath(path)) from error
    finally:
        aside.unlink(missing_ok=True)


def _cause(error: BaseException | None) -> OSError | None:
    """Return what the system said: torch's writer of archives hides it behind a RuntimeError."""
    while error is not None and not isinstance(error, OSError):
        error = error.__cause__ or error.__context__
    return error


def csv_text(columns: Sequence[str], rows: Iterable[Mapping[str, object]]) -> str:
    """Return a table as CSV, in which no spreadsheet takes a cell of text for a formula."""
    text = io.StringIO()
    table = csv.DictWriter(text, columns, lineterminator="\n")
    table.writerow({column: _cell(column) for column in columns})
    table.writerows({key: _cell(value) for key, value in row.items()} for row in rows)
    return text.getvalue()


def _cell(value: object) -> object:
    if not isinstance(value, str) or not value.startswith(("=", "+", "-", "@", "\t", "\r", "\n")):
        return value
    try:
        float(value)
    except ValueError:
        return f"'{value}"
    return value


def write_json(path: Name, value: object, *, indent: int | None = None) -> Path:
    """Write strict JSON aside and rename it, so that a reader never finds half a file.

    NaN and infinity, which JSON does not have, become null; numpy's numbers and arrays become
    numbers and lists, paths text.

    Args:
        path: the file; its folder must exist.
        value: what to write.
        indent: as of `json.dumps`.

    Raises:
        TypeError: for what JSON cannot hold; the file is left as it was.
    """
    text = json.dumps(_plain(value), allow_nan=False, indent=indent)
    with written_aside(path) as aside:
        aside.write_text(text + "\n", encoding="utf-8")
    return Path(path)


def _plain(value: object) -> object:
    if isinstance(value, Mapping):
        return {key: _plain(entry) for key, entry in value.items()}
    if isinstance(value, np.ndarray):
        return _plain(value.tolist())
    if isinstance(value, (list, tuple)):
        return [_plain(entry) for entry in value]
    if isinstance(value, np.generic):
        return _plain(value.item())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return str(value) if isinstance(value, os.PathLike) else value
