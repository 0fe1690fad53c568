"""A subnet to take away: vector, weights and configuration in one folder."""

import json
import pickle
from collections.abc import Mapping, Sequence
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sparsevit.allocator import keep_freed_memory
from sparsevit.backbone import SparseSwin, create_backbone
from sparsevit.checkpoints.files import CheckpointError, read_weights, write_weights
from sparsevit.sparsity import SparsityVector
from sparsevit.tasks import create_task

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
EXAMPLE_FILE = "example.pt"


class ExportedModel(nn.Module):
    """A model and the vector it was finetuned for."""

    def __init__(self, model: nn.Module, sparsity: SparsityVector, config: Mapping[str, Any]) -> None:
        super().__init__()
        self.model = model
        self.sparsity = sparsity
        self.config = dict(config)

    @property
    def backbone(self) -> SparseSwin:
        """The backbone inside the model."""
        return create_task(self.config["task"], self.config["task_config"]).backbone_of(self.model)

    def forward(self, *inputs: Any) -> Any:
        """The task's predictions for the inputs of its model: first a list of images in [0, 1]."""
        return self.model(*inputs, sparsity=self.sparsity)


def export_model(
    folder: Path,
    model: nn.Module,
    sparsity: SparsityVector,
    *,
    backbone: str,
    task: str,
    task_config: Any,
    example: Sequence[Any],
    details: Mapping[str, Any],
) -> None:
    """Write `model` for `load_exported`; `details` (classes, figures) go along unread.

    Args:
        example: inputs of the model for one sample, to measure it with where there is no data.
    """
    assert is_dataclass(task_config) and not isinstance(task_config, type)
    folder.mkdir(parents=True, exist_ok=True)
    write_weights(folder / WEIGHTS_FILE, model.state_dict())
    torch.save(list(example), folder / EXAMPLE_FILE)
    config = {
        "sparsity": list(sparsity.ratios),
        "backbone": backbone,
        "task": task,
        "task_config": asdict(task_config),
        **details,
    }
    (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2))


def load_exported(folder: str | Path) -> ExportedModel:
    """Rebuild an exported model, in evaluation mode, on the CPU.

    From here on the process keeps the memory that it frees (`keep_freed_memory`): without, page faults take
    much of what pruning saves on a CPU.

    Raises:
        CheckpointError: if the folder does not hold an export or its weights do not fit.
    """
    keep_freed_memory()
    folder = Path(folder)
    try:
        config = json.loads((folder / CONFIG_FILE).read_text())
        task = create_task(config["task"], config["task_config"])
        model = task.build_model(create_backbone(config["backbone"]))
        sparsity = SparsityVector(tuple(config["sparsity"]))
    except (OSError, json.JSONDecodeError, KeyError, TypeError) as error:
        raise CheckpointError(f"{folder} does not hold an exported model: {error}") from error
    weights = read_weights(folder / WEIGHTS_FILE)
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise CheckpointError(f"the weights in {folder} do not fit its configuration: {error}") from error
    return ExportedModel(model, sparsity, config).eval()


def load_example(folder: str | Path) -> list[Any]:
    """Inputs of an exported model for one sample.

    Raises:
        CheckpointError: if the folder has none.
    """
    path = Path(folder) / EXAMPLE_FILE
    try:
        example: list[Any] = torch.load(path, weights_only=True)
    except (OSError, RuntimeError, pickle.UnpicklingError) as error:
        raise CheckpointError(f"{path} holds no inputs to measure the model with: {error}") from error
    return example
