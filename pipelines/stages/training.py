"""What the three training stages share: the trainer under a progress bar, losses to MLflow."""

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pipelines import build
from pipelines.context import WEIGHTS_FILE, Run
from pipelines.progress import progress_bar
from pipelines.schema import TrainingSchema
from pipelines.verdict import steps_remark
from sparsevit.checkpoints import read_weights, write_weights
from sparsevit.sparsity import SparsityVector
from sparsevit.training import train

logger = logging.getLogger(__name__)
METRICS_EVERY_STEPS = 10
_NO_EFFECT_ON_RESULT = ("num_workers", "checkpoint_every_s")


def training_key(stage: TrainingSchema, run: Run) -> dict[str, Any]:
    """What the weights of a training stage are a function of, parents apart."""
    fields = build.plain(stage)
    return {
        "training": {name: value for name, value in fields.items() if name not in _NO_EFFECT_ON_RESULT},
        "data": run.data_fingerprint(run.train_set),
        "seed": run.config.seed,
    }


def train_stage(
    run: Run,
    name: str,
    model: nn.Module,
    stage: TrainingSchema,
    folder: Path,
    draw_vector: Callable[[torch.Generator], SparsityVector | None],
) -> int:
    """Train `model`, write its weights into `folder` and return the number of steps.

    Weights that a killed process left finished are loaded instead.
    """
    dataset = run.train_set
    finished = folder / WEIGHTS_FILE
    if finished.is_file():
        model.load_state_dict(read_weights(finished))
        return build.training(stage, len(dataset)).num_steps
    remark = steps_remark(run, name, stage)
    if remark is not None:
        logger.info("  %s", remark)
    dataset.transform = run.task.training_transform()
    config = build.training(stage, len(dataset))
    checkpoint = folder / "checkpoint.pt"
    with progress_bar(config.num_steps, f"{name}: training") as advance:
        shown = 0

        def on_step(step: int, values: Mapping[str, float]) -> None:
            nonlocal shown
            advance(step - shown, loss=f"{values['loss']:.3f}")
            shown = step
            if step % METRICS_EVERY_STEPS == 0:
                run.tracker.log_metrics(name, values, step)

        train(
            run.task, model, dataset, config,
            draw_vector=draw_vector, seed=run.seed_for(name), checkpoint=checkpoint, on_step=on_step,
        )  # fmt: skip
    dataset.transform = None
    write_weights(finished, model.state_dict())
    checkpoint.unlink(missing_ok=True)
    return config.num_steps
