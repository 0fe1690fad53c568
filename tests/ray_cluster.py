"""A real Ray cluster on this machine, with token authentication; its nodes can be killed."""

import contextlib
import functools
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import requests
from ray.job_submission import JobSubmissionClient
from ray.util.state import list_nodes
from ray.util.state.exception import RayStateApiException

ROOT = Path(__file__).parents[1]
BIN = Path(sys.executable).parent


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


class Cluster:
    """Nodes that are started and killed as processes of their own; modules in `folder` are theirs.

    They ask for the token of this process.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.port, self.dashboard = free_port(), free_port()
        self.environment = {
            **{
                name: value
                for name, value in os.environ.items()
                if name.startswith("RAY_AUTH_") or not name.startswith("RAY_")
            },
            "PATH": f"{BIN}:{os.environ['PATH']}",
            "RAY_USAGE_STATS_ENABLED": "0",
            "PYTHONPATH": str(folder),
            "CUDA_VISIBLE_DEVICES": "",
        }
        self.address = f"127.0.0.1:{self.port}"
        self.jobs_address = f"http://127.0.0.1:{self.dashboard}"
        self._nodes: list[subprocess.Popen[bytes]] = []

    def start(self, *options: str) -> subprocess.Popen[bytes]:
        """Start a node with one CPU and a folder of its own, as on a machine of its own."""
        # A socket's path may have 107 characters, so the folder must be a short one.
        temporary = f"--temp-dir=/tmp/ray-{self.port}-{len(self._nodes)}"
        log = (self.folder / f"node-{len(self._nodes)}.log").open("wb")
        command: list[str] = [str(BIN / "ray"), "start", "--block", "--num-cpus=1", temporary, *options]
        command.append("--object-store-memory=100000000")
        command.append(f"--dashboard-agent-listen-port={free_port()}")  # that of any other Ray here is taken
        node = subprocess.Popen(command, env=self.environment, stdout=log, stderr=log, start_new_session=True)
        self._nodes.append(node)
        return node

    def start_head(self) -> None:
        self.start("--head", f"--port={self.port}", f"--dashboard-port={self.dashboard}", "--no-monitor")

    def add_node(self, *options: str) -> subprocess.Popen[bytes]:
        return self.start(f"--address={self.address}", *options)

    def kill_node(self) -> None:
        """Kill the node that was added last."""
        kill(self._nodes[-1])

    def run(self, *command: str, timeout: float = 300) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [BIN / "ray", *command], env=self.environment, capture_output=True, text=True, check=False,
            timeout=timeout, cwd=ROOT,
        )  # fmt: skip

    @functools.cached_property
    def jobs(self) -> JobSubmissionClient:
        return JobSubmissionClient(self.jobs_address)

    def num_nodes(self) -> int:
        """Nodes that are alive; none as long as the head does not answer."""
        with contextlib.suppress(ConnectionError, RayStateApiException, requests.RequestException):
            nodes = list_nodes(self.jobs_address, raise_on_missing_output=False)
            return sum(node.state == "ALIVE" for node in nodes)
        return 0

    def stop(self) -> None:
        for number, node in enumerate(self._nodes):
            kill(node)
            shutil.rmtree(f"/tmp/ray-{self.port}-{number}", ignore_errors=True)


def kill(node: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(node.pid, signal.SIGKILL)
    node.wait()


@contextlib.contextmanager
def running(folder: Path, num_nodes: int) -> Iterator[Cluster]:
    """A head and further nodes, of one CPU each, that leave their logs in `folder`."""
    cluster = Cluster(folder)
    cluster.start_head()
    for _ in range(num_nodes - 1):
        cluster.add_node()
    try:
        wait_until(lambda: cluster.num_nodes() == num_nodes, 300, f"{num_nodes} nodes")
        yield cluster
    finally:
        cluster.stop()


def wait_until(is_so: Callable[[], object], seconds: float, what: str, *, every: float = 1.0) -> None:
    deadline = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < deadline, f"no {what} within {seconds} s"
        time.sleep(every)
