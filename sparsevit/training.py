"""One trainer for the dense model, the adaptation and the finetuning.

Every random choice of a step (samples, augmentation, vector, RoI sampling) is a function of the
seed and the step number, so that a run resumed from a checkpoint continues as if never stopped.
"""

import math
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from sparsevit.data.order import SeededSamples, TrainingOrder, derive_seed, seeded
from sparsevit.data.sample import collate
from sparsevit.precision import autocast, check_precision
from sparsevit.sparsity import SparsityVector
from sparsevit.tasks.protocol import Task

VectorLaw = Callable[[torch.Generator], SparsityVector | None]
SCHEDULES = ("cosine", "polynomial", "step")
OnStep = Callable[[int, Mapping[str, float]], None]


@dataclass(frozen=True)
class TrainingConfig:
    """How to train.

    Attributes:
        num_steps: optimiser steps in all.
        schedule: ``cosine`` to zero, ``polynomial`` to zero with power 0.9, or ``step``: divided by ten
            at every milestone.
        milestones: shares of `num_steps` at which ``step`` lowers the rate.
        precision: ``bf16`` autocast, ``fp32``, or ``auto``: bf16 where it is fast.
        clip_norm: gradient norm at most; 0 for no clipping.
        backbone_rate: learning rate of the backbone, as a share of `learning_rate`.
        checkpoint_every_s: seconds between two checkpoints.
    """

    num_steps: int
    batch_size: int = 4
    learning_rate: float = 1e-4
    weight_decay: float = 0.05
    warmup_steps: int = 500
    schedule: str = "cosine"
    milestones: tuple[float, ...] = (8 / 12, 11 / 12)
    precision: str = "auto"
    clip_norm: float = 1.0
    backbone_rate: float = 1.0
    num_workers: int = 0
    checkpoint_every_s: float = 20.0

    def __post_init__(self) -> None:
        if self.schedule not in SCHEDULES:
            raise ValueError(f"schedule must be one of {', '.join(SCHEDULES)}, got {self.schedule!r}")
        check_precision(self.precision)
        for name in (
            "num_steps", "batch_size", "learning_rate", "weight_decay", "warmup_steps", "clip_norm",
            "backbone_rate", "num_workers", "checkpoint_every_s",
        ):  # fmt: skip
            lowest = 1 if name == "batch_size" else 0
            if not getattr(self, name) >= lowest:  # NaN is not
                raise ValueError(f"{name} must be at least {lowest}, got {getattr(self, name)}")
        if not all(0 <= share <= 1 for share in self.milestones):
            raise ValueError(f"milestones are shares of num_steps, in [0, 1], got {list(self.milestones)}")


def train(
    task: Task,
    model: nn.Module,
    dataset: Dataset[Any],
    config: TrainingConfig,
    *,
    draw_vector: VectorLaw,
    seed: int,
    checkpoint: Path,
    on_step: OnStep = lambda step, values: None,
) -> None:
    """Train `model` in place, from `checkpoint` if that file exists.

    Args:
        draw_vector: the vector of a step, from that step's generator; None for dense.
        checkpoint: written every `config.checkpoint_every_s` seconds, so that a kill loses no more.
        on_step: called after every step with its number (from 1) and its losses.

    Raises:
        FloatingPointError: if the loss is not finite.
    """
    device = next(model.parameters()).device
    optimizer = build_optimizer(model, task.backbone_of(model), config)
    first_step = _restore(checkpoint, model, optimizer, device)
    order = TrainingOrder(
        len(dataset),  # type: ignore[arg-type]
        seed=seed,
        start=first_step * config.batch_size,
        stop=config.num_steps * config.batch_size,
    )
    loader = DataLoader(
        SeededSamples(dataset),
        config.batch_size,
        sampler=order,
        num_workers=config.num_workers,
        collate_fn=collate,
    )
    model.train()
    last_checkpoint = time.monotonic()
    for step, batch in enumerate(loader, start=first_step + 1):
        vector = draw_vector(seeded(seed, step, 1))
        with torch.random.fork_rng():  # torchvision's RoI sampling draws from the global state
            torch.manual_seed(derive_seed(seed, step, 2))
            with autocast(config.precision, device):
                losses = task.losses(model, batch, vector)
                loss = torch.stack(list(losses.values())).sum()
        values = {name: float(value.detach()) for name, value in losses.items()}
        if not math.isfinite(sum(values.values())):
            raise FloatingPointError(
                f"the loss of step {step} is not finite ({values}): lower learning_rate "
                f"({config.learning_rate}) or clip_norm ({config.clip_norm})"
            )
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        if config.clip_norm > 0:
            nn.utils.clip_grad_norm_(model.parameters(), config.clip_norm)
        for group in optimizer.param_groups:
            group["lr"] = group["base_rate"] * learning_rate_factor(step - 1, config)
        optimizer.step()
        on_step(step, {"loss": sum(values.values()), **values})
        if time.monotonic() - last_checkpoint >= config.checkpoint_every_s:
            _save(checkpoint, model, optimizer, step)
            last_checkpoint = time.monotonic()
    model.eval()


def build_optimizer(model: nn.Module, backbone: nn.Module, config: TrainingConfig) -> torch.optim.AdamW:
    """AdamW without weight decay on norms, biases, embeddings and position-bias tables."""
    embeddings = {id(each.weight) for each in model.modules() if isinstance(each, nn.Embedding)}
    of_backbone = {id(parameter) for parameter in backbone.parameters()}
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            is_plain = parameter.ndim < 2 or name.endswith("relative_position_bias_table")
            key = id(parameter) in of_backbone, is_plain or id(parameter) in embeddings
            groups.setdefault(key, []).append(parameter)
    return torch.optim.AdamW(
        [
            {
                "params": parameters,
                "weight_decay": 0.0 if is_plain else config.weight_decay,
                "base_rate": config.learning_rate * (config.backbone_rate if is_backbone else 1.0),
            }
            for (is_backbone, is_plain), parameters in groups.items()
        ],
        lr=config.learning_rate,
    )


def learning_rate_factor(step: int, config: TrainingConfig) -> float:
    """Share of the base rate at `step` (from 0): linear warm-up, then the schedule."""
    warmup = min(config.warmup_steps, config.num_steps // 4)
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, config.num_steps - warmup)
    if config.schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * progress))
    if config.schedule == "polynomial":
        return float((1 - progress) ** 0.9)
    return float(0.1 ** sum(step >= share * config.num_steps for share in config.milestones))


def _restore(
    checkpoint: Path, model: nn.Module, optimizer: torch.optim.Optimizer, device: torch.device
) -> int:
    """Load the checkpoint, if there is one; return the number of steps it has behind it."""
    if not checkpoint.is_file():
        return 0
    state = torch.load(checkpoint, map_location=device, weights_only=True)
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    return int(state["step"])


def _save(checkpoint: Path, model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
    partial = checkpoint.with_name(checkpoint.name + ".partial")
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step}, partial)
    os.replace(partial, checkpoint)
