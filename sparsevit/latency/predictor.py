"""The additive latency predictor: a base and one saving per gene and ratio, never decreasing.

Legend: V vectors of a fit; F features, one per gene and non-zero choice.
"""

import itertools
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sparsevit.sparsity import SparsitySpace, SparsityVector

SCHEMA_VERSION = 2
Array = NDArray[np.float64]


@dataclass(frozen=True)
class LatencySetting:
    """What was measured, and on what. A prediction holds for the same setting only."""

    device: str
    num_threads: int
    torch_version: str
    dtype: str
    batch_size: int
    image_size: tuple[int, int]
    backbone: str


@dataclass(frozen=True)
class LatencyPredictor:
    """Milliseconds of a backbone's forward pass at any vector of a space.

    Attributes:
        base_ms: the dense forward pass.
        terms_ms: what a gene at a choice adds to the base (≤ 0): one row per gene, one entry per
            choice of the space.
        setting: what was measured.
        scores: how well it predicts vectors that were held out of the fit.
        date: when it was calibrated, ISO 8601.
        provenance: more about the machine, for people.
    """

    space: SparsitySpace
    base_ms: float
    terms_ms: tuple[tuple[float, ...], ...]
    setting: LatencySetting
    scores: Mapping[str, float] = field(default_factory=dict)
    date: str = ""
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        values = np.array([self.base_ms, *(term for row in self.terms_ms for term in row)])
        if not np.isfinite(values).all() or self.base_ms <= 0:
            raise ValueError(f"latencies must be finite and the base positive, got base {self.base_ms} ms")
        shape = (self.space.num_genes, len(self.space.choices))
        if len(self.terms_ms) != shape[0] or any(len(row) != shape[1] for row in self.terms_ms):
            raise ValueError(
                f"the table must have {shape[0]} rows of {shape[1]} terms, one per gene and choice"
            )

    def predict(self, sparsity: SparsityVector) -> float:
        """Milliseconds of one forward pass.

        Raises:
            ValueError: if the vector is not in the calibrated space.
        """
        self.space.validate(sparsity)
        index = {choice: position for position, choice in enumerate(self.space.choices)}
        return self.base_ms + sum(row[index[r]] for row, r in zip(self.terms_ms, sparsity, strict=True))

    def predict_all(self) -> tuple[Array, Array]:
        """Every vector of the space with its milliseconds: [V, genes] in lexicographic order, and [V]."""
        terms, choices = np.array(self.terms_ms), np.array(self.space.choices)
        ratios, latencies = np.empty((1, 0)), np.array([self.base_ms])
        first = 0
        for size in self.space.group_sizes:
            index = np.array([*itertools.combinations_with_replacement(range(len(choices)), size)])
            added = terms[np.arange(first, first + size), index].sum(axis=1)
            latencies = (latencies[:, None] + added).ravel()
            ratios = np.hstack(
                (np.repeat(ratios, len(index), axis=0), np.tile(choices[index], (len(ratios), 1)))
            )
            first += size
        return ratios, latencies

    @classmethod
    def fit(
        cls,
        space: SparsitySpace,
        vectors: Sequence[SparsityVector],
        latencies_ms: Sequence[float],
        setting: LatencySetting,
        *,
        macs: Callable[[SparsityVector], float],
        noise: float,
    ) -> "LatencyPredictor":
        """Least squares with savings that never shrink as a ratio grows (relative errors weigh equally).

        What the measurements leave open follows the MACs: every step is a priori worth what the
        straight line of latency over MACs says, give or take as much again (the most probable table
        under Gaussian noise and prior).

        Args:
            macs: additive over the genes.
            noise: relative standard error of a latency; the larger, the more the prior counts.
        """
        features_VF = np.array([_steps(space, vector) for vector in vectors])
        target_V = np.array(latencies_ms)
        weights_V = 1 / target_V
        design = np.column_stack((np.ones(len(vectors)), -features_VF)) * weights_V[:, None]
        _, slope = fit_line([macs(vector) for vector in vectors], latencies_ms)
        prior_F = max(slope, 0.0) * _macs_of_steps(space, macs)
        spread_F = np.maximum(prior_F, 0.3 * prior_F.mean())
        trust_F = noise / spread_F if prior_F.any() else np.zeros_like(prior_F)
        prior_rows = np.column_stack((np.zeros(len(trust_F)), np.diag(trust_F)))
        solution = _nonnegative_least_squares(
            np.vstack((design, prior_rows)), np.concatenate((target_V * weights_V, trust_F * prior_F))
        )
        savings = solution[1:].reshape(space.num_genes, len(space.choices) - 1).cumsum(axis=1)
        terms = tuple((0.0, *(-saving for saving in row)) for row in savings.tolist())
        return cls(space, float(solution[0]), terms, setting)

    def save(self, path: Path) -> None:
        """Write JSON, all or nothing."""
        content = {
            "schema_version": SCHEMA_VERSION,
            "date": self.date,
            "setting": asdict(self.setting),
            "provenance": dict(self.provenance),
            "scores": dict(self.scores),
            "depths": list(self.space.depths),
            "choices": list(self.space.choices),
            "base_ms": self.base_ms,
            "terms_ms": {
                name: list(row) for name, row in zip(self.space.gene_names, self.terms_ms, strict=True)
            },
        }
        partial = path.with_name(path.name + ".partial")
        partial.write_text(json.dumps(content, indent=2))
        os.replace(partial, path)

    @classmethod
    def load(cls, path: Path) -> "LatencyPredictor":
        """Read what `save` wrote.

        Raises:
            ValueError: if the file is broken, of another schema version or not finite.
        """
        if not path.is_file():
            raise ValueError(
                f"there is no latency table {path}: `python -m sparsevit.latency calibrate` writes one"
            )
        try:
            content: dict[str, Any] = json.loads(path.read_text())
            if content["schema_version"] != SCHEMA_VERSION:
                raise ValueError(
                    f"schema version {content['schema_version']}, this release reads {SCHEMA_VERSION}"
                )
            setting = content["setting"] | {"image_size": tuple(content["setting"]["image_size"])}
            space = SparsitySpace(tuple(content["depths"]), tuple(content["choices"]))
            return cls(
                space,
                content["base_ms"],
                tuple(tuple(content["terms_ms"][name]) for name in space.gene_names),
                LatencySetting(**setting),
                content["scores"],
                content["date"],
                content["provenance"],
            )
        except (json.JSONDecodeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} is not a usable latency table: {error}; calibrate again") from error


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


def fit_line(macs: Sequence[float], latencies_ms: Sequence[float]) -> tuple[float, float]:
    """Intercept and slope of latency over MACs: the baseline that a predictor must beat."""
    slope, intercept = np.polyfit(np.array(macs, dtype=float), np.array(latencies_ms), 1)
    return float(intercept), float(slope)


def _steps(space: SparsitySpace, vector: SparsityVector) -> list[float]:
    """Thermometer code: for every gene and choice above the first, whether the gene reaches it."""
    return [float(ratio >= choice) for ratio in vector for choice in space.choices[1:]]


def _macs_of_steps(space: SparsitySpace, macs: Callable[[SparsityVector], float]) -> Array:
    """What each step of the thermometer code saves, the other genes dense."""
    steps = []
    for gene in range(space.num_genes):
        swept = [
            macs(SparsityVector(tuple(choice if i == gene else 0.0 for i in range(space.num_genes))))
            for choice in space.choices
        ]
        steps += [before - after for before, after in itertools.pairwise(swept)]
    return np.array(steps, dtype=float)


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


def _nonnegative_least_squares(design: Array, target: Array, num_sweeps: int = 5000) -> Array:
    """Minimise |design · x − target|² over x ≥ 0 by coordinate descent.

    scipy has this, but a device that is calibrated may have only torch and numpy.
    """
    gram, moment = design.T @ design, design.T @ target
    x = np.zeros(design.shape[1])
    gradient = -moment
    for _ in range(num_sweeps):
        largest = 0.0
        for j in np.flatnonzero(gram.diagonal() > 0):
            updated = max(0.0, x[j] - gradient[j] / gram[j, j])
            change = updated - x[j]
            if change:
                gradient = gradient + change * gram[:, j]
                x[j] = updated
                largest = max(largest, abs(change))
        if largest < 1e-10:
            break
    return x
