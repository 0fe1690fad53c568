"""Optuna's NSGA-II with operators that know vectors.

Selection, elitism and generations are Optuna's; this module only says where vectors come from.
"""

import numpy as np
from optuna import Study
from optuna.samplers import NSGAIISampler
from optuna.trial import FrozenTrial

from search.problem import SearchProblem
from search.samplers.base import GenerationSampler, Parent, SamplerConfig
from search.space import Vector
from search.variation import crossover, first_generation, mutate

MIN_FIRST_VECTORS = 16
"""Enough for both ends, the contrasts of four stages, uniform vectors and a spread over the range."""


class VectorNSGAIISampler(GenerationSampler, NSGAIISampler):
    """NSGA-II over vectors: children are legal, unseen and within the constraints."""

    def __init__(self, problem: SearchProblem, config: SamplerConfig) -> None:
        NSGAIISampler.__init__(self, population_size=config.population_size, seed=config.seed)
        GenerationSampler.__init__(self, problem, config)

    def first_vectors(self) -> list[Vector]:
        """Vectors that are spread over the range of the first cheap objective.

        A generation of them, or more where generations are small.
        """
        space, quantities = self.problem.space, self.problem.quantities
        cheap = [objective.name for objective in self.problem.objectives if objective.name in quantities]
        return first_generation(
            quantities[cheap[0]] if cheap else sum, space, self.problem.admits,
            np.random.default_rng(self.config.seed),
            num_vectors=max(self.config.population_size, MIN_FIRST_VECTORS),
        )  # fmt: skip

    def propose(
        self, study: Study, trial: FrozenTrial, known: set[Vector], rng: np.random.Generator
    ) -> Vector:
        parents = self.parents_of(study, trial)
        if not parents:
            return self.first_new(known, self.anything(rng))
        return self.first_new(known, lambda: self._breed(parents, rng), self.anything(rng))

    def _breed(self, parents: list[Parent], rng: np.random.Generator) -> Vector:
        """A child by crossover, mutation or both, of winners of binary tournaments."""
        space, probability = self.problem.space, self.config.mutation_probability
        first, second = (_winner(parents, rng).vector for _ in range(2))
        if rng.random() >= self.config.crossover_share:
            return mutate(first, space, rng, probability=probability)
        child = crossover(first, second, space, rng)
        if rng.random() < 0.5 or child in (first, second):
            return mutate(child, space, rng, probability=probability)
        return child


def _winner(parents: list[Parent], rng: np.random.Generator) -> Parent:
    """Of two parents the one that dominates, else the first."""
    first, second = (parents[int(index)] for index in rng.integers(len(parents), size=2))
    return second if second.dominates(first) else first
