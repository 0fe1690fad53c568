"""A whole search in one call, as far as it goes without a cluster: bad input, and a search that is over."""

import logging
from pathlib import Path

import pytest

from search.dispatch import Budget, Dispatcher
from search.encoding import vector_of
from search.engine import EngineConfig
from search.evaluator import Evaluator
from search.find_front import find_front
from search.problem import Constraint
from search.samplers import SamplerConfig, create_sampler
from search.study import enqueue, open_study, read_study
from sparsevit.sparsity import SparsitySpace
from tests.search_tests.problems import evaluate, problem, run_alone

SPACE = SparsitySpace((2, 2))
PROBLEM = problem(space=SPACE)
RANDOM = SamplerConfig("random")


def no_worker() -> Evaluator:
    raise AssertionError("nothing is evaluated here")


def searched(study: Path, num_trials: int) -> None:
    with open_study(study, PROBLEM, create_sampler(PROBLEM, RANDOM)) as opened:
        run_alone(Dispatcher(opened, PROBLEM, Budget(num_trials)))


def test_what_no_vector_meets_is_refused_before_any_work(tmp_path: Path) -> None:
    fast = problem(Constraint("latency_ms", upper=6.0), space=SPACE)  # 10 − 2 · 2 · 0.8 is 6.8
    with pytest.raises(ValueError, match="no vector has latency_ms ≤ 6: reachable is 6.8 to 10"):
        find_front(fast, no_worker, tmp_path / "study.journal", Budget(4))
    with pytest.raises(ValueError, match="stage2.pair1 is 0.55, which is not one of the choices"):
        find_front(PROBLEM, no_worker, tmp_path / "study.journal", Budget(4), first=[(0.0, 0.55)])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("deterministic", [False, True])
def test_a_search_that_is_over_gives_its_front_at_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, deterministic: bool
) -> None:
    study = tmp_path / "study.journal"
    searched(study, 12)
    caplog.set_level(logging.WARNING)
    front = find_front(
        PROBLEM, no_worker, str(study), Budget(12), sampler=RANDOM, deterministic=deterministic
    )
    best = {vector_of(trial, SPACE) for trial in read_study(study).best_trials}
    assert {member.vector for member in front.members} == best
    assert all(member.values["ap"] == evaluate(member.vector)["ap"] for member in front.members)
    assert caplog.text == ""


def test_the_given_vectors_come_before_those_of_the_sampler(tmp_path: Path) -> None:
    """Those of NSGA-II by default, a generation of 50."""
    study = tmp_path / "study.journal"
    searched(study, 2)
    finished = {vector_of(trial, SPACE) for trial in read_study(study).trials}
    given = [vector for vector in (SPACE.uniform(0.3), SPACE.sparsest) if vector not in finished]
    find_front(PROBLEM, no_worker, study, Budget(2), first=given)
    waiting = [vector_of(trial, SPACE) for trial in read_study(study).trials[2:]]
    sampler = create_sampler(PROBLEM, SamplerConfig())
    assert len(given) == 2
    assert waiting[:2] == given
    expected = dict.fromkeys([*given, *sampler.first_vectors()])
    assert waiting == [vector for vector in expected if vector not in finished]


def test_only_a_deterministic_search_finishes_its_batch_when_the_budget_is_spent(tmp_path: Path) -> None:
    """One trial is in flight: for that one a cluster is needed, and there is none."""
    study, engine = tmp_path / "study.journal", EngineConfig(address="127.0.0.1:1")
    searched(study, 2)
    with open_study(study, PROBLEM, create_sampler(PROBLEM, RANDOM)) as opened:
        assert Dispatcher(opened, PROBLEM, Budget(3)).next_trial() is not None
    assert find_front(PROBLEM, no_worker, study, Budget(2), sampler=RANDOM, engine=engine).members
    with pytest.raises(ValueError, match=r"no Ray cluster answers at '127.0.0.1:1'"):
        find_front(PROBLEM, no_worker, study, Budget(2), sampler=RANDOM, engine=engine, deterministic=True)


def test_an_empty_front_is_a_warning_with_its_reasons(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Two trials fail for one reason and one for another; the fourth is less accurate than is asked for."""
    accurate = problem(Constraint("ap", lower=2.0), space=SPACE)
    study = tmp_path / "study.journal"
    with open_study(study, accurate, create_sampler(accurate, RANDOM)) as opened:
        enqueue(opened, [SPACE.dense], accurate)
        dispatcher = Dispatcher(opened, accurate, Budget(4))
        run_alone(dispatcher, max_trials=1)
        for reason in ("no memory", "no memory", "no light"):
            trial = dispatcher.next_trial()
            assert trial is not None
            dispatcher.fail(trial.number, reason)
    front = find_front(accurate, no_worker, study, Budget(4), sampler=RANDOM)
    assert front.members == ()
    assert {record.name for record in caplog.records} == {"search.find_front"}
    assert [record.getMessage() for record in caplog.records] == [
        "2 trials failed: no memory",
        "1 trials failed: no light",
        "the front is empty (4 evaluations are done): 3 trials failed, 1 break a constraint (ap ≥ 2)",
    ]
