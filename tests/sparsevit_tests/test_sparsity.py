"""Vectors and spaces."""

import itertools
import math

import pytest
import torch

from sparsevit import SparsitySpace, SparsityVector
from sparsevit.sparsity import DEFAULT_CHOICES, check_fits, count_kept_windows

SWIN_T = SparsitySpace((2, 2, 6, 2))


@pytest.mark.parametrize(
    ("num_windows", "ratio", "expected"),
    [(100, 0.8, 20), (25, 0.8, 5), (576, 0.3, 403), (10, 0.1, 9), (4, 0.8, 1), (1, 0.8, 1), (7, 0.0, 7)],
)
def test_keep_counts_are_exact(num_windows: int, ratio: float, expected: int) -> None:
    assert count_kept_windows(num_windows, ratio) == expected


def test_the_release_loses_a_window_to_float_error_and_we_do_not() -> None:
    assert int(100 * (1 - 0.8)) == 19
    assert count_kept_windows(100, 0.8) == 20


def test_space_of_swin_t_has_the_published_size() -> None:
    assert SWIN_T.size == 120_285
    assert SWIN_T.num_genes == 6
    assert SparsitySpace((2, 2, 18, 2)).num_genes == 12


def test_enumeration_is_complete_legal_and_without_repeats() -> None:
    space = SparsitySpace((2, 4, 6), choices=(0.0, 0.5, 0.8))
    vectors = list(space)
    assert len(vectors) == len(set(vectors)) == space.size
    assert all(vector in space for vector in vectors)
    brute = {
        SparsityVector(ratios)
        for ratios in itertools.product(space.choices, repeat=6)
        if ratios[1] <= ratios[2] and ratios[3] <= ratios[4] <= ratios[5]
    }
    assert set(vectors) == brute


def test_canonicalize_sorts_inside_stages_only() -> None:
    vector = SWIN_T.canonicalize((0.6, 0.0, 0.5, 0.2, 0.4, 0.0))
    assert vector.ratios == (0.6, 0.0, 0.2, 0.4, 0.5, 0.0)


def test_draws_are_legal_and_follow_the_generator() -> None:
    draws = [[SWIN_T.draw(torch.Generator().manual_seed(7)) for _ in range(50)] for _ in range(2)]
    assert draws[0] == draws[1]
    generator = torch.Generator().manual_seed(1)
    assert all(SWIN_T.draw(generator) in SWIN_T for _ in range(200))


def test_every_pair_draws_from_all_choices_evenly_before_its_stage_is_sorted() -> None:
    """So the first ratio of a stage is the smallest of as many draws, its last the largest."""
    generator, number = torch.Generator().manual_seed(0), 3000
    draws = [SWIN_T.draw(generator).ratios for _ in range(number)]
    for gene, expected in (
        (0, [(1 - k / 9) for k in range(9)]),
        (2, [(1 - k / 9) ** 3 for k in range(9)]),
        (4, [1 - (k / 9) ** 3 for k in range(9)]),
        (5, [(1 - k / 9) for k in range(9)]),
    ):
        shares = [sum(each[gene] >= choice for each in draws) / number for choice in SWIN_T.choices]
        assert shares == pytest.approx(expected, abs=0.03)  # give or take 0.009


@pytest.mark.parametrize("ratio", [-0.1, 1.0, 1.5, math.nan, math.inf])
def test_ratio_out_of_range(ratio: float) -> None:
    with pytest.raises(ValueError, match=r"ratios lie in \[0, 1\), but ratio 1"):
        SparsityVector((0.0, ratio))


def test_wrong_length_names_both_numbers() -> None:
    with pytest.raises(ValueError, match="has 5 ratios, but depths .* need 6"):
        SWIN_T.validate(SparsityVector((0.0,) * 5))


def test_decrease_inside_a_stage_names_the_stage() -> None:
    with pytest.raises(ValueError, match="may not decrease inside a stage, but stage 3"):
        SWIN_T.validate(SparsityVector((0.6, 0.0, 0.4, 0.2, 0.5, 0.0)))


def test_unknown_choice_names_the_gene() -> None:
    with pytest.raises(ValueError, match=r"stage1.pair1 is 0.25, which is not one of the choices"):
        SWIN_T.validate(SparsityVector((0.25, 0, 0, 0, 0, 0)))


@pytest.mark.parametrize(
    ("depths", "choices", "message"),
    [
        ((2,), (0.0, 0.0), r"choices must be increasing and not empty, got \[0.0, 0.0\]"),
        ((2,), (0.5, 0.2), r"choices must be increasing and not empty, got \[0.5, 0.2\]"),
        ((2,), (), r"choices must be increasing and not empty, got \[\]"),
        ((2,), (0.0, 1.0), r"ratios lie in \[0, 1\), but ratio 1 of \[0.0, 1.0\] is 1.0"),
        ((), (0.0,), r"depths must be positive, got \[\]"),
        ((2, 0), (0.0,), r"depths must be positive, got \[2, 0\]"),
    ],
)
def test_bad_spaces(depths: tuple[int, ...], choices: tuple[float, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SparsitySpace(depths, choices)


def test_a_vector_is_a_sequence_of_ratios_that_reads_well() -> None:
    vector = SparsityVector((0, 0.25, 0.8))
    assert str(vector) == "[0 0.25 0.8]"
    assert (len(vector), list(vector)) == (3, [0.0, 0.25, 0.8])
    assert not vector.is_dense
    assert SparsityVector((0.0, 0)).is_dense


def test_spaces_of_the_same_numbers_are_the_same() -> None:
    """Whatever sequences they came in, as from a file."""
    listed = SparsitySpace([2, 4], [0, 0.5])  # type: ignore[arg-type]
    assert listed == SparsitySpace((2, 4), (0.0, 0.5))
    assert hash(listed) == hash(SparsitySpace((2, 4), (0.0, 0.5)))


def test_an_odd_last_block_is_a_pair_of_its_own() -> None:
    space = SparsitySpace((3, 1, 4), (0.1, 0.5))
    assert space.group_sizes == (2, 1, 2)
    assert space.gene_names == (
        "stage1.pair1", "stage1.pair2", "stage2.pair1", "stage3.pair1", "stage3.pair2",
    )  # fmt: skip
    assert space.gene_choices == ((0.1, 0.5),) * 5
    assert space.split((1, 2, 3, 4, 5)) == [(1, 2), (3,), (4, 5)]
    assert space.size == 3 * 2 * 3
    check_fits(SparsityVector((0.1, 0.5, 0.0, 0.3, 0.3)), (3, 1, 4))  # any ratio, not the choices alone
    with pytest.raises(ValueError, match=r"stage 3 of \[0 0 0 0.5 0.2\] has \[0.5, 0.2\]"):
        check_fits(SparsityVector((0, 0, 0, 0.5, 0.2)), (3, 1, 4))


def test_uniform_vectors_and_the_ends_of_a_space() -> None:
    space = SparsitySpace((2, 4), (0.1, 0.3, 0.5))
    assert space.uniform(0.3).ratios == (0.3, 0.3, 0.3)
    assert space.dense.ratios == (0.1, 0.1, 0.1)
    assert space.sparsest.ratios == (0.5, 0.5, 0.5)
    assert space.uniform(0.2) not in space
    assert SparsityVector((0.1, 0.1)) not in space


def test_vectors_come_in_lexicographic_order() -> None:
    vectors = [vector.ratios for vector in SparsitySpace((4, 2), (0.0, 0.2, 0.7))]
    assert vectors == sorted(vectors)


@pytest.mark.parametrize("choices", [(0.0, 0.1, 0.4, 0.8), (0.3,), DEFAULT_CHOICES])
def test_the_nearest_choice_is_at_the_smallest_distance(choices: tuple[float, ...]) -> None:
    space = SparsitySpace((2,), choices)
    for percent in range(-20, 121):
        distances = {abs(choice - percent / 100): choice for choice in reversed(choices)}  # of two the lower
        assert space.nearest(percent / 100) == distances[min(distances)]
