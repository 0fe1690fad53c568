"""Photos to inputs: resized as the configuration says, normalised, padded.

Legend: B inputs; H, W size of a photo, h, w of a resized one.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.models.detection.image_list import ImageList

from sparsevit.data.sample import IMAGE_MEAN, IMAGE_STD
from sparsevit.tasks.mask_rcnn.config import PhotoInput

_COEFFICIENT_BITS = 11  # of OpenCV's fixed-point resize


def resize_photo(photo: Tensor, config: PhotoInput) -> Tensor:
    """Resize a photo [3, H, W] in [0, 1] to [3, h, w]."""
    size = config.size_of(photo.shape[-2], photo.shape[-1])
    if size == tuple(photo.shape[-2:]):
        return photo
    if config.resize == "uint8":
        levels = (photo * 255).round().to(torch.uint8)
        return resize_uint8(levels, size).to(photo.dtype) / 255
    resized: Tensor = F.interpolate(photo[None], size, mode="bilinear", align_corners=False)[0]
    return resized


def to_input(photos: Sequence[Tensor], config: PhotoInput) -> ImageList:
    """Normalise resized photos [3, h, w] and pad them to one size: inputs [B, 3, …] and the sizes before."""
    sizes = [(photo.shape[-2], photo.shape[-1]) for photo in photos]
    height, width = config.padded(max(h for h, _ in sizes), max(w for _, w in sizes))
    mean, std = (photos[0].new_tensor(values).view(3, 1, 1) for values in (IMAGE_MEAN, IMAGE_STD))
    inputs = [
        F.pad((photo - mean) / std, (0, width - photo.shape[-1], 0, height - photo.shape[-2]))
        for photo in photos
    ]
    return ImageList(torch.stack(inputs), sizes)


def resize_uint8(image: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize [C, H, W] uint8 to `size` as OpenCV's ``resize`` with ``INTER_LINEAR`` does, to the last bit.

    It weighs neighbours by coefficients of 11 bits, columns first, and drops 4, 16 and 2 bits on the way.
    """
    pixels, (height, width) = image.int(), image.shape[-2:]
    first, second, weight, other = _neighbours(width, size[1], image.device, shares_edges=False)
    lines = pixels[..., first] * weight + pixels[..., second] * other
    first, second, weight, other = _neighbours(height, size[0], image.device, shares_edges=True)
    above, below = lines[..., first, :] >> 4, lines[..., second, :] >> 4
    total = ((above * weight[:, None]) >> 16) + ((below * other[:, None]) >> 16)
    return ((total + 2) >> 2).clamp(0, 255).to(torch.uint8)


def _neighbours(
    old: int, new: int, device: torch.device, *, shares_edges: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """For every new place on an axis: its two old neighbours and their weights, which add up to 2048.

    Beyond an edge both are the edge itself: the whole weight is the first's, or both keep theirs
    (`shares_edges`), which rounds otherwise.
    """
    place = ((torch.arange(new, dtype=torch.float64) + 0.5) * (old / new) - 0.5).float()
    first = place.floor()
    share = place - first
    if not shares_edges:
        share[(first < 0) | (first >= old - 1)] = 0
    second = (first + 1).clamp(0, old - 1).long()
    first = first.clamp(0, old - 1).long()
    unit = 1 << _COEFFICIENT_BITS
    weight, other = (((part * unit).round()).int() for part in (1 - share, share))
    return tuple(  # type: ignore[return-value]
        each.to(device) for each in (first, second, weight, other)
    )
