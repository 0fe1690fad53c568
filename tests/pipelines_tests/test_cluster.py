"""A real Ray cluster of nodes on this machine, with token authentication, and a submitted job."""

import json
import secrets
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from optuna.trial import TrialState
from ray.job_submission import JobStatus
from ray.util.state import list_tasks

from pipelines import build
from pipelines.compare import find_journal
from search.problem import WORKER
from search.study import counted_trials, read_study
from tests.pipelines_tests.configuration import MACS_FOR_LATENCY, command, composed, tiny_run
from tests.ray_cluster import BIN, ROOT, Cluster, running, wait_until

NUM_EVALUATIONS = 60

TOGETHER = """
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import ray

from sparsevit.tasks.instance_segmentation import InstanceSegmentation
from sparsevit.tasks.mask_rcnn import MaskRCNNConfig


@dataclass(frozen=True)
class Config(MaskRCNNConfig):
    folder: str = ""


class Together(InstanceSegmentation):
    def __init__(self, config):
        super().__init__(Config(**config))

    def evaluate(self, *args, **options):
        if Path(sys.argv[0]).name == "default_worker.py":
            folder = Path(self.config.folder)
            folder.mkdir(exist_ok=True)
            (folder / ray.get_runtime_context().get_node_id()).touch()
            while len(list(folder.iterdir())) < 2:
                time.sleep(0.1)
        return super().evaluate(*args, **options)
"""


@pytest.fixture
def head(tmp_path: Path) -> Iterator[Cluster]:
    with running(tmp_path, 1) as cluster:
        yield cluster


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    with running(tmp_path, 2) as cluster:
        yield cluster


def test_a_submitted_job_survives_the_loss_of_a_node(cluster: Cluster, tmp_path: Path) -> None:
    """Submit, kill a node in mid-search: the front comes out, the budget is spent once.

    The first worker waits for that of the other node, or a quick one would do all the work on a busy machine.
    """
    (tmp_path / "together.py").write_text(TOGETHER)
    tiny = tiny_run(tmp_path)
    options = {**build.flat(composed(*tiny).task), "folder": f"'{tmp_path / 'nodes'}'"}
    del options["name"]
    overrides = [each for each in tiny if not each.startswith("task.")]
    overrides += [
        "task=own", "task.name=together:Together",
        *(f"+task.options.{name}={'null' if value is None else value}" for name, value in options.items()),
        "cluster=ray", "cluster.num_workers=null", f"search.num_evaluations={NUM_EVALUATIONS}",
        f"search.storage={tmp_path / 'study.journal'}", "until=search",
    ]  # fmt: skip
    name = "search"
    deadline = time.monotonic() + 400
    while True:  # on a busy machine the agent of a new node takes a while
        submitted = cluster.run(
            "job", "submit", "--address", cluster.jobs_address, "--working-dir", ".", "--no-wait",
            "--submission-id", name, "--", "python", "pipelines/run.py", "+experiment=coco", *overrides,
        )  # fmt: skip
        if submitted.returncode == 0 or time.monotonic() > deadline:
            break
        name += "-again"
        time.sleep(10)
    assert submitted.returncode == 0, submitted.stderr
    stranger = subprocess.run(
        [BIN / "ray", "job", "list", "--address", cluster.jobs_address],
        env={**cluster.environment, "RAY_AUTH_TOKEN": secrets.token_hex(32)},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert stranger.returncode != 0
    assert "Invalid authentication token" in stranger.stderr + stranger.stdout
    assert name in [job.submission_id for job in cluster.jobs.list_jobs()]

    def nodes_of_finished() -> list[str]:
        journal = tmp_path / "study.journal"
        trials = counted_trials(read_study(journal)) if journal.is_file() else []
        return [trial.user_attrs.get(WORKER, "").partition("/")[0] for trial in trials]

    def is_over() -> bool:
        return cluster.jobs.get_job_status(name).is_terminal()

    def both_worked() -> bool:
        return len({*nodes_of_finished()} - {""}) == 2

    wait_until(lambda: both_worked() or is_over(), 400, "trials on both nodes")
    assert both_worked(), cluster.jobs.get_job_logs(name)[-3000:]
    cluster.kill_node()
    before = len(nodes_of_finished())
    wait_until(lambda: len(nodes_of_finished()) > before + 3, 120, "trials on the node that is left")
    wait_until(is_over, 400, "end of the job")
    assert cluster.jobs.get_job_status(name) == JobStatus.SUCCEEDED, cluster.jobs.get_job_logs(name)[-3000:]
    trials = counted_trials(read_study(tmp_path / "study.journal"))
    assert len(trials) == NUM_EVALUATIONS
    assert [trial.user_attrs for trial in trials if trial.state != TrialState.COMPLETE] == []
    nodes = nodes_of_finished()
    assert len({*nodes}) == 2  # the lost one had had work
    assert len({*nodes[-10:]}) == 1
    (run,) = (tmp_path / "out" / "coco" / "runs").iterdir()
    assert find_journal(run) == tmp_path / "study.journal"
    assert json.loads((run / "search" / "front.json").read_text())["members"]


DRIVER = """
import sys
from search.dispatch import Budget, Dispatcher
from search.samplers import SamplerConfig, create_sampler
from tests.search_tests.evaluators import *
sampler = create_sampler(PROBLEM, SamplerConfig("random"))
with open_study(Path(sys.argv[1]) / "study.journal", PROBLEM, sampler) as study:
    dispatcher = Dispatcher(study, PROBLEM, Budget(8))
    config = EngineConfig(address=sys.argv[2], num_workers=None)
    run_search(dispatcher, Logged(Path(sys.argv[1]), seconds=8.0), config)
"""


def test_a_node_that_joins_later_gets_work(head: Cluster, tmp_path: Path) -> None:
    """Trials last longer than a worker takes to start, as real ones do."""
    driver = subprocess.Popen(
        [sys.executable, "-c", DRIVER, str(tmp_path), head.address],
        env=head.environment, cwd=ROOT,
    )  # fmt: skip
    journal = tmp_path / "study.journal"
    wait_until(lambda: journal.is_file() and counted_trials(read_study(journal)), 300, "first trial")
    head.add_node()
    assert driver.wait(timeout=400) == 0
    trials = counted_trials(read_study(journal))
    assert len(trials) == 8
    assert [trial.user_attrs for trial in trials if trial.state != TrialState.COMPLETE] == []
    assert len({trial.user_attrs[WORKER].partition("/")[0] for trial in trials}) == 2


LANE = """
import sys
import ray
from search.engine import EngineConfig
from search.lane import run_in_lane

def where(on_progress):
    on_progress(1, 2)
    return ray.get_runtime_context().get_node_id()

config = EngineConfig(address=sys.argv[1], num_workers=None, latency_lane=sys.argv[2])
node = run_in_lane(where, config)
ray.init(sys.argv[1], log_to_driver=False)
(lane,) = [node["NodeID"] for node in ray.nodes() if "latency" in node["Resources"]]
print("in the lane:", node == lane)
"""


@pytest.fixture(scope="module")
def with_lane(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Two nodes, and one without CPUs to offer, which takes no trials, only what asks for its lane."""
    with running(tmp_path_factory.mktemp("with_lane"), 2) as cluster:
        cluster.add_node("--num-cpus=0", '--resources={"latency": 1}')
        wait_until(lambda: cluster.num_nodes() == 3, 90, "the lane")
        yield cluster


def measurements(cluster: Cluster) -> dict[str, str]:
    """What has been measured in the lane: nodes by task."""
    tasks = list_tasks(cluster.jobs_address, filters=[("name", "=", "_call")])
    return {task.task_id: str(task.node_id) for task in tasks}


def test_what_is_measured_has_a_node_to_itself(with_lane: Cluster) -> None:
    in_lane, nowhere = (
        subprocess.run(
            [sys.executable, "-c", LANE, with_lane.address, name],
            env=with_lane.environment, cwd=ROOT, capture_output=True, text=True, check=False, timeout=200,
        )
        for name in ("latency", "gpu-lane")
    )  # fmt: skip
    assert "in the lane: True" in in_lane.stdout, in_lane.stderr[-2000:]
    assert "no node offers cluster.latency_lane=gpu-lane: start one on the device" in nowhere.stderr


def test_a_search_measures_its_front_in_the_lane(with_lane: Cluster, tmp_path: Path) -> None:
    """Calibration and front are measured by the node that is kept for it; it takes no trials."""
    overrides = ["cluster=ray", f"cluster.address={with_lane.address}", "cluster.num_workers=null"]
    overrides += ["cluster.latency_lane=latency", "until=search", "tracking=none", MACS_FOR_LATENCY]
    overrides += ["search.num_evaluations=8", "search.measure_every=4"]
    before = measurements(with_lane)
    result = subprocess.run(
        command(tmp_path, *overrides), env=with_lane.environment, cwd=tmp_path,
        capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]
    members = json.loads(next(tmp_path.glob("out/coco/stages/search-*/front.json")).read_text())["members"]
    assert members
    assert all(member["measured_ms"] > 0 for member in members)
    measuring = [node for task, node in measurements(with_lane).items() if task not in before]
    assert len(measuring) >= 2  # calibration, and the front at least once
    (lane,) = {*measuring}
    (journal,) = tmp_path.glob("out/coco/stages/search-*/study.journal")
    workers = [trial.user_attrs[WORKER] for trial in counted_trials(read_study(journal))]
    assert not any(lane.startswith(worker.partition("/")[0]) for worker in workers)


def test_the_manifest_in_the_docs_is_whole() -> None:
    page = (ROOT / "docs" / "cluster.md").read_text()
    manifest = yaml.safe_load(page.split("```yaml\n")[1].split("```")[0])
    assert manifest["kind"] == "RayJob"
    cluster = manifest["spec"]["rayClusterSpec"]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        pod = group["template"]["spec"]
        mounted = {mount["name"] for container in pod["containers"] for mount in container["volumeMounts"]}
        assert mounted == {volume["name"] for volume in pod["volumes"]}
