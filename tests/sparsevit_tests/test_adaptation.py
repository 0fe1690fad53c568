"""The vectors of the steps of an adaptation."""

from collections import Counter

import pytest
import torch

from sparsevit import SparsitySpace, SparsityVector
from sparsevit.adaptation import SAMPLING_LAWS, sampling_law

SPACE = SparsitySpace((2, 2, 6, 2))


def draws_of(law: str, number: int = 900) -> Counter[SparsityVector]:
    generator = torch.Generator().manual_seed(0)
    return Counter(sampling_law(law)(SPACE, generator) for _ in range(number))


@pytest.mark.parametrize("name", sorted(SAMPLING_LAWS))
def test_every_sampling_law_draws_legal_vectors_by_the_generator(name: str) -> None:
    draws = draws_of(name)
    assert draws == draws_of(name)
    assert all(vector in SPACE for vector in draws)


def test_uniform_ratio_draws_every_choice_as_often() -> None:
    """100 of each are expected, give or take 9."""
    draws = draws_of("uniform_ratio")
    assert set(draws) == {SPACE.uniform(choice) for choice in SPACE.choices}
    assert all(60 < count < 140 for count in draws.values())


def test_sandwich_draws_both_ends_for_a_quarter_each() -> None:
    """225 of each are expected, give or take 13; the others are the paper's, and hardly ever an end."""
    draws = draws_of("sandwich")
    assert 175 < draws[SPACE.dense] < 275
    assert 175 < draws[SPACE.sparsest] < 275
    assert draws.most_common(3)[2][1] <= 3


def test_the_paper_s_law_draws_hardly_anything_twice() -> None:
    assert set(SAMPLING_LAWS) == {"sorted_genes", "uniform_ratio", "sandwich"}
    assert len(draws_of("sorted_genes")) > 850


def test_unknown_sampling_law_lists_the_known() -> None:
    with pytest.raises(ValueError, match="unknown sampling law 'x'; choose one of sorted_genes"):
        sampling_law("x")
