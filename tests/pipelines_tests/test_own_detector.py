"""The page docs/own-detector.md: one Python file and one YAML go through all six stages."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sparsevit import load_exported
from sparsevit.data.shapes import ShapesConfig, write_shapes
from sparsevit.tasks import create_task
from tests.pipelines_tests.configuration import tiny_run

ROOT = Path(__file__).parents[2]


def test_the_page_runs_as_it_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (ROOT / "docs" / "own-detector.md").read_text()
    (program,), (experiment,) = (
        re.findall(rf"```{language}\n(.*?)```", page, flags=re.DOTALL) for language in ("python", "yaml")
    )
    (tmp_path / "faster_rcnn.py").write_text(program)
    (tmp_path / "my_conf" / "experiment").mkdir(parents=True)
    (tmp_path / "my_conf" / "experiment" / "fruit.yaml").write_text(experiment)
    data = tmp_path / "fruit"
    write_shapes(data, ShapesConfig(image_size=64, num_images={"train": 16, "val": 6}))
    (data / "provenance.json").unlink()  # it is the user's now
    overrides = [each for each in tiny_run(tmp_path) if not each.startswith(("data.generated", "task."))]
    result = subprocess.run(
        [
            sys.executable, str(ROOT / "pipelines" / "run.py"), "--config-dir", str(tmp_path / "my_conf"),
            "+experiment=fruit", *overrides, f"data.root={data}", "data.num_search=4",
            "task.options.image_size=64",
        ],
        cwd=tmp_path, capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]
    assert "box_ap before" in result.stdout
    assert "fruit at scale embedded" in result.stdout
    monkeypatch.syspath_prepend(str(tmp_path))
    model = load_exported(next((tmp_path / "out").glob("fruit/stages/report-*/export")))
    with torch.inference_mode():
        (detections,) = model([torch.rand(3, 64, 64)])
    assert set(detections) == {"boxes", "labels", "scores"}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "detection",
            "unknown task 'detection'; choose one of instance_segmentation, .*, or your own as module:",
        ),
        ("no_such_module:Task", "task 'no_such_module:Task' cannot be imported: No module named"),
        ("json:Task", "task 'json:Task' cannot be imported: module 'json' has no attribute 'Task'"),
    ],
)
def test_a_task_that_is_not_there_is_named(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        create_task(name, {"num_classes": 3})
