"""No unmeasured number on a front: members are measured, and a table that is off is refitted."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from pipelines.compare import read_runs
from pipelines.schema import ConfigSchema
from pipelines.stages.calibrate import PREDICTOR_FILE
from pipelines.workflow import run_pipeline
from sparsevit import load_exported
from sparsevit.export import load_example
from sparsevit.latency import LatencyPredictor
from sparsevit.latency.__main__ import main
from tests.pipelines_tests.configuration import MACS_FOR_LATENCY, composed, tiny_run


def tiny(folder: Path, *overrides: str) -> ConfigSchema:
    return composed(*tiny_run(folder, "tracking=none", "cluster.num_workers=1", *overrides))


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory: pytest.TempPathFactory) -> LatencyPredictor:
    """A table of this machine."""
    folder = tmp_path_factory.mktemp("calibrated")
    results = run_pipeline(tiny(folder, "until=calibrate"))
    return LatencyPredictor.load(results["calibrate"].folder / PREDICTOR_FILE)


def test_a_table_that_is_off_is_refitted_while_the_search_runs(
    calibrated: LatencyPredictor, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The table says that the last gene, pruned, leaves a tenth of the latency; the machine disagrees."""
    terms = [list(row) for row in calibrated.terms_ms]
    wrong = 0.9 * calibrated.base_ms + sum(row[-1] for row in terms[:-1])
    terms[-1] = [0.0, *(-wrong * step / 8 for step in range(1, 9))]
    off = replace(calibrated, terms_ms=tuple(map(tuple, terms)), error_bar=0.02)
    off.save(tmp_path / "off.json")
    caplog.set_level("INFO")
    overrides = ["latency=table", f"latency.path={tmp_path / 'off.json'}", "until=search"]
    overrides += ["search.num_evaluations=16", "search.measure_every=8", MACS_FOR_LATENCY]
    results = run_pipeline(tiny(tmp_path, *overrides))
    folder, metrics = results["search"].folder, results["search"].metrics
    assert metrics["num_refits"] >= 1
    assert "the latency table is refitted" in caplog.text
    after = LatencyPredictor.load(folder / PREDICTOR_FILE)
    assert after.terms_ms != off.terms_ms
    measured = {each.vector: each for each in after.measurements}
    sparsest = after.space.sparsest
    truth = next(each for each in reversed(after.measurements) if each.vector == sparsest).latency_ms
    assert abs(after.predict(sparsest) - truth) < abs(off.predict(sparsest) - truth)
    members = json.loads((folder / "front.json").read_text())["members"]
    assert members
    for member in members:
        vector = after.space.canonicalize(member["vector"])
        assert member["measured_ms"] == pytest.approx(measured[vector].latency_ms)
        assert member["measured_half_width"] == pytest.approx(measured[vector].half_width)
        assert member["latency_ms"] == pytest.approx(after.predict(vector))
    (history,) = read_runs([folder])
    assert {trial.vector for trial in history.front.members} == {tuple(each["vector"]) for each in members}


def test_a_deterministic_search_is_measured_at_its_end_alone(
    calibrated: LatencyPredictor, tmp_path: Path
) -> None:
    replace(calibrated, error_bar=0.0).save(tmp_path / "strict.json")
    overrides = ["latency=table", f"latency.path={tmp_path / 'strict.json'}", "until=search"]
    overrides += ["search.num_evaluations=8", "search.measure_every=4", "search.deterministic=true"]
    overrides.append(MACS_FOR_LATENCY)
    results = run_pipeline(tiny(tmp_path, *overrides))
    assert results["search"].metrics["num_refits"] == 0
    folder = results["search"].folder
    assert LatencyPredictor.load(folder / PREDICTOR_FILE).terms_ms == calibrated.terms_ms
    members = json.loads((folder / "front.json").read_text())["members"]
    assert all("measured_ms" in member for member in members)


def test_a_table_of_another_device_is_left_alone(calibrated: LatencyPredictor, tmp_path: Path) -> None:
    setting = replace(calibrated.setting, device="a board")
    replace(calibrated, setting=setting, error_bar=0.0).save(tmp_path / "board.json")
    overrides = ["latency=table", f"latency.path={tmp_path / 'board.json'}", "until=report"]
    overrides += ["search.num_evaluations=8", "search.measure_every=4"]
    results = run_pipeline(tiny(tmp_path, *overrides))
    assert results["search"].metrics["num_refits"] == 0
    table = LatencyPredictor.load(results["search"].folder / PREDICTOR_FILE)
    assert table.measurements == calibrated.measurements
    report = (results["report"].folder / "report.html").read_text()
    assert "a board" in report


def test_a_whole_model_is_searched_measured_and_taken_away(tmp_path: Path) -> None:
    """Calibration waits for the trained model; the report and the table name what was measured."""
    results = run_pipeline(tiny(tmp_path, "latency.measure=model"))
    table = results["calibrate"].folder / PREDICTOR_FILE
    setting = LatencyPredictor.load(table).setting
    assert setting.measures.startswith("instance_segmentation ")
    assert setting.image_size == (64, 64)
    report = results["report"].folder
    assert (
        f"the whole model ({setting.measures}), eager, batch {setting.batch_size}, 64×64, fp32"
        in (report / "report.html").read_text()
    )
    export = report / "export"
    (detections,) = load_exported(export)(*load_example(export))
    assert set(detections) >= {"boxes", "masks", "labels"}
    again = ["calibrate", str(export), str(tmp_path / "again.json"), "--measure", "model"]
    again += ["--num-vectors", "8", "--num-held-out", "0", "--max-rounds", "3"]
    again += ["--batch-size", str(setting.batch_size)]
    assert main(again) == 0
    found = LatencyPredictor.load(tmp_path / "again.json").setting
    assert replace(found, num_threads=setting.num_threads) == setting
    path = f"latency.path={tmp_path / 'again.json'}"
    results = run_pipeline(tiny(tmp_path, "latency=table", path, "latency.measure=model", "until=calibrate"))
    assert results["calibrate"].metrics["dense_ms"] > 0
    check = ["validate", str(tmp_path / "again.json"), "--num-vectors", "2", "--max-rounds", "3"]
    assert main(check) == 2
    assert main([*check, "--model", str(export)]) == 0
