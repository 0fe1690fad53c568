"""A run that is killed in every stage, and started again."""

import json
import os
import signal
import subprocess
import time
from pathlib import Path

from pipelines.workflow import STAGES
from tests.pipelines_tests.configuration import command


def test_killed_in_every_stage_and_started_again_it_completes(tmp_path: Path) -> None:
    """kill -9 as soon as each stage has begun; at last the run ends with a complete result.

    A signal that can be handled, as a cluster sends it, comes before them.
    """
    for stage, kill in [("train", signal.SIGTERM), *((stage.name, signal.SIGKILL) for stage in STAGES)]:
        with (tmp_path / "log").open("wb") as log:
            process = subprocess.Popen(command(tmp_path), cwd=tmp_path, stdout=log, stderr=log)
            deadline = time.monotonic() + 120
            while not list((tmp_path / "out").glob(f"coco/stages/{stage}-*")):
                assert process.poll() is None, (tmp_path / "log").read_text()[-3000:]
                assert time.monotonic() < deadline
                time.sleep(0.02)
            time.sleep(1.0 if stage != "search" else 8.0)
            if process.poll() is None:
                os.kill(process.pid, kill)
            process.wait()
        if kill == signal.SIGTERM:
            assert process.returncode == 130
            last_line = (tmp_path / "log").read_text().splitlines()[-1]
            assert last_line == "error: interrupted; what is finished is kept, and the same command goes on"
    result = subprocess.run(command(tmp_path), cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    found = {path.parent.name.split("-")[0] for path in (tmp_path / "out").glob("coco/stages/*/result.json")}
    assert found == {stage.name for stage in STAGES}
    search = json.loads(next((tmp_path / "out").glob("coco/stages/search-*/result.json")).read_text())
    assert search["metrics"]["num_evaluations"] == 6
    assert "Pareto front" in result.stdout
