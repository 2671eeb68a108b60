"""The metrics of a run under a preset: against torchmetrics, hand-made rows and the core."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pskd.calibration import ConfidenceAccumulator
from pskd_tools.presets import PRESETS, measure

# Three of four are right; the bins of both presets hold one row each.
CONFIDENCE, CORRECT = [0.95, 0.85, 0.75, 0.55], [True, True, False, True]


def rows(seed: int = 0, count: int = 3000, classes: int = 12):
    generator = torch.Generator().manual_seed(seed)
    logits = 2.0 * torch.randn(count, classes, generator=generator)
    target = torch.multinomial((0.6 * logits).softmax(1), 1, generator=generator)[:, 0]
    return logits.softmax(1), target


def vectors(probs: torch.Tensor, target: torch.Tensor) -> dict[str, torch.Tensor]:
    confidence, predicted = probs.max(1)
    return {
        "confidence": confidence,
        "correct": predicted == target,
        "nll": -probs.gather(1, target[:, None])[:, 0].log(),
        "in_top5": (probs.topk(5, dim=1).indices == target[:, None]).any(1),
    }


@pytest.mark.parametrize(("preset", "percent"), [("paper", 100.0), ("guo", 1.0)])
def test_the_units_are_the_presets(preset, percent):
    # ECE by hand: the gaps are 0.05, 0.15, 0.75 and 0.45. AURC: 0, 0, 1/3, 1/4; optimum 0, 0, 0,
    # 1/4.
    nll, top5 = [0.1, 0.2, 1.5, 0.6], [True, True, True, False]
    table = PRESETS[preset].table(CONFIDENCE, CORRECT, nll=nll, in_top5=top5)
    area = 1000.0 if preset == "paper" else 1.0
    assert table == pytest.approx(
        {
            "top1_error": 0.25 * percent,
            "top5_error": 0.25 * percent,
            "nll": 0.6,
            "ece": 0.35 * percent,
            "aurc": (1 / 3 + 1 / 4) / 4 * area,
            "e_aurc": 1 / 3 / 4 * area,
        }
    )


def test_it_is_what_the_core_measures():
    probs, target = rows()
    found = measure(**vectors(probs, target), bins=10)
    everything = ConfidenceAccumulator(bins=10)
    everything.update(probs, target)
    expected = everything.compute()
    assert found.pop("top1_error") == pytest.approx(1.0 - expected.pop("accuracy"))
    assert found.pop("top5_error") < 0.5
    expected.pop("count")
    assert found == pytest.approx(expected, rel=1e-6)
    assert measure(CONFIDENCE, CORRECT).keys() == {"top1_error", "ece", "aurc", "e_aurc"}


@pytest.mark.parametrize("preset", PRESETS.values(), ids=list(PRESETS))
def test_errors_and_ece_are_those_of_torchmetrics(preset):
    metrics = pytest.importorskip(
        "torchmetrics.functional.classification",
        reason="needs torchmetrics: pip install torchmetrics",
    )
    probs, target = rows(1)
    # torchmetrics counts a confidence of exactly 1 in a bin of its own.
    assert probs.max() < 1.0
    options = {"num_classes": probs.size(1)}
    raw = measure(**vectors(probs, target), bins=preset.bins)
    ece = metrics.multiclass_calibration_error(probs, target, n_bins=preset.bins, **options)
    assert raw["ece"] == pytest.approx(float(ece), abs=1e-5)
    for key, top in (("top1_error", 1), ("top5_error", 5)):
        hits = metrics.multiclass_accuracy(probs, target, average="micro", top_k=top, **options)
        assert raw[key] == pytest.approx(1.0 - float(hits), abs=1e-6)


@pytest.mark.parametrize("preset", PRESETS.values(), ids=list(PRESETS))
def test_every_metric_is_named_with_its_unit(preset):
    probs, target = rows(2)
    table = preset.table(**vectors(probs, target))
    assert table.keys() == preset.metrics.keys()
    for metric in preset.metrics.values():
        assert metric.title and metric.unit and metric.meaning.endswith(".")
        assert metric.better == "lower"
    assert f"{preset.bins} equally wide bins" in preset.metrics["ece"].meaning
    assert PRESETS["paper"].metrics["ece"].text(0.01774) == "1.77"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"correct": [True]}, r"correct: expected shape \(4,\)"),
        ({"nll": [0.1]}, r"nll: expected shape \(4,\)"),
        ({"nll": [0.1, -1.0, 0.0, 0.0]}, "nll: expected values of at least 0, got -1"),
        ({"nll": [np.nan] * 4}, "nll: expected values of at least 0"),
        ({"in_top5": [True]}, r"in_top5: expected shape \(4,\)"),
        ({"in_top5": [0.5] * 4}, "in_top5: expected booleans"),
        ({"confidence": [], "correct": []}, "at least one example"),
    ],
)
def test_bad_rows_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        measure(**{"confidence": CONFIDENCE, "correct": CORRECT, **change})
