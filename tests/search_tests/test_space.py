"""Spaces: what is legal, how much of it there is, and that draws cover it evenly."""

import json
from collections import Counter
from typing import Any

import numpy as np
import pytest

from search.space import GeneSpace, SearchSpace, at_level, count_vectors, validate
from search.variation import uniform_vector
from sparsevit.sparsity import SparsitySpace

OWN = GeneSpace(
    {"encoder.1": (32, 64, 96), "encoder.2": (32, 64, 96), "bits": (4, 8)},
    ordered=[("encoder.1", "encoder.2")],
)
SMALL = SparsitySpace((2, 4), choices=(0.0, 0.4, 0.8))


@pytest.mark.parametrize("space", [OWN, SMALL, SparsitySpace((2, 2, 6, 2))])
def test_listing_counting_and_validating_agree(space: SearchSpace) -> None:
    assert count_vectors(space) == space.size
    if space.size < 1000:
        vectors = list(space)
        assert len(set(vectors)) == space.size
        assert all(validate(vector, space) == vector for vector in vectors)


@pytest.mark.parametrize("space", [OWN, SMALL])
def test_uniform_draws_give_every_vector_the_same_share(space: SearchSpace) -> None:
    rng = np.random.default_rng(0)
    counts = Counter(uniform_vector(space, rng) for _ in range(200 * space.size))
    assert set(counts) == set(space)
    assert min(counts.values()) > 140
    assert max(counts.values()) < 260


def test_own_space_orders_its_groups_alone() -> None:
    assert OWN.size == 6 * 2
    assert OWN.canonicalize((96, 32, 4)) == (32, 96, 4)
    assert at_level(OWN, 0.0) == (32, 32, 4)
    assert at_level(OWN, 1.0) == (96, 96, 8)


def test_the_sizes_of_the_groups_follow_from_the_order_alone() -> None:
    assert OWN.group_sizes == (2, 1)
    with pytest.raises(TypeError, match="unexpected keyword argument 'group_sizes'"):
        GeneSpace({"a": (1, 2)}, group_sizes=(1,))  # type: ignore[call-arg]


def test_choices_may_be_an_array() -> None:
    widths: Any = np.array([8, 16])
    space = GeneSpace({"width": widths})
    assert list(space) == [(8,), (16,)]
    assert json.dumps(space.gene_choices) == "[[8, 16]]"


@pytest.mark.parametrize(
    ("choices", "ordered", "message"),
    [
        ({}, [], "at least one gene"),
        ({"a": ()}, [], r"choices of gene 'a' must be finite and increasing, got \[\]"),
        ({"a": (2, 1)}, [], r"must be finite and increasing, got \[2, 1\]"),
        ({"a": (2, 2)}, [], r"must be finite and increasing, got \[2, 2\]"),
        ({"a": (1, float("inf"))}, [], r"must be finite and increasing, got \[1, inf\]"),
        ({"a": (1, float("nan"), 2)}, [], r"must be finite and increasing, got \[1, nan, 2\]"),
        ({"a": (1, 2)}, ("a",), "ordered is a list of groups of genes, but 'a' is no group"),
        ({"a": (1, 2)}, [("b",)], "names no gene"),
        ({"a": (1, 2), "b": (1, 2), "c": (1, 2)}, [("a", "c")], "do not follow each other"),
        ({"a": (1, 2), "b": (1, 3)}, [("a", "b")], "different choices"),
        ({"a": (1,), "b": (1,), "c": (1,)}, [("a", "b"), ("b", "c")], "overlap"),
    ],
)
def test_impossible_spaces_are_refused(
    choices: dict[str, tuple[float, ...]], ordered: list[tuple[str, ...]], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        GeneSpace(choices, ordered)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ((32, 64), "has 2 values, but there are 3 genes"),
        ((32, 33, 4), r"encoder.2 is 33, which is not one of the choices \[32, 64, 96\]"),
        ((64, 32, 4), "may not decrease inside a group"),
    ],
)
def test_a_vector_of_another_space_is_refused(values: tuple[float, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        validate(values, OWN)
