"""Tasks by name: ours, or yours as ``module:callable`` (docs/own-detector.md)."""

import importlib
from collections.abc import Mapping
from typing import Any

from sparsevit.tasks.instance_segmentation import InstanceSegmentation
from sparsevit.tasks.mask_rcnn import MaskRCNNConfig
from sparsevit.tasks.protocol import Task

__all__ = ["Task", "create_task"]


def create_task(name: str, config: Mapping[str, Any]) -> Task:
    """Build a task from its name and the fields of its configuration.

    A name ``module:callable`` is imported, and called with the configuration.

    Raises:
        ValueError: for an unknown name, listing the known ones, or one that cannot be imported.
    """
    if ":" in name:
        module, _, attribute = name.partition(":")
        try:
            create = getattr(importlib.import_module(module), attribute)
        except (ImportError, AttributeError) as error:
            raise ValueError(f"task {name!r} cannot be imported: {error}") from error
        task: Task = create(config)
        return task
    if name == "instance_segmentation":
        return InstanceSegmentation(MaskRCNNConfig(**config))
    raise ValueError(
        f"unknown task {name!r}; choose one of instance_segmentation, or your own as module:callable"
    )
