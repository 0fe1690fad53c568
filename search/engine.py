"""Ray Tune as the engine of a search: it places, retries and counts; the study remembers.

Tune's own state is disposable and lives in a temporary folder. A trial's result is told to the
study as soon as the driver has it; a search that is opened again spends what is left of its budget.
"""

import json
import logging
import math
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
os.environ.setdefault("TUNE_DISABLE_SIGINT_HANDLER", "1")  # an interrupt ends the run, not the search
os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")

import ray
from optuna import Study
from optuna.trial import FrozenTrial, Trial, TrialState
from ray import cloudpickle, tune
from ray.tune import Callback, CheckpointConfig, FailureConfig, RunConfig, TuneConfig
from ray.tune.search import Searcher

from search.encoding import decode, distributions
from search.evaluator import EvaluatorFactory
from search.objectives import Admission
from search.study import REASON, counted_trials
from search.variation import SearchExhausted
from sparsevit.sparsity import SparsitySpace, SparsityVector

logger = logging.getLogger(__name__)
OnTrial = Callable[[FrozenTrial], None]


@dataclass(frozen=True)
class EngineConfig:
    """Where and how trials run.

    Attributes:
        address: of a Ray cluster; None starts one on this machine (or joins that of RAY_ADDRESS).
        num_workers: trials at a time.
        num_retries: how often a trial that raises, returns NaN or loses its worker is tried again.
    """

    address: str | None = None
    num_workers: int = 2
    cpus_per_worker: float = 1.0
    gpus_per_worker: float = 0.0
    num_retries: int = 1
    object_store_mib: int = 256


def run_search(
    study: Study,
    space: SparsitySpace,
    admission: Admission,
    factory: EvaluatorFactory,
    config: EngineConfig,
    *,
    num_evaluations: int,
    sample_budget: int | None = None,
    on_trial: OnTrial = lambda trial: None,
) -> None:
    """Spend what is left of `num_evaluations` on vectors that the study's sampler proposes.

    Args:
        admission: cheap quantities, stored with every trial beside what the evaluator returns.
        factory: builds the evaluator, once in every worker.
        sample_budget: handed to the evaluator with every vector.
        on_trial: called in this process for every finished trial, complete or failed.

    Raises:
        ValueError: if no vector meets the constraints.
    """
    num_left = num_evaluations - len(counted_trials(study))
    if num_left <= 0:
        return
    searcher = StudySearcher(study, space, admission, num_trials=num_left, on_trial=on_trial)
    owns_ray = not ray.is_initialized()
    start_ray(config)
    try:
        with tempfile.TemporaryDirectory(prefix="sparsevit-tune-") as scratch:
            trainable = tune.with_resources(
                tune.with_parameters(
                    VectorTrial, factory=factory, sample_budget=sample_budget, num_retries=config.num_retries
                ),
                {"cpu": config.cpus_per_worker, "gpu": config.gpus_per_worker},
            )
            tune.Tuner(
                trainable,
                tune_config=TuneConfig(
                    search_alg=searcher,
                    num_samples=num_left,
                    max_concurrent_trials=config.num_workers,
                    reuse_actors=True,
                ),
                run_config=RunConfig(
                    name="search",
                    storage_path=scratch,
                    verbose=0,
                    failure_config=FailureConfig(max_failures=config.num_retries),
                    checkpoint_config=CheckpointConfig(checkpoint_at_end=False),
                    callbacks=[_TellLostWorkers(searcher)],
                ),
            ).fit()
    finally:
        if owns_ray:
            ray.shutdown()
    if not study.get_trials(deepcopy=False, states=[TrialState.COMPLETE]):
        if searcher.exhausted is not None:
            raise searcher.exhausted
        reasons = {trial.user_attrs[REASON] for trial in counted_trials(study)}
        raise RuntimeError(f"every evaluation of the search failed: {'; '.join(sorted(reasons))[:500]}")
    if searcher.exhausted is not None:
        logger.warning("warning: the search ends early: %s", searcher.exhausted)
    elif len(counted_trials(study)) < num_evaluations:
        raise RuntimeError("Ray Tune stopped before the search was finished: run again to go on")


def start_ray(config: EngineConfig) -> None:
    """Join the cluster that is named, or start Ray on this machine."""
    if ray.is_initialized():
        return
    address = config.address or os.environ.get("RAY_ADDRESS")
    if address:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
        return
    ray.init(
        num_cpus=max(1, math.ceil(config.num_workers * config.cpus_per_worker)),
        object_store_memory=config.object_store_mib * 2**20,
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
    )


class VectorTrial(tune.Trainable):
    """A worker: builds the evaluator once, then scores one vector per trial."""

    def setup(  # type: ignore[override]  # Tune passes what with_parameters was given
        self, config: dict[str, Any], factory: EvaluatorFactory, sample_budget: int | None, num_retries: int
    ) -> None:
        self._evaluate = factory()
        self._sample_budget = sample_budget
        self._num_attempts = 1 + num_retries

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        self.config = new_config
        return True

    def step(self) -> dict[str, Any]:
        """Score the vector. An exception is retried here, where the supernet is already loaded."""
        vector = SparsityVector(tuple(self.config["ratios"]))
        reason = ""
        for _ in range(self._num_attempts):
            try:
                values = dict(self._evaluate(vector, self._sample_budget))
            except Exception as error:  # noqa: BLE001  (whatever a user's evaluator raises is recorded)
                reason = f"{type(error).__name__}: {error}"
                continue
            broken = {name: value for name, value in values.items() if not math.isfinite(value)}
            if not broken:
                return {"outcome": json.dumps({"values": values}), "done": True}
            reason = f"the evaluation gave {broken}"
        return {"outcome": json.dumps({"failure": reason}), "done": True}

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """Nothing to save: a trial is one step."""

    def load_checkpoint(self, checkpoint: Any) -> None:
        """Nothing to load."""


class StudySearcher(Searcher):
    """Hands the study's proposals to Tune and Tune's results to the study."""

    def __init__(
        self, study: Study, space: SparsitySpace, admission: Admission, *, num_trials: int, on_trial: OnTrial
    ) -> None:
        super().__init__()
        self._study = study
        self._space = space
        self._admission = admission
        self._num_left = num_trials
        self._on_trial = on_trial
        self._running: dict[str, Trial] = {}
        self.exhausted: SearchExhausted | None = None

    def suggest(  # type: ignore[override]  # Searcher.FINISHED is a string
        self, trial_id: str
    ) -> dict[str, Any] | str | None:
        if self._num_left <= 0 or self.exhausted is not None:
            return str(Searcher.FINISHED)
        try:
            trial = self._study.ask(distributions(self._space))
        except SearchExhausted as error:
            self.exhausted = error
            return str(Searcher.FINISHED)
        self._num_left -= 1
        self._running[trial_id] = trial
        return {"ratios": list(decode(trial.params, self._space).ratios)}

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        if error or result is None:
            return  # the worker is lost; _TellLostWorkers has the reason
        outcome = json.loads(result["outcome"])  # a string, because Tune flattens nested results
        if "failure" in outcome:
            self.fail(trial_id, outcome["failure"])
            return
        trial = self._running.pop(trial_id)
        values = {**self._admission.measure(decode(trial.params, self._space)), **outcome["values"]}
        for name, value in values.items():
            trial.set_user_attr(name, value)
        names = self._study.metric_names
        assert names is not None
        self._study.tell(trial, [values[name] for name in names])
        self._on_trial(self._frozen(trial))

    def fail(self, trial_id: str, reason: str) -> None:
        """Record a trial that failed for good."""
        trial = self._running.pop(trial_id)
        trial.set_user_attr(REASON, reason)
        self._study.tell(trial, state=TrialState.FAIL)
        self._on_trial(self._frozen(trial))

    def __getstate__(self) -> dict[str, Any]:
        """Tune pickles its searcher now and then; all that matters is in the study on disk."""
        return {}

    def save(self, checkpoint_path: str) -> None:
        """Nothing to save: the study is on disk already."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing to restore."""

    def _frozen(self, trial: Trial) -> FrozenTrial:
        return self._study.get_trials(deepcopy=False)[trial.number]


class _TellLostWorkers(Callback):
    """Tune tells a searcher that a trial is lost, but a callback why."""

    def __init__(self, searcher: StudySearcher) -> None:
        self._searcher = searcher

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._searcher.fail(trial.trial_id, _reason_of(trial))


def _reason_of(trial: Any) -> str:
    """Why Tune gave a trial up. The driver has the error at once, the storage only after its next copy."""
    path = trial.pickled_error_file
    if path is None or not Path(path).is_file():
        return "the worker was lost"
    error = cloudpickle.loads(Path(path).read_bytes())
    return f"{type(error).__name__}: {error}".splitlines()[0]
