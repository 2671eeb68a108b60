"""Sets of confidence metrics under the conventions of one source: bins, scale and unit.

Shapes: N rows (samples, tokens or boxes) of one run.

A metric's *raw* value is that of `pskd.calibration`, a fraction or nats. A preset says how many
bins the ECE has and by what a raw value is multiplied before it is shown.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from pskd.calibration import reliability_bins
from pskd.calibration.inputs import Array, correct_rows, nll_rows
from pskd.calibration.metrics import confidence_metrics

__all__ = ["PRESETS", "Metric", "Preset", "measure"]


@dataclass(frozen=True)
class Metric:
    """What a column of a table shows.

    Attributes:
        title: the column's head.
        meaning: a sentence or two.
        unit: of the shown value.
        scale: the shown value is this times the raw one.
        digits: after the decimal point.
        better: "lower", "higher", or "" for what is neither.
    """

    title: str
    meaning: str
    unit: str
    scale: float = 1.0
    digits: int = 4
    better: str = "lower"

    def text(self, raw: float) -> str:
        """Return a raw value as it is shown, without the unit."""
        return f"{raw * self.scale:.{self.digits}f}"

    def signed(self, raw: float) -> str:
        """Return a raw difference as it is shown, with its sign and without the unit."""
        text = self.text(abs(raw))
        return ("" if float(text) == 0 else "\u2212" if raw < 0 else "+") + text


@dataclass(frozen=True)
class Preset:
    """Definitions and units of the metrics of N rows.

    Attributes:
        name: as the command line takes it.
        source: whose convention it is.
        bins: equal-width confidence bins of the ECE.
        metrics: the columns, by the names of `measure`.
    """

    name: str
    source: str
    bins: int
    metrics: Mapping[str, Metric]

    def table(
        self,
        confidence: Array,
        correct: Array,
        *,
        nll: Array | None = None,
        in_top5: Array | None = None,
    ) -> dict[str, float]:
        """Return a run's row: `measure` in the units of this preset.

        Args, Raises: as `measure`.
        """
        raw = measure(confidence, correct, nll=nll, in_top5=in_top5, bins=self.bins)
        return {key: self.metrics[key].scale * value for key, value in raw.items()}


def measure(
    confidence: Array,
    correct: Array,
    *,
    nll: Array | None = None,
    in_top5: Array | None = None,
    bins: int = 15,
) -> dict[str, float]:
    """Return the raw metrics of N rows.

    Args:
        confidence: (N,) tensor or array, in [0, 1]: the probability of the predicted class.
        correct: (N,) boolean, or 0 and 1: whether that class is the label.
        nll: (N,) in nats, at least 0; None leaves ``nll`` out.
        in_top5: (N,) boolean, or 0 and 1: whether the label is among the five most probable
            classes; None leaves ``top5_error`` out.
        bins: equal-width confidence bins of the ECE.

    Returns:
        ``top1_error``, ``top5_error``, ``ece``, ``aurc`` and ``e_aurc`` as fractions, ``nll`` as
        the mean in nats.

    Raises:
        ValueError: as `pskd.calibration.reliability_bins` and `pskd.calibration.aurc`; a vector of
            another length, an ``nll`` that is negative or NaN, no row at all.
    """
    filled = reliability_bins(confidence, correct, bins=bins)
    ranked = confidence_metrics(filled, confidence, correct)
    rows = int(filled.count.sum())
    raw = {"top1_error": (rows - int(filled.correct_sum.sum())) / rows}
    if in_top5 is not None:
        raw["top5_error"] = float((~correct_rows(in_top5, rows, "in_top5")).mean())
    if nll is not None:
        raw["nll"] = float(nll_rows(nll, rows).mean(dtype="float64"))
    return raw | ranked


def _metrics(
    bins: int, fraction: tuple[str, float, int], area: tuple[str, float, int], nll_digits: int
) -> dict[str, Metric]:
    return {
        "top1_error": Metric(
            "Top-1 error", "How often the most probable class is not the label.", *fraction
        ),
        "top5_error": Metric(
            "Top-5 error", "How often the label is not among the five most probable.", *fraction
        ),
        "nll": Metric(
            "NLL", "Mean negative logarithm of the label's probability.", "nats", 1.0, nll_digits
        ),
        "ece": Metric(
            "ECE",
            "Expected calibration error: by how much confidence misses accuracy, on average over "
            f"{bins} equally wide bins of the confidence.",
            *fraction,
        ),
        "aurc": Metric(
            "AURC",
            "Area under the risk-coverage curve: the error rate among the most confident rows, "
            "averaged over how many are kept; ties count as their expectation.",
            *area,
        ),
        "e_aurc": Metric(
            "E-AURC",
            "Excess AURC: the part that a better ranking of the same predictions would remove.",
            *area,
        ),
    }


#: The conventions that a table may follow, by name.
PRESETS: Mapping[str, Preset] = {
    preset.name: preset
    for preset in (
        Preset(
            "paper",
            "the tables of the PS-KD paper (Kim et al. 2021)",
            10,
            _metrics(10, ("%", 100.0, 2), ("x 1000", 1000.0, 2), 3),
        ),
        Preset(
            "guo",
            "Guo et al. 2017, in raw fractions, as everywhere else in pskd",
            15,
            _metrics(15, ("fraction", 1.0, 4), ("fraction", 1.0, 4), 4),
        ),
    )
}
