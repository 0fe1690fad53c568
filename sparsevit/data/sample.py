"""What a data set yields: an image and its targets."""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

IMAGE_MEAN = (0.485, 0.456, 0.406)
IMAGE_STD = (0.229, 0.224, 0.225)
"""ImageNet's statistics of RGB in [0, 1], by which images are normalised."""
IGNORED = 255
"""What stands in a label map where nothing is learnt or evaluated."""
Sample = tuple[Tensor, dict[str, Any]]
Transform = Callable[[Tensor, dict[str, Any]], Sample]


def collate(samples: Sequence[Sample]) -> tuple[list[Tensor], list[dict[str, Any]]]:
    """Keep images and targets as lists: their sizes differ."""
    images, targets = zip(*samples, strict=True)
    return list(images), list(targets)
