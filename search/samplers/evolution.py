"""The single-objective search of SparseViT (section 3.3), for comparison.

The most accurate vectors of a band of latency: a population of 100, its 25 best as parents, half of
the children mutants (every gene with probability 0.1) and half from uniform crossover. The band is
a constraint of the problem.
"""

import numpy as np
from optuna import Study
from optuna.samplers import BaseGASampler
from optuna.trial import FrozenTrial

from search.problem import SearchProblem
from search.samplers.base import GenerationSampler, SamplerConfig, costs_of
from search.space import Vector
from search.variation import crossover, mutate, random_vector


class EvolutionSampler(GenerationSampler):
    """Keeps the best of all generations by the study's first objective."""

    def __init__(self, problem: SearchProblem, config: SamplerConfig) -> None:
        BaseGASampler.__init__(self, population_size=config.population_size)
        GenerationSampler.__init__(self, problem, config)

    def select_parent(self, study: Study, generation: int) -> list[FrozenTrial]:
        candidates = {
            trial.number: trial
            for trial in (
                *self.get_parent_population(study, generation - 1),
                *self.get_population(study, generation - 1),
            )
        }
        ranked = sorted(
            candidates.values(),
            key=lambda trial: (*costs_of(trial, study)[:2], trial.number),
        )
        return ranked[: self.config.num_parents]

    def propose(
        self, study: Study, trial: FrozenTrial, known: set[Vector], rng: np.random.Generator
    ) -> Vector:
        space = self.problem.space
        parents = self.parents_of(study, trial)

        def draw() -> Vector:
            return random_vector(space, rng)

        def breed() -> Vector:
            first, second = (parents[index].vector for index in rng.integers(len(parents), size=2))
            if len(known) % 2:
                return crossover(first, second, space, rng)
            return mutate(first, space, rng, probability=self.config.mutation_probability, is_local=False)

        return self.first_new(known, *((breed,) if parents else ()), draw)
