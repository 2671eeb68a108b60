"""Numbers of a training: a line on the console, a line of metrics.json, and TensorBoard."""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pskd.files import parse_json
from pskd_tools.files import written_aside

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

__all__ = ["MetricsLog"]

logger = logging.getLogger(__name__)


class MetricsLog:
    """Writes what the first process measured.

    ``metrics.json`` has one JSON object a line, as Detectron2 writes it, with iterations from 0.
    TensorBoard's files lie beside it, if TensorBoard is installed.

    Args:
        output_dir: made if there is none; None writes nothing at all.
        epoch: the epoch that a resumed run goes on after. Lines of later ones, which the run that
            was stopped may have written, are dropped; with 0 all are.
    """

    def __init__(self, output_dir: str | os.PathLike[str] | None, epoch: int = 0) -> None:
        self._path: Path | None = None
        self._board: SummaryWriter | None = None
        if output_dir is None:
            return
        self._path = Path(output_dir) / "metrics.json"
        self._path.parent.mkdir(parents=True, exist_ok=True)
        last = _drop_lines_after(self._path, epoch)
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            logger.info("TensorBoard is not installed: metrics are in %s only", self._path)
        else:
            self._board = SummaryWriter(os.fspath(output_dir), purge_step=last + 1)

    def write(self, values: Mapping[str, float | None]) -> None:
        """Write named numbers, with ``epoch`` and ``iteration``; what is not finite is null."""
        if self._path is None:
            return
        finite = {k: v for k, v in values.items() if v is not None and math.isfinite(v)}
        line = {name: finite.get(name) for name in values}
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line, allow_nan=False) + "\n")
        shown = [f"{k} {v}" if isinstance(v, int) else f"{k} {v:.4g}" for k, v in finite.items()]
        logger.info("  ".join(shown))
        if self._board is not None:
            for name, value in finite.items():
                if name not in ("epoch", "iteration"):
                    self._board.add_scalar(name, value, values["iteration"])
            self._board.flush()

    def close(self) -> None:
        """Close TensorBoard's file."""
        if self._board is not None:
            self._board.close()


def _drop_lines_after(path: Path, epoch: int) -> int:
    """Rewrite metrics.json; return the last iteration in it."""
    kept = [line for line in _lines(path) if line["epoch"] <= epoch]
    with written_aside(path) as aside:
        aside.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
    return max((int(line["iteration"]) for line in kept), default=-1)


def _lines(path: Path) -> list[dict[str, Any]]:
    """Return the whole lines of a file that may end in half of one, or be none of ours."""
    lines = []
    text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    for row in text.splitlines():
        try:
            line = parse_json(row)
        except ValueError:
            continue
        if isinstance(line, dict) and {"epoch", "iteration"} <= line.keys():
            lines.append(line)
    return lines
