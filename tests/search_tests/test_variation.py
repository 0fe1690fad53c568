"""Operators: legal children, deterministic tables, bounded attempts."""

import itertools
from collections import Counter

import numpy as np
import pytest

from search.space import split, validate
from search.variation import (
    SearchExhausted,
    crossover,
    first_generation,
    first_new,
    mutate,
    random_vector,
)
from sparsevit.sparsity import SparsitySpace, SparsityVector
from tests.search_tests.scripted import Scripted

SPACE = SparsitySpace((2, 2, 6, 2))


def test_random_vector_is_sorted_inside_stages() -> None:
    rng = Scripted([], [[8, 0, 5, 1, 3, 2]])
    assert tuple(random_vector(SPACE, rng)) == (0.8, 0.0, 0.1, 0.3, 0.5, 0.2)
    rng.assert_used_up()


def test_crossover_takes_genes_from_either_parent_then_sorts() -> None:
    first, second = SparsityVector((0.1,) * 6), SparsityVector((0.7,) * 6)
    rng = Scripted([[0.4, 0.6, 0.9, 0.1, 0.9, 0.1]], [])
    assert tuple(crossover(first, second, SPACE, rng)) == (0.1, 0.7, 0.1, 0.7, 0.7, 0.1)


@pytest.mark.parametrize(
    ("from_first", "expected"),
    [
        ([0.0, 0.0, 0.0, 0.0, 0.0, 0.0], (0.1, 0.2, 0.1, 0.2, 0.3, 0.8)),  # all of the first
        ([0.9, 0.9, 0.9, 0.9, 0.9, 0.9], (0.0, 0.6, 0.5, 0.6, 0.7, 0.4)),  # all of the second
        ([0.9, 0.4, 0.4, 0.9, 0.4, 0.9], (0.0, 0.2, 0.1, 0.3, 0.6, 0.4)),  # 0.1 0.6 0.3, sorted
        ([0.5, 0.49, 0.9, 0.9, 0.4, 0.4], (0.0, 0.2, 0.3, 0.5, 0.6, 0.8)),  # 0.5 is the second's
    ],
)
def test_crossover_table(from_first: list[float], expected: tuple[float, ...]) -> None:
    first = SparsityVector((0.1, 0.2, 0.1, 0.2, 0.3, 0.8))
    second = SparsityVector((0.0, 0.6, 0.5, 0.6, 0.7, 0.4))
    assert tuple(crossover(first, second, SPACE, Scripted([from_first], []))) == expected


@pytest.mark.parametrize(
    ("uniforms", "integers", "expected"),
    [
        # gene 0 to its upper neighbour
        ([[0.0, 1, 1, 1, 1, 1], 0.4], [3, 1], (0.5, 0.4, 0.4, 0.4, 0.4, 0.4)),
        # gene 4 anywhere: five choices further, modulo nine; then the stage is sorted
        ([[1, 1, 1, 1, 0.0, 1], 0.9], [0, 5], (0.4, 0.4, 0.0, 0.4, 0.4, 0.4)),
        # nothing chosen: the gene that the generator names changes all the same
        ([[1, 1, 1, 1, 1, 1], 0.4], [5, 0], (0.4, 0.4, 0.4, 0.4, 0.4, 0.3)),
    ],
)
def test_mutation_table(uniforms: list[object], integers: list[object], expected: tuple[float, ...]) -> None:
    rng = Scripted(uniforms, integers)
    mutant = mutate(SparsityVector((0.4,) * 6), SPACE, rng, probability=0.1)
    assert tuple(mutant) == expected
    rng.assert_used_up()


@pytest.mark.parametrize(
    ("value", "draws", "expected"),
    [
        (0.0, [0], 0.1),  # the only neighbour of the first choice
        (0.8, [0], 0.7),  # the only neighbour of the last
        (0.4, [0], 0.3),
        (0.4, [1], 0.5),
    ],
)
def test_neighbours_at_the_bounds_of_the_choices(value: float, draws: list[object], expected: float) -> None:
    rng = Scripted([[1, 1, 1, 1, 1, 0.0], 0.4], [0, *draws])
    mutant = mutate(SparsityVector((0.4,) * 5 + (value,)), SPACE, rng, probability=0.1)
    assert tuple(mutant) == (0.4,) * 5 + (expected,)
    rng.assert_used_up()


@pytest.mark.parametrize(
    ("chances", "integers", "expected"),
    [
        # every gene below the probability goes anywhere else, and no chance decides between near and far
        ([0.09, 1, 1, 1, 1, 0.0], [0, 1, 8], (0.5, 0.4, 0.4, 0.4, 0.4, 0.3)),
        # 0.1 is not below the probability: none is chosen, so the third gene is
        ([0.1, 1, 1, 1, 1, 1], [2, 4], (0.4, 0.4, 0.4, 0.4, 0.8, 0.4)),
        # a gene that the generator names changes nothing where another one is chosen already
        ([1, 0.05, 1, 1, 1, 1], [3, 5], (0.4, 0.0, 0.4, 0.4, 0.4, 0.4)),
    ],
)
def test_the_papers_mutation_goes_to_any_choice(
    chances: list[float], integers: list[object], expected: tuple[float, ...]
) -> None:
    rng = Scripted([chances], integers)
    parent = SparsityVector((0.4,) * 6)
    assert tuple(mutate(parent, SPACE, rng, probability=0.1, is_local=False)) == expected
    rng.assert_used_up()


def test_a_gene_with_one_choice_never_changes() -> None:
    space = SparsitySpace((2, 2), choices=(0.5,))
    rng = np.random.default_rng(0)
    assert mutate(space.dense, space, rng, probability=1.0) == space.dense


def test_children_of_random_parents_are_legal() -> None:
    rng = np.random.default_rng(0)
    for _ in range(300):
        first, second = random_vector(SPACE, rng), random_vector(SPACE, rng)
        for child in (crossover(first, second, SPACE, rng), mutate(first, SPACE, rng, probability=0.3)):
            assert validate(child, SPACE) == child


@pytest.mark.parametrize("is_local", [True, False])
def test_a_mutant_differs_from_its_parent_in_one_gene_at_least(is_local: bool) -> None:
    """Without a probability in exactly one: another value comes, an old one goes, in the same stage."""
    rng = np.random.default_rng(0)
    for _ in range(300):
        parent = random_vector(SPACE, rng)
        mutant = mutate(parent, SPACE, rng, probability=0.0, is_local=is_local)
        stages = zip(split(tuple(parent), (1, 1, 3, 1)), split(tuple(mutant), (1, 1, 3, 1)), strict=True)
        gone_and_come = [(Counter(old) - Counter(new), Counter(new) - Counter(old)) for old, new in stages]
        assert [(gone.total(), come.total()) for gone, come in gone_and_come if gone or come] == [(1, 1)]


SINGLES = SparsitySpace((2, 2, 2, 2))  # every gene is alone in its stage, so sorting hides nothing


def test_a_certain_mutation_changes_every_gene() -> None:
    rng = np.random.default_rng(0)
    for _ in range(100):
        parent = random_vector(SINGLES, rng)
        mutant = mutate(parent, SINGLES, rng, probability=1.0)
        assert all(old != new for old, new in zip(parent, mutant, strict=True))


def test_genes_change_as_often_as_the_probability_says() -> None:
    """Of n genes n·p, and one more where chance would change none: (1 − p)ⁿ."""
    rng = np.random.default_rng(0)
    parent, num_mutants, p = SINGLES.uniform(0.4), 4000, 0.3
    mutants = [tuple(mutate(parent, SINGLES, rng, probability=p)) for _ in range(num_mutants)]
    changed = np.array(mutants) != 0.4
    assert changed.sum(axis=1).mean() == pytest.approx(4 * p + (1 - p) ** 4, abs=0.06)
    assert changed.mean(axis=0) == pytest.approx([p + (1 - p) ** 4 / 4] * 4, abs=0.03)


@pytest.mark.parametrize(
    ("value", "is_local", "shares"),
    [
        # half of the changes go to the neighbours, and half to any of the eight other choices
        (0.4, True, [1 / 16] * 3 + [1 / 4 + 1 / 16, 0, 1 / 4 + 1 / 16] + [1 / 16] * 3),
        (0.0, True, [0, 1 / 2 + 1 / 16] + [1 / 16] * 7),
        (0.8, True, [1 / 16] * 7 + [1 / 2 + 1 / 16, 0]),
        (0.7, False, [1 / 8] * 7 + [0, 1 / 8]),
    ],
)
def test_where_a_mutated_gene_goes(value: float, is_local: bool, shares: list[float]) -> None:
    rng = np.random.default_rng(0)
    one_gene = SparsitySpace((2,))
    parent = one_gene.uniform(value)
    went = Counter(mutate(parent, one_gene, rng, probability=0.5, is_local=is_local) for _ in range(4000))
    found = [went[one_gene.uniform(choice)] / 4000 for choice in one_gene.choices]
    assert found == pytest.approx(shares, abs=0.03)


def test_every_gene_comes_from_either_parent_by_the_toss_of_a_coin() -> None:
    rng = np.random.default_rng(0)
    first, second = SINGLES.uniform(0.1), SINGLES.uniform(0.7)
    children = Counter(tuple(crossover(first, second, SINGLES, rng)) for _ in range(3200))
    assert set(children) == set(itertools.product((0.1, 0.7), repeat=4))
    assert min(children.values()) > 150  # of 200 expected
    assert max(children.values()) < 250


def test_first_new_skips_seen_and_forbidden() -> None:
    stream = iter([SPACE.dense, SPACE.sparsest, SPACE.uniform(0.3)])
    vector = first_new(
        [lambda: next(stream)],
        {SPACE.dense},
        lambda v: v != SPACE.sparsest,
        num_attempts=5,
        constraints="latency_ms ≤ 1",
    )
    assert vector == SPACE.uniform(0.3)


def test_attempts_are_bounded_and_the_error_names_the_budget() -> None:
    with pytest.raises(
        SearchExhausted, match=r"within latency_ms ≤ 1 in 20 attempts .* widen the constraints"
    ):
        first_new(
            [lambda: SPACE.dense] * 2, set(), lambda v: False, num_attempts=10, constraints="latency_ms ≤ 1"
        )


def test_first_generation_covers_the_range() -> None:
    vectors = first_generation(
        lambda v: 10 - sum(v), SPACE, lambda v: True, np.random.default_rng(0),
        num_vectors=30, num_candidates=2000,
    )  # fmt: skip
    assert len(set(vectors)) == 30
    assert {SPACE.uniform(ratio) for ratio in SPACE.choices} <= set(vectors)
    assert all(validate(vector, SPACE) == vector for vector in vectors)
    assert SparsityVector((0.0, 0.7, 0.7, 0.7, 0.7, 0.7)) in vectors
    assert SparsityVector((0.0, 0.0, 0.7, 0.7, 0.7, 0.0)) in vectors
    values = sorted(sum(vector) for vector in vectors)
    assert max(b - a for a, b in itertools.pairwise(values)) < 0.8


def test_a_small_first_generation_is_dense_sparsest_and_what_each_stage_is_worth() -> None:
    vectors = first_generation(
        sum, SPACE, lambda v: True, np.random.default_rng(0), num_vectors=12, num_candidates=200
    )
    assert vectors[:2] == [SPACE.dense, SPACE.sparsest]
    assert len(set(vectors)) == 12
    assert sum(len(set(vector)) == 1 for vector in vectors) == 3  # one uniform vector between them
    assert sum(set(vector) == {0.0, 0.7} for vector in vectors) == 8


def test_first_generation_respects_the_constraints() -> None:
    vectors = first_generation(
        sum, SPACE, lambda v: sum(v) >= 4.5, np.random.default_rng(0), num_vectors=12, num_candidates=4000
    )
    assert vectors
    assert all(sum(vector) >= 4.5 for vector in vectors)


def test_the_rest_of_the_first_generation_lies_at_even_levels_of_the_quantity() -> None:
    """Two ends, eight contrasts, the seven uniform vectors between the ends; then eight levels of the sum.

    Few random vectors lie near the ends, so the nearest may be half a level away.
    """
    vectors = first_generation(
        sum, SINGLES, lambda v: True, np.random.default_rng(0), num_vectors=25, num_candidates=2000
    )
    assert vectors[:2] == [SINGLES.dense, SINGLES.sparsest]
    assert all(set(vector) == {0.0, 0.7} for vector in vectors[2:10])
    assert vectors[10:17] == [SINGLES.uniform(ratio) for ratio in SINGLES.choices[1:-1]]
    levels = [3.2 * (level + 0.5) / 8 for level in range(8)]
    assert [sum(vector) for vector in vectors[17:]] == pytest.approx(levels, abs=0.25)
