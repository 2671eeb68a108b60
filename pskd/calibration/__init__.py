"""How far a classifier's confidence can be trusted, and the temperature that mends it."""

from pskd.calibration.bins import ReliabilityBins, reliability_bins
from pskd.calibration.metrics import (
    ConfidenceAccumulator,
    expected_calibration_error,
    negative_log_likelihood,
)
from pskd.calibration.risk_coverage import (
    aurc,
    excess_aurc,
    optimal_risk_coverage_curve,
    risk_coverage_curve,
)
from pskd.calibration.temperature import fit_temperature

__all__ = [
    "ConfidenceAccumulator",
    "ReliabilityBins",
    "aurc",
    "excess_aurc",
    "expected_calibration_error",
    "fit_temperature",
    "negative_log_likelihood",
    "optimal_risk_coverage_curve",
    "reliability_bins",
    "risk_coverage_curve",
]
