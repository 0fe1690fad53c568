"""What the numbers of a run mean, in words: chance, faster or slower, too little training."""

import math

from pipelines import build
from pipelines.context import Run
from pipelines.schema import TrainingSchema

SAME = 0.005
"""How far a speed-up may be from 1 to be none."""


def chance_remark(run: Run) -> str | None:
    """A sentence if the dense model has learnt nothing; then no speed-up means anything."""
    metric, metrics = run.task.metric, run.results["train"].metrics
    if metrics[metric] > run.task.chance:
        return None
    num_steps, enough = int(metrics["num_steps"]), enough_epochs(run, run.config.train)
    if num_steps == 0:
        remedy = f"do the weights of init={run.config.init} belong to these classes and to photos like these?"
    else:
        remedy = f"after {num_steps} steps: raise train.epochs" + (
            ""
            if enough is None
            else f" (to {enough:.0f} for as many steps as the recipe has on its own data)"
        )
    return (
        f"the dense model is no better than chance: its {metric} on {run.report_set.split!r} is "
        f"{metrics[metric]:.3f}, at most {run.task.chance:.2g}. Nothing here says what pruning costs; "
        f"{remedy}"
    )


def steps_remark(run: Run, name: str, stage: TrainingSchema) -> str | None:
    """A sentence if a stage has less than half the steps that it has on the data its recipe is for."""
    enough = enough_epochs(run, stage)
    if enough is None or enough <= 2 * stage.epochs:
        return None
    num_images = len(run.train_set)
    num_steps = build.training(stage, num_images).num_steps
    wanted = math.ceil(enough * num_images / stage.batch_size)
    return (
        f"{name}.epochs={stage.epochs:g} are {num_steps} steps on these {num_images} images; the recipe has "
        f"{wanted} on its own data: {name}.epochs={enough:.0f} would be as many"
    )


def enough_epochs(run: Run, stage: TrainingSchema) -> float | None:
    """Epochs for as many steps as on the recipe's data; None on that, or where its size is not known."""
    generated = run.config.data.generated
    if generated is None or build.is_generated(run.config):
        return None
    return stage.epochs * generated.num_images["train"] / len(run.train_set)


def compared(speedup: float) -> str:
    """A speed relative to that of the dense model: ``1.52× faster than dense``."""
    if abs(speedup - 1) < SAME:
        return "as fast as dense"
    return f"{speedup:.2f}× faster than dense" if speedup > 1 else f"{1 / speedup:.2f}× slower than dense"
