"""kill -9 at random moments: every result is told once or not at all, and the budget is spent exactly."""

import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

from optuna.trial import TrialState

from search.encoding import vector_of
from search.study import counted_trials, read_study
from tests.ray_cluster import ROOT, Cluster, running, wait_until
from tests.search_tests.evaluators import SPACE

NUM_EVALUATIONS = 75  # of 81 vectors
MAX_IN_FLIGHT = 8
DRIVER = """
import sys
from tests.search_tests.evaluators import *
folder = Path(sys.argv[1])
config = {"address": sys.argv[2], "num_workers": None, "num_retries": 12}
search(folder, int(sys.argv[3]), Logged(folder, seconds=0.3), **config)
"""


def start_driver(cluster: Cluster, folder: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-c", DRIVER, str(folder), cluster.address, str(NUM_EVALUATIONS)]
    return subprocess.Popen(command, env=cluster.environment, cwd=ROOT)


def test_kills_at_random_moments_lose_nothing(tmp_path: Path) -> None:
    """Workers, the driver and a node are killed while trials run, each twice, in random order."""
    chance = random.Random(0)
    victims = 2 * ["worker", "driver", "node"]
    chance.shuffle(victims)
    journal = tmp_path / "study.journal"
    known: dict[int, list[float] | None] = {}
    times_begun: dict[int, int] = {}

    def note_finished() -> int:
        """What was told stays as it was told, and is not evaluated again."""
        trials = {trial.number: trial for trial in counted_trials(read_study(journal))}
        for number, values in known.items():
            assert trials[number].values == values
        known.update({number: trial.values for number, trial in trials.items()})
        if not trials:
            return 0
        begun = Counter((tmp_path / "begun").read_text().splitlines())
        for number, trial in trials.items():
            vector = vector_of(trial, SPACE)
            assert vector is not None
            assert times_begun.setdefault(number, begun[str(list(vector))]) == begun[str(list(vector))] > 0
        return len(known)

    with running(tmp_path, 2) as cluster:
        driver = start_driver(cluster, tmp_path)
        for victim in victims:
            goal = len(known) + chance.randrange(1, 6)
            wait_until(lambda goal=goal: journal.is_file() and note_finished() >= goal, 120, "new results")  # type: ignore[misc]
            time.sleep(chance.random() / 2)
            assert driver.poll() is None, "the search ended before the last kill"
            if victim == "worker":
                kill_workers(tmp_path)
            elif victim == "driver":
                driver.kill()
                driver.wait()
                driver = start_driver(cluster, tmp_path)
            else:
                cluster.kill_node()
                cluster.add_node()
        assert driver.wait(timeout=240) == 0
    assert note_finished() == NUM_EVALUATIONS
    trials = counted_trials(read_study(journal))
    assert len({vector_of(trial, SPACE) for trial in trials}) == NUM_EVALUATIONS
    assert all(trial.state == TrialState.COMPLETE for trial in trials)
    num_begun = sum(times_begun.values())
    assert NUM_EVALUATIONS < num_begun <= NUM_EVALUATIONS + len(victims) * MAX_IN_FLIGHT


def kill_workers(folder: Path) -> None:
    for path in folder.glob("worker-*"):
        try:
            os.kill(int(path.name.removeprefix("worker-")), signal.SIGKILL)
        except ProcessLookupError:  # killed before
            path.unlink()
