"""What every sampler of this package shares: whole vectors, legal, never proposed before, admitted.

What a sampler draws depends on its seed, on how many vectors are known, and on the finished trials
that it looks at, and on nothing that lives in a process alone: a search that is opened again goes on
as it would have.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
from optuna import Study
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler, RandomSampler
from optuna.trial import FrozenTrial

from search.encoding import distributions, encode, vector_of
from search.problem import SearchProblem
from search.space import Vector
from search.variation import Propose, first_new, uniform_vector


@dataclass(frozen=True)
class SamplerConfig:
    """Which sampler, and its settings; each sampler uses what it knows.

    Attributes:
        population_size: vectors of a generation.
        num_parents: of the next generation (`evolution`).
        crossover_share: of the children; the others are mutants (`nsga2`).
        mutation_probability: per gene (0.1 in SparseViT).
        spread: what random vectors are uniform over: ``space``, ``genes`` (as adaptation draws them)
            or the name of a cheap quantity such as ``latency_ms`` (`random`).
        num_attempts: tries to find a new vector within the constraints before the search is exhausted.
    """

    name: str = "nsga2"
    seed: int = 0
    population_size: int = 50
    num_parents: int = 25
    crossover_share: float = 0.5
    mutation_probability: float = 0.1
    spread: str = "space"
    num_attempts: int = 1000

    def __post_init__(self) -> None:
        if self.population_size < 2:
            raise ValueError(f"sampler.population_size must be at least 2, got {self.population_size}")
        if not 2 <= self.num_parents <= self.population_size:
            raise ValueError(
                f"sampler.num_parents lies between 2 and sampler.population_size, got {self.num_parents} of "
                f"{self.population_size}"
            )
        for name in ("crossover_share", "mutation_probability"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ValueError(f"sampler.{name} lies in [0, 1], got {getattr(self, name)}")
        if self.num_attempts < 1:
            raise ValueError(f"sampler.num_attempts must be at least 1, got {self.num_attempts}")


class VectorSampler(BaseSampler):
    """An Optuna sampler that proposes vectors of a space; subclasses say how in `propose`.

    Parameters that are no genes are drawn at random, so that it serves any study.
    """

    def __init__(self, problem: SearchProblem, config: SamplerConfig) -> None:
        self.problem = problem
        self.config = config
        self._genes = distributions(problem.space)
        self._others = RandomSampler(config.seed)
        self._known: WeakKeyDictionary[Study, KnownVectors] = WeakKeyDictionary()

    def propose(
        self, study: Study, trial: FrozenTrial, known: set[Vector], rng: np.random.Generator
    ) -> Vector:
        """A vector that is not `known`, drawn with `rng`."""
        raise NotImplementedError

    def first_vectors(self) -> list[Vector]:
        """Vectors to begin with, whatever comes out."""
        return []

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        return self._genes

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        if search_space != self._genes:
            return {
                name: self._others.sample_independent(study, trial, name, distribution)
                for name, distribution in search_space.items()
            }
        known = self.known_vectors(study, trial)
        rng = np.random.default_rng([self.config.seed, len(known)])
        return encode(self.propose(study, trial, known, rng), self.problem.space)

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        return self._others.sample_independent(study, trial, param_name, param_distribution)

    def reseed_rng(self) -> None:
        """Nothing to do for vectors: processes that share a study know different numbers of them."""
        self._others.reseed_rng()

    def known_vectors(self, study: Study, trial: FrozenTrial) -> set[Vector]:
        """Every vector of the study but this trial's: finished, failed, in flight or enqueued."""
        if study not in self._known:
            self._known[study] = KnownVectors(self.problem)
        return self._known[study].update(study, trial)

    def first_new(self, known: set[Vector], *propose: Propose) -> Vector:
        """The first proposal that is new and admitted; at last one from the whole space.

        Raises:
            SearchExhausted: if there was none.
        """
        return first_new(
            propose, known, self.problem.admits,
            num_attempts=self.config.num_attempts, constraints=self.problem.described_constraints,
        )  # fmt: skip

    def vectors_of(self, trials: Iterable[FrozenTrial]) -> list[Vector]:
        """The vectors of trials in order of number; Optuna's order of parents depends on who asks first."""
        vectors = (vector_of(trial, self.problem.space) for trial in sorted(trials, key=lambda t: t.number))
        return [vector for vector in vectors if vector is not None]

    def anything(self, rng: np.random.Generator) -> Callable[[], Vector]:
        """Draws from the whole space."""
        return lambda: uniform_vector(self.problem.space, rng)


class KnownVectors:
    """The vectors of a study, read once each."""

    def __init__(self, problem: SearchProblem) -> None:
        self._space = problem.space
        self._num_read = 0
        self._vectors: set[Vector] = set()

    def update(self, study: Study, current: FrozenTrial) -> set[Vector]:
        """All but the current trial's, of trials before and after it (which are enqueued)."""
        trials = study.get_trials(deepcopy=False)
        while self._num_read < min(current.number, len(trials)):
            self._add(trials[self._num_read])
            self._num_read += 1
        enqueued = {vector_of(trial, self._space) for trial in trials[current.number + 1 :]} - {None}
        return self._vectors | enqueued if enqueued else self._vectors

    def _add(self, trial: FrozenTrial) -> None:
        vector = vector_of(trial, self._space)
        if vector is not None:
            self._vectors.add(vector)
