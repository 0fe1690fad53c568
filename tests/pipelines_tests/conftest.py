"""What runs in tests share."""

from collections.abc import Iterator

import pytest
import ray

from search.engine import EngineConfig, start_ray


@pytest.fixture(scope="package", autouse=True)
def shared_ray() -> Iterator[None]:
    """A Ray on this machine that the searches of these tests run on, which else start one each."""
    start_ray(EngineConfig(num_workers=2))
    yield
    ray.shutdown()
