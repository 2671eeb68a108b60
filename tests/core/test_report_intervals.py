"""The intervals of a report: against a plain slow bootstrap, known quantiles, and by coverage."""

from __future__ import annotations

import sys

import made_up_runs as made
import numpy as np
import pytest

from pskd_tools.presets import measure
from pskd_tools.report import intervals
from pskd_tools.report.intervals import (
    RESAMPLES,
    RowMetrics,
    draws,
    grouped_interval,
    interval_over_seeds,
    percentile_interval,
    resampled,
)
from pskd_tools.report.sentences import SentenceMetrics, bleu, chrf

BINS = 10


def rows(seed: int, count: int = 200, *, ties: bool = False) -> dict[str, np.ndarray]:
    found = made.scaled(made.rows(seed, count))
    if ties:
        found["confidence"] = np.round(found["confidence"], 1)
    return found


def repeated(arrays: dict[str, np.ndarray], times: np.ndarray) -> dict[str, float]:
    """Measure rows that are really there several times, by the functions of the core."""
    drawn = {key: np.repeat(v, times) for key, v in arrays.items() if key != "temperature"}
    plain = measure(
        drawn["confidence"],
        drawn["correct"],
        nll=drawn["nll"],
        in_top5=drawn["in_top5"],
        bins=BINS,
    )
    scaled = measure(
        drawn["scaled_confidence"], drawn["correct"], nll=drawn["scaled_nll"], bins=BINS
    )
    del scaled["top1_error"]
    return plain | {f"scaled_{key}": value for key, value in scaled.items()}


# ---- over test examples --------------------------------------------------------------------------


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("units", [200, 30])
def test_a_weighted_row_is_a_row_that_is_there_several_times(units, ties):
    arrays = rows(1, ties=ties)
    unit = np.arange(200) if units == 200 else np.random.default_rng(0).integers(units, size=200)
    run = RowMetrics(arrays, unit, units, BINS)
    for weights, _ in zip(draws(units), range(20), strict=False):
        assert run(weights) == pytest.approx(repeated(arrays, weights[unit]))


def test_the_interval_is_that_of_a_plain_bootstrap():
    first, second = rows(1, 60), rows(2, 60)
    unit = np.arange(60)
    runs = [[RowMetrics(arrays, unit, 60, BINS)] for arrays in (first, second)]
    fast = resampled(runs, [60, 60], joint=True)
    slow = [(repeated(first, w), repeated(second, w)) for w in draws(60)]
    assert len(slow) == RESAMPLES
    for key in ("top1_error", "nll", "aurc", "e_aurc", "scaled_aurc"):
        interval = percentile_interval(0.0, fast[1][key] - fast[0][key])
        want = np.quantile([b[key] - a[key] for a, b in slow], [0.025, 0.975])
        assert interval == pytest.approx(want.tolist(), abs=1e-12)


def test_the_ece_s_interval_is_centred_on_the_difference():
    values = np.random.default_rng(0).normal(3.0, 1.0, 2000)
    low, high = percentile_interval(1.0, values, centred=True)
    assert (low, high) == pytest.approx((1.0 - 1.96, 1.0 + 1.96), abs=0.15)
    low, high = percentile_interval(1.0, values)
    assert (low, high) == pytest.approx((3.0 - 1.96, 3.0 + 1.96), abs=0.15)


def test_draws_are_the_same_every_time_but_for_runs_that_share_no_rows():
    run = [RowMetrics(rows(1), np.arange(200), 200, BINS)]
    joint, again = (resampled([run, run], [200, 200], joint=True) for _ in range(2))
    apart = resampled([run, run], [200, 200], joint=False)
    for key in joint[0]:
        assert (joint[0][key] == joint[1][key]).all() and (joint[0][key] == again[0][key]).all()
    assert abs(np.corrcoef(apart[0]["nll"], apart[1]["nll"])[0, 1]) < 0.2


def test_an_infinite_nll_has_no_interval():
    arrays = rows(1)
    arrays["nll"][3] = np.inf
    (found,) = resampled([[RowMetrics(arrays, np.arange(200), 200, BINS)]], [200], joint=True)
    assert percentile_interval(np.inf, found["nll"]) is None
    assert percentile_interval(0.1, found["nll"]) is None
    assert percentile_interval(0.1, found["ece"]) is not None


def test_about_19_of_20_intervals_hold_the_truth(monkeypatch):
    """Truth is the mean over test sets of this size: of fewer rows an ECE is larger."""
    monkeypatch.setattr(intervals, "RESAMPLES", 300)
    rng = np.random.default_rng(7)
    size, trials, keys = 500, 150, ("top1_error", "nll", "ece", "aurc")

    def drawn():
        """Rows of two models that share their difficulty: the second is right more often."""
        sure, luck = rng.uniform(0.3, 1.0, size), rng.uniform(size=size)
        for skill in (1.6, 1.0):
            correct = luck < sure**skill
            nll = np.where(correct, -np.log(sure), 2.0 + skill * sure)
            yield {"confidence": sure, "correct": correct, "nll": nll}

    def differences(pair):
        first, second = (
            measure(r["confidence"], r["correct"], nll=r["nll"], bins=BINS) for r in pair
        )
        return {key: second[key] - first[key] for key in keys}

    many = [differences(drawn()) for _ in range(2000)]
    truth = {key: np.mean([found[key] for found in many]) for key in keys}
    hits = dict.fromkeys(keys, 0)
    for _ in range(trials):
        pair = list(drawn())
        shown = differences(pair)
        runs = [[RowMetrics(arrays, np.arange(size), size, BINS)] for arrays in pair]
        first, second = resampled(runs, [size, size], joint=True)
        for key in keys:
            change = second[key] - first[key]
            low, high = percentile_interval(shown[key], change, centred=key == "ece")
            hits[key] += low <= truth[key] <= high
    assert all(0.89 <= count / trials <= 0.99 for count in hits.values()), hits


def test_sentences_are_drawn_whole():
    """Of tokens that are alike within a sentence, there is less to learn than of as many others."""
    sentence = np.repeat(np.arange(40), 10)
    change = np.repeat(np.random.default_rng(0).normal(size=40), 10)
    group = np.zeros(400, int)
    (whole,) = grouped_interval(change, group, sentence, 1)
    (single,) = grouped_interval(change, group, np.arange(400), 1)
    assert 2.5 < (whole[1] - whole[0]) / (single[1] - single[0]) < 4.0
    reach = 1.96 * change[::10].std() / np.sqrt(40)
    assert whole == pytest.approx((change.mean() - reach, change.mean() + reach), rel=0.15)


def test_a_group_s_interval_is_that_of_its_rows():
    rng = np.random.default_rng(1)
    change, group = rng.normal(size=300), rng.integers(0, 3, 300)
    for interval, number in zip(
        grouped_interval(change, group, np.arange(300), 3), range(3), strict=True
    ):
        own = change[group == number]
        reach = 1.96 * own.std() / np.sqrt(len(own))
        assert interval == pytest.approx((own.mean() - reach, own.mean() + reach), abs=0.06)


# ---- over seeds ----------------------------------------------------------------------------------


def test_seeds_that_are_paired_and_seeds_that_are_not():
    stats = pytest.importorskip("scipy.stats", reason="needs scipy: pip install scipy")
    first, second = [0.30, 0.34, 0.29], [0.26, 0.31, 0.27]
    paired = stats.ttest_rel(second, first).confidence_interval()
    assert interval_over_seeds(first, second, paired=True) == pytest.approx(tuple(paired), abs=1e-6)
    second = [*second, 0.2]
    welch = stats.ttest_ind(second, first, equal_var=False).confidence_interval()
    assert interval_over_seeds(first, second, paired=False) == pytest.approx(tuple(welch), abs=1e-6)
    assert interval_over_seeds([0.5, 0.5], [0.5, 0.5], paired=True) == (0.0, 0.0)
    assert interval_over_seeds([0.5, np.inf], [0.5, 0.5], paired=False) is None


def test_missing_scipy_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy.special", None)
    with pytest.raises(ImportError, match="pip install scipy"):
        interval_over_seeds([0.5, 0.6], [0.5, 0.7], paired=True)


# ---- BLEU and chrF -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "translations",
    [
        ["the cat sat on the mat today", "a dog", "nothing at all of it here"],
        ["the cat", "dog", ""],
        ["", "", ""],
    ],
)
def test_scores_are_sacrebleus(translations):
    sacrebleu = pytest.importorskip("sacrebleu", reason="needs sacrebleu: pip install sacrebleu")
    references = ["the cat sat on the mat", "a small dog barks", "it is all here"]
    found = []
    for metric in (sacrebleu.BLEU(), sacrebleu.CHRF()):
        found.append(np.array(metric._extract_corpus_statistics(translations, [references])))
        ours = bleu(found[0].sum(axis=0)) if len(found) == 1 else chrf(found[1].sum(axis=0))
        assert ours == pytest.approx(metric.corpus_score(translations, [references]).score)
    measured = SentenceMetrics(*found)
    weights = np.array([2, 0, 1])
    kept = [translations[0], translations[0], translations[2]]
    against = [[references[0], references[0], references[2]]]
    assert measured(weights) == pytest.approx(
        {
            "bleu": sacrebleu.BLEU().corpus_score(kept, against).score,
            "chrf": sacrebleu.CHRF().corpus_score(kept, against).score,
        }
    )
