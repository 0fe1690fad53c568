"""The whole way on a dozen small images: end to end, again, killed, and with bad input."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from pipelines.workflow import run_pipeline
from search.study import read_study
from search.warm_start import PUBLISHED
from sparsevit import load_exported
from tests.pipelines_tests.configuration import composed, tiny_run

ROOT = Path(__file__).parent.parent.parent
STAGES = ("train", "adapt", "calibrate", "search", "finetune", "report")


def command(folder: Path, *overrides: str) -> list[str]:
    return [
        sys.executable,
        str(ROOT / "pipelines" / "run.py"),
        "+experiment=coco",
        *tiny_run(folder, *overrides),
    ]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run, by the command line."""
    folder = tmp_path_factory.mktemp("run")
    result = subprocess.run(command(folder), cwd=folder, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    (folder / "stdout.txt").write_text(result.stdout)
    return folder


def test_prints_what_a_user_needs(finished: Path) -> None:
    printed = (finished / "stdout.txt").read_text()
    for column in ("vector", "predicted ms", "measured ms", "speed-up", "mask_ap before", "mask_ap after"):
        assert column in printed
    assert "mlflow ui --backend-store-uri sqlite:///" in printed
    report = next(line.split()[-1] for line in printed.splitlines() if line.startswith("report:"))
    assert (finished / report).is_file()


def test_every_stage_left_its_result(finished: Path) -> None:
    found = {path.parent.name.split("-")[0] for path in (finished / "out").glob("coco/stages/*/result.json")}
    assert found == set(STAGES)
    front = json.loads(next((finished / "out").glob("coco/stages/report-*/front.json")).read_text())
    assert front["members"]
    assert all(member["latency_ms"] > 0 for member in front["members"])


def test_export_loads_and_predicts(finished: Path) -> None:
    folder = next((finished / "out").glob("coco/stages/report-*/export"))
    model = load_exported(folder)
    assert model.config["classes"] == ["disc", "square", "triangle"]
    assert len(model.sparsity) == 6
    with torch.inference_mode():
        assert "masks" in model([torch.rand(3, 64, 64)])[0]


def test_again_is_skipped_and_other_choices_share_stages(
    finished: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    again = run_pipeline(composed(*tiny_run(finished)))
    assert all(result.was_reused for result in again.values())
    other = run_pipeline(composed(*tiny_run(finished, "sampler=random", "tracking=none")))
    reused = {name for name, result in other.items() if result.was_reused}
    assert reused == {"train", "adapt", "calibrate"}
    rule = run_pipeline(
        composed(*tiny_run(finished, "finetune.rule=knee", "tracking=none", "until=finetune"))
    )
    assert {name for name, result in rule.items() if not result.was_reused} == {"finetune"}


def test_sweep_shares_the_stages_it_has_in_common(finished: Path) -> None:
    before = stage_folders(finished)
    sweep = command(finished, "sampler=nsga2,random", "search.seed=7", "until=search")
    sweep.insert(2, "-m")
    result = subprocess.run(sweep, cwd=finished, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    added = sorted(folder.split("-")[0] for folder in stage_folders(finished) - before)
    assert added == ["search", "search"]
    assert result.stdout.count("train: skipped, finished before") == 2


def stage_folders(folder: Path) -> set[str]:
    return {path.parent.name for path in (folder / "out").glob("coco/stages/*/result.json")}


def test_dry_run_says_what_would_happen_and_does_nothing(finished: Path) -> None:
    before = sorted(path.name for path in (finished / "out").rglob("*"))
    result = subprocess.run(
        command(finished, "search.dry_run=true", "sampler=random", "search.warm_start=[coco_34ms]"),
        cwd=finished, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-2000:]
    assert (
        "stages:       train (finished), adapt (finished), calibrate (finished), search (to do)"
        in result.stdout
    )
    assert "space:        120,285 vectors of 6 genes" in result.stdout
    for line in (r"latency:      [\d.]+ to [\d.]+ ms", r"sampler:      random, 1 vectors to start with"):
        assert re.search(line, result.stdout)
    assert re.search(
        r"budget:       6 evaluations, 2 at a time\ntime:         about [\d.]+ min", result.stdout
    )
    assert sorted(path.name for path in (finished / "out").rglob("*")) == before


def test_a_deterministic_search_with_a_warm_start_and_a_time_limit(finished: Path) -> None:
    result = subprocess.run(
        command(
            finished, "search.deterministic=true", "search.warm_start=[coco_34ms]", "until=search",
            "search.max_hours=1", "search.plateau=100", "tracking.trials=front",
        ),
        cwd=finished, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-2000:]
    assert "the search ends: 6 evaluations are done" in result.stdout
    fronts = sorted(
        (finished / "out").glob("coco/stages/search-*/front.csv"), key=lambda p: p.stat().st_mtime
    )
    assert fronts
    study = read_study(fronts[-1].with_name("study.journal"))
    assert tuple(study.trials[0].params.values()) == PUBLISHED["coco_34ms"]


def test_too_many_failures_stop_the_run_with_what_was_found(finished: Path) -> None:
    """No trial ends in time; a larger limit goes on with the same study."""
    overrides = (
        "search.max_failures=2",
        "cluster.trial_timeout_s=0.001",
        "cluster.num_retries=0",
        "cluster.num_workers=1",
        "search.seed=70",
    )
    result = subprocess.run(
        command(finished, *overrides), cwd=finished, capture_output=True, text=True, check=False
    )
    assert result.returncode == 1
    assert (
        "the search stopped: 2 trials failed for good (max_failures=2): no result within 0.001 s"
        in result.stderr
    )
    assert "run again with a larger search.max_failures to go on from there" in result.stderr
    assert "Traceback" not in result.stderr.split("error: the search stopped")[1]
    again = subprocess.run(
        command(finished, "search.max_failures=3", "search.seed=70", "until=search"),
        cwd=finished, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert again.returncode == 0, again.stderr[-2000:]
    assert "num_failed 2" in again.stdout


def test_unreachable_budget_fails_before_training_and_names_the_range(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no vector has latency_ms ≤ 0.001: reachable is "):
        run_pipeline(composed(*tiny_run(tmp_path, "search.latency_budget_ms=0.001", "tracking=none")))
    assert not list((tmp_path / "out").glob("coco/stages/train-*/result.json"))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["+experiment=nothing"], "Available options in 'experiment':\n\tcoco"),
        ([], "choose an experiment: +experiment=coco"),
        (["+experiment=coco", "sampler=x"], "Available options in 'sampler':\n\tevolution"),
        (["+experiment=coco", "train.epochz=1"], "valid keys here: epochs, batch_size"),
        (["+experiment=coco", "train.epochs=many"], "'many' of type 'str' could not be converted to Float"),
        (["+experiment=coco", "data.root=/no/such/folder"], "is not a folder: set data.root"),
        (["+experiment=coco", "finetune.vector=[0.1,0.2]"], "has 2 ratios, but depths [2, 2, 6, 2] need 6"),
        (["+experiment=coco", "finetune.vector=[0.1,0.2,0.5,0.3,0.5,0]"], "may not decrease inside a stage"),
        (["+experiment=coco", "finetune.vector=[0.1,1.2,0.5,0.5,0.5,0]"], "ratios lie in [0, 1)"),
    ],
)  # fmt: skip
def test_bad_input_is_exit_status_2_and_a_message(tmp_path: Path, overrides: list[str], message: str) -> None:
    arguments = [sys.executable, str(ROOT / "pipelines" / "run.py"), *overrides]
    result = subprocess.run(arguments, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 2, result.stderr[-2000:]
    assert message in result.stderr
    assert "Traceback" not in result.stderr


def test_killed_in_every_stage_and_started_again_it_completes(tmp_path: Path) -> None:
    """kill -9 as soon as each stage has begun; at last the run ends with a complete result."""
    for stage in STAGES:
        with (tmp_path / "log").open("wb") as log:
            process = subprocess.Popen(command(tmp_path), cwd=tmp_path, stdout=log, stderr=log)
            deadline = time.monotonic() + 120
            while not list((tmp_path / "out").glob(f"coco/stages/{stage}-*")):
                assert process.poll() is None, (tmp_path / "log").read_text()[-3000:]
                assert time.monotonic() < deadline
                time.sleep(0.02)
            time.sleep(1.0 if stage != "search" else 8.0)
            if process.poll() is None:
                os.kill(process.pid, signal.SIGKILL)
            process.wait()
    result = subprocess.run(command(tmp_path), cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    found = {path.parent.name.split("-")[0] for path in (tmp_path / "out").glob("coco/stages/*/result.json")}
    assert found == set(STAGES)
    search = json.loads(next((tmp_path / "out").glob("coco/stages/search-*/result.json")).read_text())
    assert search["metrics"]["num_evaluations"] == 6
    assert "Pareto front" in result.stdout
