"""A lane for measuring: a node of the cluster on which nothing else runs."""

from collections.abc import Callable
from typing import Any, TypeVar

import ray

from search.engine import EngineConfig, start_ray

T = TypeVar("T")


def run_in_lane(work: Callable[[Callable[..., None]], T], config: EngineConfig) -> T:
    """Run `work` on the node that offers `config.latency_lane`, and wait for it.

    The lane is a custom resource: ``ray start --num-cpus=0 --resources='{"latency": 1}'`` makes a node that
    takes measurements, one at a time, and no trials.

    Args:
        work: picklable; called with a function to report progress to, which here does nothing.

    Raises:
        ValueError: if no node offers the lane, or what `work` raised.
    """
    assert config.latency_lane is not None
    owns_ray = not ray.is_initialized()
    start_ray(config)
    try:
        offered = ray.cluster_resources()  # type: ignore[no-untyped-call]
        if offered.get(config.latency_lane, 0) < 1:
            raise ValueError(
                f"no node offers cluster.latency_lane={config.latency_lane}: start one on the device that is "
                f"measured with ray start --num-cpus=0 --resources='{{\"{config.latency_lane}\": 1}}'"
            )
        num_gpus = 1 if config.gpus_per_worker > 0 else 0
        task: Any = ray.remote(
            num_cpus=0, num_gpus=num_gpus, resources={config.latency_lane: 1}, max_retries=2
        )(_call)
        result: T = ray.get(task.remote(work))
        return result
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, ValueError):
            raise error.cause from error
        raise
    finally:
        if owns_ray:
            ray.shutdown()


def _call(work: Callable[[Callable[..., None]], Any]) -> Any:
    return work(lambda *progress: None)
