"""From camera features to a bird's-eye view: Lift, Splat (arXiv 2008.05711) as BEVDet uses it.

Every pixel of a feature map spreads its feature along its ray, weighted by a distribution over
depths; what falls into a cell of the ground is added up.

Legend: B samples; N cameras; C channels; H, W size of the feature maps; D depths; P points; Y, X cells
of the grid, rows along y, columns along x.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparsevit.geometry import transform


class Cameras(NamedTuple):
    """Where the pixels of a batch look.

    Attributes:
        intrinsics: of the photos, [B, N, 3, 3].
        camera_to_ego: [B, N, 4, 4].
        image_to_input: from pixels of the photo to pixels of what the network gets, [B, N, 3, 3].
        bev_transform: from the ego frame to that of the bird's-eye view (augmentation), [B, 3, 3].
    """

    intrinsics: Tensor
    camera_to_ego: Tensor
    image_to_input: Tensor
    bev_transform: Tensor


@dataclass(frozen=True)
class BevGrid:
    """The ground in cells: x forward and y left, both from `-extent` to `extent` metres.

    Attributes:
        z_range: lowest and highest point that counts, metres.
    """

    extent: float
    cell: float
    z_range: tuple[float, float] = (-10.0, 10.0)

    @property
    def size(self) -> int:
        """Cells along each axis."""
        return round(2 * self.extent / self.cell)

    def cells_of(self, points_P3: Tensor) -> Tensor:
        """Cell number ``y · size + x`` of every point, counted from the lowest; -1 outside: [P]."""
        column = ((points_P3[..., :2] + self.extent) / self.cell).floor().long()
        z = points_P3[..., 2]
        is_inside = (column >= 0).all(-1) & (column < self.size).all(-1)
        is_inside &= (z >= self.z_range[0]) & (z < self.z_range[1])
        return torch.where(is_inside, column[..., 1] * self.size + column[..., 0], -1)

    def centre_of(self, column: Tensor) -> Tensor:
        """Metres of fractional cells, whose whole numbers are lower corners."""
        return column * self.cell - self.extent


def frustum_points(feature_size: tuple[int, int], stride: int, depths_D: Tensor, cameras: Cameras) -> Tensor:
    """The points that every pixel of a feature map stands for, in the frame of the bird's-eye view.

    A feature's pixel looks through the centre of its patch of the input.

    Returns:
        [B, N, D, H, W, 3].
    """
    height, width = feature_size
    device = depths_D.device
    rows, columns = (
        torch.arange(size, device=device) * stride + (stride - 1) / 2 for size in (height, width)
    )
    v, u = torch.meshgrid(rows, columns, indexing="ij")
    pixels_HW3 = torch.stack((u, v, torch.ones_like(u)), dim=-1)
    to_photo = torch.linalg.inv(cameras.image_to_input)
    to_ray = torch.linalg.inv(cameras.intrinsics) @ to_photo
    rays = pixels_HW3.view(1, 1, -1, 3) @ to_ray.transpose(-1, -2)  # [B, N, H·W, 3], depth 1
    points = rays[:, :, None] * depths_D.view(1, 1, -1, 1, 1)
    in_ego = transform(cameras.camera_to_ego[:, :, None], points)
    in_bev = in_ego @ cameras.bev_transform[:, None, None].transpose(-1, -2)
    return in_bev.view(*in_bev.shape[:3], height, width, 3)


def splat(features_QC: Tensor, depth_QD: Tensor, cells_QD: Tensor, num_cells: int) -> Tensor:
    """Add up what falls into every cell: [cells, C].

    The cell's sum over points of ``depth · feature`` is a bag of rows of `features_QC`, so that no
    product of pixels, depths and channels is ever in memory.

    Args:
        features_QC: one row per pixel of any camera of any sample.
        depth_QD: its weights.
        cells_QD: the cell of every pixel and depth; -1 outside.
    """
    num_depths = cells_QD.shape[1]
    cells_P = cells_QD.flatten()
    order = cells_P.argsort(stable=True)
    order = order[int((cells_P < 0).sum()) :]
    bounds = torch.searchsorted(cells_P[order], torch.arange(num_cells, device=cells_P.device))
    return F.embedding_bag(
        order // num_depths,
        features_QC,
        bounds,
        mode="sum",
        per_sample_weights=depth_QD.flatten()[order],
    )


class LiftSplat(nn.Module):
    """The view transform: a depth distribution and a feature per pixel, splatted onto the grid.

    Args:
        stride: input pixels per feature pixel.
        depth_range: nearest depth, farthest depth and step, metres.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        stride: int,
        grid: BevGrid,
        depth_range: tuple[float, float, float],
    ) -> None:
        super().__init__()
        self.out_channels = out_channels
        self.stride = stride
        self.grid = grid
        self.depths_D = nn.Buffer(torch.arange(*depth_range), persistent=False)
        self.projection = nn.Conv2d(in_channels, len(self.depths_D) + out_channels, kernel_size=1)

    def forward(self, features: Tensor, cameras: Cameras) -> Tensor:
        """[B · N, C, H, W] to the bird's-eye view [B, C, Y, X]."""
        num_samples, num_cameras = cameras.intrinsics.shape[:2]
        projected = self.projection(features).float()
        depth, lifted = projected.split((len(self.depths_D), self.out_channels), dim=1)
        size = (features.shape[2], features.shape[3])
        points = frustum_points(size, self.stride, self.depths_D, cameras)
        num_cells = self.grid.size**2
        cells = self.grid.cells_of(points)
        offsets = torch.arange(num_samples, device=cells.device).view(-1, 1, 1, 1, 1) * num_cells
        cells = torch.where(cells >= 0, cells + offsets, -1).flatten(0, 1)
        bev = splat(
            lifted.permute(0, 2, 3, 1).reshape(-1, self.out_channels),
            depth.softmax(dim=1).permute(0, 2, 3, 1).reshape(-1, len(self.depths_D)),
            cells.permute(0, 2, 3, 1).reshape(-1, len(self.depths_D)),
            num_samples * num_cells,
        )
        side = self.grid.size
        assert num_cameras * num_samples == len(features)
        return bev.view(num_samples, side, side, self.out_channels).permute(0, 3, 1, 2).contiguous()
