"""What runs next and when it ends: budgets, batches, and a search that is cut off anywhere."""

import random
from pathlib import Path
from typing import Any

import pytest
from optuna.trial import FrozenTrial, Trial

from search.dispatch import Budget, Dispatcher
from search.encoding import vector_of
from search.problem import Constraint, Objective, SearchProblem
from search.progress import SearchProgress, front_of
from search.samplers import SAMPLERS, SamplerConfig, create_sampler
from search.samplers.base import GenerationSampler
from search.space import Vector
from search.study import counted_trials, enqueue, open_study
from tests.search_tests.problems import SPACE, evaluate, problem, run_alone

POPULATION = 8


class Cut(BaseException):
    """Stands for a kill: nothing after it runs."""


def search(
    path: Path,
    num_evaluations: int,
    *,
    sampler: str = "nsga2",
    num_workers: int = 1,
    cut_after: int | None = None,
    order_seed: int = 0,
) -> list[Vector | None]:
    """A deterministic search with so many workers that finish in any order; maybe cut off."""
    the_problem, order = problem(), random.Random(order_seed)
    config = SamplerConfig(sampler, population_size=POPULATION, num_parents=4)
    chosen = create_sampler(the_problem, config)
    with open_study(path, the_problem, chosen) as study:
        enqueue(study, chosen.first_vectors(), the_problem)
        num_told = 0
        dispatcher = Dispatcher(study, the_problem, Budget(num_evaluations), batch_size=POPULATION)
        running: list[Trial] = []
        while dispatcher.stopped_by is None:
            while len(running) < num_workers and (trial := dispatcher.next_trial()) is not None:
                running.append(trial)
            if num_told == cut_after:
                break
            trial = running.pop(order.randrange(len(running)))
            dispatcher.tell(trial.number, evaluate(dispatcher.vector_of(trial)))
            num_told += 1
        return [vector_of(trial, SPACE) for trial in counted_trials(study)]


@pytest.mark.parametrize("sampler", sorted(SAMPLERS))
def test_the_same_vectors_for_any_number_of_workers(tmp_path: Path, sampler: str) -> None:
    alone = search(tmp_path / "1", 30, sampler=sampler)
    for num_workers in (2, 4):
        path = tmp_path / str(num_workers)
        assert set(search(path, 30, sampler=sampler, num_workers=num_workers, order_seed=num_workers)) == set(
            alone
        )
    assert len(set(alone)) == len(alone) == (9 if sampler == "uniform" else 30)


@pytest.mark.parametrize("sampler", ["nsga2", "tpe"])
def test_the_same_vectors_however_often_it_is_cut_off(tmp_path: Path, sampler: str) -> None:
    whole = search(tmp_path / "whole", 30, sampler=sampler)
    path = tmp_path / "cut"
    for step in range(12):
        search(path, 30, sampler=sampler, num_workers=3, cut_after=step % 5, order_seed=step)
    assert set(search(path, 30, sampler=sampler, num_workers=2)) == set(whole)


def test_cut_off_while_a_batch_is_proposed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = search(tmp_path / "whole", 30)
    path = tmp_path / "cut"
    suggest = Trial._suggest
    for num_writes in (3, 19, 17, 41, 30):
        left = [num_writes]

        def suggest_or_cut(
            self: Trial, *arguments: object, left: list[int] = left, **named: object
        ) -> object:
            left[0] -= 1
            if left[0] < 0:
                raise Cut
            return suggest(self, *arguments, **named)  # type: ignore[arg-type]

        monkeypatch.setattr(Trial, "_suggest", suggest_or_cut)
        with pytest.raises(Cut):
            search(path, 30, num_workers=2)
        monkeypatch.setattr(Trial, "_suggest", suggest)
    assert set(search(path, 30)) == set(whole)


def test_the_budget_is_spent_exactly(tmp_path: Path) -> None:
    with open_study(
        tmp_path / "study", problem(), create_sampler(problem(), SamplerConfig("random"))
    ) as study:
        dispatcher = Dispatcher(study, problem(), Budget(5))
        trials = [dispatcher.next_trial() for _ in range(7)]
        assert [trial is None for trial in trials] == [False] * 5 + [True] * 2
        assert dispatcher.is_over
        assert dispatcher.stopped_by is None  # five are running
        for trial in trials[:5]:
            assert trial is not None
            dispatcher.tell(trial.number, evaluate(dispatcher.vector_of(trial)))
        assert dispatcher.stopped_by == "5 evaluations are done"
        with pytest.raises(KeyError):  # told once
            dispatcher.tell(0, {"ap": 1.0})


def test_a_plateau_ends_the_search(tmp_path: Path) -> None:
    flat = SearchProblem(SPACE, [Objective("ap", "maximize")], evaluated=("ap",))
    with open_study(tmp_path / "study", flat, create_sampler(flat, SamplerConfig("random"))) as study:
        dispatcher = Dispatcher(study, flat, Budget(plateau=6))
        num_told = 0
        while dispatcher.stopped_by is None:
            trial = dispatcher.next_trial()
            assert trial is not None
            dispatcher.tell(trial.number, {"ap": min(num_told, 10) / 10})
            num_told += 1
    assert num_told == 17  # it rises up to the 11th
    assert dispatcher.stopped_by == "6 evaluations raised the hypervolume by at most 0.10%"


def test_time_ends_the_search_and_counts_over_restarts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [100.0]
    monkeypatch.setattr("search.progress.time.monotonic", lambda: now[0])
    path, sampler = tmp_path / "study", create_sampler(problem(), SamplerConfig("random"))
    counts: list[int] = []
    for _ in range(2):
        with open_study(path, problem(), sampler) as study:
            dispatcher = Dispatcher(study, problem(), Budget(seconds=60))
            for _ in range(10):
                trial = dispatcher.next_trial()
                if trial is None:
                    break
                now[0] += 8
                dispatcher.tell(trial.number, evaluate(dispatcher.vector_of(trial)))
                if len(counts) == 0 and dispatcher.progress.num_counted == 3:
                    break
            counts.append(dispatcher.progress.num_counted)
        now[0] += 1000  # between the processes
    assert counts == [3, 8]
    assert dispatcher.stopped_by == "60 s are over"


def test_failures_end_the_search_when_there_are_too_many(tmp_path: Path) -> None:
    with open_study(
        tmp_path / "study", problem(), create_sampler(problem(), SamplerConfig("random"))
    ) as study:
        dispatcher = Dispatcher(study, problem(), Budget(100, max_failures=2))
        for number in range(5):
            trial = dispatcher.next_trial()
            if trial is None:
                break
            if number % 2:
                dispatcher.fail(trial.number, "no memory")
            else:
                dispatcher.tell(trial.number, evaluate(dispatcher.vector_of(trial)))
        assert dispatcher.stopped_by == "2 trials failed for good (max_failures=2): no memory"
        assert dispatcher.progress.num_counted == 4
        assert dispatcher.progress.front.members


def test_a_result_without_the_objective_is_a_failure(tmp_path: Path) -> None:
    with open_study(
        tmp_path / "study", problem(), create_sampler(problem(), SamplerConfig("random"))
    ) as study:
        dispatcher = Dispatcher(study, problem(), Budget(3))
        trial = dispatcher.next_trial()
        assert trial is not None
        dispatcher.tell(trial.number, {"accuracy": 0.5})
        trial = dispatcher.next_trial()
        assert trial is not None
        dispatcher.tell(trial.number, {"ap": 0.5, "latency_ms": 1.0})
        assert dispatcher.progress.failures == [
            "the evaluation gave ['accuracy'], but not ap",
            "the evaluation gave latency_ms, which has that name already",
        ]


def test_progress_is_what_the_finished_trials_give(tmp_path: Path) -> None:
    seen: list[FrozenTrial] = []
    the_problem = problem()
    sampler = create_sampler(the_problem, SamplerConfig(population_size=8, num_parents=2))
    with open_study(tmp_path / "study", the_problem, sampler) as study:
        dispatcher = Dispatcher(
            study, the_problem, Budget(40), on_trial=lambda trial, progress: seen.append(trial)
        )
        run_alone(dispatcher)
        assert [trial.number for trial in seen] == list(range(40))
        front = front_of(counted_trials(study), the_problem)
        assert dispatcher.progress.front == front
        volumes = [
            front_of(counted_trials(study)[:count], the_problem).hypervolume(the_problem.reference)
            for count in range(1, 41)
        ]
        assert dispatcher.progress.hypervolumes == pytest.approx(volumes)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "a search needs a budget: num_evaluations, seconds or plateau"),
        ({"num_evaluations": 0}, "the budget num_evaluations must be a positive integer, got 0"),
        ({"num_evaluations": "10"}, "the budget num_evaluations must be a positive integer, got '10'"),
        ({"plateau": 2.5}, "the budget plateau must be a positive integer, got 2.5"),
        ({"seconds": -1}, "the budget seconds must be positive and finite, got -1"),
        ({"max_failures": 3}, "a search needs a budget"),
        ({"plateau": 5, "plateau_gain": -0.1}, "plateau_gain must be finite and at least 0"),
    ],
)
def test_a_budget_that_ends_nothing_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Budget(**fields)


def test_nothing_runs_while_a_search_pauses(tmp_path: Path) -> None:
    """What is measured then has the machine to itself."""
    the_problem, paused_at = problem(), []
    sampler = create_sampler(the_problem, SamplerConfig("random"))
    running: list[Trial] = []

    def on_pause(progress: SearchProgress) -> bool:
        assert running == []
        paused_at.append(progress.num_counted)
        return False

    with open_study(tmp_path / "study.journal", the_problem, sampler) as study:
        dispatcher = Dispatcher(study, the_problem, Budget(30), pause_every=8, on_pause=on_pause)
        while dispatcher.stopped_by is None:
            while len(running) < 3 and (trial := dispatcher.next_trial()) is not None:
                running.append(trial)
            trial = running.pop(0)
            dispatcher.tell(trial.number, evaluate(dispatcher.vector_of(trial)))
    assert len(paused_at) == 3
    assert all(8 * (index + 1) <= count <= 8 * (index + 1) + 2 for index, count in enumerate(paused_at))


@pytest.mark.parametrize("sampler", ["nsga2", "evolution"])
def test_a_changed_quantity_counts_for_finished_trials_too(tmp_path: Path, sampler: str) -> None:
    """Half-way the last gene turns out to gain nothing: fronts and parents know it at once."""
    weights = [2.0] * SPACE.num_genes

    def latency_now(vector: Any) -> float:
        return 20.0 - float(sum(weight * ratio for weight, ratio in zip(weights, vector, strict=True)))

    objectives = (Objective("ap", "maximize"), Objective("latency_ms", "minimize"))
    bound = Constraint("latency_ms", upper=18.0)
    the_problem = SearchProblem(SPACE, objectives, {"latency_ms": latency_now}, ("ap",), [bound])
    chosen = create_sampler(the_problem, SamplerConfig(sampler, population_size=POPULATION, num_parents=4))

    def on_pause(progress: SearchProgress) -> bool:
        weights[-1] = 0.0
        return True

    with open_study(tmp_path / "study.journal", the_problem, chosen) as study:
        enqueue(study, chosen.first_vectors(), the_problem)
        dispatcher = Dispatcher(study, the_problem, Budget(40), pause_every=24, on_pause=on_pause)
        run_alone(dispatcher)
        told = {vector_of(t, SPACE): t.values for t in counted_trials(study) if t.values}
        assert any(values[1] < latency_now(vector) - 0.5 for vector, values in told.items())  # as it was then
        for member in dispatcher.progress.front.members:
            assert member.values["latency_ms"] == latency_now(member.vector)
            assert member.values["latency_ms"] <= 18.0
        assert dispatcher.progress.front == front_of(counted_trials(study), the_problem)
        assert dispatcher.progress.num_counted == len(dispatcher.progress.hypervolumes) == 40
        assert isinstance(chosen, GenerationSampler)
        last = max(t.system_attrs[chosen._get_generation_key()] for t in counted_trials(study))
        for parent in chosen.get_parent_population(study, last):
            vector = vector_of(parent, SPACE)
            assert vector is not None
            assert parent.values[1] == latency_now(vector)
            assert parent.constraints["latency_ms"] == max(0.0, latency_now(vector) - 18.0)
