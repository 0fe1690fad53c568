"""The page docs/own-detector.md: one Python file and one YAML go through all six stages."""

import json
import re
import subprocess
from pathlib import Path

import pandas as pd
import pytest
import torch

from search.study import counted_trials, read_study
from sparsevit import load_exported
from sparsevit.data.shapes import ShapesConfig, write_shapes
from sparsevit.tasks import create_task
from tests.pipelines_tests.command_line import run_command
from tests.pipelines_tests.configuration import tiny_run

ROOT = Path(__file__).parents[2]


@pytest.fixture
def own_detector(tmp_path: Path) -> list[str]:
    """Arguments of a run with the page's detector, on data of the user's own."""
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
    for path in (data / "annotations").iterdir():
        dataset = json.loads(path.read_text())
        for annotation in dataset["annotations"]:
            del annotation["segmentation"]  # boxes alone
        path.write_text(json.dumps(dataset))
    overrides = [each for each in tiny_run(tmp_path) if not each.startswith(("data.generated", "task."))]
    return [
        "--config-dir", str(tmp_path / "my_conf"), "+experiment=fruit", *overrides, f"data.root={data}",
        "data.num_search=4", "task.options.image_size=64",
    ]  # fmt: skip


def run(arguments: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    return run_command(arguments, folder, python_path=str(folder))


def test_the_page_runs_as_it_stands(
    own_detector: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = run([*own_detector, "tracking=none"], tmp_path)
    assert result.returncode == 0, result.stderr[-3000:]
    assert "box_ap before" in result.stdout
    assert "fruit at scale embedded" in result.stdout
    assert "/export', trusted=True)" in result.stdout
    monkeypatch.syspath_prepend(str(tmp_path))
    model = load_exported(next((tmp_path / "out").glob("fruit/stages/report-*/export")), trusted=True)
    with torch.inference_mode():
        (detections,) = model([torch.rand(3, 64, 64)])
    assert set(detections) == {"boxes", "labels", "scores"}


BRITTLE = """
import sys
from pathlib import Path

from faster_rcnn import BoxDetection


class Brittle(BoxDetection):
    def evaluate(self, model, dataset, sparsity, **options):
        if Path(sys.argv[0]).name == "default_worker.py" and sum(sparsity) > 3:
            raise RuntimeError("by intention")
        return super().evaluate(model, dataset, sparsity, **options)
"""


def test_too_many_failures_leave_the_front_that_was_found(own_detector: list[str], tmp_path: Path) -> None:
    """Sparse vectors fail in the workers, dense ones do not."""
    (tmp_path / "brittle.py").write_text(BRITTLE)
    brittle = [*own_detector, "task.name=brittle:Brittle", "search.num_evaluations=12", "tracking=none"]
    stopped = run([*brittle, "search.max_failures=3"], tmp_path)
    assert stopped.returncode == 1
    assert "3 trials failed for good (max_failures=3): RuntimeError: by intention" in stopped.stderr
    (told,) = re.findall(r"front so far \((\d+) vectors\) is in (\S+)/front.json", stopped.stderr)
    num_members, folder = int(told[0]), tmp_path / told[1]
    assert num_members >= 1
    assert len(json.loads((folder / "front.json").read_text())["members"]) == num_members
    assert len(pd.read_csv(folder / "front.csv")) == num_members
    assert (folder / "front.html").is_file()
    assert (folder / "front.png").is_file()
    study = read_study(folder / "study.journal")
    before = [trial.params for trial in counted_trials(study)]
    whole = run([*brittle, "until=search"], tmp_path)
    assert whole.returncode == 0, whole.stderr[-3000:]
    after = counted_trials(read_study(folder / "study.journal"))
    assert [trial.params for trial in after[: len(before)]] == before
    assert len(after) == 12


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
