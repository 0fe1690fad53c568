"""The weights that a run starts from: read, put into our terms, and what the task is set to for them."""

import logging
from collections.abc import Sequence
from dataclasses import asdict, replace

from torch import nn

from pipelines import build
from pipelines.schema import ConfigSchema
from sparsevit.checkpoints import Imported, ModelReport, import_checkpoint, load_model_weights
from sparsevit.tasks import Task, create_task

logger = logging.getLogger(__name__)


def read_initial(config: ConfigSchema, task: Task, class_names: Sequence[str]) -> Imported | None:
    """The checkpoint of `config.init` in the terms of a task; None for random weights.

    Raises:
        CheckpointError: if it cannot be used.
    """
    path = build.initial_weights(config)
    if path is None:
        return None
    if not build.loads_heads(config):
        return import_checkpoint(path, (), task.config)
    if build.loads_classifier(config):
        return import_checkpoint(path, task.foreign_formats, task.config, class_names)
    imported = import_checkpoint(path, task.foreign_formats, task.config)
    if imported.config is task.config:
        return imported
    num_classes = len(class_names)
    return replace(
        imported,
        config=replace(imported.config, num_classes=num_classes),
        tested_config=replace(imported.tested_config, num_classes=num_classes),
    )


def settled_task(config: ConfigSchema, task: Task, imported: Imported | None) -> Task:
    """The task as the weights need it, and tested as `init_settings` says."""
    if imported is None:
        return task
    chosen = imported.tested_config if config.init_settings == "checkpoint" else imported.config
    return task if chosen == task.config else create_task(config.task.name, asdict(chosen))


def load_initial(config: ConfigSchema, task: Task, model: nn.Module, imported: Imported) -> ModelReport:
    """Load the checkpoint into a model of the settled task."""
    return load_model_weights(
        model, task.backbone_of(model), imported,
        class_layers=task.class_layers,
        loads_classifier=build.loads_classifier(config),
        loads_heads=build.loads_heads(config),
    )  # fmt: skip


def told(config: ConfigSchema, task: Task, imported: Imported) -> list[str]:
    """What the user should know of the checkpoint, a sentence each."""
    notes = [f"{imported.path}: {note}" for note in imported.notes]
    mine, its = imported.config, imported.tested_config
    if mine == its:
        return notes
    differing = {
        name: (getattr(its, name), getattr(mine, name))
        for name in asdict(mine)
        if getattr(its, name) != getattr(mine, name)
    }
    if not differing:
        return notes
    listed = "; ".join(f"{name} {theirs}, here {ours}" for name, (theirs, ours) in differing.items())
    is_its = config.init_settings == "checkpoint"
    kept = (
        "the checkpoint's are kept: init_settings=recipe takes those of the configuration"
        if is_its
        else ("those of the configuration are taken: init_settings=checkpoint keeps the checkpoint's")
    )
    notes.append(f"{imported.path} was tested with {listed}. {kept[0].upper()}{kept[1:]}")
    if is_its and "input" in differing:
        height, width = config.latency.image_size
        notes.append(
            f"training crops squares of task.image_size={mine.image_size}, and latency is measured on inputs "
            f"of latency.image_size=[{height}, {width}] (height, width): set them to what your photos become"
        )
    return notes
