"""The whole way on a dozen small images: end to end, again, and with other choices."""

import json
import logging
import re
import subprocess
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from mlflow.tracking import MlflowClient
from PIL import Image

from pipelines.context import WEIGHTS_FILE
from pipelines.workflow import STAGES, run_pipeline
from search.study import read_study
from search.warm_start import PUBLISHED
from sparsevit import create_backbone, load_backbone_weights, load_exported
from sparsevit.checkpoints import read_weights
from sparsevit.checkpoints.__main__ import main as write_weights
from sparsevit.latency import LatencyPredictor
from tests.pipelines_tests.command_line import run_command
from tests.pipelines_tests.configuration import arguments, command, composed, tiny_run


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run, by the command line as a user starts it."""
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
    chance = "the dense model is no better than chance: its mask_ap on 'report' is "  # after three steps
    assert len(re.findall(rf"train: done in .* – {chance}", printed)) == 1
    assert printed.index(f"warning: {chance}") < printed.index("Pareto front") < printed.index("chosen: ")
    report = next(line.split()[-1] for line in printed.splitlines() if line.startswith("report:"))
    assert (finished / report).is_file()


def test_every_stage_left_its_result(finished: Path) -> None:
    found = {path.parent.name.split("-")[0] for path in (finished / "out").glob("coco/stages/*/result.json")}
    assert found == {stage.name for stage in STAGES}
    front = json.loads(next((finished / "out").glob("coco/stages/report-*/front.json")).read_text())
    assert front["members"]
    assert all(member["latency_ms"] > 0 for member in front["members"])


def test_mlflow_has_a_run_with_its_results_stages_and_trials(finished: Path) -> None:
    client = MlflowClient(tracking_uri=f"sqlite:///{finished / 'out' / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("coco")
    assert experiment is not None
    runs = {run.info.run_name: run for run in client.search_runs([experiment.experiment_id])}
    assert runs["coco"].data.metrics["chosen_speedup"] > 0
    assert {runs[stage.name].data.tags["mlflow.parentRunId"] for stage in STAGES} == {
        runs["coco"].info.run_id
    }
    trials = [run for name, run in runs.items() if name.startswith("trial")]
    assert len(trials) == 6
    assert all({"latency_ms", "mask_ap"} <= set(run.data.metrics) for run in trials)
    search = runs["search"]
    curves = {"hypervolume", "feasible_share", "num_failed", "predictor_rmspe", "predictor_spearman"}
    assert curves <= set(search.data.metrics)
    assert len(client.get_metric_history(search.info.run_id, "hypervolume")) >= 6
    artifacts = {file.path for file in client.list_artifacts(search.info.run_id)}
    assert {"front.json", "front.csv", "front.html", "front.png"} <= artifacts
    assert all(run.info.status == "FINISHED" for run in runs.values())


def test_the_report_has_every_class_and_pictures(finished: Path) -> None:
    report = next((finished / "out").glob("coco/stages/report-*"))
    assert "mask_ap/disc" in (report / "classes.csv").read_text()
    with Image.open(report / "pictures.png") as sheet:
        assert min(sheet.size) > 500
    assert "data:image/png;base64," in (report / "report.html").read_text()


def test_export_loads_and_predicts(finished: Path) -> None:
    folder = next((finished / "out").glob("coco/stages/report-*/export"))
    model = load_exported(folder)
    assert model.config["classes"] == ["disc", "square", "triangle"]
    assert model.label_names == {1: "disc", 2: "square", 3: "triangle"}
    assert len(model.sparsity) == 6
    with torch.inference_mode():
        assert "masks" in model([torch.rand(3, 64, 64)])[0]


def test_export_goes_home(finished: Path) -> None:
    """As a checkpoint of mmdet that a run starts from, and as a backbone of another library."""
    export = next((finished / "out").glob("coco/stages/report-*/export"))
    assert write_weights([str(export), str(finished / "home.pth"), "--format", "mmdet"]) == 0
    run = composed(*tiny_run(finished, f"init={finished / 'home.pth'}", "tracking=none", "until=train"))
    trained = run_pipeline(run)["train"].folder / WEIGHTS_FILE
    expected = load_exported(export).model.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in read_weights(trained).items())
    assert write_weights([str(export), str(finished / "swin.pth"), "--format", "torchvision"]) == 0
    load_backbone_weights(create_backbone("swin_nano"), finished / "swin.pth")
    assert write_weights([str(finished), str(finished / "no.pth"), "--format", "mmdet"]) == 2


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


def test_a_table_of_another_device_takes_the_place_of_calibration(finished: Path) -> None:
    measured = next((finished / "out").glob("coco/stages/calibrate-*/latency.json"))
    table = finished / "board.json"
    board = LatencyPredictor.load(measured)
    replace(board, setting=replace(board.setting, device="a board"), base_ms=2 * board.base_ms).save(table)
    overrides = ("latency=table", f"latency.path={table}", "tracking=none")
    result = run_command(arguments(finished, *overrides), finished)
    assert result.returncode == 0, result.stderr[-3000:]
    assert "the latency table is of a board; the report measures here, on " in result.stdout + result.stderr
    assert "train: skipped" in result.stdout and "adapt: skipped" in result.stdout
    pages = [path.read_text() for path in (finished / "out").glob("coco/stages/report-*/report.html")]
    assert len([page for page in pages if "a board, " in page and "predicted for" in page]) == 1
    dense = result.stdout.split("\n")
    (row,) = (line.split() for line in dense if line.split()[:1] == ["dense"])
    assert float(row[1]) == pytest.approx(2 * board.base_ms, abs=0.01)


def test_sweep_shares_the_stages_it_has_in_common(finished: Path) -> None:
    before = stage_folders(finished)
    sweep = arguments(finished, "sampler=nsga2,random", "search.seed=7", "until=search", "tracking=none")
    result = run_command(["-m", *sweep], finished)
    assert result.returncode == 0, result.stderr[-3000:]
    added = sorted(folder.split("-")[0] for folder in stage_folders(finished) - before)
    assert added == ["search", "search"]
    assert result.stdout.count("train: skipped, finished before") == 2


def stage_folders(folder: Path) -> set[str]:
    return {path.parent.name for path in (folder / "out").glob("coco/stages/*/result.json")}


def test_dry_run_says_what_would_happen_and_does_nothing(finished: Path) -> None:
    before = sorted(path.name for path in (finished / "out").rglob("*"))
    overrides = ("search.dry_run=true", "sampler=random", "search.warm_start=[coco_34ms]")
    result = run_command(arguments(finished, *overrides), finished)
    assert result.returncode == 0, result.stderr[-2000:]
    assert (
        "stages:       train (finished), adapt (finished), calibrate (finished), search (to do)"
        in result.stdout
    )
    assert "space:        120,285 vectors of 6 genes" in result.stdout
    for line in (r"latency:      [\d.]+ to [\d.]+ ms", r"sampler:      random, 1 vectors to start with"):
        assert re.search(line, result.stdout)
    assert re.search(
        r"budget:       6 evaluations, 1 at a time\ntime:         about [\d.]+ min", result.stdout
    )
    assert sorted(path.name for path in (finished / "out").rglob("*")) == before


def test_dry_run_in_an_empty_folder_writes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_pipeline(composed(*tiny_run(tmp_path, "search.dry_run=true", "search.max_hours=2"))) == {}
    printed = capsys.readouterr().out
    assert "stages:       train (to do), adapt (to do)" in printed
    assert re.search(
        r"latency:      not calibrated yet .* the sparsest vector has \d+% of the dense", printed
    )
    assert "budget:       6 evaluations or 2 hours" in printed
    assert "time:         at most 2 h" in printed
    assert "6 images per evaluation" in printed
    assert list(tmp_path.rglob("*")) == []


def test_a_deterministic_search_with_a_warm_start_and_a_time_limit(
    finished: Path, caplog: pytest.LogCaptureFixture
) -> None:
    overrides = (
        "search.deterministic=true", "search.warm_start=[coco_34ms]", "until=search",
        "search.max_hours=1", "search.plateau=100", "tracking.trials=front",
    )  # fmt: skip
    began = 1000 * time.time()
    with caplog.at_level(logging.INFO):
        results = run_pipeline(composed(*tiny_run(finished, *overrides)))
    assert "the search ends: 6 evaluations are done" in caplog.text
    folder = results["search"].folder
    assert (folder / "front.csv").is_file()
    client = MlflowClient(tracking_uri=f"sqlite:///{finished / 'out' / 'mlflow.db'}")
    (experiment,) = [each for each in client.search_experiments() if each.name == "coco"]
    nested = [
        run
        for run in client.search_runs([experiment.experiment_id], max_results=500)
        if (run.info.run_name or "").startswith("trial") and run.info.start_time >= began
    ]
    assert len(nested) == results["search"].metrics["num_front_members"]  # and no other trial
    study = read_study(folder / "study.journal")
    assert tuple(study.trials[0].params.values()) == PUBLISHED["coco_34ms"]


def test_too_many_failures_stop_the_run_with_what_was_found(finished: Path) -> None:
    """No trial ends in time; a larger limit goes on with the same study."""
    overrides = (
        "search.max_failures=1",
        "cluster.trial_timeout_s=0.001",
        "cluster.num_retries=0",
        "search.seed=70",
        "tracking=none",
    )
    result = run_command(arguments(finished, *overrides), finished)
    assert result.returncode == 1
    assert (
        "the search stopped: 1 trials failed for good (max_failures=1): no result within 0.001 s"
        in result.stderr
    )
    assert "run again with a larger search.max_failures to go on from there" in result.stderr
    assert "Traceback" not in result.stderr.split("error: the search stopped")[1]
    again = run_pipeline(
        composed(
            *tiny_run(finished, "search.max_failures=2", "search.seed=70", "tracking=none", "until=search")
        )
    )
    assert again["search"].metrics["num_failed"] == 1
