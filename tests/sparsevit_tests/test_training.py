"""The trainer: it learns, resumes as if never stopped, and says when it cannot go on."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sparsevit import SparsitySpace, SparsityVector, create_backbone
from sparsevit.adaptation import SAMPLING_LAWS, sampling_law
from sparsevit.data.augmentation import instance_augmentation
from sparsevit.data.coco import CocoInstances
from sparsevit.data.order import TrainingOrder
from sparsevit.data.shapes import ShapesConfig, write_shapes
from sparsevit.tasks.instance_segmentation import InstanceSegmentation
from sparsevit.training import TrainingConfig, build_optimizer, learning_rate_factor, train
from tests.sparsevit_tests.test_checkpoints import small_task

SPACE = SparsitySpace((2, 2, 6, 2))


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> CocoInstances:
    root = tmp_path_factory.mktemp("data") / "shapes"
    write_shapes(root, ShapesConfig(image_size=64, num_images={"train": 6}))
    dataset = CocoInstances(root, "train")
    dataset.transform = instance_augmentation(64, (0.8, 1.2))
    return dataset


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


def test_interrupted_training_continues_as_if_never_stopped(dataset: CocoInstances, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    whole, losses = run(dataset, tmp_path / "a")
    with pytest.raises(KeyboardInterrupt):
        run(dataset, tmp_path / "b", stop_after=4)
    resumed, rest = run(dataset, tmp_path / "b")
    assert rest == pytest.approx(losses[3:], rel=1e-6)  # the step in flight is lost, no other
    for (name, expected), value in zip(
        whole.state_dict().items(), resumed.state_dict().values(), strict=True
    ):
        torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-7, msg=name)


def test_training_lowers_the_loss(dataset: CocoInstances, tmp_path: Path) -> None:
    _, losses = run(dataset, tmp_path, num_steps=40)
    assert sum(losses[-8:]) < 0.8 * sum(losses[:8])


class Exploding(InstanceSegmentation):
    """A task whose loss is not a number."""

    def losses(self, model: nn.Module, batch: Any, sparsity: SparsityVector | None) -> dict[str, Tensor]:
        return {"bad": next(model.parameters()).sum() * float("nan")}


def test_loss_that_is_not_finite_names_the_step(dataset: CocoInstances, tmp_path: Path) -> None:
    task = Exploding(small_task().config)
    with pytest.raises(FloatingPointError, match=r"the loss of step 1 is not finite .* lower learning_rate"):
        train(
            task, fresh_model(task), dataset, TrainingConfig(num_steps=2, batch_size=2),
            draw_vector=lambda generator: None, seed=0, checkpoint=tmp_path / "c.pt",
        )  # fmt: skip


def test_order_is_shuffled_epochs_and_can_begin_anywhere() -> None:
    whole = list(TrainingOrder(5, seed=3, start=0, stop=20))
    assert whole[7:] == list(TrainingOrder(5, seed=3, start=7, stop=20))
    for epoch in range(4):
        assert sorted(index for index, _ in whole[5 * epoch : 5 * epoch + 5]) == [0, 1, 2, 3, 4]
    assert whole != list(TrainingOrder(5, seed=4, start=0, stop=20))
    assert len({seed for _, seed in whole}) == 20


def test_schedules() -> None:
    cosine = TrainingConfig(num_steps=100, warmup_steps=10)
    assert learning_rate_factor(0, cosine) == pytest.approx(0.1)
    assert learning_rate_factor(10, cosine) == pytest.approx(1.0)
    assert learning_rate_factor(55, cosine) == pytest.approx(0.5)
    assert learning_rate_factor(100, cosine) == pytest.approx(0.0)
    polynomial = TrainingConfig(num_steps=100, warmup_steps=0, schedule="polynomial")
    assert learning_rate_factor(50, polynomial) == pytest.approx(0.5**0.9)
    assert learning_rate_factor(100, polynomial) == 0.0
    steps = TrainingConfig(num_steps=12, warmup_steps=0, schedule="step")
    assert [learning_rate_factor(step, steps) for step in (0, 7, 8, 10, 11)] == pytest.approx(
        [1, 1, 0.1, 0.1, 0.01]
    )


def test_norms_biases_and_bias_tables_do_not_decay() -> None:
    model = create_backbone("swin_nano")
    decayed, plain = build_optimizer(model, model, TrainingConfig(num_steps=1)).param_groups
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.05, 0.0)
    assert all(parameter.ndim >= 2 for parameter in decayed["params"])
    table = model.get_parameter("stages.0.blocks.0.attn.relative_position_bias_table")
    assert any(parameter is table for parameter in plain["params"])
    assert len(decayed["params"]) + len(plain["params"]) == len(list(model.parameters()))


def test_the_backbone_may_have_a_rate_of_its_own() -> None:
    backbone = create_backbone("swin_nano")
    model = nn.ModuleDict({"backbone": backbone, "queries": nn.Embedding(4, 8), "head": nn.Linear(8, 8)})
    groups = build_optimizer(model, backbone, TrainingConfig(num_steps=1, backbone_rate=0.1)).param_groups
    rates = {id(p): (g["base_rate"], g["weight_decay"]) for g in groups for p in g["params"]}
    assert len(rates) == len(list(model.parameters()))
    assert all(rates[id(each)][0] == pytest.approx(1e-5) for each in backbone.parameters())
    assert rates[id(model["head"].weight)] == (pytest.approx(1e-4), 0.05)
    assert rates[id(model["queries"].weight)] == (pytest.approx(1e-4), 0.0)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"schedule": "linear"}, "schedule must be one of cosine, polynomial, step, got 'linear'"),
        ({"precision": "fp8"}, "precision must be one of auto, bf16, fp32, got 'fp8'"),
        ({"batch_size": 0}, "batch_size at least 1"),
    ],
)
def test_bad_training_configuration(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainingConfig(num_steps=1, **fields)


@pytest.mark.parametrize("name", sorted(SAMPLING_LAWS))
def test_every_sampling_law_draws_legal_and_varied_vectors(name: str) -> None:
    space = SparsitySpace((2, 2, 6, 2))
    generator = torch.Generator().manual_seed(0)
    draws = {sampling_law(name)(space, generator) for _ in range(300)}
    assert all(vector in space for vector in draws)
    assert len(draws) >= len(space.choices)


def test_unknown_sampling_law_lists_the_known() -> None:
    with pytest.raises(ValueError, match="unknown sampling law 'x'; choose one of sorted_genes"):
        sampling_law("x")
