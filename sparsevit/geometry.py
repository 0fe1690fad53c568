"""Cameras, boxes and frames of reference in 3D.

Frames: *ego*, the vehicle at the reference time, x forward, y left, z up, metres; *camera*, x right,
y down, z forward; *pixel*, x right, y down, (0, 0) at the centre of the first pixel.

Legend: I boxes; N cameras; P points.
"""

import math

import torch
from torch import Tensor

BOX_FIELDS = ("x", "y", "z", "length", "width", "height", "yaw", "vx", "vy")
"""Columns of a box in the ego frame: its centre, its size along its own axes, and its velocity."""


def rotation_z(angle: float) -> Tensor:
    """Rotation about the z axis, [3, 3], counter-clockwise seen from above."""
    cosine, sine = math.cos(angle), math.sin(angle)
    return torch.tensor([[cosine, -sine, 0.0], [sine, cosine, 0.0], [0.0, 0.0, 1.0]])


def rigid(rotation: Tensor, translation: Tensor) -> Tensor:
    """A homogeneous matrix [..., 4, 4] from a rotation [..., 3, 3] and a translation [..., 3]."""
    matrix = torch.zeros(*rotation.shape[:-2], 4, 4, dtype=rotation.dtype, device=rotation.device)
    matrix[..., :3, :3] = rotation
    matrix[..., :3, 3] = translation
    matrix[..., 3, 3] = 1.0
    return matrix


def transform(matrix: Tensor, points_P3: Tensor) -> Tensor:
    """Apply a homogeneous matrix [..., 4, 4] to points [..., P, 3]."""
    return points_P3 @ matrix[..., :3, :3].transpose(-1, -2) + matrix[..., None, :3, 3]


def box_corners(boxes_I9: Tensor, rotations_I33: Tensor | None = None) -> Tensor:
    """The eight corners of boxes: [I, 8, 3].

    Boxes stand upright, turned by their yaw, unless their `rotations_I33` are given.

    The first four are the front side (towards positive x of the box): upper left, upper right, lower
    right, lower left, seen from inside; the last four are those of the back side in the same order.
    """
    signs = boxes_I9.new_tensor(
        [[1, 1, 1], [1, -1, 1], [1, -1, -1], [1, 1, -1], [-1, 1, 1], [-1, -1, 1], [-1, -1, -1], [-1, 1, -1]]
    )
    local_I83 = signs * boxes_I9[:, None, 3:6] / 2
    if rotations_I33 is None:
        cosine, sine = boxes_I9[:, 6].cos(), boxes_I9[:, 6].sin()
        zero, one = torch.zeros_like(sine), torch.ones_like(sine)
        rows = (cosine, -sine, zero, sine, cosine, zero, zero, zero, one)
        rotations_I33 = torch.stack(rows, dim=1).view(-1, 3, 3)
    return local_I83 @ rotations_I33.transpose(1, 2) + boxes_I9[:, None, :3]


def project(points_P3: Tensor, ego_to_camera: Tensor, intrinsics: Tensor) -> tuple[Tensor, Tensor]:
    """Pixels [P, 2] and depths [P] of points in the ego frame, in one camera.

    Args:
        ego_to_camera: [4, 4].
        intrinsics: [3, 3].
    """
    in_camera = transform(ego_to_camera, points_P3)
    depth_P = in_camera[..., 2]
    pixels = in_camera @ intrinsics.T
    return pixels[..., :2] / pixels[..., 2:], depth_P


def transform_boxes(boxes_I9: Tensor, bev_transform: Tensor) -> Tensor:
    """Boxes in a frame that is rotated about z, scaled and mirrored.

    Args:
        bev_transform: [3, 3], one scale in all directions; x and y may be mirrored.
    """
    scale = float(bev_transform[2, 2])
    moved = boxes_I9.clone()
    moved[:, :3] = boxes_I9[:, :3] @ bev_transform.T
    moved[:, 3:6] = boxes_I9[:, 3:6] * scale
    heading = torch.stack((boxes_I9[:, 6].cos(), boxes_I9[:, 6].sin()), dim=1) @ bev_transform[:2, :2].T
    moved[:, 6] = torch.atan2(heading[:, 1], heading[:, 0])
    moved[:, 7:9] = boxes_I9[:, 7:9] @ bev_transform[:2, :2].T
    return moved
