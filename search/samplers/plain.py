"""Samplers that learn nothing: at random, one value everywhere, or everything there is."""

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
from optuna import Study
from optuna.trial import FrozenTrial

from search.problem import SearchProblem
from search.samplers.base import SamplerConfig, VectorSampler
from search.space import Vector, at_level
from search.variation import SearchExhausted, leaning_vector, random_vector, uniform_vector

NUM_CANDIDATES = 64


class RandomVectorSampler(VectorSampler):
    """Legal vectors at random: uniform over the space, over the genes, or over a cheap quantity."""

    def __init__(self, problem: SearchProblem, config: SamplerConfig) -> None:
        super().__init__(problem, config)
        if config.spread not in ("space", "genes", *problem.quantities):
            choices = ["space", "genes", *problem.quantities]
            raise ValueError(f"unknown sampler.spread {config.spread!r}; choose one of {', '.join(choices)}")
        self._range: tuple[float, float] | None = None

    def propose(
        self, study: Study, trial: FrozenTrial, known: set[Vector], rng: np.random.Generator
    ) -> Vector:
        space, spread = self.problem.space, self.config.spread
        if spread == "space":
            return self.first_new(known, self.anything(rng))
        if spread == "genes":
            return self.first_new(known, lambda: random_vector(space, rng))
        return self.first_new(known, lambda: self._near_a_level(known, rng), self.anything(rng))

    def _near_a_level(self, known: set[Vector], rng: np.random.Generator) -> Vector:
        """Of a few candidates the one whose quantity is nearest to a uniform draw."""
        quantity = self.problem.quantities[self.config.spread]
        if self._range is None:
            self._range = self.problem.reachable(self.config.spread)
        level = rng.uniform(*self._range)
        candidates = [
            draw(self.problem.space, rng)
            for draw in (uniform_vector, leaning_vector)  # the ends of the range are rare in the space
            for _ in range(NUM_CANDIDATES // 2)
        ]
        new = [vector for vector in candidates if vector not in known and self.problem.admits(vector)]
        return min(new or candidates, key=lambda vector: abs(quantity(vector) - level))


class ListSampler(VectorSampler):
    """The vectors of a list, one after the other."""

    def __init__(self, problem: SearchProblem, config: SamplerConfig, vectors: Iterable[Vector]) -> None:
        super().__init__(problem, config)
        self._vectors = list(vectors)

    def propose(
        self, study: Study, trial: FrozenTrial, known: set[Vector], rng: np.random.Generator
    ) -> Vector:
        for vector in self._left(known):
            return vector
        raise SearchExhausted(
            f"sampler={self.config.name} has no vector left within {self.problem.described_constraints}: "
            f"all {len(self._vectors)} of its vectors were considered"
        )

    def _left(self, known: set[Vector]) -> Iterator[Vector]:
        return (vector for vector in self._vectors if vector not in known and self.problem.admits(vector))


def uniform_levels(problem: SearchProblem, config: SamplerConfig) -> ListSampler:
    """The same level in every gene, from the first choice to the last."""
    num_levels = max(map(len, problem.space.gene_choices))
    levels = (at_level(problem.space, level / max(1, num_levels - 1)) for level in range(num_levels))
    return ListSampler(problem, config, dict.fromkeys(levels))


def exhaustive(problem: SearchProblem, config: SamplerConfig) -> ListSampler:
    """Every vector of the space, in an order that the seed shuffles.

    Raises:
        ValueError: if the space is too large to be listed.
    """
    if problem.space.size > 1_000_000:
        raise ValueError(
            f"sampler=exhaustive lists every vector, but the space has {problem.space.size:,}: fewer choices"
        )
    vectors: list[Any] = list(problem.space)
    order = np.random.default_rng(config.seed).permutation(len(vectors))
    return ListSampler(problem, config, (vectors[index] for index in order))
