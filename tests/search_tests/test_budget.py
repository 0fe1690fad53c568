"""When a search ends, by every budget, and what the dispatcher does with each trial."""

import math
from pathlib import Path
from typing import Any

import pytest
from optuna.trial import FrozenTrial, Trial, TrialState

from search.dispatch import Budget, Dispatcher
from search.encoding import distributions
from search.problem import ELAPSED, REASON, WORKER, Constraint, Objective, SearchProblem
from search.progress import SearchProgress
from search.samplers import SamplerConfig, create_sampler
from search.space import GeneSpace
from search.study import open_study

SPACE = GeneSpace({"early": (0.0, 1.0, 2.0), "late": (0.0, 1.0)})
PROBLEM = SearchProblem(
    SPACE,
    (Objective("ap", "maximize"), Objective("ms", "minimize")),
    {"ms": sum},
    ("ap", "watts"),
    (Constraint("ms", upper=2.5), Constraint("watts", upper=10.0, lower=2.0)),
)
GOOD = {"ap": 0.5, "watts": 5.0}


def dispatched(folder: Path, budget: Budget, name: str = "exhaustive", **options: Any) -> Dispatcher:
    """Of six vectors, one of them forbidden; nobody else wants the study, so it may be unlocked again."""
    sampler = create_sampler(PROBLEM, SamplerConfig(name, population_size=2))
    with open_study(folder / "study.journal", PROBLEM, sampler) as study:
        return Dispatcher(study, PROBLEM, budget, **options)


def taken(dispatcher: Dispatcher) -> Trial:
    trial = dispatcher.next_trial()
    assert trial is not None
    return trial


def progress_of(num_complete: int, failures: tuple[str, ...] = (), **fields: Any) -> SearchProgress:
    return SearchProgress(PROBLEM, num_complete=num_complete, failures=list(failures), **fields)


@pytest.mark.parametrize(
    ("budget", "progress", "reached"),
    [
        (Budget(3), progress_of(2), None),
        (Budget(3), progress_of(3), "3 evaluations are done"),
        (Budget(3), progress_of(1, ("no memory", "no light")), "3 evaluations are done"),
        (Budget(3), progress_of(5), "5 evaluations are done"),
        (Budget(seconds=1e6), progress_of(5, elapsed_before_s=0.9e6), None),
        (Budget(seconds=1e6), progress_of(5, elapsed_before_s=1e6), "1e+06 s are over"),
        (Budget(9, max_failures=2), progress_of(0, ("no memory",)), None),
        (
            Budget(9, max_failures=2),
            progress_of(0, ("no memory", "no light", "no memory")),
            "3 trials failed for good (max_failures=2): no light; no memory",
        ),
        (
            Budget(2, max_failures=2),  # what went wrong is said first
            progress_of(0, ("x" * 600, "x" * 600)),
            "2 trials failed for good (max_failures=2): " + "x" * 500,
        ),
        (Budget(plateau=2), progress_of(2, hypervolumes=[1.0, 1.0]), None),
        (
            Budget(plateau=2),
            progress_of(3, hypervolumes=[1.0, 1.001, 1.001]),
            "2 evaluations raised the hypervolume by at most 0.10%",
        ),
        (Budget(plateau=2), progress_of(3, hypervolumes=[1.0, 1.0, 1.002]), None),
        (
            Budget(plateau=2, plateau_gain=0.25),
            progress_of(3, hypervolumes=[1.0, 1.0, 1.25]),
            "2 evaluations raised the hypervolume by at most 25.00%",
        ),
    ],
)
def test_what_ends_a_search(budget: Budget, progress: SearchProgress, reached: str | None) -> None:
    assert budget.reached(progress) == reached


@pytest.mark.parametrize(
    ("plateau", "num_flat", "reached"), [(5, 7, None), (5, 8, 8), (4, 3, None), (4, 4, 4), (1, 4, 4)]
)
def test_a_plateau_is_counted_in_whole_batches_of_four(
    plateau: int, num_flat: int, reached: int | None
) -> None:
    progress = progress_of(num_flat + 1, hypervolumes=[1.0] * (num_flat + 1))
    text = None if reached is None else f"{reached} evaluations raised the hypervolume by at most 0.10%"
    assert Budget(plateau=plateau).reached(progress, batch_size=4) == text


def test_the_smallest_budgets_are_budgets() -> None:
    Budget(1)
    Budget(seconds=1e-3)
    Budget(plateau=1, plateau_gain=0.0, max_failures=1)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"seconds": 0.0}, "the budget seconds must be positive and finite, got 0.0"),
        ({"seconds": math.inf}, "the budget seconds must be positive and finite, got inf"),
        ({"seconds": math.nan}, "the budget seconds must be positive and finite, got nan"),
        ({"plateau": 0}, "the budget plateau must be a positive integer, got 0"),
        ({"num_evaluations": 1, "max_failures": 0}, "max_failures must be a positive integer, got 0"),
        ({"plateau": 1, "plateau_gain": math.inf}, "plateau_gain must be finite and at least 0, got inf"),
    ],
)
def test_budgets_out_of_range_are_named(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Budget(**fields)


def test_what_a_finished_trial_leaves_in_the_study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now, told = [100.0], []
    monkeypatch.setattr("search.progress.time.monotonic", lambda: now[0])

    def on_trial(trial: FrozenTrial, progress: SearchProgress) -> None:
        told.append((trial.number, progress.num_counted))

    dispatcher = dispatched(tmp_path, Budget(5), on_trial=on_trial)
    first, second, third = (taken(dispatcher) for _ in range(3))
    assert dispatcher.num_running == 3
    now[0] = 102.34567
    dispatcher.tell(second.number, {"ap": 0.25, "watts": 12.5, "extra": 7.0}, "node/12")
    dispatcher.fail(third.number, "no memory")
    dispatcher.tell(first.number, {"ap": 0.5, "watts": 0.5})
    one, two, three = dispatcher.study.trials
    ms = float(sum(dispatcher.vector_of(second)))
    assert two.state == TrialState.COMPLETE
    assert two.values == [0.25, ms]
    assert two.constraints == {"ms": 0.0, "watts": 2.5}
    notes = {"ap": 0.25, "watts": 12.5, "extra": 7.0, "ms": ms, ELAPSED: 2.346, WORKER: "node/12"}
    assert two.user_attrs == notes
    assert three.state == TrialState.FAIL
    assert three.user_attrs == {REASON: "no memory", ELAPSED: 2.346}
    assert one.constraints["watts"] == 1.5
    assert one.user_attrs[WORKER] == ""
    assert told == [(1, 1), (2, 2), (0, 3)]
    assert dispatcher.num_running == 0
    with pytest.raises(KeyError, match="2"):
        dispatcher.fail(third.number, "again")


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"watts": 5.0, "b": 1.0}, "the evaluation gave ['b', 'watts'], but not ap"),
        ({}, "the evaluation gave [], but not ap, watts"),
        ({**GOOD, "ms": 3.0}, "the evaluation gave ms, which has that name already"),
        (
            {**GOOD, "worker": 1.0, "reason": 2.0},
            "the evaluation gave reason, worker, which has that name already",
        ),
    ],
)
def test_a_result_of_other_names_is_a_failure_that_says_so(
    tmp_path: Path, values: dict[str, float], reason: str
) -> None:
    dispatcher = dispatched(tmp_path, Budget(5))
    dispatcher.tell(taken(dispatcher).number, values)
    (trial,) = dispatcher.study.trials
    assert (trial.state, trial.user_attrs[REASON]) == (TrialState.FAIL, reason)
    assert dispatcher.progress.failures == [reason]


def test_a_trial_whose_place_is_gone_runs_next_and_is_counted_once(tmp_path: Path) -> None:
    dispatcher = dispatched(tmp_path, Budget(3))
    trials = [taken(dispatcher) for _ in range(3)]
    assert dispatcher.next_trial() is None
    assert dispatcher.is_over
    dispatcher.requeue(0)
    dispatcher.requeue(2)
    assert not dispatcher.is_over
    assert dispatcher.num_running == 1
    assert [taken(dispatcher).number for _ in range(2)] == [2, 0]
    assert dispatcher.next_trial() is None
    for trial in trials:
        assert dispatcher.stopped_by is None
        dispatcher.tell(trial.number, GOOD)
    assert dispatcher.stopped_by == "3 evaluations are done"


def test_a_search_that_is_stopped_keeps_what_runs_for_the_next_process(tmp_path: Path) -> None:
    dispatcher = dispatched(tmp_path, Budget(5))
    running = taken(dispatcher)
    dispatcher.stop("the evaluator cannot be built")
    assert dispatcher.next_trial() is None
    assert dispatcher.is_over
    assert dispatcher.stopped_by == "the evaluator cannot be built"
    again = dispatched(tmp_path, Budget(5))
    assert taken(again).params == running.params


def test_an_exhausted_search_is_over_when_what_runs_is_finished(tmp_path: Path) -> None:
    """Five of six vectors are allowed."""
    dispatcher = dispatched(tmp_path, Budget(50))
    trials = [taken(dispatcher) for _ in range(5)]
    assert not dispatcher.is_over
    assert dispatcher.next_trial() is None
    assert dispatcher.is_over
    for trial in trials:
        assert dispatcher.stopped_by is None
        dispatcher.tell(trial.number, GOOD)
    assert dispatcher.stopped_by == str(dispatcher.exhausted)
    assert dispatcher.progress.num_counted == 5


def test_a_batch_is_proposed_whole_and_finished_whole(tmp_path: Path) -> None:
    """Two at a time, of five: the last batch has one."""
    dispatcher = dispatched(tmp_path, Budget(5), "random", batch_size=2)
    sizes = []
    while dispatcher.stopped_by is None:
        batch = []
        while (trial := dispatcher.next_trial()) is not None:
            batch.append(trial)
        sizes.append(len(batch))
        for trial in reversed(batch):
            assert dispatcher.next_trial() is None
            dispatcher.tell(trial.number, GOOD)
    assert sizes == [2, 2, 1]


def test_an_interrupted_batch_is_filled_up_by_the_next_process(tmp_path: Path) -> None:
    dispatcher = dispatched(tmp_path, Budget(5), "random", batch_size=2)
    dispatcher.tell(taken(dispatcher).number, GOOD)
    again = dispatched(tmp_path, Budget(5), "random", batch_size=2)
    assert taken(again).number == 1
    assert again.next_trial() is None
    again.tell(1, GOOD)
    assert [taken(again).number for _ in range(2)] == [2, 3]


def test_a_budget_of_time_does_not_cut_a_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("search.progress.time.monotonic", lambda: now[0])
    dispatcher = dispatched(tmp_path, Budget(seconds=10.0), "random", batch_size=2)
    first = taken(dispatcher)
    now[0] = 11.0
    second = taken(dispatcher)
    dispatcher.tell(first.number, GOOD)
    assert dispatcher.stopped_by is None
    dispatcher.tell(second.number, GOOD)
    assert dispatcher.stopped_by == "10 s are over"
    again = dispatched(tmp_path, Budget(seconds=20.0), "random")
    assert again.progress.elapsed_s == 11.0


def test_time_is_over_at_the_second_and_begins_at_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A trial that somebody else told does not say how long the search had taken by then."""
    now = [0.0]
    monkeypatch.setattr("search.progress.time.monotonic", lambda: now[0])
    sampler = create_sampler(PROBLEM, SamplerConfig("random"))
    with open_study(tmp_path / "study.journal", PROBLEM, sampler) as study:
        study.tell(study.ask(distributions(SPACE)), state=TrialState.FAIL)
        dispatcher = Dispatcher(study, PROBLEM, Budget(seconds=10.0))
    assert dispatcher.progress.elapsed_s == 0.0
    now[0] = 10.0
    assert dispatcher.stopped_by == "10 s are over"


def test_a_pause_waits_for_what_runs_and_revises_if_it_is_told_to(tmp_path: Path) -> None:
    paused: list[int] = []

    def on_pause(progress: SearchProgress) -> bool:
        paused.append(progress.num_counted)
        return progress.num_counted == 4

    dispatcher = dispatched(tmp_path, Budget(5), "random", pause_every=2, on_pause=on_pause)
    first, second, third = (taken(dispatcher) for _ in range(3))
    dispatcher.tell(first.number, GOOD)
    dispatcher.fail(second.number, "no memory")
    assert dispatcher.next_trial() is None
    dispatcher.tell(third.number, GOOD)
    fourth = taken(dispatcher)
    assert paused == [3]
    sampler: Any = dispatcher.study.sampler
    assert not sampler.is_revised
    dispatcher.tell(fourth.number, GOOD)
    front = dispatcher.progress.front
    taken(dispatcher)
    assert paused == [3, 4]
    assert sampler.is_revised
    assert dispatcher.progress.front == front
    assert dispatcher.progress.failures == ["no memory"]
