"""Files and values of unknown origin: read within bounds, compared and shown without harm."""

from __future__ import annotations

import json
import os
import reprlib
import stat
from typing import Any, BinaryIO

__all__ = ["Name", "open_regular", "parse_json", "same_value", "shown"]

Name = str | os.PathLike[str]

_MOST_DIGITS = 300  # as many as a float may have

_repr = reprlib.Repr()
_repr.maxstring = _repr.maxother = 200
_repr.maxlong = 40
_repr.maxlist = _repr.maxtuple = _repr.maxdict = _repr.maxset = 20


def shown(value: object) -> str:
    """Return a value for a message: its repr, which is cut where it is long."""
    try:
        return _repr.repr(value)
    except ValueError:  # an integer of more digits than Python prints
        return f"a {type(value).__name__} of many digits"


def same_value(one: object, other: object) -> bool:
    """Return whether two values are equal, of which one may be anything that a file held."""
    try:
        return bool(one == other)
    except Exception:  # tensors and arrays compare entry by entry
        return False


def open_regular(path: Name) -> BinaryIO:
    """Open a file to read its bytes.

    Raises:
        ValueError: for a pipe, a socket or a device, where reading may wait for ever.
        OSError: if it cannot be opened.
    """
    # Opening a pipe would wait for its writer.
    flag = getattr(os, "O_NONBLOCK", 0)
    file = open(path, "rb", opener=lambda name, flags: os.open(name, flags | flag))
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise ValueError(f"{path}: expected a file, got a pipe or a device")
    return file


def parse_json(text: str | bytes) -> Any:
    """Return what JSON holds.

    Raises:
        ValueError: for text that is no JSON, is nested too deeply, or has an integer that no float
            could hold.
    """
    try:
        return json.loads(text, parse_int=_integer)
    except RecursionError:
        raise ValueError("values that are nested too deeply") from None


def _integer(digits: str) -> int:
    if len(digits) > _MOST_DIGITS:
        raise ValueError(f"an integer of {len(digits)} digits")
    return int(digits)
