"""What a data set yields: an image and its targets."""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

Sample = tuple[Tensor, dict[str, Any]]
Transform = Callable[[Tensor, dict[str, Any]], Sample]


def collate(samples: Sequence[Sample]) -> tuple[list[Tensor], list[dict[str, Any]]]:
    """Keep images and targets as lists: their sizes differ."""
    images, targets = zip(*samples, strict=True)
    return list(images), list(targets)
