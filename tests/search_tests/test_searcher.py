"""Between Tune and the dispatcher, without a cluster: what a result, a loss or a bad start leads to."""

import json
import os
import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from optuna.trial import TrialState
from ray.exceptions import ActorUnavailableError, RayActorError

from search.dispatch import Budget, Dispatcher
from search.engine import (
    MAX_LOSSES,
    EngineConfig,
    StudySearcher,
    _error_of,
    _in_one_line,
    _TellLostWorkers,
    check_cluster,
    run_search,
)
from search.evaluator import Evaluator
from search.problem import REASON, WORKER
from search.samplers import SamplerConfig, create_sampler
from search.study import open_study
from tests.search_tests.evaluators import PROBLEM

FAILURE = {"failure": "RuntimeError: no memory"}


@pytest.fixture
def dispatcher(tmp_path: Path) -> Dispatcher:
    sampler = create_sampler(PROBLEM, SamplerConfig("random"))
    with open_study(tmp_path / "study.journal", PROBLEM, sampler) as study:
        return Dispatcher(study, PROBLEM, Budget(3))


def result(**outcome: Any) -> dict[str, Any]:
    return {"outcome": json.dumps(outcome)}


def reason_of(dispatcher: Dispatcher, number: int) -> object:
    return dispatcher.study.trials[number].user_attrs.get(REASON)


def test_what_is_suggested_is_what_the_dispatcher_hands_out(dispatcher: Dispatcher) -> None:
    searcher = StudySearcher(dispatcher)
    for name in "abc":
        suggested = searcher.suggest(name)
        assert isinstance(suggested, dict)
        number = dispatcher.num_running - 1
        assert suggested == {"values": list(dispatcher.study.trials[number].params.values())}
    assert searcher.suggest("d") == "FINISHED"  # three evaluations are all there are
    searcher.lose("b", "its node has died")
    assert isinstance(searcher.suggest("e"), dict)
    for number, name in enumerate("ace"):
        searcher.on_trial_complete(name, result(values={"ap": 0.5, "extra": 1.0}, worker=f"node/{number}"))
    assert dispatcher.stopped_by == "3 evaluations are done"
    workers = [trial.user_attrs[WORKER] for trial in dispatcher.study.trials]
    assert workers == ["node/0", "node/2", "node/1"]  # the second was lost, and ran last


def test_nothing_to_suggest_for_the_moment_is_not_the_end(tmp_path: Path) -> None:
    """Both of a batch run: the next two wait for them."""
    sampler = create_sampler(PROBLEM, SamplerConfig("random"))
    with open_study(tmp_path / "study.journal", PROBLEM, sampler) as study:
        searcher = StudySearcher(Dispatcher(study, PROBLEM, Budget(4), batch_size=2))
        assert all(isinstance(searcher.suggest(name), dict) for name in "ab")
        assert searcher.suggest("c") is None


def test_a_lost_worker_is_left_to_who_knows_why(dispatcher: Dispatcher) -> None:
    searcher = StudySearcher(dispatcher)
    searcher.suggest("a")
    searcher.on_trial_complete("a", None)
    searcher.on_trial_complete("a", result(values={"ap": 0.5}, worker=""), error=True)
    assert dispatcher.num_running == 1
    assert dispatcher.progress.num_counted == 0


def test_an_evaluator_that_was_never_built_ends_the_search(dispatcher: Dispatcher) -> None:
    searcher = StudySearcher(dispatcher)
    searcher.suggest("a")
    searcher.on_trial_complete("a", result(**FAILURE, is_built=False))
    assert dispatcher.stopped_by == "the evaluator cannot be built: RuntimeError: no memory"
    assert searcher.suggest("b") == "FINISHED"
    assert dispatcher.study.trials[0].state == TrialState.RUNNING


@pytest.mark.parametrize("has_result", [False, True])
def test_a_failure_where_an_evaluator_was_built_once_is_its_trials_alone(
    dispatcher: Dispatcher, has_result: bool
) -> None:
    """Here, or by another worker that has had a result."""
    searcher = StudySearcher(dispatcher)
    for name in "ab":
        searcher.suggest(name)
    if has_result:
        searcher.on_trial_complete("b", result(values={"ap": 0.5, "extra": 1.0}, worker="node/1"))
    searcher.on_trial_complete("a", result(**FAILURE, is_built=not has_result))
    assert reason_of(dispatcher, 0) == "RuntimeError: no memory"
    assert dispatcher.stopped_by is None


def test_a_trial_is_lost_so_often_and_no_more(dispatcher: Dispatcher) -> None:
    searcher = StudySearcher(dispatcher)
    for _ in range(MAX_LOSSES):
        searcher.suggest("a")
        searcher.lose("a", "its node has died")
        assert dispatcher.progress.num_counted == 0
    searcher.suggest("a")
    searcher.lose("a", "its node has died again")
    assert reason_of(dispatcher, 0) == "its node has died again"
    searcher.suggest("b")
    searcher.lose("b", "its node has died")  # every trial has losses of its own
    assert dispatcher.progress.num_counted == 1


def lost(folder: Path, error: BaseException | None, num_failures: int = 2) -> Any:
    """As Tune describes it: the error lies in a file."""
    path = folder / "error.pkl"
    if error is not None:
        path.write_bytes(pickle.dumps(error))
    return SimpleNamespace(trial_id="a", num_failures=num_failures, pickled_error_file=str(path))


DIED = "its worker crashed"


@pytest.mark.parametrize(
    ("error", "num_failures", "elapsed_s", "reason"),
    [
        (RayActorError(error_msg=DIED), 2, 1.0, f"RayActorError: {DIED}"),
        (RayActorError(error_msg=DIED), 1, 1.0, None),  # Tune had tries left
        (RayActorError(error_msg="it ended: its node has died"), 2, 1.0, None),
        (ActorUnavailableError("away", b"0" * 16), 2, 1.0, None),
        (RuntimeError("no\nmemory"), 1, 1.0, "RuntimeError: no … memory"),
        (RuntimeError("hung"), 2, 7.0, "no result within 7 s, so its worker was ended"),
        (RuntimeError("hung"), 2, 6.9, "RuntimeError: hung"),
        (None, 2, 1.0, "the worker was lost"),
    ],
)
def test_why_a_trial_was_lost(
    dispatcher: Dispatcher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    error: BaseException | None, num_failures: int, elapsed_s: float, reason: str | None,
) -> None:  # fmt: skip
    """What a node took along runs again; what its own worker did is a failure with a reason."""
    now = [100.0]
    monkeypatch.setattr("search.engine.time.monotonic", lambda: now[0])
    searcher = StudySearcher(dispatcher)
    teller = _TellLostWorkers(searcher, EngineConfig(num_retries=1, trial_timeout_s=7.0))
    searcher.suggest("a")
    trial = lost(tmp_path, error, num_failures)
    teller.on_trial_start(0, [], trial)
    now[0] += elapsed_s
    teller.on_trial_error(0, [], trial)
    assert dispatcher.num_running == 0
    assert reason_of(dispatcher, 0) == reason
    assert dispatcher.progress.num_counted == (reason is not None)


def test_without_a_timeout_nothing_hangs(dispatcher: Dispatcher, tmp_path: Path) -> None:
    searcher = StudySearcher(dispatcher)
    searcher.suggest("a")
    _TellLostWorkers(searcher, EngineConfig()).on_trial_error(0, [], lost(tmp_path, RuntimeError("odd")))
    assert reason_of(dispatcher, 0) == "RuntimeError: odd"


def test_an_error_in_one_line() -> None:
    assert _in_one_line(ValueError("short")) == "ValueError: short"
    assert (
        _in_one_line(ValueError("\x1b[36mfirst\x1b[0m  \n middle\n  last\n\n")) == "ValueError: first … last"
    )
    assert _error_of(SimpleNamespace(pickled_error_file=None)) is None


def test_what_tune_pickles_is_nothing(dispatcher: Dispatcher) -> None:
    searcher = StudySearcher(dispatcher)
    assert searcher.__getstate__() == {}
    assert _TellLostWorkers(searcher, EngineConfig()).__getstate__() == {}


def test_a_search_that_is_over_starts_nothing(dispatcher: Dispatcher) -> None:
    def no_worker() -> Evaluator:
        raise AssertionError("nothing is evaluated here")

    dispatcher.stop("enough")
    assert run_search(dispatcher, no_worker, EngineConfig(address="127.0.0.1:1")) == "enough"


@pytest.mark.parametrize("address", ["127.0.0.1:1", "ray://127.0.0.1:1", "127.0.0.1", "host:port"])
def test_an_address_where_nothing_answers(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(ValueError, match=f"no Ray cluster answers at '{address}' .*ray start --head"):
        check_cluster(address)
    monkeypatch.setenv("RAY_ADDRESS", address)
    for named in (None, ""):
        with pytest.raises(ValueError, match=f"no Ray cluster answers at '{address}'"):
            check_cluster(named)


def test_on_this_machine_no_cluster_is_looked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    for address in (None, "", "local"):
        check_cluster(address)


def test_the_bounds_of_the_settings_are_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    EngineConfig(num_workers=1, num_retries=0, object_store_mib=76, cpus_per_worker=0.0, trial_timeout_s=1e-3)
    for share in (0.0, 0.25, 1.0, 2.0):
        EngineConfig(gpus_per_worker=share)
    EngineConfig(num_workers=None, address="127.0.0.1:1")
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    EngineConfig(num_workers=None)
    assert os.environ["RAY_AIR_NEW_OUTPUT"] == "0"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"object_store_mib": 75}, "cluster.object_store_mib must be an integer, at least 76, got 75"),
        ({"cpus_per_worker": -0.5}, "cluster.cpus_per_worker must be finite and at least 0, got -0.5"),
        ({"gpus_per_worker": float("inf")}, "cluster.gpus_per_worker must be finite and at least 0, got inf"),
        ({"gpus_per_worker": 1.5}, "share of one GPU, or a whole number, got 1.5"),
        ({"trial_timeout_s": -1.0}, "cluster.trial_timeout_s must be positive, got -1.0"),
        ({"trial_timeout_s": float("inf")}, "cluster.trial_timeout_s must be positive, got inf"),
    ],
)
def test_settings_out_of_range_are_named(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EngineConfig(**fields)
