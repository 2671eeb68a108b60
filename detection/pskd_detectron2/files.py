"""Paths as Detectron2 takes them: whatever a handler of its PathManager is registered for."""

from __future__ import annotations

import contextlib
import logging
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

from detectron2.utils.file_io import PathManager
from pskd_detection import write_results
from pskd_detection.coco_format import is_remote

logger = logging.getLogger("detectron2." + __name__)


def local_path(path: str | os.PathLike) -> Path:
    """Return where a file or folder is on this machine; a remote one is fetched first."""
    return Path(PathManager.get_local_path(os.fspath(path)))


@contextlib.contextmanager
def output_folder(path: str | os.PathLike, *known: str) -> Iterator[Path]:
    """Give a local folder to write files to: ``path``, or one whose files are copied there then.

    ``known`` are names of files that are to be in the local folder if they are in ``path``.
    """
    if not is_remote(path):
        yield Path(path)
        return
    remote = os.fspath(path)
    with tempfile.TemporaryDirectory() as folder:
        for name in known:
            if PathManager.isfile(os.path.join(remote, name)):
                with PathManager.open(os.path.join(remote, name), "rb") as file:
                    Path(folder, name).write_bytes(file.read())
        yield Path(folder)
        PathManager.mkdirs(remote)
        for local in Path(folder).iterdir():
            with PathManager.open(os.path.join(remote, local.name), "wb") as file:
                file.write(local.read_bytes())


def save_results(output_dir: str | os.PathLike, results: Mapping, *, evaluation: bool) -> None:
    """Write a run's numbers as `write_results` does, and log where."""
    name = "evaluation.json" if evaluation else "results.json"
    with output_folder(output_dir, name) as folder:
        write_results(folder, results, evaluation=evaluation)
    logger.info("results: %s", os.path.join(output_dir, name))
