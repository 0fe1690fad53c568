"""Slow, obvious versions of the bird's-eye view: one point, one box, one cell at a time."""

import math

import torch
from torch import Tensor

from sparsevit.tasks.lift_splat import BevGrid


def splat_by_loops(features_QC: Tensor, depth_QD: Tensor, cells_QD: Tensor, num_cells: int) -> Tensor:
    """Every pixel's feature, times every depth's weight, into its cell."""
    out = features_QC.new_zeros(num_cells, features_QC.shape[1])
    for pixel in range(cells_QD.shape[0]):
        for depth in range(cells_QD.shape[1]):
            cell = int(cells_QD[pixel, depth])
            if cell >= 0:
                out[cell] = out[cell] + depth_QD[pixel, depth] * features_QC[pixel]
    return out


def cell_by_hand(grid: BevGrid, point: tuple[float, float, float]) -> int:
    x, y, z = point
    column, row = math.floor((x + grid.extent) / grid.cell), math.floor((y + grid.extent) / grid.cell)
    if not (0 <= row < grid.size and 0 <= column < grid.size and grid.z_range[0] <= z < grid.z_range[1]):
        return -1
    return row * grid.size + column


def circle_nms_by_loops(centres: list[tuple[float, float]], scores: list[float], radius: float) -> list[int]:
    """Strongest first; a box stays unless one that stays is closer than `radius`."""
    kept: list[int] = []
    for index in sorted(range(len(scores)), key=lambda each: -scores[each]):
        if all(math.dist(centres[index], centres[other]) >= radius for other in kept):
            kept.append(index)
    return kept


def rotate_z(points: Tensor, angle: float) -> Tensor:
    return torch.stack(
        (
            math.cos(angle) * points[:, 0] - math.sin(angle) * points[:, 1],
            math.sin(angle) * points[:, 0] + math.cos(angle) * points[:, 1],
            points[:, 2],
        ),
        dim=1,
    )
