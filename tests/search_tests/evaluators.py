"""Evaluators for the engine's tests, and a search on Ray with them. Nothing here needs torch."""

import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from optuna.trial import FrozenTrial

from search.dispatch import Budget, Dispatcher
from search.engine import EngineConfig, run_search
from search.evaluator import Evaluator, EvaluatorFactory
from search.problem import Objective, SearchProblem
from search.samplers import SamplerConfig, create_sampler
from search.space import GeneSpace, Vector
from search.study import enqueue, open_study

CHOICES = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8)
SPACE = GeneSpace({"early": CHOICES, "late": CHOICES})
RAISES, GIVES_NAN, LOSES_WORKER, RAISES_ONCE, HANGS, HANGS_ONCE, NAN_ONCE = (
    (ratio, ratio) for ratio in (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7)
)
GREEDY = (0.7, 0.7)
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
        def evaluate(vector: Vector, budget: int | None) -> Mapping[str, float]:
            note_begun(self.folder, vector)
            if vector == RAISES:
                raise MemoryError("CUDA out of memory, say")
            if vector == GIVES_NAN or (vector == NAN_ONCE and self.is_first("not a number")):
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
    """Takes a moment; every worker leaves a file that says which GPUs it was given.

    The file `begun` has a line for every evaluation that began, in order; those of `worked-<process>`
    say from when to when. Evaluations wait for `num_workers` to start, until two
    minutes after their own worker did.
    """

    folder: Path
    seconds: float = 0.1
    num_workers: int = 1

    def __call__(self) -> Evaluator:
        (self.folder / f"worker-{os.getpid()}").write_text(os.environ.get("CUDA_VISIBLE_DEVICES", ""))
        deadline = time.time() + 120

        def evaluate(vector: Vector, budget: int | None) -> Mapping[str, float]:
            note_begun(self.folder, vector)
            begin = time.time()
            while len(list(self.folder.glob("worker-*"))) < self.num_workers and time.time() < deadline:
                time.sleep(0.01)
            time.sleep(self.seconds)
            with (self.folder / f"worked-{os.getpid()}").open("a") as log:
                log.write(f"{begin} {time.time()}\n")
            return {"ap": 1 - sum(vector) / 4}

        return evaluate


@dataclass(frozen=True)
class Greedy:
    """Takes all the memory there is for one vector."""

    folder: Path

    def __call__(self) -> Evaluator:
        def evaluate(vector: Vector, budget: int | None) -> Mapping[str, float]:
            note_begun(self.folder, vector)
            held = []
            while vector == GREEDY:
                held.append(b"1" * (100 * 2**20))
                time.sleep(0.05)
            return {"ap": 1 - sum(vector) / 4}

        return evaluate


@dataclass(frozen=True)
class Stuck:
    """Never has an evaluator ready."""

    def __call__(self) -> Evaluator:
        time.sleep(1000)
        raise AssertionError


def note_begun(folder: Path, vector: Vector) -> None:
    with (folder / "begun").open("a") as log:
        log.write(f"{list(vector)}\n")


def times_begun(folder: Path, vector: Vector) -> int:
    """How often an evaluation of a vector has begun."""
    return (folder / "begun").read_text().splitlines().count(str(list(vector)))


def search(
    folder: Path,
    num_evaluations: int,
    factory: EvaluatorFactory,
    *,
    batch_size: int | None = None,
    **config: Any,
) -> list[FrozenTrial]:
    """Search in `folder` and return the trials that were told in this call."""
    told: list[FrozenTrial] = []
    sampler = create_sampler(PROBLEM, SamplerConfig(population_size=4, num_parents=2))
    first = [RAISES, GIVES_NAN, LOSES_WORKER, RAISES_ONCE, HANGS, HANGS_ONCE, NAN_ONCE]
    with open_study(folder / "study.journal", PROBLEM, sampler) as study:
        if isinstance(factory, Treacherous):
            enqueue(study, first, PROBLEM)
        if isinstance(factory, Greedy):
            enqueue(study, [GREEDY], PROBLEM)
        dispatcher = Dispatcher(
            study, PROBLEM, Budget(num_evaluations), batch_size=batch_size,
            on_trial=lambda trial, progress: told.append(trial),
        )  # fmt: skip
        run_search(dispatcher, factory, EngineConfig(**config), sample_budget=7)
    return told
