"""What a training wrote of its epochs: metrics.json, or the log of fairseq-train."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pskd.files import open_regular, parse_json
from pskd_tools.files import named

__all__ = ["fairseq_epochs", "read_epochs"]

# As fairseq-train and fairseq-hydra-train head the line that ends an epoch.
_TRAIN_LINE = re.compile(r"(?:INFO \| train \||\[train\]\[INFO\] -) (.*)$")
_SIMPLE = re.compile(r"epoch (\d+) \| (.*)$")
# The same line in the file of --log-file, where none has a head; a validation's names its subset.
_BARE_LINE = re.compile(r'(\{"epoch": \d+, "train_.*|epoch \d+ \| (?!valid on ).* \| .*)$')
# A cascade's box heads have a teacher each: stage0/pskd/..., whose mean is kept.
_PREFIX = re.compile(r"^(stage\d+/)?(pskd/|train_)")

#: What a report draws of a line.
_QUANTITIES = ("alpha", "gradient_rescaling")


def fairseq_epochs(log: str) -> list[dict[str, float]]:
    """Return what a log of fairseq-train says of each epoch; after a resume the later line counts.

    Args:
        log: what it printed with ``--log-format simple`` or ``json``, or wrote to ``--log-file``.

    Returns:
        One record an epoch, with ``epoch`` and the numbers under the names that fairseq gives them
        in the simple format: ``loss``, ``nll_loss``, ``alpha`` and so on.
    """
    records: dict[int, dict[str, float]] = {}
    for line in log.splitlines():
        if not (found := _TRAIN_LINE.search(line) or _BARE_LINE.match(line)):
            continue
        if found[1].startswith("{"):
            values = parse_json(found[1])
            record = {key.removeprefix("train_"): float(value) for key, value in values.items()}
            records[int(record["epoch"])] = record
        elif simple := _SIMPLE.match(found[1]):
            pairs = (part.rsplit(" ", 1) for part in simple[2].split(" | "))
            records[int(simple[1])] = {name: float(value) for name, value in pairs}
    return [record | {"epoch": epoch} for epoch, record in sorted(records.items())]


def read_epochs(metrics: Path | None, log: Path | None) -> list[dict[str, float]]:
    """Return what PS-KD did in the course of a training.

    Args:
        metrics: a file of one JSON object a line, with ``epoch`` or ``iteration`` and any of
            ``pskd/alpha`` and ``pskd/gradient_rescaling``; several lines of an epoch count as
            their mean.
        log: of fairseq-train; read where there is no ``metrics``.

    Returns:
        In order, records of finite numbers: those quantities without ``pskd/``, and ``epoch``, or
        ``iteration`` if the file knows no epochs. Empty for a training without PS-KD.

    Raises:
        ValueError: a file that holds something else, naming it.
        OSError: a file that cannot be read.
    """
    path = metrics or log
    if path is None:
        return []
    with open_regular(path) as file:
        text = file.read().decode(errors="replace")
    with named(path, "expected the numbers of a training, got"):
        return _by_step(_json_lines(text) if metrics else fairseq_epochs(text))


def _json_lines(text: str) -> list[dict[str, Any]]:
    lines = []
    # After the last line break there is nothing, or half a line of a run that was stopped.
    for number, line in enumerate(text.split("\n")[:-1], start=1):
        if line.strip():
            try:
                lines.append(parse_json(line))
            except ValueError as error:
                raise ValueError(f"line {number}: {error}") from error
    return lines


def _by_step(lines: Sequence[Mapping[str, Any]]) -> list[dict[str, float]]:
    unit = "epoch" if any("epoch" in line for line in lines) else "iteration"
    found: defaultdict[float, defaultdict[str, list[float]]] = defaultdict(
        lambda: defaultdict(list)
    )
    for line in lines:
        for name, value in line.items():
            key = _PREFIX.sub("", name)
            if key in _QUANTITIES and value is not None and math.isfinite(value) and unit in line:
                found[line[unit]][key].append(value)
    return [
        {unit: step} | {key: float(np.mean(values)) for key, values in found[step].items()}
        for step in sorted(found)
    ]
