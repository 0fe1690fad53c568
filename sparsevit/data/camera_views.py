"""What the network sees of a rig of cameras: photos resized, cropped, turned, with the matrices to match.

Legend: N cameras; H, W size of a photo, h, w of the input.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2.functional import crop, horizontal_flip, resize, rotate

from sparsevit.data.sample import Sample, Transform
from sparsevit.geometry import rotation_z, transform_boxes


@dataclass(frozen=True)
class ImageView:
    """From a photo to the input: resize, crop, flip, rotate, in this order.

    Attributes:
        scale: of the resize.
        left, top: corner of the crop in the resized photo; it may lie outside.
        degrees: counter-clockwise, about the centre of the input.
    """

    scale: float
    left: int
    top: int
    is_flipped: bool = False
    degrees: float = 0.0

    def apply(self, photo: Tensor, input_size: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """The input [3, h, w] of a photo [3, H, W], and the matrix [3, 3] of their pixels."""
        old = photo.shape[-2:]
        new = [max(1, round(side * self.scale)) for side in old]
        height, width = input_size
        image = resize(photo, new, antialias=True)
        image = crop(image, self.top, self.left, height, width)
        scale_y, scale_x = (after / before for after, before in zip(new, old, strict=True))
        matrix = torch.tensor(
            [
                [scale_x, 0.0, (scale_x - 1) / 2 - self.left],
                [0.0, scale_y, (scale_y - 1) / 2 - self.top],
                [0.0, 0.0, 1.0],
            ]
        )
        if self.is_flipped:
            image = horizontal_flip(image)
            matrix = torch.tensor([[-1.0, 0.0, width - 1], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]]) @ matrix
        if self.degrees:
            image = rotate(image, self.degrees, InterpolationMode.BILINEAR)
            matrix = _rotation_about(((width - 1) / 2, (height - 1) / 2), self.degrees) @ matrix
        return image, matrix


def fitting_view(photo_size: tuple[int, int], input_size: tuple[int, int]) -> ImageView:
    """Fit the width, keep the lower part: the sky is what a car can do without (BEVDet, section 3.3)."""
    scale = input_size[1] / photo_size[1]
    return ImageView(scale, left=0, top=round(photo_size[0] * scale) - input_size[0])


def camera_inputs(input_size: tuple[int, int]) -> Transform:
    """The evaluation's inputs. Adds ``image_to_input`` [N, 3, 3] and ``bev_transform`` [3, 3]."""

    def apply(photos: Tensor, target: dict[str, Any]) -> Sample:
        views = [(photo, fitting_view(_size(photo), input_size)) for photo in _photos(photos, target)]
        images, matrices = zip(*(view.apply(photo, input_size) for photo, view in views), strict=True)
        added = {"image_to_input": torch.stack(matrices), "bev_transform": torch.eye(3)}
        return torch.stack(images), target | added

    return apply


def camera_augmentation(
    input_size: tuple[int, int],
    *,
    resize_range: tuple[float, float],
    degrees: float,
    bev_degrees: float,
    bev_scale_range: tuple[float, float],
    flips: bool = True,
) -> Transform:
    """BEVDet's augmentation (section 3.3) in the photos, each on its own, and in the bird's-eye view.

    It draws from PyTorch's global generator.

    Args:
        resize_range: added to the factor that fits the photo's width.
        degrees, bev_degrees: largest rotation of the photos and of the bird's-eye view.
        flips: whether both are mirrored, half of the times.
    """

    def apply(photos: Tensor, target: dict[str, Any]) -> Sample:
        images, matrices = [], []
        for photo in _photos(photos, target):
            view = _draw_view(_size(photo), input_size, resize_range, degrees, flips=flips)
            image, matrix = view.apply(photo, input_size)
            images.append(image)
            matrices.append(matrix)
        bev = _draw_bev(bev_degrees, bev_scale_range, flips=flips)
        return torch.stack(images), target | {
            "image_to_input": torch.stack(matrices),
            "bev_transform": bev,
            "boxes": transform_boxes(target["boxes"], bev),
        }

    return apply


def _photos(photos: Tensor, target: dict[str, Any]) -> list[Tensor]:
    """Each photo without its padding: the cameras may be of several sizes."""
    sizes: list[list[int]] = target["photo_sizes"].tolist()
    return [photo[:, :height, :width] for photo, (height, width) in zip(photos, sizes, strict=True)]


def _size(photo: Tensor) -> tuple[int, int]:
    return photo.shape[-2], photo.shape[-1]


def _draw_view(
    photo_size: tuple[int, int],
    input_size: tuple[int, int],
    resize_range: tuple[float, float],
    degrees: float,
    *,
    flips: bool,
) -> ImageView:
    scale = input_size[1] / photo_size[1] + _uniform(*resize_range)
    height, width = (round(side * scale) for side in photo_size)
    left = round(_uniform(0, max(0, width - input_size[1])))
    return ImageView(
        scale, left, height - input_size[0],
        is_flipped=flips and _uniform(0, 1) < 0.5, degrees=_uniform(-degrees, degrees),
    )  # fmt: skip


def _draw_bev(degrees: float, scale_range: tuple[float, float], *, flips: bool) -> Tensor:
    matrix = rotation_z(math.radians(_uniform(-degrees, degrees))) * _uniform(*scale_range)
    mirror = torch.tensor([-1.0 if flips and _uniform(0, 1) < 0.5 else 1.0 for _ in range(2)] + [1.0])
    return mirror[:, None] * matrix


def _rotation_about(centre: tuple[float, float], degrees: float) -> Tensor:
    """Counter-clockwise as seen, where y points down."""
    x, y = centre
    cosine, sine = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    return torch.tensor(
        [
            [cosine, sine, x - cosine * x - sine * y],
            [-sine, cosine, y + sine * x - cosine * y],
            [0.0, 0.0, 1.0],
        ]
    )


def _uniform(low: float, high: float) -> float:
    return low + (high - low) * float(torch.rand(()))
