"""Tasks by name: ours, or yours as ``module:callable`` (docs/own-detector.md)."""

import importlib
from collections.abc import Callable, Mapping
from typing import Any

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
    if name not in TASKS:
        raise ValueError(
            f"unknown task {name!r}; choose one of {', '.join(TASKS)}, or your own as module:callable"
        )
    return TASKS[name](config)


def _instance_segmentation(config: Mapping[str, Any]) -> Task:
    from sparsevit.tasks.instance_segmentation import InstanceSegmentation
    from sparsevit.tasks.mask_rcnn import MaskRCNNConfig

    return InstanceSegmentation(MaskRCNNConfig(**config))


def _semantic_segmentation(config: Mapping[str, Any]) -> Task:
    # transformers takes seconds to import, and need not be there for the other tasks.
    try:
        from sparsevit.tasks.mask2former import Mask2FormerConfig
    except ImportError as error:
        raise ValueError(f"Mask2Former needs transformers and scipy: {error}") from error
    from sparsevit.tasks.semantic_segmentation import SemanticSegmentation

    return SemanticSegmentation(Mask2FormerConfig(**config))


def _detection_3d(config: Mapping[str, Any]) -> Task:
    from sparsevit.tasks.bevdet import BEVDetConfig
    from sparsevit.tasks.detection_3d import Detection3D

    return Detection3D(BEVDetConfig(**config))


TASKS: dict[str, Callable[[Mapping[str, Any]], Task]] = {
    "instance_segmentation": _instance_segmentation,
    "semantic_segmentation": _semantic_segmentation,
    "detection_3d": _detection_3d,
}
