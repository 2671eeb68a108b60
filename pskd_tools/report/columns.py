"""The columns of each task's table, and where in a run's files their values stand."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from pskd_tools.presets import Metric, Preset, measure
from pskd_tools.report.runs import Run

__all__ = ["Column", "columns_of", "raw_values"]


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
    def raw_unit(self) -> str:
        """The unit of the value before the preset's scale."""
        return self.metric.unit if self.metric.scale == 1.0 else "fraction"


_AP = "Average precision of the boxes over all classes,"
_COCO = {
    "AP": f"{_AP} mean over the IoU thresholds 0.50 to 0.95, as COCO computes it.",
    "AP50": f"{_AP} at an IoU of at least 0.50.",
    "AP75": f"{_AP} at an IoU of at least 0.75.",
}
_percent = partial(Metric, unit="%", digits=2, better="higher")
_number = partial(Metric, unit="", better="")
_TEMPERATURE = _number(
    "T",
    "The temperature by which logits are divided, fitted on validation data after training; above "
    "1 the run was overconfident. Predictions stay as they are.",
    digits=2,
)


def columns_of(task: str, preset: Preset) -> list[Column]:
    """Return every column that a run of a task may have, in order."""
    own = {
        "classification": _classification,
        "detection": _detection,
        "translation": _translation,
    }
    return own[task](preset)


def _confidence(preset: Preset, *names: str, of: tuple[str, ...] = ()) -> list[Column]:
    """Return columns of confidence; ``of`` is where they stand in the numbers."""
    return [Column(name, preset.metrics[name], (*of, name)) for name in names]


def _after_scaling(preset: Preset) -> list[Column]:
    """Return the baseline that every run is compared with: its own logits, divided by T."""
    columns = [Column("temperature", _TEMPERATURE, ("temperature",), scaled=True)]
    for name in ("nll", "ece", "aurc"):
        metric = preset.metrics[name]
        metric = dataclasses.replace(
            metric, meaning=f"{metric.title} of the same predictions after temperature scaling."
        )
        columns.append(Column(f"scaled_{name}", metric, ("scaled", name), scaled=True))
    return columns


def _seconds(of: str, digits: int) -> Column:
    metric = Metric(
        f"time per {of}",
        f"What a training {of} takes on the machine of the run.",
        "s",
        digits=digits,
        better="",  # of the machine as much as of the method
    )
    return Column(f"seconds_per_{of}", metric, (f"seconds_per_{of}",))


def _classification(preset: Preset) -> list[Column]:
    epochs = _number("epochs", "The epoch of the weights that were tested: the last.", digits=0)
    return [
        *_confidence(preset, *preset.metrics, of=("last",)),
        *_after_scaling(preset),
        Column("epochs", epochs, ("last", "epoch")),
        _seconds("epoch", 1),
    ]


def _detection(preset: Preset) -> list[Column]:
    columns = [Column(k, _percent(k, text), ("bbox", k)) for k, text in _COCO.items()]
    voc = _percent("VOC AP50", f"{_AP} at an IoU of at least 0.50, as VOC computes it.")
    columns.append(Column("voc_AP50", voc, ("voc", "AP50")))
    ece, area, excess = _confidence(preset, "ece", "aurc", "e_aurc", of=("confidence",))
    d_ece = dataclasses.replace(
        ece.metric, title="D-ECE", meaning=ece.metric.meaning.replace("accuracy", "precision")
    )
    la_ece = dataclasses.replace(
        ece.metric,
        title="LaECE",
        meaning="Location-aware calibration error: by how much the score misses precision times "
        "IoU, mean over classes; with the bins of the run's own evaluation.",
    )
    columns += [
        dataclasses.replace(ece, metric=d_ece, path=("confidence", "d_ece")),
        Column("la_ece", la_ece, ("confidence", "la_ece")),
        area,
        excess,
    ]
    nll = dataclasses.replace(
        preset.metrics["nll"],
        title="box NLL",
        meaning="Mean negative logarithm of the true class's probability over the annotated boxes "
        "themselves, the same rows for every detector.",
    )
    columns.append(Column("box_nll", nll, ("ground_truth_rois", "nll")))
    for title, key, digits, text in (
        ("IoU\u00a0≥", "iou_threshold", 2, "The IoU from which a detection is correct."),
        ("score\u00a0≥", "score_threshold", 2, "The score from which a detection counts."),
        ("boxes", "num_detections", 0, "Detections that count; what was missed is not seen."),
    ):
        metric = _number(title, text, digits=digits)
        columns.append(Column(key, metric, ("confidence", key)))
    return [*columns, _seconds("iteration", 3)]


def _translation(preset: Preset) -> list[Column]:
    scored = partial(Metric, unit="points", digits=2, better="higher")
    bleu = scored("BLEU", "sacreBLEU of the detokenised translations.")
    chrf = scored("chrF", "sacreBLEU's chrF of the same.")
    comet = Metric(
        "COMET", "Unbabel's COMET of the same, by default wmt22-comet-da.", "", 1.0, 4, "higher"
    )
    tokenised = scored(
        "tok. BLEU", "BLEU of the tokens, as fairseq-generate prints it; not sacreBLEU's."
    )
    error, *confidence = _confidence(preset, "top1_error", "nll", "ece", "aurc", "e_aurc")
    error = dataclasses.replace(
        error, metric=dataclasses.replace(error.metric, title="token error")
    )
    return [
        Column("bleu", bleu, ("bleu",)),
        Column("chrf", chrf, ("chrf",)),
        Column("comet", comet, ("comet",)),
        Column("tokenised_bleu", tokenised, ("tokenised_bleu",)),
        error,
        *confidence,
        *_after_scaling(preset),
    ]


def raw_values(run: Run, preset: Preset) -> dict[str, float]:
    """Return a run's raw values by their columns' keys, without what it does not have.

    What confidence.npz gives is measured here, under the preset; the rest is what the run's own
    numbers say. An ECE that they tell of other bins is no ECE of this preset and left out.

    Raises:
        ValueError: confidences or NLL out of range, naming the run.
    """
    try:
        measured = _measured(run, preset)
    except ValueError as error:
        raise ValueError(f"{run.folder}: confidence.npz: {error}") from error
    values = {}
    for column in columns_of(run.task, preset):
        found = measured.get(column.key)
        if found is None and not (column.key in _BINNED and _bins(run) != preset.bins):
            found = _told(run.numbers, column.path)
        if found is not None:
            values[column.key] = found
    return values


_BINNED = ("ece", "scaled_ece")


def _measured(run: Run, preset: Preset) -> dict[str, float]:
    rows = run.rows
    if not rows:
        return {}
    values = measure(
        rows["confidence"],
        rows["correct"],
        nll=rows.get("nll"),
        in_top5=rows.get("in_top5"),
        bins=preset.bins,
    )
    if "scaled_confidence" in rows:
        scaled = measure(
            rows["scaled_confidence"],
            rows["correct"],
            nll=rows.get("scaled_nll"),
            bins=preset.bins,
        )
        values |= {f"scaled_{key}": value for key, value in scaled.items()}
    if "temperature" in rows:
        values["temperature"] = float(rows["temperature"])
    return values


def _bins(run: Run) -> int:
    """Return how many bins the run's own ECE has: 15 where it does not say."""
    for told in (run.numbers.get("confidence", {}), run.numbers.get("last", {}), run.numbers):
        bins = told.get("bins")
        if isinstance(bins, int):
            return bins
    return 15


def _told(numbers: Mapping[str, Any], path: tuple[str, ...]) -> float | None:
    *outer, key = path
    found = numbers
    for name in outer:
        found = found.get(name) or {}
    value = found.get(key)
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    return None
