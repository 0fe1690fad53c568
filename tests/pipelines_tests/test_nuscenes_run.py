"""The whole way for nuScenes on a few drawn drives, by the same stages as every experiment."""

from pathlib import Path

import pandas as pd
import pytest
import torch
from PIL import Image

from pipelines.workflow import STAGES
from sparsevit import load_exported
from sparsevit.data.camera_views import camera_inputs
from sparsevit.data.nuscenes import CLASSES, NuScenesSamples
from sparsevit.tasks.lift_splat import Cameras
from tests.pipelines_tests.command_line import run_command
from tests.pipelines_tests.configuration import arguments


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run, by the command line."""
    folder = tmp_path_factory.mktemp("nuscenes")
    result = run_command(arguments(folder, "tracking=none", experiment="nuscenes"), folder)
    assert result.returncode == 0, result.stderr[-3000:]
    (folder / "stdout.txt").write_text(result.stdout)
    return folder


def report_of(folder: Path) -> Path:
    return next(folder.glob("out/nuscenes/stages/report-*"))


def test_the_same_stages_and_the_same_table(finished: Path) -> None:
    found = {path.parent.name.split("-")[0] for path in finished.glob("out/nuscenes/stages/*/result.json")}
    assert found == {stage.name for stage in STAGES}
    printed = (finished / "stdout.txt").read_text()
    for words in (
        "nuscenes at scale embedded",
        "map before",
        "map after",
        "speed-up",
        "model([images], [cameras])",
    ):
        assert words in printed


def test_the_report_has_every_class_and_pictures(finished: Path) -> None:
    classes = pd.read_csv(report_of(finished) / "classes.csv", index_col="class")
    assert set(classes.index) == {f"ap/{name}" for name in CLASSES}
    with Image.open(report_of(finished) / "pictures.png") as sheet:
        assert min(sheet.size) > 500


def test_export_loads_and_predicts_boxes(finished: Path) -> None:
    model = load_exported(report_of(finished) / "export")
    dataset = NuScenesSamples(finished / "data", "drives_val")
    dataset.transform = camera_inputs((64, 128))
    images, target = dataset[0]
    with torch.inference_mode():
        (found,) = model([images / 255], [{name: target[name] for name in Cameras._fields}])
    assert found.boxes.shape == (len(found.scores), 9)
