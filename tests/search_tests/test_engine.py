"""The engine on a real Ray: failures, hangs, lost workers, workers side by side, bad settings."""

import itertools
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
from optuna.trial import FrozenTrial, TrialState

from search.encoding import vector_of
from search.engine import EngineConfig
from search.problem import REASON
from search.space import Vector
from search.study import counted_trials, read_study
from tests.ray_cluster import ROOT, wait_until
from tests.search_tests.evaluators import (
    GIVES_NAN,
    HANGS,
    HANGS_ONCE,
    LOSES_WORKER,
    NAN_ONCE,
    RAISES,
    RAISES_ONCE,
    SPACE,
    Logged,
    Stuck,
    Treacherous,
    search,
    times_begun,
)

NUM_BATCHED = 14


@pytest.fixture(scope="module", autouse=True)
def shared_ray() -> Iterator[None]:
    """A Ray that these searches run on. It believes in the GPU that it is told of."""
    ray.init(num_cpus=4, num_gpus=1, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


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
    """The workers only look which GPU they were given."""
    evaluator = Logged(tmp_path, seconds=0.05, num_workers=2)
    search(tmp_path, 15, evaluator, num_workers=2, gpus_per_worker=0.5)
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
