"""Tasks by name. A new detector is a new file here, and a line in `create_task`."""

from collections.abc import Mapping
from typing import Any

from sparsevit.tasks.instance_segmentation import InstanceSegmentation
from sparsevit.tasks.mask_rcnn import MaskRCNNConfig
from sparsevit.tasks.protocol import Task

__all__ = ["Task", "create_task"]


def create_task(name: str, config: Mapping[str, Any]) -> Task:
    """Build a task from its name and the fields of its configuration.

    Raises:
        ValueError: for an unknown name, listing the known ones.
    """
    if name == "instance_segmentation":
        return InstanceSegmentation(MaskRCNNConfig(**config))
    raise ValueError(f"unknown task {name!r}; choose one of instance_segmentation")
