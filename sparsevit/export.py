"""A subnet to take away: vector, weights and configuration in one folder."""

import json
import math
import pickle
from collections.abc import Mapping, Sequence
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparsevit.allocator import keep_freed_memory
from sparsevit.backbone import SparseSwin, create_backbone
from sparsevit.checkpoints.files import CheckpointError, check_finite, read_weights, write_weights
from sparsevit.sparsity import SparsityVector, check_fits
from sparsevit.tasks import create_task

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
EXAMPLE_FILE = "example.pt"
OVERSHOOT = 0.1
"""Beyond [0, 1], as bicubic resizing makes it at edges."""


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

    @property
    def label_names(self) -> dict[int, str]:
        """The class of every label that predictions have."""
        return {int(label): name for label, name in self.config.get("label_names", {}).items()}

    def forward(self, images: list[Tensor], *others: Any) -> Any:
        """The task's predictions for images in [0, 1], and what else its model takes.

        Args:
            images: [3, H, W] each, red, green and blue; [6, 3, h, w] of all cameras for ``detection_3d``.

        Raises:
            ValueError: for images of another form or range, in which the model would see nothing.
        """
        _check_images(images, self.config["task"])
        return self.model(images, *others, sparsity=self.sparsity)


def _check_images(images: Any, task: str) -> None:
    """Refuse images in which the model would see nothing and not say so."""
    if not isinstance(images, list | tuple) or not images:
        given = f"a tensor {list(images.shape)}" if isinstance(images, Tensor) else f"{images!r:.80}"
        raise ValueError(f"the model takes a list of images, one or more, got {given}: call model([image])")
    form = "[cameras, 3, h, w]" if task == "detection_3d" else "[3, H, W]"
    num_axes = (3, 4) if ":" in task else (form.count(",") + 1,)  # a task of one's own may take either
    for index, image in enumerate(images):
        if not isinstance(image, Tensor):
            raise ValueError(f"images[{index}] is a {type(image).__name__}, not a tensor {form} in [0, 1]")
        if image.ndim not in num_axes or image.shape[-3] != 3 or image.numel() == 0:
            raise ValueError(
                f"images[{index}] has the shape {list(image.shape)}, but the model takes {form}: red, green "
                "and blue, also where an image is grey"
            )
        if not image.is_floating_point():
            raise ValueError(
                f"images[{index}] is {image.dtype}, but the model takes values in [0, 1]: divide by 255"
            )
    limits = torch.stack([torch.stack(torch.aminmax(image.detach())).float() for image in images])
    for index, (lowest, highest) in enumerate(limits.tolist()):  # on a GPU this waits, for all images at once
        if lowest >= -OVERSHOOT and highest <= 1 + OVERSHOOT:
            continue
        remedy = "it normalises them itself" if lowest < -OVERSHOOT else "divide by 255"
        raise ValueError(
            f"images[{index}] has values from {lowest:g} to {highest:g}, but the model takes [0, 1]"
            + (f": {remedy}" if math.isfinite(lowest + highest) else "")
        )


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


def load_exported(folder: str | Path, *, trusted: bool = False) -> ExportedModel:
    """Rebuild an exported model, in evaluation mode, on the CPU.

    Nothing that the folder holds is run. If its task is not one of ours, it names Python to import and call,
    which needs your word.

    From here on the process keeps the memory that it frees (`keep_freed_memory`): without, page faults take
    much of what pruning saves on a CPU.

    Args:
        trusted: whether a task of one's own, ``module:callable``, may be imported and called.

    Raises:
        CheckpointError: if the folder does not hold an export, its weights do not fit or are no numbers, or
            its task is not one of ours and not trusted.
    """
    keep_freed_memory()
    folder = Path(folder)
    config = _read_config(folder)
    if ":" in str(config["task"]) and not trusted:
        raise CheckpointError(
            f"{folder / CONFIG_FILE} names a task that is not ours: loading it imports and calls "
            f"{config['task']}, whatever that does. If you know where the folder comes from, allow it: "
            "load_exported(folder, trusted=True), or --trusted on the command line"
        )
    try:
        task = create_task(config["task"], config["task_config"])
        backbone = create_backbone(config["backbone"])
        model = task.build_model(backbone)
        sparsity = SparsityVector(tuple(config["sparsity"]))
        check_fits(sparsity, backbone.depths)
    except (TypeError, ValueError) as error:
        raise CheckpointError(
            f"the model that {folder / CONFIG_FILE} describes cannot be built: {error}"
        ) from error
    path = folder / WEIGHTS_FILE
    weights = read_weights(path)
    check_finite(weights, path)
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise CheckpointError(f"the weights in {folder} do not fit its configuration: {error}") from error
    return ExportedModel(model, sparsity, config).eval()


def _read_config(folder: Path) -> dict[str, Any]:
    """What `export_model` wrote beside the weights, all of it."""
    try:
        config: dict[str, Any] = json.loads((folder / CONFIG_FILE).read_text())
        for key in ("sparsity", "backbone", "task", "task_config"):
            config[key]
        return config
    except (OSError, KeyError, TypeError, ValueError) as error:
        reason = f"{error} is missing" if isinstance(error, KeyError) else str(error)
        raise CheckpointError(f"{folder} does not hold an exported model: {reason}") from error


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
