"""The engine on a real Ray: failures, hangs, lost workers, killed drivers; the budget is spent once."""

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
from optuna.trial import FrozenTrial, TrialState

from search.dispatch import Budget, Dispatcher
from search.encoding import vector_of
from search.engine import EngineConfig, check_cluster, run_search
from search.evaluator import Evaluator
from search.problem import Objective, SearchProblem
from search.samplers import SamplerConfig, create_sampler
from search.study import REASON, counted_trials, enqueue, open_study, read_study
from sparsevit.sparsity import SparsitySpace, SparsityVector

SPACE = SparsitySpace((2, 2))
RAISES, GIVES_NAN, LOSES_WORKER, RAISES_ONCE, HANGS, HANGS_ONCE = (
    SPACE.uniform(ratio) for ratio in (0.1, 0.2, 0.3, 0.4, 0.5, 0.6)
)
PROBLEM = SearchProblem(
    SPACE,
    (Objective("ap", "maximize"), Objective("latency_ms", "minimize")),
    {"latency_ms": lambda vector: 10 - sum(vector)},
    ("ap", "extra"),
)


@dataclass(frozen=True)
class Treacherous:
    """An evaluator that goes wrong in every way, on vectors that the test enqueues."""

    folder: Path

    def __call__(self) -> Evaluator:
        def evaluate(vector: SparsityVector, budget: int | None) -> Mapping[str, float]:
            if vector == RAISES:
                raise MemoryError("CUDA out of memory, say")
            if vector == GIVES_NAN:
                return {"ap": float("nan")}
            if vector == LOSES_WORKER:
                os._exit(1)
            if vector == HANGS or (vector == HANGS_ONCE and self.is_first("hung")):
                time.sleep(1000)
            if vector == RAISES_ONCE and self.is_first("raised"):
                raise RuntimeError("once")
            return {"ap": 1 - sum(vector) / 4, "extra": float(budget or 0)}

        return evaluate

    def is_first(self, name: str) -> bool:
        marker = self.folder / name
        is_first = not marker.exists()
        marker.touch()
        return is_first


@dataclass(frozen=True)
class Logged:
    """Takes a moment, and notes every evaluation in a file per vector."""

    folder: Path
    seconds: float = 0.1

    def __call__(self) -> Evaluator:
        (self.folder / f"worker-{os.getpid()}").touch()

        def evaluate(vector: SparsityVector, budget: int | None) -> Mapping[str, float]:
            time.sleep(self.seconds)
            return {"ap": 1 - sum(vector) / 4}

        return evaluate


def search(
    folder: Path,
    num_evaluations: int,
    factory: Treacherous | Logged,
    *,
    batch_size: int | None = None,
    **config: int,
) -> list[FrozenTrial]:
    """Search in `folder` and return the trials that were told in this call."""
    told: list[FrozenTrial] = []
    sampler = create_sampler(PROBLEM, SamplerConfig(population_size=4, num_parents=2))
    first = [RAISES, GIVES_NAN, LOSES_WORKER, RAISES_ONCE, HANGS, HANGS_ONCE]
    with open_study(folder / "study.journal", PROBLEM, sampler) as study:
        if isinstance(factory, Treacherous):
            enqueue(study, first, SPACE)
        dispatcher = Dispatcher(
            study, PROBLEM, Budget(num_evaluations), batch_size=batch_size,
            on_trial=lambda trial, progress: told.append(trial),
        )  # fmt: skip
        run_search(dispatcher, factory, EngineConfig(**config), sample_budget=7)  # type: ignore[arg-type]
    return told


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


DRIVER = """
import sys
from tests.search_tests.test_engine import *
folder = Path(sys.argv[1])
search(folder, int(sys.argv[2]), Logged(folder), num_workers=2, num_retries=12)
"""


def test_kills_at_random_moments_lose_nothing(tmp_path: Path) -> None:
    """kill -9 of workers and of the driver, again and again, until the budget is spent."""
    chance, num_evaluations = random.Random(0), 40
    journal = tmp_path / "study.journal"
    known: dict[int, list[float] | None] = {}
    for kill in range(12):
        program = [sys.executable, "-c", DRIVER, str(tmp_path), str(num_evaluations)]
        driver = subprocess.Popen(program, start_new_session=True)
        if kill < 6:
            _wait_for_trials(journal, len(known) + chance.randrange(1, 6), driver)
            victims = [path.name.removeprefix("worker-") for path in tmp_path.glob("worker-*")]
            if kill % 2:
                for victim in victims:
                    _kill(int(victim))
                _wait_for_trials(journal, len(known) + 6, driver)
            os.killpg(driver.pid, signal.SIGKILL)
            for victim in victims:
                _kill(int(victim))
        status = driver.wait(timeout=120)
        for path in tmp_path.glob("worker-*"):
            path.unlink()
        trials = counted_trials(read_study(journal))
        for number, values in known.items():  # what was told stays as it was
            assert values == next(trial.values for trial in trials if trial.number == number)
        known = {trial.number: trial.values for trial in trials}
        if status == 0:
            break
    assert status == 0
    assert len(trials) == num_evaluations
    assert len({vector_of(trial, SPACE) for trial in trials}) == num_evaluations
    assert all(trial.state == TrialState.COMPLETE for trial in trials)


def _wait_for_trials(journal: Path, count: int, driver: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and driver.poll() is None:
        if journal.is_file() and len(counted_trials(read_study(journal))) >= count:
            return
        time.sleep(0.05)


def _kill(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return


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
