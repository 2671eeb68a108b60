"""What a finished run leaves in its folder, as `pskd report` reads it.

Shapes: N samples of the test set, M of the training set.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from torch import Tensor

from pskd.files import parse_json
from pskd_classification.data import Images, Splits
from pskd_classification.evaluation import Rows
from pskd_tools.files import csv_text, write_json, written_aside

__all__ = [
    "read_epochs",
    "write_confidence",
    "write_csv",
    "write_examples",
    "write_test_pictures",
]

SHOWN_EXAMPLES = 24
SHOWN_MISTAKES = 500


def write_confidence(
    folder: Path,
    rows: Rows,
    splits: Splits,
    scaled: Rows | None = None,
    temperature: float | None = None,
) -> None:
    """Write confidence.npz: what the model says of each test image, also ``scaled``."""
    names = {"ids": np.array(splits.test.ids), "class_names": np.array(splits.class_names)}
    arrays = rows._asdict() | names
    if scaled is not None:
        arrays |= {
            "scaled_confidence": scaled.confidence,
            "scaled_nll": scaled.nll,
            "temperature": np.float64(temperature),
        }
    with written_aside(folder / "confidence.npz") as aside:
        np.savez_compressed(aside, **arrays)


def write_test_pictures(folder: Path, rows: Rows, test: Images) -> None:
    """Write test_pictures.json: the mistakes with the highest NLL.

    Whatever two runs disagree on most, one of them has wrong.
    """
    wrong = np.flatnonzero(~rows.correct)
    worst = wrong[np.argsort(-rows.nll[wrong], kind="stable")][:SHOWN_MISTAKES]
    pictures = {test.ids[row]: _data_uri(test, row) for row in worst.tolist()}
    write_json(folder / "test_pictures.json", pictures)


def read_epochs(folder: Path) -> list[dict]:
    """Return the lines of metrics.json, one an epoch, those before a resume too."""
    lines = (folder / "metrics.json").read_text(encoding="utf-8").splitlines()
    return [parse_json(line) for line in lines]


def write_csv(folder: Path) -> None:
    """Write metrics.csv, a row an epoch, from metrics.json."""
    epochs = read_epochs(folder)
    columns = list(dict.fromkeys(key for epoch in epochs for key in epoch))
    with written_aside(folder / "metrics.csv") as aside:
        aside.write_text(csv_text(columns, epochs), encoding="utf-8")


def write_examples(folder: Path, splits: Splits, statistics: tuple[Tensor, Tensor]) -> None:
    """Write what happened to each training sample, by `ExampleStats.compute`, to examples.npz.

    reweighted.json holds those whose gradient PS-KD took most and least of, with their pictures.
    """
    train, class_names = splits.train, splits.class_names
    difficulty, rescaling = (values.numpy() for values in statistics)
    with written_aside(folder / "examples.npz") as aside:
        np.savez_compressed(
            aside,
            ids=np.array(train.ids),
            label=train.targets.numpy(),
            noisy=splits.noisy,
            difficulty=difficulty,
            rescaling=rescaling,
            class_names=np.array(class_names),
        )
    known = np.flatnonzero(np.isfinite(rescaling))
    if not len(known):  # cross-entropy re-weights nothing
        (folder / "reweighted.json").unlink(missing_ok=True)
        return
    order = known[np.argsort(rescaling[known], kind="stable")]

    def shown(row: int) -> Mapping:
        return {
            "id": train.ids[row],
            "label": class_names[int(train.targets[row])],
            "rescaling": rescaling[row],
            "difficulty": difficulty[row],
            "image": _data_uri(train, int(row)),
        }

    most, least = order[:SHOWN_EXAMPLES], order[::-1][:SHOWN_EXAMPLES]
    content = {"most": [shown(row) for row in most], "least": [shown(row) for row in least]}
    write_json(folder / "reweighted.json", content)


def _data_uri(images: Images, row: int) -> str:
    buffer = io.BytesIO()
    picture = images.picture(row)
    picture.thumbnail((64, 64))
    picture.save(buffer, format="PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
