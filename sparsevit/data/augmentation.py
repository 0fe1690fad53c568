"""Training augmentation for instance masks, from torchvision's transforms."""

from typing import Any

from torch import Tensor
from torchvision.transforms import v2

from sparsevit.data.sample import Sample, Transform


def instance_augmentation(image_size: int, scale_range: tuple[float, float]) -> Transform:
    """Horizontal flip and multi-scale resize onto a square of `image_size` pixels.

    The image is resized to fit the square, times a factor from `scale_range` (large-scale
    jitter, arXiv 2012.07177), then cropped or padded to it. Instances that leave the crop go.
    """
    augment = v2.Compose(
        [
            v2.RandomHorizontalFlip(),
            v2.ScaleJitter((image_size, image_size), scale_range, antialias=True),
            v2.RandomCrop(image_size, pad_if_needed=True),
            v2.SanitizeBoundingBoxes(min_size=2),
        ]
    )

    def apply(image: Tensor, target: dict[str, Any]) -> Sample:
        image, target = augment(image, target)
        visible = target["masks"].bool().flatten(1).any(dim=1)
        return image, target | {key: target[key][visible] for key in ("boxes", "labels", "masks")}

    return apply
