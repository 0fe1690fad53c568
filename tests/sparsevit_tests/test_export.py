"""Task and export: a subnet leaves and comes back the same."""

from pathlib import Path

import pytest
import torch

from sparsevit import SparsityVector, create_backbone, load_exported
from sparsevit.checkpoints import CheckpointError
from sparsevit.export import export_model, load_example
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
