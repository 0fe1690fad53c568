"""Fit the additive latency model: measurements say what they can, a prior says the rest.

Legend: V vectors of a fit; F features, one per gene and non-zero choice.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sparsevit.latency.scores import fit_line
from sparsevit.sparsity import SparsitySpace, SparsityVector

Array = NDArray[np.float64]
TRUST_IN_MACS = 0.5
TRUST_IN_TABLE = 0.2


@dataclass(frozen=True)
class StepPrior:
    """What every step of a gene from a choice to the next is worth before it is measured.

    Attributes:
        savings_ms: [F] the most probable.
        spread_ms: [F] the standard deviation.
    """

    savings_ms: tuple[float, ...]
    spread_ms: tuple[float, ...]


@dataclass(frozen=True)
class AdditiveFit:
    """A base and what every gene adds at every choice (≤ 0)."""

    base_ms: float
    terms_ms: tuple[tuple[float, ...], ...]

    def predict(self, space: SparsitySpace, vector: SparsityVector) -> float:
        index = {choice: position for position, choice in enumerate(space.choices)}
        return self.base_ms + sum(row[index[ratio]] for row, ratio in zip(self.terms_ms, vector, strict=True))


def prior_from_macs(
    space: SparsitySpace,
    vectors: Sequence[SparsityVector],
    latencies_ms: Sequence[float],
    macs: Callable[[SparsityVector], float],
) -> StepPrior:
    """Every step is worth what the straight line of latency over MACs says, give or take half of it.

    Args:
        macs: additive over the genes.
    """
    _, slope = fit_line([macs(vector) for vector in vectors], latencies_ms)
    return _prior(max(slope, 0.0) * _macs_of_steps(space, macs), TRUST_IN_MACS, floor=0.3)


def prior_from_table(
    space: SparsitySpace,
    terms_ms: Sequence[Sequence[float]],
    vectors: Sequence[SparsityVector],
    latencies_ms: Sequence[float],
    noise: float,
) -> StepPrior:
    """Every step is worth what it is in the table of another setting, stretched stage by stage.

    The stretch of each stage comes from the new measurements (least squares, towards that of all stages).

    Args:
        terms_ms: of the other table: a row per gene, an entry per choice.
        noise: relative standard error of a latency.
    """
    steps_F = -np.diff(np.array(terms_ms), axis=1).ravel()
    num_steps = len(space.choices) - 1
    stage_of_F = np.repeat(np.repeat(np.arange(len(space.group_sizes)), space.group_sizes), num_steps)
    features_VF = np.array([steps_of(space, vector) for vector in vectors])
    is_stage_SF = stage_of_F == np.arange(len(space.group_sizes))[:, None]
    savings_VS = features_VF @ (is_stage_SF * steps_F).T
    target_V = np.array(latencies_ms)
    weights_V = 1 / target_V
    together = np.column_stack((np.ones(len(vectors)), -savings_VS.sum(axis=1))) * weights_V[:, None]
    overall = _nonnegative_least_squares(together, target_V * weights_V)[1]
    design = np.column_stack((np.ones(len(vectors)), -savings_VS)) * weights_V[:, None]
    trust = noise / max(0.3 * overall, 1e-9)
    rows = np.column_stack((np.zeros(savings_VS.shape[1]), trust * np.eye(savings_VS.shape[1])))
    stretch_S = _nonnegative_least_squares(
        np.vstack((design, rows)),
        np.concatenate((target_V * weights_V, np.full(savings_VS.shape[1], trust * overall))),
    )[1:]
    return _prior(stretch_S[stage_of_F] * steps_F, TRUST_IN_TABLE, floor=0.05)


def fit_additive(
    space: SparsitySpace,
    vectors: Sequence[SparsityVector],
    latencies_ms: Sequence[float],
    prior: StepPrior,
    noise: float,
) -> AdditiveFit:
    """Least squares with savings that never shrink as a ratio grows (relative errors weigh equally).

    What the measurements leave open follows the prior: the most probable table under Gaussian noise and
    prior.

    Args:
        noise: relative standard error of a latency; the larger, the more the prior counts.
    """
    features_VF = np.array([steps_of(space, vector) for vector in vectors])
    target_V = np.array(latencies_ms)
    weights_V = 1 / target_V
    design = np.column_stack((np.ones(len(vectors)), -features_VF)) * weights_V[:, None]
    prior_F, spread_F = np.array(prior.savings_ms), np.array(prior.spread_ms)
    trust_F = np.divide(noise, spread_F, out=np.zeros_like(spread_F), where=spread_F > 0)
    prior_rows = np.column_stack((np.zeros(len(trust_F)), np.diag(trust_F)))
    solution = _nonnegative_least_squares(
        np.vstack((design, prior_rows)), np.concatenate((target_V * weights_V, trust_F * prior_F))
    )
    savings = solution[1:].reshape(space.num_genes, len(space.choices) - 1).cumsum(axis=1)
    terms = tuple((0.0, *(-saving for saving in row)) for row in savings.tolist())
    return AdditiveFit(float(solution[0]), terms)


def steps_of(space: SparsitySpace, vector: SparsityVector) -> list[float]:
    """Thermometer code: for every gene and choice above the first, whether the gene reaches it."""
    return [float(ratio >= choice) for ratio in vector for choice in space.choices[1:]]


def _prior(savings_F: Array, spread: float, *, floor: float) -> StepPrior:
    spread_F = spread * np.maximum(savings_F, floor * savings_F.mean()) if savings_F.any() else 0 * savings_F
    return StepPrior(tuple(savings_F.tolist()), tuple(spread_F.tolist()))


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
