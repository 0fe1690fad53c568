"""What a trial costs the driver, and how busy eight workers are kept.

    python tests/benchmarks/engine_cost.py --trials 5000

The trials of the first part take no time at all, so that what is left is the engine: Ray Tune, the
sampler, the study on disk, MLflow (SQLite), and the pictures of the front. "driver ms" is processor
time of the driver's process per trial, "wall ms" the time between results; both by blocks of
trials. In the second part trials sleep for a second, eight at a time: "busy" is the share of the
workers' time that is sleep.

Where all trials are logged, the last lines say how long MLflow then takes for what its table of
runs asks for: a page of 100 trials in an order.
"""

import argparse
import os
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

import ray
from mlflow.tracking import MlflowClient
from optuna.trial import FrozenTrial

from pipelines.search_log import SearchLog
from pipelines.tracking import PARENT, NoTracker, Tracker
from search.dispatch import Budget, Dispatcher
from search.engine import EngineConfig, run_search
from search.evaluator import Evaluator
from search.problem import Objective, SearchProblem
from search.progress import SearchProgress
from search.samplers import SamplerConfig, create_sampler
from search.study import open_study
from sparsevit.latency.machine import device_name
from sparsevit.sparsity import SparsitySpace, SparsityVector

SPACE = SparsitySpace((2, 2, 6, 2))
PROBLEM = SearchProblem(
    SPACE,
    (Objective("ap", "maximize"), Objective("latency_ms", "minimize")),
    {"latency_ms": lambda vector: 10 - sum(vector)},
    ("ap",),
)


class Sleeper:
    """Builds an evaluator that sleeps."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds

    def __call__(self) -> Evaluator:
        def evaluate(vector: SparsityVector, budget: int | None) -> Mapping[str, float]:
            time.sleep(self._seconds)
            return {"ap": 1 - sum((gene + 1) * ratio**2 for gene, ratio in enumerate(vector)) / 20}

        return evaluate


def main() -> None:
    import torch

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--trials", type=int, default=5000)
    parser.add_argument("--block", type=int, default=500)
    parser.add_argument("--workers", type=int, default=2, help="of the trials that take no time")
    parser.add_argument("--log", nargs="+", default=["all", "front"], choices=["all", "front", "none"])
    arguments = parser.parse_args()
    print(f"{device_name(torch.device('cpu'))}, {os.cpu_count()} cores, Ray {ray.__version__}")
    for trials in arguments.log:
        print(f"\n{arguments.workers} workers, trials logged: {trials}")
        print(f"{'trials':>12} {'driver ms':>10} {'wall ms':>8}")
        stamps, startup_s, pages = search(arguments.trials, arguments.workers, Sleeper(0.0), trials)
        first = 0
        for last in range(min(arguments.block, len(stamps) - 1), len(stamps), arguments.block):
            count = last - first
            wall, processor = (stamps[last][i] - stamps[first][i] for i in (0, 1))
            print(
                f"{first:>5} … {last:<5} {1000 * processor / count:>9.1f} {1000 * wall / count:>8.1f}",
                flush=True,
            )
            first = last
        print(f"start-up: {startup_s:.1f} s until the first result")
        for order, seconds in pages.items():
            print(f"100 of {len(stamps)} logged trials, by {order}: {seconds:.2f} s")
    stamps, _, _ = search(160, 8, Sleeper(1.0), "none")
    wall = stamps[-1][0] - stamps[7][0]  # once all eight are at work
    print(f"\neight workers, trials of 1 s: {(len(stamps) - 8) / (8 * wall):.1%} busy")


def search(
    num_trials: int, num_workers: int, factory: Sleeper, trials: str
) -> tuple[list[tuple[float, float]], float, dict[str, float]]:
    """Wall and processor time of the driver at every result, the time until the first, and MLflow's."""
    stamps: list[tuple[float, float]] = []
    sampler = create_sampler(PROBLEM, SamplerConfig(population_size=100))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tracker: Tracker | NoTracker = NoTracker()
        if trials != "none":
            tracker = Tracker(
                folder / "run", uri=f"sqlite:///{folder / 'mlflow.db'}", artifact_root=folder / "artifacts",
                experiment="cost",
            )  # fmt: skip
        tracker.start(PARENT, "cost")
        tracker.start("search", "search", parent=PARENT)
        log = SearchLog(tracker, "search", folder, PROBLEM, trials=trials, every=100, details=lambda _: {})

        def on_trial(trial: FrozenTrial, progress: SearchProgress) -> None:
            log.on_trial(trial, progress)
            stamps.append((time.perf_counter(), time.process_time()))

        start = time.perf_counter()
        with open_study(folder / "study.journal", PROBLEM, sampler) as study:
            dispatcher = Dispatcher(study, PROBLEM, Budget(num_trials), on_trial=on_trial)
            run_search(dispatcher, factory, EngineConfig(num_workers=num_workers))
        tracker.close()
        pages = page_seconds(f"sqlite:///{folder / 'mlflow.db'}") if trials == "all" else {}
    return stamps, stamps[0][0] - start, pages


def page_seconds(uri: str) -> dict[str, float]:
    """How long MLflow takes for a page of 100 trials, by what they are sorted by."""
    client = MlflowClient(tracking_uri=uri)
    experiment = client.get_experiment_by_name("cost")
    assert experiment is not None
    found = {}
    for order in (
        "start_time DESC",
        "metrics.ap DESC",
        "metrics.latency_ms ASC",
        "params.`stage3.pair1` ASC",
    ):
        start = time.perf_counter()
        page = client.search_runs([experiment.experiment_id], order_by=[order], max_results=100)
        found[order] = time.perf_counter() - start
        assert len(page) == 100
    return found


if __name__ == "__main__":
    main()
