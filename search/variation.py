"""Children of sparsity vectors: legal, new, and within the constraints.

Crossover and mutation draw genes as SparseViT does (section 3.3) and sort every stage again, so
that each child is a canonical vector.
"""

import itertools
from collections.abc import Callable, Collection, Sequence

import numpy as np

from sparsevit.sparsity import SparsitySpace, SparsityVector

Propose = Callable[[], SparsityVector]


class SearchExhausted(ValueError):
    """No new vector within the constraints turned up in the attempts that were allowed."""


def random_vector(space: SparsitySpace, rng: np.random.Generator) -> SparsityVector:
    """Draw every gene from the choices, then sort the stages."""
    return space.canonicalize(
        space.choices[index] for index in rng.integers(len(space.choices), size=space.num_genes)
    )


def crossover(
    first: SparsityVector, second: SparsityVector, space: SparsitySpace, rng: np.random.Generator
) -> SparsityVector:
    """Uniform crossover: every gene from one parent or the other."""
    from_first = rng.random(len(first)) < 0.5
    return space.canonicalize(
        a if take_first else b for a, b, take_first in zip(first, second, from_first, strict=True)
    )


def mutate(
    vector: SparsityVector, space: SparsitySpace, rng: np.random.Generator, *, probability: float
) -> SparsityVector:
    """Change every gene with `probability`, at least one: half to a neighbouring choice, half to any."""
    chosen = rng.random(len(vector)) < probability
    chosen[rng.integers(len(vector))] |= not chosen.any()
    return space.canonicalize(
        _changed(ratio, space.choices, rng) if change else ratio
        for ratio, change in zip(vector, chosen, strict=True)
    )


def first_new(
    propose: Sequence[Propose],
    seen: Collection[SparsityVector],
    admits: Callable[[SparsityVector], bool],
    *,
    num_attempts: int,
    constraints: str,
) -> SparsityVector:
    """The first proposal that is new and admitted; every source gets `num_attempts` tries in turn.

    Raises:
        SearchExhausted: if there was none, naming the constraints.
    """
    for source in propose:
        for _ in range(num_attempts):
            vector = source()
            if vector not in seen and admits(vector):
                return vector
    raise SearchExhausted(
        f"no new sparsity vector within {constraints} in {num_attempts * len(propose)} attempts "
        f"({len(seen)} are known already): widen the budget or the choices"
    )


def first_generation(
    quantity: Callable[[SparsityVector], float],
    space: SparsitySpace,
    admits: Callable[[SparsityVector], bool],
    rng: np.random.Generator,
    *,
    num_vectors: int,
    num_candidates: int,
) -> list[SparsityVector]:
    """Vectors that show what each stage is worth, and spread evenly over the range of a quantity.

    Dense and sparsest come first, then every stage alone dense and alone pruned (crossover joins
    what selection learns from them), uniform vectors for half of the rest, and for evenly spaced
    levels of the quantity the closest of `num_candidates` random vectors. May return fewer where
    the constraints leave fewer.
    """
    contrasts = [space.dense, space.sparsest, *_stage_contrasts(space)]
    chosen = [vector for vector in dict.fromkeys(contrasts) if admits(vector)][:num_vectors]
    uniform = [vector for vector in map(space.uniform, space.choices[1:-1]) if admits(vector)]
    chosen += _evenly(uniform, -(-(num_vectors - len(chosen)) // 2))
    candidates = {random_vector(space, rng) for _ in range(num_candidates)} - set(chosen)
    values = {vector: quantity(vector) for vector in candidates if admits(vector)}
    num_levels = min(num_vectors - len(chosen), len(values))
    if num_levels <= 0:
        return chosen
    low, high = min(values.values()), max(values.values())
    for level in range(num_levels):
        wanted = low + (high - low) * (level + 0.5) / num_levels
        closest = min(values, key=lambda vector: (abs(values[vector] - wanted), vector.ratios))
        chosen.append(closest)
        del values[closest]
    return chosen


def _stage_contrasts(space: SparsitySpace) -> list[SparsityVector]:
    """Every stage dense while the others are pruned, and pruned while they are dense.

    Pruned is one choice short of the sparsest: at the very end accuracy often falls off a cliff,
    which would hide what the stage is worth.
    """
    contrasts = []
    pruned = space.uniform(space.choices[max(0, len(space.choices) - 2)])
    for inside, outside in ((space.dense, pruned), (pruned, space.dense)):
        for stage in range(len(space.depths)):
            parts = space.split(outside.ratios)
            parts[stage] = space.split(inside.ratios)[stage]
            contrasts.append(SparsityVector(tuple(itertools.chain.from_iterable(parts))))
    return contrasts


def _evenly(vectors: Sequence[SparsityVector], count: int) -> list[SparsityVector]:
    """At most `count` of the vectors, evenly spaced."""
    if count >= len(vectors):
        return list(vectors)
    return [vectors[int((index + 0.5) * len(vectors) / count)] for index in range(count)]


def _changed(ratio: float, choices: Sequence[float], rng: np.random.Generator) -> float:
    index = choices.index(ratio)
    if len(choices) == 1:
        return ratio
    if rng.random() < 0.5:
        neighbours = [i for i in (index - 1, index + 1) if 0 <= i < len(choices)]
        return choices[neighbours[rng.integers(len(neighbours))]]
    return choices[(index + int(rng.integers(1, len(choices)))) % len(choices)]
