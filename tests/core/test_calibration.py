"""The confidence metrics by what must hold for any predictions, and by hand on small ones."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pskd.calibration import (
    ConfidenceAccumulator,
    ReliabilityBins,
    aurc,
    excess_aurc,
    expected_calibration_error,
    negative_log_likelihood,
    optimal_risk_coverage_curve,
    reliability_bins,
    risk_coverage_curve,
)

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
few = settings(max_examples=50, deadline=None)


def predictions(seed: int, rows: int, classes: int = 7, dtype=torch.float32):
    """Return probabilities and labels that agree more often than not."""
    generator = torch.Generator().manual_seed(seed)
    logits = 2.0 * torch.randn(rows, classes, generator=generator, dtype=torch.float64)
    target = torch.multinomial(logits.softmax(1), 1, generator=generator).squeeze(1)
    return logits.softmax(1).to(dtype), target


def top1(probs, target):
    return probs.max(1).values, probs.argmax(1) == target


def two_classes(*confidence: float, dtype=torch.float64):
    """Return rows that predict class 0 with the given confidence."""
    first = torch.tensor(confidence, dtype=dtype)
    return torch.stack([first, 1 - first], dim=1)


# A few distinct scores, so that most rows are tied with another.
tied_rows = st.lists(st.tuples(st.sampled_from([0.2, 0.5, 0.9]), st.booleans()), min_size=1)
small_tied_rows = st.lists(
    st.tuples(st.sampled_from([0.2, 0.5]), st.booleans()), min_size=1, max_size=5
)
free_rows = st.lists(st.tuples(st.floats(0, 1, width=32), st.booleans()), min_size=1)


def columns(rows):
    confidence, correct = zip(*rows, strict=True)
    return np.array(confidence), np.array(correct)


class TestNegativeLogLikelihood:
    def test_by_hand(self):
        probs = torch.tensor([[0.5, 0.5], [0.25, 0.75]])
        value = negative_log_likelihood(probs, torch.tensor([0, 0]))
        assert value == pytest.approx((math.log(2) + math.log(4)) / 2)

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_is_torch_nll_loss(self, dtype):
        probs, target = predictions(0, 200, dtype=dtype)
        reference = torch.nn.functional.nll_loss(probs.double().log(), target)
        assert negative_log_likelihood(probs, target) == pytest.approx(float(reference))

    def test_probability_zero_at_the_label_is_infinite(self):
        assert negative_log_likelihood(two_classes(1.0, 0.5), torch.tensor([1, 0])) == math.inf

    def test_probability_one_at_the_label_is_zero(self):
        assert negative_log_likelihood(two_classes(1.0), torch.tensor([0])) == 0.0


class TestExpectedCalibrationError:
    def test_by_hand(self):
        # (0.5, 0.75]: 0.6 and 0.7, one of two right; (0.75, 1]: 0.8 and 1.0, both right.
        probs = two_classes(0.6, 0.7, 0.8, 1.0)
        value = expected_calibration_error(probs, torch.tensor([0, 1, 0, 0]), bins=4)
        assert value == pytest.approx(2 / 4 * (0.65 - 0.5) + 2 / 4 * (1.0 - 0.9))

    def test_confidence_one_shares_the_last_bin(self):
        # Alone in a bin, each of the two rows would count with its own gap.
        probs = two_classes(1.0, 0.98)
        value = expected_calibration_error(probs, torch.tensor([0, 1]), bins=10)
        assert value == pytest.approx(abs(0.5 - 0.99))

    def test_calibrated_rows_have_none(self):
        probs = two_classes(0.75, 0.75, 0.75, 0.75, 1.0)
        assert expected_calibration_error(probs, torch.tensor([0, 0, 0, 1, 0])) == 0.0

    def test_one_bin_is_the_gap_of_the_means(self):
        probs, target = predictions(1, 300, dtype=torch.float64)
        confidence, correct = top1(probs, target)
        gap = abs(float(confidence.mean()) - float(correct.double().mean()))
        assert expected_calibration_error(probs, target, bins=1) == pytest.approx(gap)

    @few
    @given(st.integers(0, 10**6), st.integers(1, 80), st.integers(1, 40))
    def test_is_torchmetrics_below_confidence_one(self, seed, rows, bins):
        metrics = pytest.importorskip(
            "torchmetrics.functional.classification",
            reason="needs torchmetrics: pip install torchmetrics",
        )
        probs, target = predictions(seed, rows)
        reference = metrics.multiclass_calibration_error(
            probs, target, num_classes=probs.size(1), n_bins=bins, norm="l1"
        )
        assert probs.max() < 1
        assert expected_calibration_error(probs, target, bins=bins) == pytest.approx(
            float(reference), abs=1e-6
        )

    @few
    @given(st.integers(0, 10**6), st.integers(1, 80), st.integers(1, 40))
    def test_lies_between_the_gap_of_the_means_and_one(self, seed, rows, bins):
        probs, target = predictions(seed, rows)
        coarse = expected_calibration_error(probs, target, bins=1)
        assert coarse - 1e-9 <= expected_calibration_error(probs, target, bins=bins) <= 1

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_dtypes_agree_within_their_own_rounding(self, dtype):
        probs, target = predictions(2, 500, dtype=torch.float64)
        exact = expected_calibration_error(probs, target, bins=1)
        rounded = expected_calibration_error(probs.to(dtype), target, bins=1)
        assert rounded == pytest.approx(exact, abs=float(torch.finfo(dtype).eps) + 0.01)


class TestReliabilityBins:
    @pytest.mark.parametrize("dtype", [np.float32, np.float64])
    @pytest.mark.parametrize("bins", [1, 3, 10, 15])
    def test_borders_belong_to_the_bin_below(self, bins, dtype):
        borders = (np.arange(1, bins + 1) / bins).astype(dtype)
        filled = reliability_bins(borders, np.ones(bins, bool), bins=bins)
        assert filled.count.tolist() == [1] * bins
        above = np.nextafter(borders[:-1], dtype(2))
        filled = reliability_bins(above, np.ones(bins - 1, bool), bins=bins)
        assert filled.count.tolist() == [0] + [1] * (bins - 1)

    def test_zero_is_in_the_first_and_one_in_the_last_bin(self):
        filled = reliability_bins([0.0, 1.0, 1.0], [0, 1, 0], bins=4)
        assert filled.count.tolist() == [1, 0, 0, 2]
        assert filled.correct_sum.tolist() == [0, 0, 0, 1]
        assert filled.accuracy.tolist()[3] == 0.5
        assert np.isnan(filled.confidence).tolist() == [False, True, True, False]

    @few
    @given(free_rows, st.integers(1, 30))
    def test_counters_count_every_row(self, rows, bins):
        confidence, correct = columns(rows)
        filled = reliability_bins(confidence, correct, bins=bins)
        assert filled.count.sum() == len(rows)
        assert filled.correct_sum.sum() == correct.sum()
        assert filled.confidence_sum.sum() == pytest.approx(confidence.sum())
        assert len(filled.edges) == bins + 1 and filled.edges[0] == 0 and filled.edges[-1] == 1
        used = filled.count > 0
        assert (filled.confidence[used] <= filled.edges[1:][used] + 1e-7).all()
        assert (filled.confidence[used] >= filled.edges[:-1][used] - 1e-7).all()

    def test_no_row_fills_no_bin(self):
        bins = reliability_bins([], [], bins=3)
        assert bins.count.tolist() == [0, 0, 0]
        assert bins.confidence_sum.dtype == np.float64

    def test_bins_of_other_widths_do_not_add(self):
        with pytest.raises(ValueError, match="expected 3 bins.*got 4"):
            ReliabilityBins.empty(3) + ReliabilityBins.empty(4)
        with pytest.raises(TypeError, match="unsupported operand"):
            ReliabilityBins.empty(3) + 4


def brute_force_curve(confidence, correct):
    """Return the risk averaged over every order of the rows that sorts the confidence."""
    curves = []
    for order in itertools.permutations(range(len(confidence))):
        ranked = confidence[list(order)]
        if (ranked[1:] <= ranked[:-1]).all():
            wrong = ~correct[list(order)]
            curves.append(np.cumsum(wrong) / np.arange(1, len(wrong) + 1))
    return np.mean(curves, axis=0)


class TestAURC:
    def test_by_hand(self):
        # Sorted: right, wrong, right, wrong -> risks 0, 1/2, 1/3, 1/2; optimum 0, 0, 1/3, 1/2.
        confidence, correct = [0.6, 0.9, 0.7, 0.8], [False, True, True, False]
        coverage, risk = risk_coverage_curve(confidence, correct)
        assert coverage.tolist() == [0.25, 0.5, 0.75, 1.0]
        assert risk == pytest.approx([0, 1 / 2, 1 / 3, 1 / 2])
        assert aurc(confidence, correct) == pytest.approx(4 / 12)
        assert excess_aurc(confidence, correct) == pytest.approx(1 / 8)

    @few
    @given(small_tied_rows)
    def test_ties_count_as_the_mean_over_their_orders(self, rows):
        confidence, correct = columns(rows)
        expected = brute_force_curve(confidence, correct)
        assert risk_coverage_curve(confidence, correct)[1] == pytest.approx(expected)
        assert aurc(confidence, correct) == pytest.approx(expected.mean())

    @few
    @given(st.one_of(tied_rows, free_rows), st.randoms())
    def test_row_permutation_changes_nothing(self, rows, random):
        shuffled = random.sample(rows, len(rows))
        assert aurc(*columns(shuffled)) == aurc(*columns(rows))
        assert excess_aurc(*columns(shuffled)) == excess_aurc(*columns(rows))

    @few
    @given(st.lists(st.booleans(), min_size=1), st.floats(0, 1))
    def test_constant_confidence_gives_the_error_rate(self, correct, score):
        error = 1 - np.mean(correct)
        assert aurc(np.full(len(correct), score), correct) == pytest.approx(error, abs=1e-12)

    @few
    @given(st.one_of(tied_rows, free_rows))
    def test_optimal_ranking_has_no_excess(self, rows):
        _, correct = columns(rows)
        assert excess_aurc(correct.astype(float), correct) == 0.0
        distinct = np.argsort(np.argsort(correct, kind="stable")).astype(float)
        assert excess_aurc(distinct, correct) == 0.0
        for ours, general in zip(
            optimal_risk_coverage_curve(correct),
            risk_coverage_curve(correct, correct),
            strict=True,
        ):
            assert ours.tolist() == general.tolist()

    @few
    @given(st.one_of(tied_rows, free_rows))
    def test_bounds(self, rows):
        confidence, correct = columns(rows)
        _, risk = risk_coverage_curve(confidence, correct)
        assert -1e-12 <= excess_aurc(confidence, correct) <= aurc(confidence, correct) <= 1
        assert risk[-1] == pytest.approx(1 - correct.mean(), abs=1e-12)
        worst = excess_aurc(~correct, correct)
        assert excess_aurc(confidence, correct) <= worst + 1e-12

    @few
    @given(free_rows)
    def test_only_the_ranking_counts(self, rows):
        confidence, correct = columns(rows)
        ranks = np.unique(confidence, return_inverse=True)[1]
        assert aurc(ranks * 3.0 - 5.0, correct) == aurc(confidence, correct)

    def test_optimum_approaches_the_closed_form(self):
        correct = np.arange(100_000) >= 30_000
        _, risk = optimal_risk_coverage_curve(correct)
        assert risk.mean() == pytest.approx(0.3 + 0.7 * math.log(0.7), abs=1e-5)

    def test_float64_confidences_are_not_tied_by_rounding(self):
        confidence = 1 - np.array([1e-10, 1e-11])
        assert aurc(confidence, [False, True]) == pytest.approx(0.25)


def batches(probs, target, cuts):
    cuts = sorted({cut % (len(target) + 1) for cut in cuts})
    sizes = np.diff([0, *cuts, len(target)]).tolist()
    return zip(probs.split(sizes), target.split(sizes), strict=True)


def one_shot(probs, target, bins):
    confidence, correct = top1(probs, target)
    return {
        "nll": negative_log_likelihood(probs, target),
        "ece": expected_calibration_error(probs, target, bins=bins),
        "aurc": aurc(confidence, correct),
        "e_aurc": excess_aurc(confidence, correct),
        "accuracy": float(correct.double().mean()),
        "count": len(target),
    }


class TestConfidenceAccumulator:
    @few
    @given(
        st.integers(0, 10**6),
        st.integers(1, 60),
        st.lists(st.integers(0, 10**6), max_size=5),
        st.sampled_from(DTYPES),
        st.integers(1, 20),
    )
    def test_equals_one_shot_for_any_split(self, seed, rows, cuts, dtype, bins):
        probs, target = predictions(seed, rows, dtype=dtype)
        whole = one_shot(probs, target, bins)
        streams = ConfidenceAccumulator(bins=bins), ConfidenceAccumulator(bins=bins)
        for some, labels in batches(probs, target, cuts):
            streams[0].update(some, labels)
            nll = -some.double()[torch.arange(len(labels)), labels].log()
            streams[1].update_from(*top1(some, labels), nll)
        for stream in streams:
            result = stream.compute()
            assert result.keys() == whole.keys()
            assert result == pytest.approx(whole, abs=1e-12)
            assert result["aurc"] == whole["aurc"] and result["count"] == rows
            assert stream.confidence.tolist() == probs.max(1).values.tolist()
            assert stream.correct.dtype == bool

    def test_goes_on_after_compute(self):
        probs, target = predictions(3, 40)
        stream = ConfidenceAccumulator()
        stream.update(probs[:10], target[:10])
        assert stream.compute() == pytest.approx(one_shot(probs[:10], target[:10], 15))
        stream.update(probs[10:], target[10:])
        assert stream.compute() == pytest.approx(one_shot(probs, target, 15))

    def test_is_compact(self):
        stream = ConfidenceAccumulator()
        for dtype in (torch.float16, torch.float32):
            stream.update(*predictions(4, 20, dtype=dtype))
        assert stream.confidence.dtype == np.float32 and stream.confidence.nbytes == 4 * 40
        assert stream.correct.nbytes == 40
        assert stream.bins.count.sum() == stream.count == 40

    def test_does_not_watch_the_callers_buffers(self):
        confidence, correct = torch.tensor([0.9, 0.6]), torch.tensor([True, False])
        stream = ConfidenceAccumulator()
        stream.update_from(confidence, correct, torch.zeros(2))
        confidence.zero_()
        correct.zero_()
        assert stream.confidence.tolist() == pytest.approx([0.9, 0.6])
        assert stream.correct.tolist() == [True, False]

    def test_empty_batch_adds_nothing(self):
        probs, target = predictions(5, 10)
        stream = ConfidenceAccumulator()
        stream.update(probs[:0], target[:0])
        stream.update_from([], [], [])
        assert stream.count == 0 and len(stream.confidence) == len(stream.correct) == 0
        stream.update(probs, target)
        stream.update(probs[:0], target[:0])
        assert stream.compute() == pytest.approx(one_shot(probs, target, 15))

    def test_infinite_nll_stays_visible(self):
        stream = ConfidenceAccumulator()
        stream.update(two_classes(1.0), torch.tensor([1]))
        stream.update(two_classes(0.5), torch.tensor([1]))
        assert stream.compute()["nll"] == math.inf

    def test_a_refused_batch_leaves_no_trace(self):
        probs, target = predictions(6, 10)
        stream = ConfidenceAccumulator()
        stream.update(probs, target)
        before = stream.compute()
        with pytest.raises(ValueError):
            stream.update(probs, target + 100)
        with pytest.raises(ValueError):
            stream.update_from([0.5], [True], [math.nan])
        assert stream.compute() == before

    @pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
    def test_cuda_equals_cpu(self):
        probs, target = predictions(7, 100)
        stream = ConfidenceAccumulator()
        stream.update(probs.cuda(), target.cuda())
        confidence, correct = top1(probs.cuda(), target.cuda())
        stream.update_from(confidence, correct, torch.zeros(100, device="cuda"))
        assert stream.count == 200
        assert aurc(confidence, correct) == aurc(*top1(probs, target))


class TestInputs:
    @pytest.mark.parametrize("dtype", DTYPES[:1] + DTYPES[2:])
    def test_numpy_equals_torch(self, dtype):
        probs, target = predictions(8, 50, dtype=dtype)
        assert one_shot(probs, target, 15) == {
            "nll": negative_log_likelihood(probs.numpy(), target.numpy()),
            "ece": expected_calibration_error(probs.numpy(), target.numpy()),
            "aurc": aurc(*(column.numpy() for column in top1(probs, target))),
            "e_aurc": excess_aurc(*(column.numpy() for column in top1(probs, target))),
            "accuracy": top1(probs, target)[1].numpy().mean(),
            "count": 50,
        }

    def test_awkward_arrays(self):
        probs, target = predictions(9, 50)
        expected = negative_log_likelihood(probs, target)
        frozen = np.asfortranarray(probs.numpy())[::-1]
        frozen.flags.writeable = False
        labels = target.numpy()[::-1].astype(">i4")
        assert negative_log_likelihood(frozen, labels) == pytest.approx(expected)
        assert negative_log_likelihood(frozen.astype(">f8"), labels) == pytest.approx(expected)
        assert negative_log_likelihood(
            frozen.astype(np.longdouble), labels.astype(np.uint8)
        ) == pytest.approx(expected)

    def test_probabilities_with_a_gradient(self):
        probs, target = predictions(10, 5)
        stream = ConfidenceAccumulator()
        stream.update(probs.requires_grad_(), target)
        assert expected_calibration_error(probs, target) == stream.compute()["ece"]

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_probabilities_an_ulp_outside_of_the_unit_range_are_brought_back(self, dtype):
        """As a product of a mean, or one minus a sum, leaves them."""
        eps = torch.finfo(dtype).eps
        probs = torch.tensor([[1.0, 0.0], [0.0, 1.0]], dtype=dtype)
        rounded = torch.tensor([[1.0 + eps, -eps], [0.0, 1.0 + eps]], dtype=dtype)
        assert (rounded > 1.0).any()
        exact, stream = ConfidenceAccumulator(), ConfidenceAccumulator()
        exact.update(probs, LABELS)
        stream.update(rounded, LABELS)
        stream.update_from(rounded.amax(1), [True, True], torch.tensor([-eps, 0.0], dtype=dtype))
        assert stream.compute() == exact.compute() | {"count": 4}
        assert negative_log_likelihood(rounded, LABELS) == 0.0
        assert expected_calibration_error(rounded, LABELS) == 0.0
        assert reliability_bins(rounded.amax(1), [True, True]).confidence_sum.tolist()[-1] == 2.0

    def test_probabilities_of_float32_may_come_as_float64(self):
        """As a list of Python's floats does: what was rounded before stays rounded."""
        above = np.nextafter(np.float32(1.0), np.float32(2.0))
        probs = np.array([[above, 0.0], [-np.finfo(np.float32).eps, above]], np.float64)
        labels = LABELS.tolist()
        assert negative_log_likelihood(probs, np.array(labels)) == 0.0
        assert reliability_bins(probs.max(1).tolist(), [True, True]).confidence_sum[-1] == 2.0
        stream = ConfidenceAccumulator()
        stream.update_from(probs.max(1).tolist(), [True, True], (-np.log(probs.max(1))).tolist())
        assert stream.compute()["nll"] == 0.0

    def test_more_than_rounding_is_refused_with_enough_digits_to_see_it(self):
        probs = torch.tensor([[1.0 + 1e-5, 0.0]])
        with pytest.raises(ValueError, match=r"got values in \[0, 1.00001"):
            negative_log_likelihood(probs, torch.tensor([0]))
        with pytest.raises(ValueError, match=r"confidence: expected .* got values in \[1.0000\d+,"):
            reliability_bins(probs[:, 0], [True])
        with pytest.raises(ValueError, match=r"nll: expected values of at least 0, got -9.9"):
            ConfidenceAccumulator().update_from([0.5], [True], np.array([-1e-5], np.float32))

    @pytest.mark.parametrize("dtype", DTYPES[:3])
    def test_a_half_precision_softmax_over_a_large_vocabulary_is_accepted(self, dtype):
        generator = torch.Generator().manual_seed(0)
        probs = torch.randn(4, 60_000, generator=generator).softmax(1).to(dtype)
        negative_log_likelihood(probs, torch.zeros(4, dtype=torch.int64))

    @pytest.mark.parametrize("correct", [[True, False], [1, 0], [1.0, 0.0]])
    def test_forms_of_correct(self, correct):
        assert aurc(torch.tensor([0.9, 0.8]), torch.tensor(correct)) == 0.25
        assert aurc(np.array([0.9, 0.8]), np.array(correct)) == 0.25


GOOD = two_classes(0.9, 0.6, dtype=torch.float32)
LABELS = torch.tensor([0, 1])
NAN = math.nan


class TestRefusals:
    @pytest.mark.parametrize(
        ("probs", "target", "message"),
        [
            (GOOD[0], LABELS, r"probs: expected shape \(N, C\).*got \(2,\)"),
            (GOOD[:, :0], LABELS, r"probs: expected shape \(N, C\).*got \(2, 0\)"),
            (GOOD, LABELS[:1], r"target: expected shape \(2,\), got \(1,\)"),
            (GOOD, LABELS[:, None], r"target: expected shape \(2,\), got \(2, 1\)"),
            (torch.eye(2, dtype=torch.int64), LABELS, "probs: expected a floating-point dtype"),
            (GOOD.to(torch.complex64), LABELS, "probs: expected real numbers, got .*complex64"),
            (np.array([["a", "b"]]), LABELS, "probs: expected real numbers"),
            (
                torch.tensor([[1.1, -0.1], [1, 0]]),
                LABELS,
                r"got values in \[-0.1\d*, 1.1\d*\]",
            ),
            (torch.tensor([[0.5, 0.5], [NAN, 1]]), LABELS, r"\[0, 1\], got values in \[nan, nan\]"),
            (torch.tensor([[0.5, 0.5], [0.5, 0.4]]), LABELS, "sum to 1, got a row .* to 0.9"),
            (GOOD, torch.tensor([0, 2]), r"labels in \[0, 2\), got labels in \[0, 2\]"),
            (GOOD, torch.tensor([-100, 1]), r"labels in \[0, 2\), got labels in \[-100, 1\]"),
            (GOOD, torch.tensor([0.0, 1.0]), "target: expected an integer dtype, got .*float32"),
            (GOOD, torch.tensor([True, False]), "target: expected an integer dtype, got .*bool"),
        ],
    )
    def test_probs_and_target(self, probs, target, message):
        for metric in (
            negative_log_likelihood,
            expected_calibration_error,
            ConfidenceAccumulator().update,
        ):
            with pytest.raises(ValueError, match=message):
                metric(probs, target)

    @pytest.mark.parametrize(
        ("confidence", "correct", "message"),
        [
            ([[0.5]], [True], r"confidence: expected shape \(N,\), got \(1, 1\)"),
            ([0.5, 0.6], [True], r"correct: expected shape \(2,\), got \(1,\)"),
            ([0.5], [[True]], r"correct: expected shape \(1,\), got \(1, 1\)"),
            ([0.5], [2], "correct: expected booleans or 0 and 1, got 2"),
            ([0.5], [0.5], "correct: expected booleans or 0 and 1, got 0.5"),
            ([0.5], [NAN], "correct: expected booleans or 0 and 1, got nan"),
            ([NAN], [True], "confidence: expected numbers, got NaN"),
            (["a"], [True], "confidence: expected real numbers"),
        ],
    )
    def test_confidence_and_correct(self, confidence, correct, message):
        for metric in (aurc, excess_aurc, risk_coverage_curve, reliability_bins):
            with pytest.raises(ValueError, match=message):
                metric(confidence, correct)
        with pytest.raises(ValueError, match=message):
            ConfidenceAccumulator().update_from(confidence, correct, [1.0])

    @pytest.mark.parametrize("confidence", [-0.1, 1.1, math.inf])
    def test_bins_hold_probabilities_only(self, confidence):
        with pytest.raises(ValueError, match=r"confidence: expected values in \[0, 1\], got"):
            reliability_bins([confidence], [True])
        with pytest.raises(ValueError, match=r"confidence: expected values in \[0, 1\], got"):
            ConfidenceAccumulator().update_from([confidence], [True], [1.0])

    @pytest.mark.parametrize("nll", [[-0.1], [NAN], [-math.inf], [0.1, 0.2], [[0.1]]])
    def test_nll(self, nll):
        with pytest.raises(ValueError, match="nll: expected"):
            ConfidenceAccumulator().update_from([0.5], [True], nll)

    @pytest.mark.parametrize("bins", [0, -1, 1.5, "15", None])
    def test_bins(self, bins):
        for call in (
            lambda: expected_calibration_error(GOOD, LABELS, bins=bins),
            lambda: reliability_bins([0.5], [True], bins=bins),
            lambda: ConfidenceAccumulator(bins=bins),
        ):
            with pytest.raises(ValueError, match="bins: expected an integer of at least 1, got"):
                call()

    @pytest.mark.parametrize(
        "call",
        [
            lambda: negative_log_likelihood(GOOD[:0], LABELS[:0]),
            lambda: expected_calibration_error(GOOD[:0], LABELS[:0]),
            lambda: aurc([], []),
            lambda: excess_aurc([], []),
            lambda: risk_coverage_curve([], []),
            lambda: optimal_risk_coverage_curve([]),
            lambda: ReliabilityBins.empty(3).expected_calibration_error,
            lambda: ConfidenceAccumulator().compute(),
        ],
    )
    def test_no_example(self, call):
        with pytest.raises(ValueError, match="got none: a metric of zero examples is undefined"):
            call()
