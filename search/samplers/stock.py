"""Optuna's own samplers on the genes of a vector, for comparison.

They know nothing of the order inside a group: it is restored afterwards. Where what comes out was
proposed before or is not admitted, they are asked again, a bounded number of times.
"""

from collections.abc import Callable

import numpy as np
from optuna import Study
from optuna.samplers import BaseSampler, NSGAIISampler, TPESampler
from optuna.trial import FrozenTrial

from search.problem import SearchProblem
from search.samplers.base import SamplerConfig, VectorSampler
from search.space import Vector

NUM_ATTEMPTS = 30
MakeSampler = Callable[[int], BaseSampler]


class StockSampler(VectorSampler):
    """A sampler of Optuna's, made anew for every proposal with a seed of its own."""

    def __init__(self, problem: SearchProblem, config: SamplerConfig, make: MakeSampler) -> None:
        super().__init__(problem, config)
        self._make = make

    def propose(
        self, study: Study, trial: FrozenTrial, known: set[Vector], rng: np.random.Generator
    ) -> Vector:
        inner = self._make(int(rng.integers(2**31)))
        shared = inner.infer_relative_search_space(study, trial)  # by all finished trials
        genes = {name: distribution for name, distribution in self._genes.items() if name in shared}

        def ask() -> Vector:
            params = inner.sample_relative(study, trial, genes) if genes else {}
            return self.problem.space.canonicalize(
                params[name] if name in params else inner.sample_independent(study, trial, name, distribution)
                for name, distribution in self._genes.items()
            )

        for _ in range(NUM_ATTEMPTS):
            vector = ask()
            if vector not in known and self.problem.admits(vector):
                return vector
        return self.first_new(known, self.anything(rng))


def tpe(problem: SearchProblem, config: SamplerConfig) -> StockSampler:
    """Optuna's tree-structured Parzen estimator, all genes together."""
    return StockSampler(problem, config, lambda seed: TPESampler(multivariate=True, seed=seed))


def nsga2_stock(problem: SearchProblem, config: SamplerConfig) -> StockSampler:
    """Optuna's NSGA-II with its own operators."""
    return StockSampler(
        problem, config, lambda seed: NSGAIISampler(population_size=config.population_size, seed=seed)
    )
