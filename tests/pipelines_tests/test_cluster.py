"""A real Ray cluster of two nodes on this machine, with token authentication, and a submitted job."""

import contextlib
import json
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from optuna.trial import TrialState

from pipelines.compare import find_journal
from search.study import WORKER, counted_trials, read_study
from tests.pipelines_tests.configuration import tiny_run

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
NUM_EVALUATIONS = 60


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


class Cluster:
    """Nodes that are started and killed as processes of their own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.port, self.dashboard = free_port(), free_port()
        self.environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("RAY_")},
            "PATH": f"{BIN}:{os.environ['PATH']}",
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(32),
            "RAY_USAGE_STATS_ENABLED": "0",
            "CUDA_VISIBLE_DEVICES": "",
        }
        self._nodes: list[subprocess.Popen[bytes]] = []

    def start(self, *options: str) -> subprocess.Popen[bytes]:
        """Start a node with one CPU and a folder of its own, as on a machine of its own."""
        # A socket's path may have 107 characters, so the folder must be a short one.
        temporary = f"--temp-dir=/tmp/ray-{self.port}-{len(self._nodes)}"
        log = (self.folder / f"node-{len(self._nodes)}.log").open("wb")
        command: list[str] = [str(BIN / "ray"), "start", "--block", "--num-cpus=1", temporary, *options]
        command.append("--object-store-memory=100000000")
        node = subprocess.Popen(command, env=self.environment, stdout=log, stderr=log, start_new_session=True)
        self._nodes.append(node)
        return node

    def start_head(self) -> None:
        self.start("--head", f"--port={self.port}", f"--dashboard-port={self.dashboard}")

    def add_node(self) -> subprocess.Popen[bytes]:
        return self.start(f"--address=127.0.0.1:{self.port}")

    def run(self, *command: str, timeout: float = 120) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [BIN / "ray", *command], env=self.environment, capture_output=True, text=True, check=False,
            timeout=timeout, cwd=ROOT,
        )  # fmt: skip

    def num_nodes(self) -> int:
        """Nodes that are alive."""
        program = (
            "import ray\n"
            f"ray.init('127.0.0.1:{self.port}', logging_level='ERROR', log_to_driver=False)\n"
            "print('nodes:', sum(node['Alive'] for node in ray.nodes()))\n"
        )
        result = subprocess.run(
            [sys.executable, "-c", program], env=self.environment, capture_output=True, text=True, check=False
        )
        counts = re.findall(r"^nodes: (\d+)$", result.stdout, flags=re.MULTILINE)
        return int(counts[0]) if counts else 0

    def stop(self) -> None:
        for number, node in enumerate(self._nodes):
            kill(node)
            shutil.rmtree(f"/tmp/ray-{self.port}-{number}", ignore_errors=True)


def kill(node: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(node.pid, signal.SIGKILL)
    node.wait()


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    cluster = Cluster(tmp_path)
    cluster.start_head()
    cluster.add_node()
    try:
        wait_until(lambda: cluster.num_nodes() == 2, 120, "two nodes")
        yield cluster
    finally:
        cluster.stop()


def wait_until(is_so: object, seconds: float, what: str) -> None:
    assert callable(is_so)
    deadline = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < deadline, f"no {what} within {seconds} s"
        time.sleep(1)


def test_a_submitted_job_survives_the_loss_of_a_node(cluster: Cluster, tmp_path: Path) -> None:
    """Submit, kill a node in mid-search: the front comes out, the budget is spent once."""
    address = f"http://127.0.0.1:{cluster.dashboard}"
    stranger = subprocess.run(
        [BIN / "ray", "job", "list", "--address", address], capture_output=True, text=True, check=False,
        env={**cluster.environment, "RAY_AUTH_TOKEN": secrets.token_hex(32)},
    )  # fmt: skip
    assert stranger.returncode != 0
    overrides = tiny_run(
        tmp_path, "cluster=ray", f"search.num_evaluations={NUM_EVALUATIONS}", "until=search",
        f"search.storage={tmp_path / 'study.journal'}",
    )  # fmt: skip
    for attempt in range(3):  # a dashboard that has just started may not answer yet
        name = f"search-{attempt}"
        submitted = cluster.run(
            "job", "submit", "--address", address, "--working-dir", ".", "--no-wait", "--submission-id", name,
            "--", "python", "pipelines/run.py", "+experiment=coco", *overrides,
        )  # fmt: skip
        if submitted.returncode == 0:
            break
        time.sleep(10)
    assert submitted.returncode == 0, submitted.stderr

    def num_finished() -> int:
        journal = tmp_path / "study.journal"
        return len(counted_trials(read_study(journal))) if journal.is_file() else 0

    wait_until(lambda: num_finished() >= 8, 400, "first trials")
    kill(cluster._nodes[1])
    before = num_finished()
    wait_until(lambda: num_finished() > before + 3, 120, "trials on the node that is left")
    status = ""

    def is_over() -> bool:
        nonlocal status
        status = cluster.run("job", "status", name, "--address", address).stdout
        return any(word in status for word in ("succeeded", "failed", "stopped"))

    wait_until(is_over, 400, "end of the job")
    logs = cluster.run("job", "logs", name, "--address", address).stdout
    assert "succeeded" in status, logs[-3000:]
    trials = counted_trials(read_study(tmp_path / "study.journal"))
    assert len(trials) == NUM_EVALUATIONS
    assert [trial.user_attrs for trial in trials if trial.state != TrialState.COMPLETE] == []
    (run,) = (tmp_path / "out" / "coco" / "runs").iterdir()
    assert find_journal(run) == tmp_path / "study.journal"
    assert json.loads((run / "search" / "front.json").read_text())["members"]


DRIVER = """
import sys
from search.dispatch import Budget, Dispatcher
from search.samplers import SamplerConfig, create_sampler
from tests.search_tests.test_engine import *
sampler = create_sampler(PROBLEM, SamplerConfig("random"))
with open_study(Path(sys.argv[1]) / "study.journal", PROBLEM, sampler) as study:
    dispatcher = Dispatcher(study, PROBLEM, Budget(8))
    config = EngineConfig(address=sys.argv[2], num_workers=None)
    run_search(dispatcher, Logged(Path(sys.argv[1]), seconds=8.0), config)
"""


def test_a_node_that_joins_later_gets_work(cluster: Cluster, tmp_path: Path) -> None:
    """Trials last longer than a worker takes to start, as real ones do."""
    kill(cluster._nodes[1])
    wait_until(lambda: cluster.num_nodes() == 1, 90, "notice of the loss")
    driver = subprocess.Popen(
        [sys.executable, "-c", DRIVER, str(tmp_path), f"127.0.0.1:{cluster.port}"],
        env=cluster.environment, cwd=ROOT,
    )  # fmt: skip
    journal = tmp_path / "study.journal"
    wait_until(lambda: journal.is_file() and counted_trials(read_study(journal)), 120, "first trial")
    cluster.add_node()
    assert driver.wait(timeout=200) == 0
    trials = counted_trials(read_study(journal))
    assert len(trials) == 8
    assert [trial.user_attrs for trial in trials if trial.state != TrialState.COMPLETE] == []
    assert len({trial.user_attrs[WORKER].partition("/")[0] for trial in trials}) == 2


def test_the_manifest_in_the_docs_is_whole() -> None:
    page = (ROOT / "docs" / "cluster.md").read_text()
    manifest = yaml.safe_load(page.split("```yaml\n")[1].split("```")[0])
    assert manifest["kind"] == "RayJob"
    cluster = manifest["spec"]["rayClusterSpec"]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        pod = group["template"]["spec"]
        mounted = {mount["name"] for container in pod["containers"] for mount in container["volumeMounts"]}
        assert mounted == {volume["name"] for volume in pod["volumes"]}
