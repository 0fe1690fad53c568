"""The trainer on losses of two weights: what it does at every step, and when it cannot go on."""

from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sparsevit import SparseSwin, SparsitySpace, SparsityVector, SwinConfig, create_backbone
from sparsevit.data.coco import CocoInstances
from sparsevit.data.order import TrainingOrder
from sparsevit.tasks.instance_segmentation import InstanceSegmentation
from sparsevit.training import OnStep, TrainingConfig, build_optimizer, learning_rate_factor, train
from tests.sparsevit_tests.test_checkpoints import small_task

SPACE = SparsitySpace((2, 2, 6, 2))


class Plane(nn.Module):
    """Two weights beside a backbone that nothing depends on."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.Parameter(torch.zeros(2))
        self.backbone = SparseSwin(SwinConfig(embed_dim=8, depths=(2,), num_heads=(1,)))


class Slope(InstanceSegmentation):
    """A task whose loss is a plane: its gradient is (3, 4) everywhere."""

    def __init__(self) -> None:
        super().__init__(small_task().config)
        self.vectors: list[SparsityVector | None] = []
        self.states: set[tuple[bool, bool]] = set()

    def backbone_of(self, model: nn.Module) -> SparseSwin:
        assert isinstance(model, Plane)
        return model.backbone

    def losses(self, model: nn.Module, batch: Any, sparsity: SparsityVector | None) -> dict[str, Tensor]:
        assert isinstance(model, Plane)
        self.vectors.append(sparsity)
        self.states.add((model.training, torch.is_autocast_enabled("cpu")))
        return {"along": 3 * model.weights[0], "across": 4 * model.weights[1]}


class Exploding(Slope):
    """A task whose loss is not a number."""

    def losses(self, model: nn.Module, batch: Any, sparsity: SparsityVector | None) -> dict[str, Tensor]:
        return {"bad": next(model.parameters()).sum() * float("nan")}


def test_loss_that_is_not_finite_names_the_step(shapes: CocoInstances, tmp_path: Path) -> None:
    task, config = Exploding(), TrainingConfig(num_steps=2, batch_size=2, learning_rate=0.5, clip_norm=3.0)
    message = r"the loss of step 1 .*'bad': nan.* lower learning_rate \(0.5\) or clip_norm \(3.0\)"
    with pytest.raises(FloatingPointError, match=message):
        train(
            task, Plane(), shapes, config,
            draw_vector=lambda generator: None, seed=0, checkpoint=tmp_path / "c.pt",
        )  # fmt: skip


def descend(
    dataset: CocoInstances,
    folder: Path,
    config: TrainingConfig,
    *,
    seed: int = 0,
    on_step: OnStep | None = None,
) -> tuple[Slope, Plane]:
    task, model = Slope(), Plane().eval()
    train(
        task, model, dataset, config, draw_vector=SPACE.draw, seed=seed, checkpoint=folder / "c.pt",
        on_step=on_step or (lambda step, values: None),
    )  # fmt: skip
    return task, model


@pytest.mark.parametrize(("clip_norm", "expected"), [(0.0, (3.0, 4.0)), (1.0, (0.6, 0.8)), (5.5, (3.0, 4.0))])
def test_gradients_are_clipped_to_a_norm_and_not_at_all_by_none(
    shapes: CocoInstances, tmp_path: Path, clip_norm: float, expected: tuple[float, float]
) -> None:
    """What the last of three steps leaves behind: its own gradient, not the sum of all."""
    config = TrainingConfig(num_steps=3, batch_size=1, clip_norm=clip_norm)
    _, model = descend(shapes, tmp_path, config)
    assert model.weights.grad is not None
    assert model.weights.grad.tolist() == pytest.approx(expected, rel=1e-4)
    assert model.weights.detach().abs().min() > 0


def test_weights_move_by_the_schedule(shapes: CocoInstances, tmp_path: Path) -> None:
    """On a plane a step of Adam is as long as the rate: half of it, all, then six steps of a cosine."""
    config = TrainingConfig(
        num_steps=8, batch_size=1, learning_rate=0.01, weight_decay=0.5, warmup_steps=5, clip_norm=0.0
    )
    _, model = descend(shapes, tmp_path, config)
    moved = 0.01 * (0.5 + 1 + (3 + 1 / 2))
    assert model.weights.tolist() == pytest.approx([-moved] * 2, rel=1e-4)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_every_step_has_a_vector_of_its_own(shapes: CocoInstances, tmp_path: Path, precision: str) -> None:
    """A function of the seed and the step; losses are taken in training mode, in the precision asked for."""
    config = TrainingConfig(
        num_steps=6, batch_size=1, precision=precision, learning_rate=0.5, warmup_steps=0,
        checkpoint_every_s=float("inf"),
    )  # fmt: skip
    told: list[tuple[int, float, float]] = []
    task, model = descend(
        shapes, tmp_path, config,
        on_step=lambda step, values: told.append((step, values["loss"], values["along"] + values["across"])),
    )  # fmt: skip
    again, _ = descend(shapes, tmp_path, config)
    other, _ = descend(shapes, tmp_path, config, seed=1)
    assert task.vectors == again.vectors != other.vectors
    assert len(set(task.vectors)) == len(task.vectors) == 6
    assert all(vector is not None and vector in SPACE for vector in task.vectors)
    assert task.states == {(True, precision == "bf16")}
    assert not model.training
    assert [step for step, _, _ in told] == [1, 2, 3, 4, 5, 6]
    assert told[0][1] == 0
    assert all(loss == pytest.approx(parts) for _, loss, parts in told)


def test_training_draws_from_its_own_seed_alone(shapes: CocoInstances, tmp_path: Path) -> None:
    """What the process drew before is nothing to it, and it leaves the process's seed as it was."""
    order: list[list[int]] = []

    class Noting(Slope):
        def losses(self, model: nn.Module, batch: Any, sparsity: SparsityVector | None) -> dict[str, Tensor]:
            order[-1] += [int(image.sum()) for image in batch[0]] + [int(torch.randint(10**9, ()))]
            return super().losses(model, batch, sparsity)

    for seed in (123, 456):
        order.append([])
        model = Plane()
        torch.manual_seed(seed)
        train(
            Noting(), model, shapes, TrainingConfig(num_steps=3, batch_size=2), draw_vector=SPACE.draw,
            seed=7, checkpoint=tmp_path / "c.pt",
        )  # fmt: skip
        assert torch.initial_seed() == seed
    assert order[0] == order[1]
    assert len(set(order[0])) == 9


def test_a_run_that_was_stopped_continues_as_if_it_never_was(shapes: CocoInstances, tmp_path: Path) -> None:
    """Its samples, draws, vectors, rates and weights; in a bowl, a step of Adam depends on the last."""

    class Bowl(Slope):
        def losses(self, model: nn.Module, batch: Any, sparsity: SparsityVector | None) -> dict[str, Tensor]:
            assert isinstance(model, Plane)
            super().losses(model, batch, sparsity)
            seen.append((sparsity, int(torch.stack(list(batch[0])).sum()), int(torch.randint(10**9, ()))))
            return {"bowl": (model.weights - torch.tensor([1.0, 2.0])).square().sum()}

    config = TrainingConfig(
        num_steps=7, batch_size=2, learning_rate=0.1, warmup_steps=3, schedule="polynomial",
        checkpoint_every_s=0.0,
    )  # fmt: skip
    weights, all_seen = [], []
    for folder, stops in (("whole", (None,)), ("stopped", (2, 5, None))):
        seen: list[tuple[Any, ...]] = []
        (tmp_path / folder).mkdir()
        for stop in stops:
            numbers: list[int] = []

            def on_step(step: int, values: Mapping[str, float], numbers: list[int] = numbers) -> None:
                numbers.append(step)
                if len(numbers) == stop:  # noqa: B023
                    raise KeyboardInterrupt

            model = Plane()
            with pytest.raises(KeyboardInterrupt) if stop else nullcontext():
                train(
                    Bowl(), model, shapes, config, draw_vector=SPACE.draw, seed=3,
                    checkpoint=tmp_path / folder / "c.pt", on_step=on_step,
                )  # fmt: skip
        weights.append(model.weights.tolist())
        all_seen.append(seen)
        assert [path.name for path in (tmp_path / folder).iterdir()] == ["c.pt"]
    whole, stopped = all_seen
    assert stopped == [*whole[:2], *whole[1:6], *whole[5:]]  # the step in flight is lost, no other
    assert len({image for _, image, _ in whole}) > 3
    assert weights[1] == pytest.approx(weights[0], rel=1e-6)


def test_checkpoints_are_written_as_seldom_as_asked(
    shapes: CocoInstances, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step takes a second of this clock; a checkpoint is due 3 after the last."""
    clock, found = [100.0], []
    monkeypatch.setattr("time.monotonic", lambda: clock[0])

    def on_step(step: int, values: Mapping[str, float]) -> None:
        path = tmp_path / "c.pt"
        found.append(torch.load(path, weights_only=True)["step"] if path.exists() else None)
        clock[0] += 1.0

    descend(
        shapes,
        tmp_path,
        TrainingConfig(num_steps=8, batch_size=1, checkpoint_every_s=3.0),
        on_step=on_step,
    )
    assert found == [None, None, None, 3, 3, 3, 6, 6]


def test_what_is_frozen_is_not_optimized() -> None:
    backbone = SparseSwin(SwinConfig(embed_dim=8, depths=(2, 2), num_heads=(1, 1)), frozen_stages=1)
    groups = build_optimizer(backbone, backbone, TrainingConfig(num_steps=1)).param_groups
    found = {id(parameter) for group in groups for parameter in group["params"]}
    assert found == {id(parameter) for parameter in backbone.parameters() if parameter.requires_grad}


def test_a_checkpoint_of_another_model_is_not_gone_on_from(shapes: CocoInstances, tmp_path: Path) -> None:
    config = TrainingConfig(num_steps=1, batch_size=1, checkpoint_every_s=0.0)
    descend(shapes, tmp_path, config)
    state = torch.load(tmp_path / "c.pt", weights_only=True)
    del state["model"]["weights"]
    torch.save(state, tmp_path / "c.pt")
    with pytest.raises(RuntimeError, match='Missing key.* "weights"'):
        descend(shapes, tmp_path, config)


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
    assert learning_rate_factor(8, cosine) == pytest.approx(0.9)
    assert learning_rate_factor(0, TrainingConfig(num_steps=0)) == 1.0
    assert learning_rate_factor(1, TrainingConfig(num_steps=1)) == pytest.approx(0.0)
    short = TrainingConfig(num_steps=8)  # warms up for a quarter at most
    assert [learning_rate_factor(step, short) for step in (0, 1, 2)] == pytest.approx([0.5, 1, 1])
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
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"num_steps": -1}, "num_steps must be at least 0, got -1"),
        ({"clip_norm": -1.0}, "clip_norm must be at least 0, got -1.0"),
        ({"clip_norm": float("nan")}, "clip_norm must be at least 0, got nan"),
        ({"learning_rate": -1e-4}, "learning_rate must be at least 0, got -0.0001"),
        ({"weight_decay": -0.1}, "weight_decay must be at least 0, got -0.1"),
        ({"warmup_steps": -5}, "warmup_steps must be at least 0, got -5"),
        ({"backbone_rate": -1.0}, "backbone_rate must be at least 0, got -1.0"),
        ({"num_workers": -1}, "num_workers must be at least 0, got -1"),
        ({"checkpoint_every_s": -1.0}, "checkpoint_every_s must be at least 0, got -1.0"),
        ({"milestones": (0.5, 8.0)}, r"milestones are shares of num_steps, in \[0, 1\], got \[0.5, 8.0\]"),
    ],
)
def test_bad_training_configuration(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainingConfig(**{"num_steps": 1} | fields)


def test_bounds_of_a_training_configuration_are_allowed() -> None:
    TrainingConfig(
        num_steps=0, batch_size=1, learning_rate=0.0, weight_decay=0.0, warmup_steps=0, clip_norm=0.0,
        backbone_rate=0.0, num_workers=0, checkpoint_every_s=0.0, milestones=(0.0, 1.0),
    )  # fmt: skip


def test_who_asks_for_nothing_gets_the_recipe_of_swin_detectors() -> None:
    """AdamW at 1e-4 and 0.05, 500 steps of warm-up, milestones after 8 and 11 of 12 epochs (MMDetection)."""
    config = TrainingConfig(num_steps=12)
    assert (config.learning_rate, config.weight_decay, config.warmup_steps) == (1e-4, 0.05, 500)
    assert (config.schedule, config.precision, config.clip_norm) == ("cosine", "auto", 1.0)
    assert [12 * share for share in config.milestones] == pytest.approx([8, 11])
    assert (config.batch_size, config.num_workers, config.checkpoint_every_s) == (4, 0, 20.0)
