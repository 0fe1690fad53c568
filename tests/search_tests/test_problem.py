"""Constraints and quantities of a problem: bounds in words, what is reachable, what is feasible at all."""

import math
from collections.abc import Sequence

import pytest

from search.problem import Constraint, Objective, SearchProblem
from search.space import GeneSpace, SearchSpace

SPACE = GeneSpace({"width": (1.0, 2.0, 4.0), "depth": (1.0, 3.0)})
LARGE = GeneSpace({"number": tuple(range(3000))})  # more vectors than are listed
MS = Objective("ms", "minimize")


def area(vector: Sequence[float]) -> float:
    return math.prod(vector)


def problem_of(space: SearchSpace, *constraints: Constraint, **quantities: object) -> SearchProblem:
    return SearchProblem(space, [MS], {"ms": area, **quantities}, ("ap", "watts"), constraints)  # type: ignore[dict-item]


@pytest.mark.parametrize(
    ("constraint", "text", "violations"),
    [
        (Constraint("ms", upper=5.0), "ms ≤ 5", {-9.0: 0.0, 5.0: 0.0, 7.5: 2.5}),
        (Constraint("ms", lower=-1.0), "ms ≥ -1", {-3.0: 2.0, -1.0: 0.0, 9.0: 0.0}),
        (Constraint("ms", 5.0, 1.5), "ms ≥ 1.5 and ≤ 5", {0.0: 1.5, 1.5: 0.0, 3.0: 0.0, 6.0: 1.0}),
        (Constraint("ms", 2.0, 2.0), "ms ≥ 2 and ≤ 2", {2.0: 0.0, 1.0: 1.0, 3.0: 1.0}),
        (Constraint("ms"), "ms anything", {-1e300: 0.0, 1e300: 0.0}),
    ],
)
def test_bounds_in_words_and_how_far_a_value_is_out_of_them(
    constraint: Constraint, text: str, violations: dict[float, float]
) -> None:
    assert str(constraint) == text
    assert {value: constraint.violation(value) for value in violations} == violations


def test_the_corner_of_the_hypervolume() -> None:
    """Given, or nothing where more is better, or a tenth above the largest reachable value: 4 · 3 = 12."""
    objectives = [
        MS, Objective("area", "minimize", reference=7.0), Objective("ap", "maximize"),
        Objective("recall", "maximize", reference=-2.0),
    ]  # fmt: skip
    problem = SearchProblem(SPACE, objectives, {"ms": area, "area": area}, ("ap", "recall"))
    assert problem.reference == {"ms": pytest.approx(13.2), "area": 7.0, "ap": 0.0, "recall": -2.0}


def test_who_gives_and_who_checks_what() -> None:
    bounds = [Constraint("watts", upper=9.0), Constraint("ms", upper=6.0), Constraint("ap", lower=0.1)]
    objectives = [MS, Objective("ap", "maximize")]
    problem = SearchProblem(SPACE, objectives, {"ms": area}, ("ap", "watts", "extra"), bounds)
    assert problem.needed == ["ap", "watts"]
    assert problem.evaluated_constraints == [bounds[0], bounds[2]]
    assert problem.described_constraints == "watts ≤ 9, ms ≤ 6, ap ≥ 0.1"
    assert [vector for vector in SPACE if problem.admits(vector)] == [
        vector for vector in SPACE if vector[0] * vector[1] <= 6.0
    ]
    assert problem.measure((4.0, 3.0)) == {"ms": 12.0}
    assert problem_of(SPACE).described_constraints == "the space"


@pytest.mark.parametrize("needle", list(SPACE))
def test_of_a_small_space_every_vector_counts(needle: tuple[float, ...]) -> None:
    """A single vector is fast enough, wherever it is."""

    def ms(vector: Sequence[float]) -> float:
        return 1.0 if tuple(vector) == needle else 5.0

    problem = SearchProblem(SPACE, [MS], {"ms": ms}, (), [Constraint("ms", upper=2.0)])
    problem.require_feasible()
    assert problem.reachable("ms") == (1.0, 5.0)


def test_of_a_large_space_the_ends_and_a_sample_count() -> None:
    """Of 30 000 vectors; what is reachable is the same whenever it is asked for."""
    space = GeneSpace({"number": tuple(range(30_000))})

    def ms(vector: Sequence[float]) -> float:
        return {0: -1.0, 29_999: 99.0}.get(int(vector[0]), 5.0)

    def mixed(vector: Sequence[float]) -> float:
        return vector[0] * 7919 % 30_011

    bound = Constraint("number", 16_000, 14_000)
    problem, same = (
        problem_of(space, bound, ms=ms, mixed=mixed, number=lambda vector: vector[0]) for _ in range(2)
    )
    assert problem.reachable("ms") == (-1.0, 99.0)
    assert problem.reachable("mixed") == same.reachable("mixed")
    problem.require_feasible()


def test_of_a_large_space_one_vector_is_found_where_many_meet_every_constraint_alone() -> None:
    """It is 23 · 60 + 9, which is not of the sample that is looked at first."""
    bounds = [Constraint("quotient", 23, 23), Constraint("rest", 9, 9)]
    parts = {"quotient": lambda vector: vector[0] // 60, "rest": lambda vector: vector[0] % 60}
    problem_of(LARGE, *bounds, **parts).require_feasible()


@pytest.mark.parametrize("bound", [Constraint("ms", upper=0.5), Constraint("ms", lower=12.5)])
def test_what_cannot_be_reached_is_refused_with_what_can(bound: Constraint) -> None:
    with pytest.raises(ValueError, match=f"no vector has {bound}: reachable is 1 to 12"):
        problem_of(SPACE, bound).require_feasible()


@pytest.mark.parametrize("bound", [Constraint("ms", upper=1.0), Constraint("ms", lower=12.0)])
def test_the_last_that_can_be_reached_is_enough(bound: Constraint) -> None:
    problem_of(SPACE, bound).require_feasible()


def test_what_an_evaluation_gives_is_not_checked_before_it() -> None:
    problem = problem_of(SPACE, Constraint("watts", upper=-1.0))
    problem.require_feasible()
    assert all(map(problem.admits, SPACE))


def test_constraints_of_which_each_alone_can_be_met() -> None:
    """Of a small space every vector was looked at."""
    bounds = (Constraint("ms", upper=2.0), Constraint("deep", lower=3.0))
    with pytest.raises(ValueError, match="none of 6 vectors meets ms ≤ 2, deep ≥ 3 at once"):
        problem_of(SPACE, *bounds, deep=lambda vector: vector[1]).require_feasible()
    bounds = (Constraint("ms", upper=1000.0), Constraint("same", lower=2000.0))
    number = {name: lambda vector: vector[0] for name in ("ms", "same")}
    with pytest.raises(ValueError, match=r"none of 22,002 vectors meets ms ≤ 1000, same ≥ 2000 at once"):
        problem_of(LARGE, *bounds, **number).require_feasible()


@pytest.mark.parametrize("direction", ["maximize", "minimize"])
@pytest.mark.parametrize("reference", [math.inf, -math.inf])
def test_an_infinite_reference_is_refused(direction: str, reference: float) -> None:
    with pytest.raises(ValueError, match=f"the reference of objective 'ap' must be finite, got {reference}"):
        Objective("ap", direction, reference)  # type: ignore[arg-type]


def test_constraints_on_one_quantity_may_touch_and_those_on_others_are_their_own() -> None:
    bounds = (Constraint("ms", upper=6.0), Constraint("ms", lower=6.0), Constraint("watts", lower=90.0))
    problem_of(SPACE, *bounds)


@pytest.mark.parametrize("name", ["reason", "worker", "elapsed_s"])
def test_the_names_of_what_a_study_notes_are_taken(name: str) -> None:
    with pytest.raises(ValueError, match=f"the quantity '{name}' needs another name"):
        problem_of(SPACE, **{name: area})
    with pytest.raises(ValueError, match=f"the quantity '{name}' needs another name"):
        SearchProblem(SPACE, [MS], {"ms": area}, ("ap", name))


@pytest.mark.parametrize("bound", ["5", None])
def test_a_bound_of_another_type_is_refused(bound: object) -> None:
    with pytest.raises(ValueError, match=f"a bound of the constraint on 'ms' is {bound!r}, not a number"):
        Constraint("ms", lower=bound)  # type: ignore[arg-type]
