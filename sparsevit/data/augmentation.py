"""Training augmentation for instance masks and label maps, from torchvision's transforms."""

from typing import Any

import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2.functional import resize

from sparsevit.data.sample import IGNORED, IMAGE_MEAN, Sample, Transform

GREY = 128
MEAN = [round(255 * share) for share in IMAGE_MEAN]
"""Where a crop reaches beyond the image; the mean is 0 once it is normalised, as padding is in evaluation."""


def instance_augmentation(image_size: int, scale_range: tuple[float, float]) -> Transform:
    """Horizontal flip and multi-scale resize onto a square of `image_size` pixels.

    The image is resized to fit the square, times a factor from `scale_range` (large-scale
    jitter, arXiv 2012.07177), then cropped or padded to it. Instances that leave the crop go, also
    those whose masks do, where there are masks.
    """
    augment = v2.Compose(
        [
            v2.RandomHorizontalFlip(),
            v2.ScaleJitter((image_size, image_size), scale_range, antialias=True),
            v2.RandomCrop(image_size, pad_if_needed=True, fill={tv_tensors.Image: MEAN, tv_tensors.Mask: 0}),
            v2.SanitizeBoundingBoxes(min_size=2),
        ]
    )

    def apply(image: Tensor, target: dict[str, Any]) -> Sample:
        image, target = augment(image, target)
        if "masks" not in target:
            return image, target
        visible = target["masks"].bool().flatten(1).any(dim=1)
        return image, target | {key: target[key][visible] for key in ("boxes", "labels", "masks")}

    return apply


def segmentation_augmentation(crop_size: tuple[int, int], scale_range: tuple[float, float]) -> Transform:
    """Random resize, crop, horizontal flip and photometric distortion, as Mask2Former's for Cityscapes.

    The image is resized by a factor from `scale_range`, then cropped or padded to `crop_size` (height,
    width); nothing is learnt from the padding.
    """
    fill = {tv_tensors.Image: GREY, tv_tensors.Mask: IGNORED}
    augment = v2.Compose(
        [
            v2.RandomCrop(crop_size, pad_if_needed=True, fill=fill),
            v2.RandomHorizontalFlip(),
            v2.RandomPhotometricDistort(),
        ]
    )

    def apply(image: Tensor, target: dict[str, Any]) -> Sample:
        low, high = scale_range
        scale = low + (high - low) * float(torch.rand(()))
        size = [max(1, round(scale * side)) for side in image.shape[-2:]]
        image = resize(image, size, antialias=True)
        labels = resize(tv_tensors.Mask(target["labels"][None]), size, v2.InterpolationMode.NEAREST)
        image, labels = augment(image, labels)
        return image, target | {"labels": labels[0]}

    return apply
