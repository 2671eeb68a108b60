"""The output folder: never half made, and never in the place of somebody else's files."""

from __future__ import annotations

import contextlib
import glob
import logging
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

from pskd_fairseq.programs import UserError
from pskd_tools.files import read_json

logger = logging.getLogger("prepare")

RECORD = "prepare.json"


def write_lines(path: Path, lines: Iterable[str]) -> None:
    """Write one sentence a line, UTF-8, with line feeds on every system."""
    path.parent.mkdir(exist_ok=True)
    with path.open("w", encoding="utf-8", newline="\n") as stream:
        stream.writelines(line + "\n" for line in lines)


def list_files(folder: Path) -> list[str]:
    """Return the files below a folder, as sorted relative paths with slashes."""
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if not p.is_dir())


def check_out(out: Path, overwrite: bool) -> None:
    """Refuse an output folder that holds anything but what `overwrite` allows to go."""
    if out.exists() and not out.is_dir():
        raise UserError(f"{out}: is a file, not a folder")
    if not out.exists() or not any(out.iterdir()):
        return
    if not (out / RECORD).is_file():
        raise UserError(
            f"{out}: is not empty, and without {RECORD} not a prepared set; choose another --out"
        )
    if not overwrite:
        raise UserError(
            f"{out}: already holds a prepared set; choose another --out, or pass "
            "--overwrite to replace it"
        )
    try:
        foreign = sorted(set(list_files(out)) - set(read_json(out / RECORD)["files"]))
    except (ValueError, KeyError, TypeError):
        raise UserError(
            f"{out / RECORD}: cannot be read as a record of this program, so "
            "nothing is overwritten; remove the folder yourself"
        ) from None
    if foreign:
        raise UserError(
            f"{out}: holds files that are not part of the prepared set, such as "
            f"{foreign[0]}; --overwrite would delete them, move them away first"
        )


@contextlib.contextmanager
def staging(out: Path) -> Iterator[Path]:
    """Give a temporary folder beside `out` whose subfolder `data` becomes `out` if all goes well.

    An old `out` stays until the new one is complete.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    for left in out.parent.glob(f".{glob.escape(out.name)}.*.partial"):
        logger.warning(
            "%s was left by a run that was killed (or still runs); it may be removed", left
        )
    folder = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".partial", dir=out.parent))
    old = folder / "old"
    try:
        (folder / "data").mkdir()
        (folder / "text").mkdir()
        yield folder
        if out.exists():
            out.rename(old)
        (folder / "data").rename(out)
    finally:
        if old.exists() and not out.exists():
            old.rename(out)
        shutil.rmtree(folder, ignore_errors=True)
