"""A search on a Ray that has not what it asks for: memory, room, a cluster."""

import time
from pathlib import Path

import pytest
import ray
from optuna.trial import TrialState
from ray._common.utils import get_system_memory
from ray._private.utils import get_used_memory

from search.encoding import vector_of
from search.engine import check_cluster
from search.problem import REASON
from search.study import counted_trials, read_study
from tests.search_tests.evaluators import GREEDY, SPACE, Greedy, Logged, search, times_begun


def test_a_worker_killed_for_want_of_memory_costs_its_trial_alone(tmp_path: Path) -> None:
    """Ray itself kills it, when 6 GiB more are taken than now, or half of what is free."""
    used, total = get_used_memory(), get_system_memory()  # type: ignore[no-untyped-call]
    limit = used + min((total - used) / 2, 6 * 2**30)
    monitor = {"memory_usage_threshold": limit / total, "memory_monitor_refresh_ms": 100}
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
