"""Optuna's NSGA-II with operators that know sparsity vectors.

Selection, elitism and generations are Optuna's; this module only says where vectors come from.
"""

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
from optuna import Study
from optuna.distributions import BaseDistribution
from optuna.exceptions import ExperimentalWarning
from optuna.samplers import BaseSampler, NSGAIISampler
from optuna.trial import FrozenTrial

from search.encoding import decode, distributions, encode
from search.objectives import Admission
from search.study import seen_vectors
from search.variation import crossover, first_new, mutate, random_vector
from sparsevit.sparsity import SparsitySpace, SparsityVector


class VectorSource:
    """Draws new, admitted vectors; shared by the samplers of this package."""

    def __init__(
        self, space: SparsitySpace, admission: Admission, *, seed: int, num_attempts: int = 1000
    ) -> None:
        self.space = space
        self.admission = admission
        self.num_attempts = num_attempts
        self.rng = np.random.default_rng(seed)

    def random(self, study: Study) -> SparsityVector:
        return self._first_new(study, lambda: random_vector(self.space, self.rng))

    def child(
        self,
        study: Study,
        parents: list[SparsityVector],
        *,
        crossover_share: float,
        mutation_probability: float,
    ) -> SparsityVector:
        """A child by crossover, mutation or both; a random vector where the parents give nothing new."""

        def breed() -> SparsityVector:
            first, second = (parents[index] for index in self.rng.integers(len(parents), size=2))
            if self.rng.random() >= crossover_share:
                return mutate(first, self.space, self.rng, probability=mutation_probability)
            child = crossover(first, second, self.space, self.rng)
            if self.rng.random() < 0.5 or child in (first, second):
                return mutate(child, self.space, self.rng, probability=mutation_probability)
            return child

        return self._first_new(study, breed, lambda: random_vector(self.space, self.rng))

    def _first_new(self, study: Study, *propose: Callable[[], SparsityVector]) -> SparsityVector:
        return first_new(
            propose,
            seen_vectors(study, self.space),
            self.admission.admits,
            num_attempts=self.num_attempts,
            constraints=", ".join(
                f"{constraint.name} ≤ {constraint.upper:g}" for constraint in self.admission.constraints
            )
            or "the space",
        )


class SparsityNSGAIISampler(NSGAIISampler):
    """NSGA-II over sparsity vectors: children are legal, unseen and within the constraints.

    Args:
        source: where vectors come from.
        population_size: trials per generation.
        crossover_share: share of children that have two parents; the others are mutants.
        mutation_probability: per gene (0.1 in SparseViT).
    """

    def __init__(
        self,
        source: VectorSource,
        *,
        population_size: int,
        crossover_share: float = 0.5,
        mutation_probability: float = 0.1,
    ) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ExperimentalWarning)
            super().__init__(population_size=population_size, child_generation_strategy=self._breed)
        self._source = source
        self._crossover_share = crossover_share
        self._mutation_probability = mutation_probability

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        return distributions(self._source.space)

    def before_trial(self, study: Study, trial: FrozenTrial) -> None:
        super().before_trial(study, trial)
        # Optuna asks for parameters only where some are not fixed, so an enqueued trial would
        # belong to no generation.
        self.get_trial_generation(study, trial)

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        generation = self.get_trial_generation(study, trial)
        parents = self.get_parent_population(study, generation)
        if not parents:
            return encode(self._source.random(study), self._source.space)
        return self._breed(study, search_space, parents)

    def _breed(
        self, study: Study, search_space: dict[str, BaseDistribution], parents: list[FrozenTrial]
    ) -> dict[str, Any]:
        child = self._source.child(
            study,
            [decode(parent.params, self._source.space) for parent in parents],
            crossover_share=self._crossover_share,
            mutation_probability=self._mutation_probability,
        )
        return encode(child, self._source.space)


class RandomVectorSampler(BaseSampler):
    """Legal vectors at random, never the same twice."""

    def __init__(self, source: VectorSource) -> None:
        self._source = source

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        return distributions(self._source.space)

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        return encode(self._source.random(study), self._source.space)

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        raise ValueError(f"{param_name!r} is no gene of the sparsity space {self._source.space.gene_names}")
