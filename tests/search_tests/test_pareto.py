"""Fronts and hypervolume in closed form, and problems that make no sense."""

import itertools
import json
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from search import Constraint, FrontMember, Objective, ParetoFront
from search.problem import SearchProblem
from sparsevit.sparsity import SparsitySpace, SparsityVector

ACCURACY, LATENCY = Objective("ap", "maximize"), Objective("ms", "minimize")
OBJECTIVES = (ACCURACY, LATENCY)
SPACE = SparsitySpace((2,))


def member(ap: float, ms: float, ratio: float = 0.0) -> FrontMember:
    return FrontMember(SparsityVector((ratio,)), {"ap": ap, "ms": ms})


def test_front_keeps_the_non_dominated_in_order_of_latency() -> None:
    front = ParetoFront.of(
        [member(0.5, 10), member(0.4, 8), member(0.45, 11), member(0.3, 5), member(0.4, 9)], OBJECTIVES
    )
    assert [(m.values["ap"], m.values["ms"]) for m in front.members] == [(0.3, 5), (0.4, 8), (0.5, 10)]


def test_equal_values_are_kept_once() -> None:
    front = ParetoFront.of([member(0.5, 10, 0.1), member(0.5, 10, 0.2)], OBJECTIVES)
    assert [m.vector.ratios for m in front.members] == [(0.1,)]


def test_hypervolume_of_a_staircase() -> None:
    front = ParetoFront.of([member(0.2, 4), member(0.6, 8)], OBJECTIVES)
    # widths 6 and 2 up to 10 ms, heights 0.2 and another 0.4 above no accuracy
    assert front.hypervolume({"ap": 0.0, "ms": 10.0}) == pytest.approx(6 * 0.2 + 2 * 0.4)


def test_members_outside_the_reference_count_for_nothing() -> None:
    front = ParetoFront.of([member(0.2, 4), member(0.6, 12), member(0.0, 1)], OBJECTIVES)
    assert front.hypervolume({"ap": 0.0, "ms": 10.0}) == pytest.approx(6 * 0.2)
    assert ParetoFront.of([], OBJECTIVES).hypervolume({"ap": 0.0, "ms": 10.0}) == 0.0


def test_infinite_values() -> None:
    front = ParetoFront.of([member(-math.inf, 1), member(0.5, math.inf)], OBJECTIVES)
    assert front.hypervolume({"ap": 0.0, "ms": 10.0}) == 0.0


def test_hypervolume_in_three_dimensions() -> None:
    objectives = [Objective(name, "minimize") for name in "abc"]
    corner = FrontMember(SPACE.dense, {"a": 1.0, "b": 1.0, "c": 1.0})
    other = FrontMember(SPACE.sparsest, {"a": 0.0, "b": 2.0, "c": 2.0})
    front = ParetoFront.of([corner, other], objectives)
    # cubes of 2×2×2 and 3×1×1 that share 2×1×1
    assert front.hypervolume(dict.fromkeys("abc", 3.0)) == pytest.approx(8 + 3 - 2)


def in_three_dimensions(points: Sequence[Sequence[int]]) -> list[FrontMember]:
    return [FrontMember(SPACE.dense, dict(zip("abc", map(float, point), strict=True))) for point in points]


THREE = (Objective("a", "minimize"), Objective("b", "maximize"), Objective("c", "minimize"))


def is_better(one: FrontMember, other: FrontMember) -> bool:
    """By the definition: nowhere worse, somewhere better."""
    pairs = [(one.values[name], other.values[name]) for name in "abc"]
    gains = [theirs - mine for mine, theirs in pairs]
    gains[1] *= -1
    return min(gains) >= 0 and max(gains) > 0


@pytest.mark.parametrize("seed", range(4))
def test_hypervolume_is_the_number_of_dominated_unit_cells(seed: int) -> None:
    """Of a box of unequal sides: a below 5, b above 2 and up to 9, c below 7; in any order of objectives."""
    points = np.random.default_rng(seed).integers(0, (7, 10, 9), size=(6, 3)).tolist()
    cells = itertools.product(range(5), range(2, 9), range(7))
    dominated = sum(any(a <= i and b >= j + 1 and c <= k for a, b, c in points) for i, j, k in cells)
    for objectives in itertools.permutations(THREE):
        front = ParetoFront.of(in_three_dimensions(points), objectives)
        assert front.hypervolume({"a": 5.0, "b": 2.0, "c": 7.0}) == pytest.approx(dominated)


@pytest.mark.parametrize("seed", range(8))
def test_a_front_is_what_nothing_dominates_however_it_came_about(seed: int) -> None:
    """Few values, so that many candidates are equal in some objectives or in all."""
    candidates = in_three_dimensions(np.random.default_rng(seed).integers(0, 4, size=(20, 3)).tolist())
    front, grown = ParetoFront.of(candidates, THREE), ParetoFront.of([], THREE)
    for candidate in candidates:
        grown = grown.with_candidate(candidate)
    best = [one for one in candidates if not any(is_better(other, one) for other in candidates)]
    assert {tuple(one.values.values()) for one in front.members} == {
        tuple(one.values.values()) for one in best
    }
    assert [one.values["c"] for one in front.members] == sorted(one.values["c"] for one in front.members)
    assert len(front.members) == len({tuple(one.values.values()) for one in best})
    assert grown == front


def test_json() -> None:
    content = json.loads(ParetoFront.of([member(0.5, 10, 0.3)], OBJECTIVES).to_json())
    assert content["objectives"][0] == {"name": "ap", "direction": "maximize"}
    assert content["members"] == [{"vector": [0.3], "ap": 0.5, "ms": 10}]


def ms(vector: SparsityVector) -> float:
    return 10 - 5 * vector.ratios[0]


def test_infeasible_budget_names_the_reachable_range() -> None:
    problem = SearchProblem(SPACE, [LATENCY], {"ms": ms}, constraints=[Constraint("ms", upper=3.0)])
    with pytest.raises(ValueError, match=r"no vector has ms ≤ 3: reachable is 6 to 10"):
        problem.require_feasible()


def test_constraints_that_no_vector_meets_at_once() -> None:
    problem = SearchProblem(
        SPACE, [LATENCY], {"ms": ms, "area": lambda vector: vector.ratios[0]},
        constraints=[Constraint("ms", upper=7.0), Constraint("area", upper=0.3)],
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"none of 9 vectors meets ms ≤ 7, area ≤ 0.3 at once"):
        problem.require_feasible()


@pytest.mark.parametrize(
    ("objectives", "constraints", "message"),
    [
        ([LATENCY], [Constraint("energy", upper=1.0)], "constraint on 'energy' can never be checked"),
        ([Objective("map", "maximize")], [], r"nothing gives the objective 'map'; .* \['ap', 'ms'\]"),
        ([LATENCY, Objective("ms", "maximize")], [], "an objective is named twice"),
        ([], [], r"a search needs an objective; the quantities are \['ap', 'ms'\]"),
        (
            [LATENCY],
            [Constraint("ms", upper=7.0), Constraint("ms", lower=8.0)],
            "the constraints ms ≥ 8 and ms ≤ 7 contradict each other",
        ),
        ([Objective("ap", "minimize")], [], "'ap' needs a reference: the worst value of interest"),
    ],
)
def test_a_problem_that_makes_no_sense_is_refused(
    objectives: list[Objective], constraints: list[Constraint], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        SearchProblem(SPACE, objectives, {"ms": ms}, ("ap",), constraints)


def test_a_name_that_a_study_uses_is_refused() -> None:
    with pytest.raises(ValueError, match="the quantity 'worker' needs another name"):
        SearchProblem(SPACE, [LATENCY], {"ms": ms}, ("worker",))


@pytest.mark.parametrize("value", [math.nan, "fast", None])
def test_a_quantity_that_is_no_number_is_named_before_any_work(value: Any) -> None:
    problem = SearchProblem(SPACE, [LATENCY], {"ms": lambda vector: value})
    with pytest.raises(ValueError, match=r"the quantity 'ms' of \[0.0\] is .*, not a finite number"):
        problem.require_feasible()


def test_a_quantity_may_be_a_numpy_scalar() -> None:
    half: Any = np.float32(0.5)
    problem = SearchProblem(SPACE, [LATENCY], {"ms": lambda vector: half})
    assert type(problem.measure(SPACE.dense)["ms"]) is float


def test_bounds_and_references_are_numbers() -> None:
    with pytest.raises(ValueError, match="a bound of the constraint on 'ms' is nan, not a number"):
        Constraint("ms", upper=math.nan)
    with pytest.raises(ValueError, match="the reference of objective 'ms' must be finite, got nan"):
        Objective("ms", "minimize", reference=math.nan)


def test_an_empty_band_is_refused() -> None:
    with pytest.raises(ValueError, match="'ms' is empty: its lower bound 9 is above its upper bound 3"):
        Constraint("ms", upper=3.0, lower=9.0)


def test_a_front_grows_one_candidate_at_a_time() -> None:
    candidates = [member(0.5, 10), member(0.4, 8), member(0.45, 11), member(0.4, 8), member(0.6, 7)]
    front = ParetoFront.of([], OBJECTIVES)
    for count, candidate in enumerate(candidates, start=1):
        grown = front.with_candidate(candidate)
        assert grown.members == ParetoFront.of(candidates[:count], OBJECTIVES).members
        assert (grown is front) == (count in (3, 4))
        front = grown


def test_unknown_direction() -> None:
    with pytest.raises(ValueError, match="must be maximize or minimize, got 'up'"):
        Objective("ap", "up")  # type: ignore[arg-type]
