"""New vectors from chance or from parents: legal, unseen, and within the constraints.

Crossover and mutation draw genes as SparseViT does (section 3.3) and sort every group again, so
that each child is a canonical vector.
"""

import itertools
from collections.abc import Callable, Collection, Sequence
from typing import Any

import numpy as np

from search.space import SearchSpace, Vector, at_level, group_choices, split

Propose = Callable[[], Vector]


class SearchExhausted(ValueError):
    """No new vector within the constraints turned up in the attempts that were allowed."""


def random_vector(space: SearchSpace, rng: np.random.Generator) -> Vector:
    """Draw every gene from its choices, then sort the groups."""
    sizes = [len(choices) for choices in space.gene_choices]
    indices = rng.integers(sizes)
    return space.canonicalize(
        choices[index] for choices, index in zip(space.gene_choices, indices, strict=True)
    )


def uniform_vector(space: SearchSpace, rng: np.random.Generator) -> Vector:
    """Draw from the legal vectors, all with the same probability.

    A sorted group of k genes with n choices is a multiset, of which stars and bars gives every one
    the same share.
    """
    values: list[float] = []
    for choices, size in zip(group_choices(space), space.group_sizes, strict=True):
        bars = np.sort(rng.choice(len(choices) + size - 1, size=size, replace=False))
        values += [choices[index] for index in bars - np.arange(size)]
    return space.canonicalize(values)


def leaning_vector(space: SearchSpace, rng: np.random.Generator) -> Vector:
    """Draw all genes about the same level, which is drawn first: the ends are as frequent as the middle."""
    level = rng.random()
    return space.canonicalize(
        choices[rng.binomial(len(choices) - 1, level)] for choices in space.gene_choices
    )


def crossover(first: Vector, second: Vector, space: SearchSpace, rng: np.random.Generator) -> Vector:
    """Uniform crossover: every gene from one parent or the other."""
    from_first = rng.random(len(first)) < 0.5
    return space.canonicalize(
        a if take_first else b for a, b, take_first in zip(first, second, from_first, strict=True)
    )


def mutate(
    vector: Vector, space: SearchSpace, rng: np.random.Generator, *, probability: float, is_local: bool = True
) -> Vector:
    """Change every gene with `probability`, at least one.

    Args:
        is_local: half of the changes go to a neighbouring choice; otherwise all go to any choice.
    """
    chosen = rng.random(len(vector)) < probability
    chosen[rng.integers(len(vector))] |= not chosen.any()
    return space.canonicalize(
        _changed(value, choices, rng, is_local) if change else value
        for value, choices, change in zip(vector, space.gene_choices, chosen, strict=True)
    )


def first_new(
    propose: Sequence[Propose],
    seen: Collection[Vector],
    admits: Callable[[Vector], bool],
    *,
    num_attempts: int,
    constraints: str,
) -> Vector:
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
        f"no new vector within {constraints} in {num_attempts * len(propose)} attempts "
        f"({len(seen)} are known already): widen the constraints or the choices"
    )


def first_generation(
    quantity: Callable[[Any], float],
    space: SearchSpace,
    admits: Callable[[Vector], bool],
    rng: np.random.Generator,
    *,
    num_vectors: int,
    num_candidates: int = 2000,
) -> list[Vector]:
    """Vectors that show what each group is worth, and spread evenly over the range of a quantity.

    The first choices of all genes (dense) and the last ones (sparsest) come first, then every group
    alone dense and alone pruned (crossover joins what selection learns from them), uniform vectors
    for half of the rest, and for evenly spaced levels of the quantity the closest of
    `num_candidates` random vectors. May return fewer where the constraints leave fewer.
    """
    contrasts = [at_level(space, 0.0), at_level(space, 1.0), *_group_contrasts(space)]
    chosen = [vector for vector in dict.fromkeys(contrasts) if admits(vector)][:num_vectors]
    num_levels = max(map(len, space.gene_choices)) - 1
    levels = dict.fromkeys(at_level(space, level / num_levels) for level in range(1, num_levels))
    uniform = [vector for vector in levels if admits(vector) and vector not in chosen]
    chosen += _evenly(uniform, -(-(num_vectors - len(chosen)) // 2))
    candidates = {random_vector(space, rng) for _ in range(num_candidates)} - set(chosen)
    values = {vector: quantity(vector) for vector in candidates if admits(vector)}
    num_left = min(num_vectors - len(chosen), len(values))
    if num_left <= 0:
        return chosen
    low, high = min(values.values()), max(values.values())
    for level in range(num_left):
        wanted = low + (high - low) * (level + 0.5) / num_left
        closest = min(values, key=lambda vector: (abs(values[vector] - wanted), tuple(vector)))
        chosen.append(closest)
        del values[closest]
    return chosen


def _group_contrasts(space: SearchSpace) -> list[Vector]:
    """Every group dense while the others are pruned, and pruned while they are dense.

    Pruned is one choice short of the sparsest: at the very end accuracy often falls off a cliff,
    which would hide what the group is worth.
    """
    contrasts = []
    dense = tuple(choices[0] for choices in space.gene_choices)
    pruned = tuple(choices[max(0, len(choices) - 2)] for choices in space.gene_choices)
    for inside, outside in ((dense, pruned), (pruned, dense)):
        for group in range(len(space.group_sizes)):
            parts = split(outside, space.group_sizes)
            parts[group] = split(inside, space.group_sizes)[group]
            contrasts.append(space.canonicalize(itertools.chain.from_iterable(parts)))
    return contrasts


def _evenly(vectors: Sequence[Vector], count: int) -> list[Vector]:
    """At most `count` of the vectors, evenly spaced."""
    if count >= len(vectors):
        return list(vectors)
    return [vectors[int((index + 0.5) * len(vectors) / count)] for index in range(count)]


def _changed(value: float, choices: Sequence[float], rng: np.random.Generator, is_local: bool) -> float:
    index = choices.index(value)
    if len(choices) == 1:
        return value
    if is_local and rng.random() < 0.5:
        neighbours = [i for i in (index - 1, index + 1) if 0 <= i < len(choices)]
        return choices[neighbours[rng.integers(len(neighbours))]]
    return choices[(index + int(rng.integers(1, len(choices)))) % len(choices)]
