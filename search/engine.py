"""Ray Tune as the engine of a search: it places trials, keeps workers, and replaces lost ones.

Tune's own state is disposable and lives in a temporary folder. What runs next and what came out is
the dispatcher's: it tells the study as soon as the driver has a result.
"""

import faulthandler
import json
import logging
import math
import os
import re
import signal
import socket
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
os.environ.setdefault("TUNE_DISABLE_SIGINT_HANDLER", "1")  # an interrupt ends the run, not the search
os.environ.setdefault("TUNE_GLOBAL_CHECKPOINT_S", "3600")  # grows with the trials; nothing reads it
os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")

import ray
from ray import cloudpickle, tune
from ray.air.execution._internal.actor_manager import RayActorManager
from ray.exceptions import ActorUnavailableError, RayActorError, RayError, RayTaskError
from ray.tune import Callback, CheckpointConfig, FailureConfig, RunConfig, TuneConfig
from ray.tune.schedulers import FIFOScheduler
from ray.tune.search import Searcher

from search.dispatch import Dispatcher
from search.evaluator import Evaluator, EvaluatorFactory, as_numbers
from search.space import SearchSpace

logger = logging.getLogger(__name__)
CONNECTION_TIMEOUT_S = 5.0
NUM_STARTING = 4
MAX_LOSSES = 20  # of nodes under one trial; the cluster takes a while to notice that one is gone
MAX_REMEMBERED = 20  # trials of which Tune knows
LOST_NODE = "its node has died"


@dataclass(frozen=True)
class EngineConfig:
    """Where and how trials run.

    Attributes:
        address: of a Ray cluster; None starts one on this machine (or joins that of RAY_ADDRESS).
        num_workers: trials at a time; None takes as many as the cluster has room for, now and later.
        num_retries: how often a trial that raises, returns NaN, hangs or loses its worker is tried again.
        trial_timeout_s: a trial that takes longer is taken for hung and its worker ended, and so is one that
            takes longer to build the evaluator; None waits.
        gpus_per_worker: a share of one, or a whole number.
        latency_lane: custom resource of the node that latency is measured on (`search.lane`); None measures
            in the driver.

    Raises:
        ValueError: for a number out of range.
    """

    address: str | None = None
    num_workers: int | None = 2
    cpus_per_worker: float = 1.0
    gpus_per_worker: float = 0.0
    num_retries: int = 1
    trial_timeout_s: float | None = None
    object_store_mib: int = 256
    latency_lane: str | None = None

    def __post_init__(self) -> None:
        for name, lowest in (("num_workers", 1), ("num_retries", 0), ("object_store_mib", 76)):
            value = getattr(self, name)
            if value is not None and not (isinstance(value, int) and value >= lowest):
                raise ValueError(f"cluster.{name} must be an integer, at least {lowest}, got {value!r}")
        for name in ("cpus_per_worker", "gpus_per_worker"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"cluster.{name} must be finite and at least 0, got {getattr(self, name)}")
        if self.gpus_per_worker > 1 and self.gpus_per_worker % 1:
            raise ValueError(
                "cluster.gpus_per_worker is a share of one GPU, or a whole number, got "
                f"{self.gpus_per_worker:g}"
            )
        if self.trial_timeout_s is not None and not 0 < self.trial_timeout_s < math.inf:
            raise ValueError(f"cluster.trial_timeout_s must be positive, got {self.trial_timeout_s}")
        if self.num_workers is None and self.address is None and "RAY_ADDRESS" not in os.environ:
            raise ValueError("cluster.num_workers=null needs a cluster: set cluster.address or RAY_ADDRESS")


def run_search(
    dispatcher: Dispatcher,
    factory: EvaluatorFactory,
    config: EngineConfig,
    *,
    sample_budget: int | None = None,
) -> str:
    """Run the dispatcher's trials on Ray until its budget is spent.

    Args:
        factory: builds the evaluator, once in every worker.
        sample_budget: handed to the evaluator with every vector.

    Returns:
        What ended the search, in words.

    Raises:
        ValueError: if no cluster is there, a trial has no room on it, or no worker can build the
            evaluator.
    """
    if dispatcher.stopped_by is not None:
        return dispatcher.stopped_by
    # Tune starts so many workers at once; it gives a worker that has become free to the trial that
    # waits longest, whose own worker may be about to start.
    os.environ["TUNE_MAX_PENDING_TRIALS_PG"] = str(config.num_workers or NUM_STARTING)
    owns_ray = not ray.is_initialized()
    start_ray(config)
    try:
        _require_room(config)
        with (
            tempfile.TemporaryDirectory(prefix="sparsevit-tune-") as scratch,
            _memory_kills_lose_workers(),
        ):
            trainable = tune.with_resources(
                tune.with_parameters(
                    VectorTrial,
                    factory=factory,
                    space=dispatcher.problem.space,
                    sample_budget=sample_budget,
                    config=config,
                ),
                {"cpu": config.cpus_per_worker, "gpu": config.gpus_per_worker},
            )
            searcher = StudySearcher(dispatcher)
            tune.Tuner(
                trainable,
                tune_config=TuneConfig(
                    search_alg=searcher,
                    scheduler=_InOrder(),  # type: ignore[no-untyped-call]
                    num_samples=-1,
                    max_concurrent_trials=config.num_workers,
                    reuse_actors=True,
                ),
                run_config=RunConfig(
                    name="search",
                    storage_path=scratch,
                    verbose=0,
                    failure_config=FailureConfig(max_failures=config.num_retries),
                    checkpoint_config=CheckpointConfig(checkpoint_at_end=False),
                    callbacks=[_TellLostWorkers(searcher, config)],
                ),
            ).fit()
    finally:
        if owns_ray:
            ray.shutdown()
    if dispatcher.broken is not None:
        raise ValueError(dispatcher.broken)
    if dispatcher.stopped_by is None:
        raise RuntimeError("Ray Tune stopped before the search was finished: run again to go on")
    return dispatcher.stopped_by


def check_cluster(address: str | None) -> None:
    """Fail within seconds if there is no cluster at an address.

    Raises:
        ValueError: naming the address and how to start a cluster.
    """
    address = address or os.environ.get("RAY_ADDRESS")
    if not address or address == "local" or ray.is_initialized():
        return
    try:
        if address == "auto":
            _connect(address)
            ray.shutdown()
        else:
            host, _, port = address.removeprefix("ray://").rpartition(":")
            socket.create_connection((host, int(port)), timeout=CONNECTION_TIMEOUT_S).close()
    except (OSError, ValueError) as error:  # Ray's ConnectionError is an OSError
        raise ValueError(
            f"no Ray cluster answers at {address!r} ({str(error).splitlines()[0]}): start one with "
            "`ray start --head`, or run on this machine with cluster=local"
        ) from None


def start_ray(config: EngineConfig) -> None:
    """Join the cluster that is named, or start Ray on this machine.

    Raises:
        ValueError: if there is no cluster of that name.
    """
    if ray.is_initialized():
        return
    address = config.address or os.environ.get("RAY_ADDRESS")
    if address:
        check_cluster(address)
        _connect(address)
        return
    num_workers = config.num_workers or 1
    _connect(
        "local",  # whatever else runs on this machine
        num_cpus=max(1, math.ceil(num_workers * config.cpus_per_worker)),
        object_store_memory=config.object_store_mib * 2**20,
        include_dashboard=False,
    )


def _connect(address: str, **options: Any) -> None:
    """`ray.init`, quietly; who handled SIGTERM before still does."""
    handler = signal.getsignal(signal.SIGTERM)
    ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, **options)
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, handler)


def _require_room(config: EngineConfig) -> None:
    """A trial that fits on no node would wait for ever, and look as if it ran.

    Raises:
        ValueError: on this machine; a cluster may yet grow, so there it is a warning.
    """
    needed = {"CPU": config.cpus_per_worker, "GPU": config.gpus_per_worker}
    alive = [node for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]
    nodes = [node["Resources"] for node in alive]
    if any(all(node.get(name, 0) >= number for name, number in needed.items()) for node in nodes):
        return
    offers = "; ".join(f"{node.get('CPU', 0):g} CPUs and {node.get('GPU', 0):g} GPUs" for node in nodes)
    text = (
        f"no node has room for a trial with cluster.cpus_per_worker={config.cpus_per_worker:g} and "
        f"cluster.gpus_per_worker={config.gpus_per_worker:g}: the nodes have {offers}"
    )
    if len(nodes) == 1 and config.address is None and "RAY_ADDRESS" not in os.environ:
        raise ValueError(text)
    logger.warning("%s; trials wait for a larger one", text)


class VectorTrial(tune.Trainable):
    """A worker: builds the evaluator once, then scores one vector per trial."""

    def setup(  # type: ignore[override]  # Tune passes what with_parameters was given
        self,
        trial_config: dict[str, Any],
        factory: EvaluatorFactory,
        space: SearchSpace,
        sample_budget: int | None,
        config: EngineConfig,
    ) -> None:
        self._factory = factory
        self._evaluate: Evaluator | None = None
        self._space = space
        self._sample_budget = sample_budget
        self._num_attempts = 1 + config.num_retries
        self._timeout_s = config.trial_timeout_s
        self._name = f"{ray.get_runtime_context().get_node_id()[:12]}/{os.getpid()}"

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        self.config = new_config
        return True

    def step(self) -> dict[str, Any]:
        """Score the vector. An exception is retried here, where the model is already loaded."""
        vector = self._space.canonicalize(self.config["values"])
        failure: dict[str, Any] = {}
        for _ in range(self._num_attempts):
            try:
                if self._evaluate is None:
                    self._evaluate = self._watched(self._factory)
                evaluate = partial(self._evaluate, vector, self._sample_budget)
                values = as_numbers(self._watched(evaluate))
            except Exception as error:  # noqa: BLE001  (whatever a user's evaluator raises is recorded)
                reason = f"{type(error).__name__}: {error}"
                failure = {"failure": reason, "is_built": self._evaluate is not None}
                continue
            outcome = {"values": values, "worker": self._name}
            return {"outcome": json.dumps(outcome), "done": True}
        return {"outcome": json.dumps(failure), "done": True}

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """Nothing to save: a trial is one step."""

    def load_checkpoint(self, checkpoint: Any) -> None:
        """Nothing to load."""

    def _watched(self, work: Callable[[], Any]) -> Any:
        """Do it; after the timeout a thread outside Python ends this process, whatever it is doing."""
        if self._timeout_s is None:
            return work()
        faulthandler.dump_traceback_later(self._timeout_s, exit=True, file=sys.stderr.fileno())
        try:
            return work()
        finally:
            faulthandler.cancel_dump_traceback_later()


class StudySearcher(Searcher):
    """Hands the dispatcher's trials to Tune and Tune's results to the dispatcher."""

    def __init__(self, dispatcher: Dispatcher) -> None:
        super().__init__()
        self._dispatcher = dispatcher
        self._numbers: dict[str, int] = {}  # Tune's name of a trial to its number in the study
        self._num_losses: Counter[int] = Counter()
        self._has_result = False

    def suggest(  # type: ignore[override]  # Searcher.FINISHED is a string
        self, trial_id: str
    ) -> dict[str, Any] | str | None:
        trial = self._dispatcher.next_trial()
        if trial is None:
            return str(Searcher.FINISHED) if self._dispatcher.is_over else None
        self._numbers[trial_id] = trial.number
        return {"values": list(self._dispatcher.vector_of(trial))}

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        if error or result is None:
            return  # the worker is lost; _TellLostWorkers has the reason
        outcome = json.loads(result["outcome"])  # a string, because Tune flattens nested results
        if "failure" in outcome:
            if outcome["is_built"] or self._has_result:
                self.fail(trial_id, outcome["failure"])
            else:
                self._dispatcher.stop(f"the evaluator cannot be built: {outcome['failure']}")
        else:
            self._has_result = True
            self._dispatcher.tell(self._numbers.pop(trial_id), outcome["values"], outcome["worker"])

    def fail(self, trial_id: str, reason: str) -> None:
        """Record a trial that failed for good."""
        self._dispatcher.fail(self._numbers.pop(trial_id), reason)

    def lose(self, trial_id: str, reason: str) -> None:
        """A node went away under a trial: it runs again, within bounds."""
        number = self._numbers.pop(trial_id)
        self._num_losses[number] += 1
        if self._num_losses[number] > MAX_LOSSES:
            self._dispatcher.fail(number, reason)
        else:
            self._dispatcher.requeue(number)

    def __getstate__(self) -> dict[str, Any]:
        """Tune pickles its searcher now and then; all that matters is in the study on disk."""
        return {}

    def save(self, checkpoint_path: str) -> None:
        """Nothing to save: the study is on disk already."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing to restore."""


class _InOrder(FIFOScheduler):
    """Trials start as they come, and are forgotten when they are finished: the study has them.

    Otherwise Tune looks through all that it ever had, twice per trial.
    """

    def choose_trial_to_run(self, tune_controller: Any) -> None:
        """Tune starts what is pending by itself."""

    def on_trial_complete(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> None:
        trials = tune_controller.get_trials()
        if len(trials) > MAX_REMEMBERED:
            trials[:] = [known for known in trials if not known.is_finished()]


@contextmanager
def _memory_kills_lose_workers() -> Iterator[None]:
    """Have Tune take a worker that Ray killed for want of memory for a lost one.

    Tune ends the whole run at an error that is neither an actor's nor a task's, and Ray's
    `OutOfMemoryError` is neither.
    """
    handle = RayActorManager._actor_task_failed

    def failed(manager: RayActorManager, tracked_actor_task: Any, exception: Exception) -> None:
        if isinstance(exception, RayError) and not isinstance(exception, (RayActorError, RayTaskError)):
            message = f"{type(exception).__name__}: {str(exception).splitlines()[0]}"
            exception = RayActorError(error_msg=message)
        handle(manager, tracked_actor_task, exception)

    RayActorManager._actor_task_failed = failed  # type: ignore[assignment, method-assign]
    try:
        yield
    finally:
        RayActorManager._actor_task_failed = handle  # type: ignore[method-assign]


class _TellLostWorkers(Callback):
    """Tune tells a searcher that a trial is lost, but a callback why."""

    def __init__(self, searcher: StudySearcher, config: EngineConfig) -> None:
        self._searcher = searcher
        self._timeout_s = config.trial_timeout_s
        self._num_retries = config.num_retries
        self._started: dict[str, float] = {}

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._started[trial.trial_id] = time.monotonic()

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        elapsed_s = time.monotonic() - self._started.pop(trial.trial_id, math.inf)
        error = _error_of(trial)
        reason = "the worker was lost" if error is None else _in_one_line(error)
        # Tune gives up at once where a worker dies between two trials.
        is_early = isinstance(error, RayActorError) and trial.num_failures <= self._num_retries
        if isinstance(error, ActorUnavailableError) or LOST_NODE in str(error) or is_early:
            self._searcher.lose(trial.trial_id, reason)
            return
        if self._timeout_s is not None and elapsed_s >= self._timeout_s:
            reason = f"no result within {self._timeout_s:g} s, so its worker was ended"
        self._searcher.fail(trial.trial_id, reason)

    def __getstate__(self) -> dict[str, Any]:
        """As the searcher: nothing to keep."""
        return {}


def _in_one_line(error: BaseException) -> str:
    """Ray's errors are pages: the first line says what, the last one why."""
    lines = re.sub(r"\x1b\[\d+m", "", f"{type(error).__name__}: {error}").strip().splitlines()
    return lines[0] if len(lines) == 1 else f"{lines[0].strip()} … {lines[-1].strip()}"


def _error_of(trial: Any) -> BaseException | None:
    """Why Tune gave a trial up. The driver has the error at once, the storage only after its next copy."""
    path = trial.pickled_error_file
    if path is None or not Path(path).is_file():
        return None
    error: BaseException = cloudpickle.loads(Path(path).read_bytes())
    return error
