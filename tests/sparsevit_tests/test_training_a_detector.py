"""A detector learns, and resumes as if never stopped: seconds per test."""

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import nn

from sparsevit import SparsitySpace, create_backbone
from sparsevit.data.coco import CocoInstances
from sparsevit.tasks.instance_segmentation import InstanceSegmentation
from sparsevit.training import TrainingConfig, train
from tests.sparsevit_tests.test_checkpoints import small_task

SPACE = SparsitySpace((2, 2, 6, 2))


def fresh_model(task: InstanceSegmentation) -> nn.Module:
    torch.manual_seed(0)
    return task.build_model(create_backbone("swin_nano", drop_path_rate=0.2))


def run(
    dataset: CocoInstances, folder: Path, *, stop_after: int | None = None, num_steps: int = 6
) -> tuple[nn.Module, list[float]]:
    task = small_task()
    model = fresh_model(task)
    losses: list[float] = []

    def on_step(step: int, values: Mapping[str, float]) -> None:
        losses.append(values["loss"])
        if step == stop_after:
            raise KeyboardInterrupt

    config = TrainingConfig(
        num_steps=num_steps, batch_size=2, learning_rate=1e-3, precision="fp32", checkpoint_every_s=0.0
    )
    train(
        task, model, dataset, config, draw_vector=SPACE.draw, seed=1,
        checkpoint=folder / "checkpoint.pt", on_step=on_step,
    )  # fmt: skip
    return model, losses


def test_interrupted_training_continues_as_if_never_stopped(shapes: CocoInstances, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    whole, losses = run(shapes, tmp_path / "a")
    with pytest.raises(KeyboardInterrupt):
        run(shapes, tmp_path / "b", stop_after=4)
    resumed, rest = run(shapes, tmp_path / "b")
    assert rest == pytest.approx(losses[3:], rel=1e-6)  # the step in flight is lost, no other
    for (name, expected), value in zip(
        whole.state_dict().items(), resumed.state_dict().values(), strict=True
    ):
        torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-7, msg=name)


def test_training_lowers_the_loss(shapes: CocoInstances, tmp_path: Path) -> None:
    _, losses = run(shapes, tmp_path, num_steps=40)
    assert sum(losses[-8:]) < 0.8 * sum(losses[:8])
