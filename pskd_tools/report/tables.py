"""Tables of runs: a row a method, its seeds as mean and deviation; a column a quantity."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from pskd_tools.presets import Metric, Preset, measure
from pskd_tools.report.runs import TASKS, Run

__all__ = ["Column", "Row", "Table", "columns_of", "make_tables", "raw_values"]

_ARROWS = {"lower": "↓", "higher": "↑", "": ""}
_BINNED = ("ece", "scaled_ece")


@dataclass(frozen=True)
class Column:
    """A quantity of a run.

    Attributes:
        key: its name in report.json and report.csv.
        metric: how it is shown, and what it means.
        path: where it stands in a run's numbers.
        scaled: whether it is of the run after temperature scaling.
    """

    key: str
    metric: Metric
    path: tuple[str, ...]
    scaled: bool = False

    @property
    def title(self) -> str:
        """The metric's title, which also says that it is of the run after temperature scaling."""
        title = self.metric.title
        return f"{title} after scaling" if self.scaled and title != "T" else title

    @property
    def unit_and_arrow(self) -> str:
        """The unit as it is shown, and in which direction values are better."""
        return f"{self.metric.unit} {_ARROWS[self.metric.better]}".strip()

    @property
    def raw_unit(self) -> str:
        """The unit of the value before the preset's scale."""
        return self.metric.unit if self.metric.scale == 1.0 else "fraction"


@dataclass(frozen=True)
class Row:
    """The runs of one name.

    Attributes:
        runs: a seed each.
        values: raw, for each run in order.
    """

    name: str
    runs: list[Run]
    values: list[dict[str, float]]

    @property
    def has_seeds(self) -> bool:
        """Whether there are several runs."""
        return len(self.runs) > 1

    def mean(self, key: str) -> float | None:
        """Return the mean over the runs; None unless all have the quantity."""
        found = [values[key] for values in self.values if key in values]
        return float(np.mean(found)) if len(found) == len(self.runs) else None

    def deviation(self, key: str) -> float | None:
        """Return the sample standard deviation over the runs; None for a single one."""
        if not self.has_seeds or self.mean(key) is None:
            return None
        return float(np.std([values[key] for values in self.values], ddof=1))

    def cell(self, column: Column) -> str:
        """Return mean and deviation as they are shown."""
        mean, deviation = self.mean(column.key), self.deviation(column.key)
        if mean is None:
            return "-"
        shown = column.metric.text(mean)
        if deviation is not None and (column.metric.better or column.scaled):
            shown += f" ± {column.metric.text(deviation)}"
        return shown


@dataclass(frozen=True)
class Table:
    """The rows of a task, and the columns that at least one of them has."""

    task: str
    columns: list[Column]
    rows: list[Row]


def make_tables(runs: Sequence[Run], preset: Preset) -> list[Table]:
    """Return a table for each task that has runs, rows in the order in which they were given.

    Raises:
        ValueError: a run without a single number to show, or as `raw_values`.
    """
    tables = []
    for task in TASKS:
        rows: dict[str, Row] = {}
        for run in runs:
            if run.task == task:
                row = rows.setdefault(run.name, Row(run.name, [], []))
                row.runs.append(run)
                row.values.append(raw_values(run, preset))
        known = {key for row in rows.values() for values in row.values for key in values}
        if rows:
            columns = [column for column in columns_of(task, preset) if column.key in known]
            tables.append(Table(task, columns, list(rows.values())))
    return tables


# ---- columns -------------------------------------------------------------------------------------

_ap = partial(Metric, unit="%", digits=2, better="higher")
_number = partial(Metric, unit="", better="")
_points = partial(Metric, unit="points", digits=2, better="higher")
# Of the machine as much as of the method: neither better nor worse.
_seconds = partial(Metric, unit="s", better="")

_AP = "Average precision of the boxes over all classes,"


def columns_of(task: str, preset: Preset) -> list[Column]:
    """Return every column that a run of a task may have, in order."""
    own = {
        "classification": _classification,
        "detection": _detection,
        "translation": _translation,
    }
    return own[task](preset)


def _classification(preset: Preset) -> list[Column]:
    epochs = _number("epochs", "The epoch of the weights that were tested: the last.", digits=0)
    time = _seconds(
        "time per epoch", "What a training epoch takes on the machine of the run.", digits=1
    )
    return [
        *(Column(key, metric, ("last", key)) for key, metric in preset.metrics.items()),
        *_after_scaling(preset),
        Column("epochs", epochs, ("last", "epoch")),
        Column("seconds_per_epoch", time, ("seconds_per_epoch",)),
    ]


def _detection(preset: Preset) -> list[Column]:
    ece, nll = preset.metrics["ece"], preset.metrics["nll"]
    d_ece = replace(ece, title="D-ECE", meaning=ece.meaning.replace("accuracy", "precision"))
    la_ece = replace(
        ece,
        title="LaECE",
        meaning="Location-aware calibration error: by how much the score misses precision times "
        "IoU, mean over classes; with the bins of the run's own evaluation.",
    )
    box_nll = replace(
        nll,
        title="box NLL",
        meaning="Mean negative logarithm of the true class's probability over the annotated boxes "
        "themselves, the same rows for every detector.",
    )
    coco = f"{_AP} mean over the IoU thresholds 0.50 to 0.95, as COCO computes it."
    voc = f"{_AP} at an IoU of at least 0.50, as VOC computes it."
    iou = _number("IoU\u00a0≥", "The IoU from which a detection is correct.", digits=2)
    score = _number("score\u00a0≥", "The score from which a detection counts.", digits=2)
    boxes = _number("boxes", "Detections that count; what was missed is not seen.", digits=0)
    time = _seconds(
        "time per iteration", "What a training iteration takes on the machine of the run.", digits=3
    )
    return [
        Column("AP", _ap("AP", coco), ("bbox", "AP")),
        Column("AP50", _ap("AP50", f"{_AP} at an IoU of at least 0.50."), ("bbox", "AP50")),
        Column("AP75", _ap("AP75", f"{_AP} at an IoU of at least 0.75."), ("bbox", "AP75")),
        Column("voc_AP50", _ap("VOC AP50", voc), ("voc", "AP50")),
        Column("ece", d_ece, ("confidence", "d_ece")),
        Column("la_ece", la_ece, ("confidence", "la_ece")),
        *(Column(key, preset.metrics[key], ("confidence", key)) for key in ("aurc", "e_aurc")),
        Column("box_nll", box_nll, ("ground_truth_rois", "nll")),
        Column("iou_threshold", iou, ("confidence", "iou_threshold")),
        Column("score_threshold", score, ("confidence", "score_threshold")),
        Column("num_detections", boxes, ("confidence", "num_detections")),
        Column("seconds_per_iteration", time, ("seconds_per_iteration",)),
    ]


def _translation(preset: Preset) -> list[Column]:
    scores = {
        "bleu": _points("BLEU", "sacreBLEU of the detokenised translations."),
        "chrf": _points("chrF", "sacreBLEU's chrF of the same."),
        "comet": Metric(
            "COMET", "Unbabel's COMET of the same, by default wmt22-comet-da.", "", better="higher"
        ),
        "tokenised_bleu": _points(
            "tok. BLEU", "BLEU of the tokens, as fairseq-generate prints it; not sacreBLEU's."
        ),
        "top1_error": replace(preset.metrics["top1_error"], title="token error"),
    }
    scores |= {key: preset.metrics[key] for key in ("nll", "ece", "aurc", "e_aurc")}
    return [
        *(Column(key, metric, (key,)) for key, metric in scores.items()),
        *_after_scaling(preset),
    ]


def _after_scaling(preset: Preset) -> list[Column]:
    """Return the baseline that every run is compared with: its own logits, divided by T."""
    temperature = _number(
        "T",
        "The temperature by which logits are divided, fitted on validation data after training; "
        "above 1 the run was overconfident. Predictions stay as they are.",
        digits=2,
    )
    columns = [Column("temperature", temperature, ("temperature",), scaled=True)]
    for name in ("nll", "ece", "aurc"):
        metric = preset.metrics[name]
        metric = replace(
            metric, meaning=f"{metric.title} of the same predictions after temperature scaling."
        )
        columns.append(Column(f"scaled_{name}", metric, ("scaled", name), scaled=True))
    return columns


def raw_values(run: Run, preset: Preset) -> dict[str, float]:
    """Return a run's raw values by their columns' keys, without what it does not have.

    What confidence.npz gives is measured here, under the preset; the rest is what the run's own
    numbers say. An ECE over a different number of bins is omitted.

    Raises:
        ValueError: confidences or NLL out of range, or no value at all, naming the run.
    """
    try:
        values = _measured(run, preset)
    except ValueError as error:
        raise ValueError(f"{run.folder}: confidence.npz: {error}") from error
    found = {}
    for column in columns_of(run.task, preset):
        value = values.get(column.key)
        if value is None and (column.key not in _BINNED or run.bins == preset.bins):
            value = run.number(*column.path)
        if value is not None:
            found[column.key] = value
    if not found:
        raise ValueError(
            f"{run.folder}: expected numbers of a {run.task} run, got none that are known"
        )
    return found


def _measured(run: Run, preset: Preset) -> dict[str, float]:
    rows = run.rows
    values: dict[str, float] = {}
    for prefix in ("", "scaled_"):
        if f"{prefix}confidence" in rows:
            found = measure(
                rows[f"{prefix}confidence"],
                rows["correct"],
                nll=rows.get(f"{prefix}nll"),
                in_top5=rows.get("in_top5"),
                bins=preset.bins,
            )
            values |= {f"{prefix}{key}": value for key, value in found.items()}
    if "temperature" in rows:
        values["temperature"] = float(rows["temperature"])
    return values
