"""The engine on a real Ray: failures, hangs, lost workers, bad settings."""

import itertools
import subprocess
import sys
import time
from pathlib import Path

import pytest
import ray
from optuna.trial import FrozenTrial, TrialState
from ray._common.utils import get_system_memory
from ray._private.utils import get_used_memory

from search.encoding import vector_of
from search.engine import EngineConfig, check_cluster
from search.problem import REASON
from search.space import Vector
from search.study import counted_trials, read_study
from tests.ray_cluster import ROOT, wait_until
from tests.search_tests.evaluators import (
    GIVES_NAN,
    GREEDY,
    HANGS,
    HANGS_ONCE,
    LOSES_WORKER,
    NAN_ONCE,
    RAISES,
    RAISES_ONCE,
    SPACE,
    Greedy,
    Logged,
    Stuck,
    Treacherous,
    search,
    times_begun,
)

NUM_BATCHED = 14


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
    for vector in (*failed, RAISES_ONCE, HANGS_ONCE, NAN_ONCE):
        assert vector is not None
        assert times_begun(tmp_path, vector) == 2  # one retry each, and no third attempt
    for trial in trials:
        if trial.state == TrialState.COMPLETE:
            vector = vector_of(trial, SPACE)
            assert vector is not None
            assert times_begun(tmp_path, vector) == 1 + (vector in (RAISES_ONCE, HANGS_ONCE, NAN_ONCE))
            assert trial.values == [trial.user_attrs["ap"], 10 - sum(vector)]
            assert trial.user_attrs["extra"] == 7


def test_a_worker_killed_for_want_of_memory_costs_its_trial_alone(tmp_path: Path) -> None:
    """Ray itself kills it, when half of the memory that is free now is taken."""
    used, total = get_used_memory(), get_system_memory()  # type: ignore[no-untyped-call]
    monitor = {"memory_usage_threshold": (used + total) / 2 / total, "memory_monitor_refresh_ms": 100}
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, _system_config=monitor)
    try:
        search(tmp_path, 6, Greedy(tmp_path), num_workers=2, num_retries=2)
    finally:
        ray.shutdown()
    trials = counted_trials(read_study(tmp_path / "study.journal"))
    assert len(trials) == 6
    (failed,) = (trial for trial in trials if trial.state != TrialState.COMPLETE)
    assert vector_of(failed, SPACE) == GREEDY
    assert "OutOfMemoryError" in failed.user_attrs[REASON]
    assert "running low on memory" in failed.user_attrs[REASON]
    assert times_begun(tmp_path, GREEDY) == 3


def test_a_worker_that_hangs_while_it_builds_the_evaluator_is_ended(tmp_path: Path) -> None:
    (trial,) = search(tmp_path, 1, Stuck(), num_workers=1, num_retries=0, trial_timeout_s=2)
    assert trial.user_attrs[REASON] == "no result within 2 s, so its worker was ended"


def test_deterministic_for_any_number_of_workers_and_after_a_kill(tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    for folder in (whole, killed):
        folder.mkdir()
    search(whole, NUM_BATCHED, Logged(whole, seconds=0.02), num_workers=4, batch_size=4)
    driver = start_batched_driver(killed)  # with two workers
    wait_until(lambda: num_finished(killed) >= 6, 120, "new results", every=0.1)  # in the second batch of 4
    driver.kill()
    driver.wait()
    assert 6 <= num_finished(killed) < NUM_BATCHED
    search(killed, NUM_BATCHED, Logged(killed, seconds=0.02), num_workers=1, batch_size=4)
    vectors, front = vectors_and_front(whole)
    assert len(vectors) == NUM_BATCHED
    assert (vectors, front) == vectors_and_front(killed)


def start_batched_driver(folder: Path) -> subprocess.Popen[bytes]:
    """A deterministic search in a process that can be killed."""
    program = (
        "import sys\n"
        "from tests.search_tests.evaluators import *\n"
        "folder = Path(sys.argv[1])\n"
        "search(folder, int(sys.argv[2]), Logged(folder, seconds=0.5), num_workers=2, batch_size=4)\n"
    )
    return subprocess.Popen([sys.executable, "-c", program, str(folder), str(NUM_BATCHED)], cwd=ROOT)


def num_finished(folder: Path) -> int:
    journal = folder / "study.journal"
    return len(counted_trials(read_study(journal))) if journal.is_file() else 0


def vectors_and_front(folder: Path) -> tuple[set[Vector | None], set[tuple[float, ...]]]:
    study = read_study(folder / "study.journal")
    vectors = {vector_of(trial, SPACE) for trial in counted_trials(study)}
    return vectors, {tuple(trial.values) for trial in study.best_trials}


def test_workers_keep_their_model_and_share_a_gpu(tmp_path: Path) -> None:
    """Ray believes in the GPU that it is told of; the workers only look which one they were given."""
    ray.init(num_cpus=2, num_gpus=1, include_dashboard=False, log_to_driver=False)
    try:
        evaluator = Logged(tmp_path, seconds=0.05, num_workers=2)
        search(tmp_path, 15, evaluator, num_workers=2, gpus_per_worker=0.5)
    finally:
        ray.shutdown()
    given = [path.read_text() for path in tmp_path.glob("worker-*")]
    assert most_at_a_time(tmp_path) == 2
    # Tune may give a worker that is still starting up for one that is free already.
    assert 2 <= len(given) <= 4
    assert set(given) == {"0"}


def most_at_a_time(folder: Path) -> int:
    """The largest number of workers that evaluated at the same moment, by what they noted."""
    moments = [
        (float(moment), change)
        for path in folder.glob("worked-*")
        for line in path.read_text().splitlines()
        for moment, change in zip(line.split(), (1, -1), strict=True)
    ]
    return max(itertools.accumulate(change for _, change in sorted(moments)))


def test_what_no_worker_can_do_stops_the_search_with_its_reason(tmp_path: Path) -> None:
    ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False)
    try:
        with pytest.raises(ValueError, match=r"no node has room .*gpus_per_worker=1: the nodes have 1 CPUs"):
            search(tmp_path, 5, Logged(tmp_path), num_workers=1, gpus_per_worker=1)
        with pytest.raises(ValueError, match="cannot be built: FileNotFoundError: .*/nowhere/worker-"):
            search(tmp_path, 5, Logged(tmp_path / "nowhere"), num_workers=1)
        assert counted_trials(read_study(tmp_path / "study.journal")) == []  # mended, they are evaluated
        search(tmp_path, 5, Logged(tmp_path, seconds=0), num_workers=1)
    finally:
        ray.shutdown()
    trials = counted_trials(read_study(tmp_path / "study.journal"))
    assert [trial.state for trial in trials] == 5 * [TrialState.COMPLETE]


def test_a_cluster_that_is_not_there_is_named_at_once() -> None:
    start = time.monotonic()
    with pytest.raises(ValueError, match="no Ray cluster answers at '127.0.0.1:1' .*ray start --head"):
        check_cluster("127.0.0.1:1")
    assert time.monotonic() - start < 10


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_workers": 0}, "cluster.num_workers must be an integer, at least 1, got 0"),
        ({"num_workers": 1.5}, "cluster.num_workers must be an integer, at least 1, got 1.5"),
        ({"num_retries": -1}, "cluster.num_retries must be an integer, at least 0, got -1"),
        ({"trial_timeout_s": 0.0}, "cluster.trial_timeout_s must be positive"),
        ({"num_workers": None}, "cluster.num_workers=null needs a cluster"),
    ],
)
def test_bad_settings_are_named(fields: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EngineConfig(**fields)  # type: ignore[arg-type]
