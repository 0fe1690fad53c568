"""How well predictions agree with measurements."""

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def score_predictions(predicted: Sequence[float], measured: Sequence[float]) -> dict[str, float]:
    """RMSPE, shares within ±5 % and ±10 %, and Spearman's rank correlation.

    Raises:
        ValueError: for fewer than two values, or values that are not positive and finite.
    """
    p, m = np.array(predicted, dtype=float), np.array(measured, dtype=float)
    if len(p) != len(m) or len(p) < 2:
        raise ValueError(f"need two or more pairs of predictions and measurements, got {len(p)} and {len(m)}")
    if not (np.isfinite(p).all() and np.isfinite(m).all() and (m > 0).all()):
        raise ValueError("predictions and measurements must be finite, and measurements positive")
    errors = p / m - 1
    return {
        "rmspe": float(np.sqrt(np.mean(errors**2))),
        "within_5_percent": float(np.mean(np.abs(errors) <= 0.05)),
        "within_10_percent": float(np.mean(np.abs(errors) <= 0.10)),
        "spearman": _spearman(p, m),
    }


def error_bar(predicted: Sequence[float], measured: Sequence[float], coverage: float = 0.95) -> float:
    """The relative error that a prediction of another vector keeps below with this probability.

    The ⌈(n + 1) · coverage⌉-th smallest of the errors of n vectors that the prediction did not see, or the
    largest where there are too few (split conformal prediction: Lei et al. 2018, section 2.2).
    """
    errors = np.sort(np.abs(np.array(predicted) / np.array(measured) - 1))
    rank = math.ceil((len(errors) + 1) * coverage)
    return float(errors[min(rank, len(errors)) - 1])


def fit_line(macs: Sequence[float], latencies_ms: Sequence[float]) -> tuple[float, float]:
    """Intercept and slope of latency over MACs: the baseline that a predictor must beat."""
    slope, intercept = np.polyfit(np.array(macs, dtype=float), np.array(latencies_ms), 1)
    return float(intercept), float(slope)


def _spearman(first: Array, second: Array) -> float:
    a, b = _average_ranks(first), _average_ranks(second)
    if np.ptp(a) == 0 or np.ptp(b) == 0:
        return math.nan
    return float(np.corrcoef(a, b)[0, 1])


def _average_ranks(values: Array) -> Array:
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    averages: Array = last - (counts - 1) / 2
    return averages[inverse]
