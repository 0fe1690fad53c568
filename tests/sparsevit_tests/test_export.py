"""Task and export: a subnet leaves and comes back the same."""

import json
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from sparsevit import SparsityVector, create_backbone, load_exported
from sparsevit.checkpoints import CheckpointError, read_weights, write_weights
from sparsevit.export import CONFIG_FILE, WEIGHTS_FILE, ExportedModel, export_model, load_example
from sparsevit.latency.__main__ import main
from sparsevit.tasks import create_task
from tests.sparsevit_tests.test_checkpoints import small_task

VECTOR = SparsityVector((0.5, 0.3, 0.2, 0.4, 0.6, 0.0))


def test_exported_model_predicts_the_same(tmp_path: Path) -> None:
    torch.manual_seed(0)
    task = small_task()
    model = task.build_model(create_backbone("swin_nano")).eval()
    export_model(
        tmp_path, model, VECTOR, backbone="swin_nano", task="instance_segmentation",
        task_config=task.config, example=[[torch.rand(3, 40, 60)]], details={"classes": ["a", "b", "c"]},
    )  # fmt: skip
    loaded = load_exported(tmp_path)
    assert loaded.sparsity == VECTOR
    assert loaded.config["classes"] == ["a", "b", "c"]
    assert loaded.backbone is task.backbone_of(loaded.model)
    assert load_example(tmp_path)[0][0].shape == (3, 40, 60)
    image = torch.rand(3, 50, 70)
    with torch.inference_mode():
        expected = model([image], sparsity=VECTOR)[0]
        result = loaded([image])[0]
    for name, value in expected.items():
        assert torch.equal(result[name], value)


def test_folder_without_an_export(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not hold an exported model"):
        load_exported(tmp_path)
    with pytest.raises(CheckpointError, match="holds no inputs to measure the model with"):
        load_example(tmp_path)


def export_small(folder: Path) -> None:
    task = small_task()
    export_model(
        folder, task.build_model(create_backbone("swin_nano")), VECTOR, backbone="swin_nano",
        task="instance_segmentation", task_config=task.config, example=[[torch.rand(3, 40, 60)]], details={},
    )  # fmt: skip


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop("backbone.body.norms.2.bias"), "Missing key.*backbone.body.norms.2.bias"),
        (lambda w: w.update(other=torch.zeros(2)), "Unexpected key.*other"),
        (
            lambda w: w.update({"backbone.body.norms.2.bias": torch.zeros(7)}),
            "size mismatch for backbone.body.norms.2.bias",
        ),
        (lambda w: w["backbone.body.norms.2.bias"].fill_(torch.nan), "holds NaN or infinity: backbone.body"),
    ],
)  # fmt: skip
def test_weights_that_are_not_all_there_are_refused(
    tmp_path: Path, change: Callable[[dict[str, Tensor]], object], message: str
) -> None:
    """What a file lacks would be random, and nobody would know."""
    export_small(tmp_path)
    weights = read_weights(tmp_path / WEIGHTS_FILE)
    change(weights)
    write_weights(tmp_path / WEIGHTS_FILE, weights)
    with pytest.raises(CheckpointError, match=rf"(?s){re.escape(str(tmp_path))}.*{message}"):
        load_exported(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sparsity": [0.5, 0.3]}, r"has 2 ratios, but depths \[2, 2, 6, 2\] need 6"),
        ({"sparsity": [1.0] * 6}, r"ratios lie in \[0, 1\)"),
        ({"backbone": "swin_x"}, "unknown backbone 'swin_x'"),
        ({"backbone": None}, "unknown backbone None"),
        ({"task": "x"}, "unknown task 'x'"),
        ({"task": 3}, "'int' is not iterable"),
        ({"task_config": {"classes": 3}}, "unexpected keyword argument 'classes'"),
        ({"task_config": {"num_classes": 0}}, "num_classes must be a whole number of at least 1, got 0"),
    ],
)
def test_a_configuration_that_is_none_names_its_folder(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    export_small(tmp_path)
    path = tmp_path / CONFIG_FILE
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(
        CheckpointError, match=rf"{re.escape(str(path))} describes cannot be built: .*{message}"
    ):
        load_exported(tmp_path)


@pytest.mark.parametrize("key", ["sparsity", "backbone", "task", "task_config"])
def test_a_configuration_that_lacks_something_names_it(tmp_path: Path, key: str) -> None:
    export_small(tmp_path)
    path = tmp_path / CONFIG_FILE
    config = json.loads(path.read_text())
    del config[key]
    path.write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=rf"{re.escape(str(tmp_path))}.*: '{key}' is missing"):
        load_exported(tmp_path)


def rename_task(folder: Path, name: str) -> None:
    config = json.loads((folder / CONFIG_FILE).read_text())
    (folder / CONFIG_FILE).write_text(json.dumps(config | {"task": name}))


@pytest.fixture
def own_task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An export whose task is a module of one's own, which leaves a mark when it is imported."""
    (tmp_path / "marking_task.py").write_text(
        "from pathlib import Path\n"
        "from sparsevit.tasks import create_task\n"
        "Path(__file__).with_name('imported').touch()\n"
        "def build(config):\n"
        "    return create_task('instance_segmentation', config)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    folder = tmp_path / "export"
    export_small(folder)
    rename_task(folder, "marking_task:build")
    yield folder
    sys.modules.pop("marking_task", None)


def test_code_that_a_folder_names_is_imported_only_with_ones_word(own_task: Path) -> None:
    message = (
        r"config\.json names a task that is not ours: loading it imports and calls marking_task:build, .* "
        r"load_exported\(folder, trusted=True\), or --trusted"
    )
    with pytest.raises(CheckpointError, match=message):
        load_exported(own_task)
    assert not own_task.with_name("imported").exists()
    loaded = load_exported(own_task, trusted=True)
    assert own_task.with_name("imported").exists()
    assert loaded.backbone is loaded.model.get_submodule("backbone.body")


@pytest.mark.parametrize("name", ["os:system", "builtins:eval"])
def test_a_function_of_python_is_not_called(tmp_path: Path, name: str) -> None:
    export_small(tmp_path)
    rename_task(tmp_path, name)
    with pytest.raises(CheckpointError, match=f"imports and calls {name}, whatever that does"):
        load_exported(tmp_path)


def test_the_latency_command_asks_too(
    own_task: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = tmp_path / "latency.json"
    command = ["calibrate", str(own_task), str(table), "--measure", "model", "--runtime", "compiled"]
    assert main(command) == 2
    assert "imports and calls marking_task:build" in capsys.readouterr().err
    assert not own_task.with_name("imported").exists()
    assert main([*command, "--trusted"]) == 2
    assert "a whole model is measured in eager mode" in capsys.readouterr().err
    assert own_task.with_name("imported").exists()


class CountImages(nn.Module):
    """A model that says how many images it was given."""

    def forward(self, images: list[Tensor], cameras: Any = None, *, sparsity: SparsityVector) -> int:
        return sum(len(each) if each.ndim == 4 else 1 for each in images)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ([torch.rand(3, 40, 40) * 255], r"images\[0\] has values from \S+ to 25\S+, .*: divide by 255"),
        ([torch.zeros(3, 40, 40), torch.ones(3, 40, 40) * 2], r"images\[1\] has values from 2 to 2, .* 255"),
        ([torch.zeros(3, 40, 40, dtype=torch.uint8)], r"images\[0\] is torch\.uint8, .*: divide by 255"),
        ([torch.zeros(3, 40, 40) - 2.1], r"values from -2\.1 to -2\.1, .*: it normalises them itself"),
        ([torch.full((3, 40, 40), torch.nan)], r"values from nan to nan, but the model takes \[0, 1\]$"),
        ([torch.rand(1, 40, 40)], r"shape \[1, 40, 40\], but the model takes \[3, H, W\]: .* is grey"),
        ([torch.rand(40, 40)], r"images\[0\] has the shape \[40, 40\]"),
        ([torch.rand(40, 40, 3)], r"images\[0\] has the shape \[40, 40, 3\]"),
        ([torch.rand(1, 3, 40, 40)], r"images\[0\] has the shape \[1, 3, 40, 40\]"),
        ([torch.rand(3, 0, 40)], r"images\[0\] has the shape \[3, 0, 40\]"),
        (torch.rand(3, 40, 40), r"a list of images, .* got a tensor \[3, 40, 40\]: call model\(\[image\]\)"),
        (torch.rand(2, 3, 40, 40), r"a list of images, .* got a tensor \[2, 3, 40, 40\]"),
        ([], r"a list of images, one or more, got \[\]"),
        ([np.zeros((3, 40, 40))], r"images\[0\] is a ndarray, not a tensor \[3, H, W\] in \[0, 1\]"),
    ],
)  # fmt: skip
def test_images_in_which_a_model_sees_nothing_are_refused(images: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ExportedModel(CountImages(), VECTOR, {"task": "instance_segmentation"})(images)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
def test_images_may_go_a_little_beyond_black_and_white(dtype: torch.dtype) -> None:
    image = torch.rand(3, 40, 60).to(dtype)
    image[:, 0, 0], image[:, 0, 1] = -0.05, 1.05
    for task in ("instance_segmentation", "module:of_ones_own"):
        assert ExportedModel(CountImages(), VECTOR, {"task": task})([image, image[:, :20]]) == 2


def test_images_of_all_cameras_of_a_sample() -> None:
    """What a model for cameras takes is not what a model for photos takes."""
    model = ExportedModel(CountImages(), VECTOR, {"task": "detection_3d"})
    assert model([torch.rand(6, 3, 8, 8)], [{}]) == 6
    with pytest.raises(ValueError, match=r"shape \[3, 8, 8\], but the model takes \[cameras, 3, h, w\]"):
        model([torch.rand(3, 8, 8)], [{}])
    with pytest.raises(ValueError, match=r"images\[0\] has values from 255 to 255"):
        model([torch.full((6, 3, 8, 8), 255.0)], [{}])


def test_the_vector_changes_the_predictions_and_dense_is_no_vector() -> None:
    torch.manual_seed(0)
    model = small_task().build_model(create_backbone("swin_nano")).eval()
    images = torch.rand(1, 3, 64, 64)
    with torch.inference_mode():
        plain = model.backbone(images)
        dense = model.backbone(images, SparsityVector((0.0,) * 6))
        sparse = model.backbone(images, VECTOR)
    assert all(torch.equal(plain[level], dense[level]) for level in plain)
    assert not torch.equal(plain["3"], sparse["3"])


def test_unknown_task() -> None:
    with pytest.raises(ValueError, match="unknown task 'x'; choose one of instance_segmentation"):
        create_task("x", {})
