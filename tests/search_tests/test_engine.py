"""The engine on a real Ray: failures, hangs, lost workers, bad settings."""

import time
from pathlib import Path

import pytest
from optuna.trial import FrozenTrial, TrialState

from search.encoding import vector_of
from search.engine import EngineConfig, check_cluster
from search.study import REASON, counted_trials, read_study
from tests.search_tests.evaluators import (
    GIVES_NAN,
    HANGS,
    LOSES_WORKER,
    RAISES,
    SPACE,
    Logged,
    Treacherous,
    search,
)


def test_failures_are_recorded_and_the_search_goes_on(tmp_path: Path) -> None:
    told: list[FrozenTrial] = []
    for num_evaluations in (12, 12, 15):  # the second call has nothing left to do
        told += search(
            tmp_path, num_evaluations, Treacherous(tmp_path), num_workers=2, num_retries=1, trial_timeout_s=3
        )
    trials = counted_trials(read_study(tmp_path / "study.journal"))
    assert len(trials) == len(told) == 15
    assert len({vector_of(trial, SPACE) for trial in trials}) == 15
    failed = {vector_of(trial, SPACE): trial for trial in trials if trial.state == TrialState.FAIL}
    assert set(failed) == {RAISES, GIVES_NAN, LOSES_WORKER, HANGS}
    assert failed[RAISES].user_attrs[REASON] == "MemoryError: CUDA out of memory, say"
    assert "nan" in failed[GIVES_NAN].user_attrs[REASON]
    assert "ActorDiedError" in failed[LOSES_WORKER].user_attrs[REASON]
    assert failed[HANGS].user_attrs[REASON] == "no result within 3 s, so its worker was ended"
    for trial in trials:
        if trial.state == TrialState.COMPLETE:
            vector = vector_of(trial, SPACE)
            assert vector is not None
            assert trial.values == [trial.user_attrs["ap"], 10 - sum(vector)]
            assert trial.user_attrs["extra"] == 7


def test_the_same_vectors_from_one_worker_and_from_three(tmp_path: Path) -> None:
    evaluated = []
    for num_workers in (1, 3):
        folder = tmp_path / str(num_workers)
        folder.mkdir()
        search(folder, 14, Logged(folder, seconds=0.02), num_workers=num_workers, batch_size=4)
        evaluated.append({vector_of(t, SPACE) for t in counted_trials(read_study(folder / "study.journal"))})
    assert evaluated[0] == evaluated[1]
    assert len(evaluated[0]) == 14


def test_workers_keep_their_model_between_trials(tmp_path: Path) -> None:
    search(tmp_path, 15, Logged(tmp_path, seconds=0.05), num_workers=2)
    # Tune may give a worker that is still starting up for one that is free already.
    assert 2 <= len(list(tmp_path.glob("worker-*"))) <= 4


def test_a_cluster_that_is_not_there_is_named_at_once() -> None:
    start = time.monotonic()
    with pytest.raises(ValueError, match="no Ray cluster answers at '127.0.0.1:1' .*ray start --head"):
        check_cluster("127.0.0.1:1")
    assert time.monotonic() - start < 10


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_workers": 0}, "cluster.num_workers must be at least 1, got 0"),
        ({"num_retries": -1}, "cluster.num_retries must be at least 0, got -1"),
        ({"trial_timeout_s": 0.0}, "cluster.trial_timeout_s must be positive"),
        ({"num_workers": None}, "cluster.num_workers=null needs a cluster"),
    ],
)
def test_bad_settings_are_named(fields: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EngineConfig(**fields)  # type: ignore[arg-type]
