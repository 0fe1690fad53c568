"""What is known after every finished trial: counts, areas in closed form, and when these level off."""

from collections.abc import Mapping
from typing import Any

import pytest
from optuna.trial import FrozenTrial, TrialState, create_trial

from search.encoding import distributions, encode
from search.pareto import FrontMember
from search.problem import REASON, Constraint, Objective, SearchProblem
from search.progress import SearchProgress, front_of, member_of
from search.space import GeneSpace

SPACE = GeneSpace({"early": (0.0, 1.0, 2.0, 3.0), "late": (0.0, 1.0)})
PROBLEM = SearchProblem(
    SPACE,
    (Objective("ap", "maximize", reference=0.1), Objective("ms", "minimize", reference=10.0)),
    {"ms": lambda vector: 9.0 - sum(vector)},
    ("ap", "watts"),
    [Constraint("watts", upper=10.0)],
)


def finished(early: float, ap: float, watts: float = 5.0, **notes: Any) -> FrozenTrial:
    """A complete trial; it was told with another latency than the problem gives now."""
    known = {"ap": ap, "watts": watts, "ms": 1.0}
    return trial_of(TrialState.COMPLETE, (early, 0.0), {**known, **notes}, [ap, 1.0])


def failed(*reason: str) -> FrozenTrial:
    return trial_of(TrialState.FAIL, (0.0, 1.0), dict(zip([REASON], reason, strict=False)), None)


def trial_of(
    state: TrialState, vector: tuple[float, float], notes: Mapping[str, Any], values: list[float] | None
) -> FrozenTrial:
    return create_trial(
        state=state, values=values, params=encode(vector, SPACE), distributions=distributions(SPACE),
        user_attrs=dict(notes),
    )  # fmt: skip


TRIALS = [
    finished(0.0, 0.6),  # 9 ms: an area of 0.5 × 1
    failed("no memory"),
    finished(1.0, 0.9, watts=11.0),  # forbidden
    finished(2.0, 0.4, worker="a", elapsed_s=3.0),  # 7 ms: 0.3 × 2 more
    finished(0.0, 0.3),  # dominated
    failed(),
    finished(3.0, 0.7),  # 6 ms, and better than all: 0.6 × 4
    finished(3.0, 0.8, watts=12.0),  # forbidden
]
VOLUMES = [0.5, 0.5, 0.5, 1.1, 1.1, 1.1, 2.4, 2.4]


def progress_of(trials: list[FrozenTrial]) -> SearchProgress:
    progress = SearchProgress(PROBLEM)
    for trial in trials:
        progress.add(trial)
    return progress


def test_before_the_first_trial() -> None:
    progress = SearchProgress(PROBLEM)
    assert (progress.num_counted, progress.hypervolume, progress.front.members) == (0, 0.0, ())
    assert 0.0 <= progress.elapsed_s < 60.0


def test_progress_trial_by_trial() -> None:
    progress = progress_of(TRIALS)
    assert progress.hypervolumes == pytest.approx(VOLUMES)
    assert progress.hypervolume == pytest.approx(2.4)
    assert progress.failures == ["no memory", "no reason is recorded"]
    assert (progress.num_complete, progress.num_infeasible, progress.num_counted) == (6, 2, 8)
    assert [member.values["ap"] for member in progress.front.members] == [0.7]
    assert progress.front == front_of(TRIALS, PROBLEM)


def test_failures_before_anything_else_are_a_hypervolume_of_nothing() -> None:
    assert progress_of([TRIALS[1], TRIALS[2]]).hypervolumes == [0.0, 0.0]


def test_a_recount_forgets_what_was_before() -> None:
    progress = progress_of(TRIALS)
    progress.recount(TRIALS[:4])
    again = progress_of(TRIALS[:4])
    assert progress.hypervolumes == again.hypervolumes == pytest.approx(VOLUMES[:4])
    assert progress.front == again.front
    assert progress.failures == ["no memory"]
    assert (progress.num_complete, progress.num_infeasible) == (3, 1)


def test_time_counts_on_from_where_the_last_process_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("search.progress.time.monotonic", lambda: now[0])
    progress = SearchProgress(PROBLEM, elapsed_before_s=40.0)
    now[0] = 107.0
    assert progress.elapsed_s == 47.0


@pytest.mark.parametrize(
    ("hypervolumes", "num_evaluations", "gain", "has_levelled_off"),
    [
        ([1.0, 1.0, 1.0], 2, 0.0, True),
        ([1.0, 1.0], 2, 0.0, False),  # so many were not done yet
        ([1.0, 1.1, 1.1], 2, 0.05, False),
        ([1.0, 1.1, 1.1], 1, 0.05, True),
        ([2.0, 2.5], 1, 0.25, True),  # by exactly the share
        ([2.0, 2.5], 1, 0.24, False),
        ([0.0, 0.0, 0.0], 2, 0.5, False),  # nothing is no plateau
        ([0.5, 0.5], 1, 0.0, True),
    ],
)
def test_when_a_hypervolume_has_levelled_off(
    hypervolumes: list[float], num_evaluations: int, gain: float, has_levelled_off: bool
) -> None:
    progress = SearchProgress(PROBLEM, hypervolumes=hypervolumes)
    assert progress.has_levelled_off(num_evaluations, gain) is has_levelled_off


def test_a_member_has_its_quantities_of_now_and_no_notes() -> None:
    member = member_of(TRIALS[3], PROBLEM)
    assert member == FrontMember((2.0, 0.0), {"ap": 0.4, "watts": 5.0, "ms": 7.0})
    assert member_of(finished(1.0, 0.9, watts=10.0), PROBLEM) is not None  # bounds are inclusive
    assert member_of(TRIALS[2], PROBLEM) is None


def test_a_trial_whose_parameters_are_no_genes_is_no_member() -> None:
    foreign = create_trial(values=[0.5, 1.0], user_attrs={"ap": 0.5, "watts": 1.0})
    assert member_of(foreign, PROBLEM) is None
    assert front_of([foreign, *TRIALS], PROBLEM) == front_of(TRIALS, PROBLEM)
