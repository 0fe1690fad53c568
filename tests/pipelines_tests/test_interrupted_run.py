"""A run that is killed in every stage, and started again."""

import json
import os
import signal
import time
from pathlib import Path

from pipelines.stages.search import STUDY_FILE
from pipelines.workflow import STAGES
from search.study import counted_trials, read_study
from tests.pipelines_tests.command_line import Command, run_command
from tests.pipelines_tests.configuration import MACS_FOR_LATENCY, arguments
from tests.ray_cluster import wait_until


def test_killed_in_every_stage_and_started_again_it_completes(tmp_path: Path) -> None:
    """kill -9 as soon as each stage has begun; at last the run ends with a complete result.

    A signal that can be handled, as a cluster sends it, comes before them.
    """
    whole = arguments(tmp_path, "tracking=none")
    for stage, kill in [("train", signal.SIGTERM), *((stage.name, signal.SIGKILL) for stage in STAGES)]:
        process = Command(whole, tmp_path, tmp_path / "log", tmp_path / "log", os.environ)
        deadline = time.monotonic() + 120
        while not list((tmp_path / "out").glob(f"coco/stages/{stage}-*")):
            assert process.poll() is None, (tmp_path / "log").read_text()[-3000:]
            assert time.monotonic() < deadline
            time.sleep(0.02)
        time.sleep(1.0 if stage != "search" else 8.0)
        if process.poll() is None:
            os.kill(process.pid, kill)
        status = process.wait()
        if kill == signal.SIGTERM:
            assert status == 130
            last_line = (tmp_path / "log").read_text().splitlines()[-1]
            assert last_line == "error: interrupted; what is finished is kept, and the same command goes on"
    result = run_command(whole, tmp_path)
    assert result.returncode == 0, result.stderr[-3000:]
    found = {path.parent.name.split("-")[0] for path in (tmp_path / "out").glob("coco/stages/*/result.json")}
    assert found == {stage.name for stage in STAGES}
    search = json.loads(next((tmp_path / "out").glob("coco/stages/search-*/result.json")).read_text())
    assert search["metrics"]["num_evaluations"] == 6
    assert "Pareto front" in result.stdout


def test_killed_while_the_front_is_measured_the_search_goes_on(tmp_path: Path) -> None:
    """kill -9 in a pause for measuring: no trial is lost or done twice, and no member stays unmeasured."""
    overrides = ["until=search", "tracking=none", "search.num_evaluations=12", "search.measure_every=6"]
    overrides += [MACS_FOR_LATENCY, "latency.min_rounds=40", "latency.max_rounds=40"]
    search, log = arguments(tmp_path, *overrides), tmp_path / "log"
    process = Command(search, tmp_path, log, log, os.environ)

    def is_measuring() -> bool:
        assert process.poll() is None, log.read_text()[-3000:]
        return "search: measure" in log.read_text()

    wait_until(is_measuring, 240, "measuring", every=0.01)
    process.kill()
    process.wait()
    (folder,) = (tmp_path / "out" / "coco" / "stages").glob("search-*")
    before = counted_trials(read_study(folder / STUDY_FILE))
    assert len(before) == 6
    result = run_command(search, tmp_path)
    assert result.returncode == 0, result.stderr[-3000:]
    after = counted_trials(read_study(folder / STUDY_FILE))
    assert len(after) == 12
    assert [trial.values for trial in after[:6]] == [trial.values for trial in before]
    members = json.loads((folder / "front.json").read_text())["members"]
    assert members
    assert all(member["measured_ms"] > 0 for member in members)
