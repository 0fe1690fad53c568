"""Anchors at fixed strides.

torchvision's generator divides the size of the input by that of a map, which is not the stride where a side
is not a multiple of it: 61 instead of 64 pixels for the coarsest level of 672.
"""

import torch
from torch import Tensor
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList

from sparsevit.tasks.mask_rcnn.config import Conventions


class StridedAnchors(AnchorGenerator):
    """torchvision's anchors, where the conventions put them.

    Args:
        sides: of a square anchor, one per level.
    """

    def __init__(self, sides: tuple[int, ...], conventions: Conventions) -> None:
        self.rounded = conventions.rounded_anchors
        self.strides = conventions.anchor_strides
        super().__init__(tuple((side,) for side in sides), (conventions.anchor_ratios,) * len(sides))

    def generate_anchors(
        self,
        scales: list[int],
        aspect_ratios: list[float],
        dtype: torch.dtype = torch.float32,
        device: torch.device = torch.device("cpu"),  # noqa: B008
    ) -> Tensor:
        """Anchors at the origin, [ratios × scales, 4]."""
        ratios = torch.as_tensor(aspect_ratios, dtype=dtype, device=device).sqrt()
        sides = torch.as_tensor(scales, dtype=dtype, device=device)
        halves_w, halves_h = ((each[:, None] * sides).flatten() / 2 for each in (1 / ratios, ratios))
        anchors = torch.stack((-halves_w, -halves_h, halves_w, halves_h), dim=1)
        return anchors.round() if self.rounded else anchors

    def forward(self, image_list: ImageList, feature_maps: list[Tensor]) -> list[Tensor]:
        """All anchors of every image, level by level, row by row."""
        first = feature_maps[0]
        self.set_cell_anchors(first.dtype, first.device)
        sizes = [list(feature_map.shape[-2:]) for feature_map in feature_maps]
        strides = [[torch.tensor(stride, device=first.device)] * 2 for stride in self.strides]
        anchors = torch.cat(self.grid_anchors(sizes, strides))
        return [anchors] * len(image_list.image_sizes)
