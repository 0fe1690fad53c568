"""The way from pixels to the bird's-eye view and from maps to boxes, against loops and closed forms."""

import math

import pytest
import torch
from torch import Tensor, nn

from sparsevit.geometry import box_corners, project, rigid, rotation_z, transform_boxes
from sparsevit.tasks.center_head import (
    CenterHead,
    ClassGroup,
    circle_nms,
    draw_gaussian,
    gaussian_focal_loss,
    gaussian_radius,
)
from sparsevit.tasks.lift_splat import BevGrid, Cameras, LiftSplat, frustum_points, splat
from tests.oracles.bev_loops import cell_by_hand, circle_nms_by_loops, rotate_z, splat_by_loops

GRID = BevGrid(extent=8.0, cell=0.5, z_range=(-2.0, 3.0))
GROUPS = (ClassGroup((0, 2), (1.0, 2.0)), ClassGroup((1,), (0.5,)))


def random_boxes(count: int, generator: torch.Generator) -> Tensor:
    """Boxes inside the grid, far from each other."""
    places = torch.randperm(36, generator=generator)[:count]
    xy = torch.stack((places // 6, places % 6), dim=1) * 2.5 - 6.4 + torch.rand(count, 2, generator=generator)
    rest = torch.rand(count, 7, generator=generator)
    return torch.cat(
        (xy, rest[:, :1] * 2 - 1, rest[:, 1:4] * 3 + 0.5, (rest[:, 4:5] - 0.5) * 6, rest[:, 5:7] * 4 - 2),
        dim=1,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_splat_equals_the_loop(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(20, 5, generator=generator, dtype=dtype)
    depth = torch.rand(20, 7, generator=generator, dtype=dtype)
    cells = torch.randint(-1, 9, (20, 7), generator=generator)
    torch.testing.assert_close(splat(features, depth, cells, 12), splat_by_loops(features, depth, cells, 12))
    nowhere = torch.full((20, 7), -1)
    assert float(splat(features, depth, nowhere, 12).abs().sum()) == 0.0


def test_splat_has_the_gradients_of_the_loop() -> None:
    generator = torch.Generator().manual_seed(1)
    features = torch.randn(6, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    depth = torch.rand(6, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    cells = torch.randint(-1, 5, (6, 4), generator=generator)
    weights = torch.randn(5, 3, generator=generator, dtype=torch.float64)
    gradients = [
        torch.autograd.grad((function(features, depth, cells, 5) * weights).sum(), (features, depth))
        for function in (splat, splat_by_loops)
    ]
    for fast, slow in zip(*gradients, strict=True):
        torch.testing.assert_close(fast, slow)


def test_cells_are_those_by_hand() -> None:
    generator = torch.Generator().manual_seed(2)
    points = (torch.rand(400, 3, generator=generator) - 0.5) * torch.tensor([20.0, 20.0, 8.0])
    expected = [cell_by_hand(GRID, tuple(point)) for point in points.double().tolist()]
    assert GRID.cells_of(points.double()).tolist() == expected
    assert -1 in expected
    assert GRID.centre_of(torch.tensor([0.0, 16.5])).tolist() == [-8.0, 0.25]


def camera_setup(bev: Tensor) -> Cameras:
    """Two cameras, one looking ahead and one to the left; photos of 80×48 at half size, cropped."""
    ahead = torch.tensor([[0.0, 0.0, 1.0], [-1.0, 0.0, 0.0], [0.0, -1.0, 0.0]])
    left = rotation_z(math.pi / 2) @ ahead
    poses = rigid(torch.stack((ahead, left)), torch.tensor([[0.5, 0.0, 1.5], [0.0, 0.4, 1.2]]))
    intrinsics = torch.tensor([[60.0, 0.0, 39.5], [0.0, 60.0, 23.5], [0.0, 0.0, 1.0]]).expand(2, 3, 3)
    to_input = torch.tensor([[0.5, 0.0, -0.25], [0.0, 0.5, -0.25 - 4], [0.0, 0.0, 1.0]]).expand(2, 3, 3)
    return Cameras(*(each[None] for each in (intrinsics, poses, to_input, bev)))


@pytest.mark.parametrize("angle", [0.0, 0.7])
@pytest.mark.parametrize("mirror", [1.0, -1.0])
def test_a_lifted_pixel_lies_where_its_point_was_projected_from(angle: float, mirror: float) -> None:
    bev = torch.diag(torch.tensor([1.0, mirror, 1.0])) @ (1.1 * rotation_z(angle))
    cameras = camera_setup(bev)
    depths = torch.tensor([2.0, 4.0, 6.0])
    points = frustum_points((5, 10), 4, depths, cameras)
    for camera in range(2):
        ego_to_camera = torch.linalg.inv(cameras.camera_to_ego[0, camera])
        to_input = cameras.image_to_input[0, camera] @ cameras.intrinsics[0, camera]
        in_ego = points[0, camera] @ torch.linalg.inv(bev).T
        pixels, found_depth = project(in_ego.reshape(-1, 3), ego_to_camera, to_input)
        rows, columns = torch.meshgrid(torch.arange(5), torch.arange(10), indexing="ij")
        expected = torch.stack((columns, rows), dim=-1) * 4 + 1.5
        torch.testing.assert_close(pixels.view(3, 5, 10, 2), expected.expand(3, 5, 10, 2), atol=1e-3, rtol=0)
        torch.testing.assert_close(found_depth.view(3, -1), depths[:, None].expand(3, 50), atol=1e-4, rtol=0)


@pytest.mark.parametrize("angle", [0.0, -0.5])
def test_a_point_at_its_true_depth_lands_in_its_cell(angle: float) -> None:
    """One pixel of one camera is lit, and its depth is sure: exactly one cell gets all of it."""
    bev = rotation_z(angle)
    cameras = camera_setup(bev)
    view = LiftSplat(4, 2, stride=4, grid=GRID, depth_range=(1.0, 7.0, 0.5))
    row, column, depth_bin = 3, 6, 8
    with torch.no_grad():
        view.projection.weight.zero_()
        nn.init.zeros_(view.projection.get_parameter("bias"))
        view.projection.weight[depth_bin, 0] = 60.0
        view.projection.weight[len(view.depths_D), 1] = 1.0
    features = torch.zeros(2, 4, 5, 10)
    features[0, 0] = 1.0
    features[0, 1, row, column] = 1.0
    with torch.no_grad():
        out = view(features, cameras)
    assert out.shape == (1, 2, GRID.size, GRID.size)
    depth = float(view.depths_D[depth_bin])
    pixel = torch.tensor([column * 4 + 1.5, row * 4 + 1.5, 1.0])
    ray = torch.linalg.inv(cameras.intrinsics[0, 0]) @ torch.linalg.inv(cameras.image_to_input[0, 0]) @ pixel
    in_ego = cameras.camera_to_ego[0, 0, :3, :3] @ (ray * depth) + cameras.camera_to_ego[0, 0, :3, 3]
    (place,) = rotate_z(in_ego[None], angle).tolist()
    cell = cell_by_hand(GRID, (place[0], place[1], place[2]))
    assert cell >= 0
    lit = out[0, 0].flatten()
    assert int(lit.argmax()) == cell
    assert float(lit[cell]) == pytest.approx(1.0, abs=1e-4)
    assert float(lit.sum()) == pytest.approx(1.0, abs=1e-4)


def test_decoding_what_was_encoded_gives_the_boxes_back() -> None:
    generator = torch.Generator().manual_seed(3)
    head = CenterHead(4, 4, GROUPS, GRID, min_score=0.5)
    boxes, labels = random_boxes(12, generator), torch.randint(0, 3, (12,), generator=generator)
    maps = []
    for group in GROUPS:
        target = head.encode(group, boxes, labels)
        found: dict[str, Tensor] = {"heat": torch.where(target.heat == 1, 9.0, -9.0)[None]}
        for name, values in target.regressed.items():
            flat = torch.zeros(values.shape[1], GRID.size**2)
            flat[:, target.cells] = values.T
            found[name] = flat.view(1, -1, GRID.size, GRID.size)
        maps.append(found)
    (decoded,) = head.decode(maps)
    assert len(decoded.boxes) == 12
    for box, label in zip(boxes, labels, strict=True):
        nearest = int((decoded.boxes[:, :2] - box[:2]).norm(dim=1).argmin())
        torch.testing.assert_close(decoded.boxes[nearest], box, atol=1e-4, rtol=1e-4)
        assert int(decoded.labels[nearest]) == int(label)


def test_boxes_outside_the_grid_and_of_other_groups_are_no_targets() -> None:
    head = CenterHead(4, 4, GROUPS, GRID)
    boxes = torch.zeros(3, 9) + torch.tensor([0.0, 0, 0, 1, 1, 1, 0, 0, 0])
    boxes[1, 0] = 9.0
    target = head.encode(GROUPS[0], boxes, torch.tensor([0, 0, 1]))
    assert len(target.cells) == 1
    assert int((target.heat == 1).sum()) == 1


def test_unknown_velocities_cost_nothing() -> None:
    head = CenterHead(4, 4, GROUPS, GRID).train()
    boxes = torch.tensor([[0.1, 0.1, 0.0, 1.0, 1.0, 1.0, 0.3, math.nan, math.nan]])
    maps = head(torch.randn(1, 4, GRID.size, GRID.size))
    losses = head.losses(maps, [boxes], [torch.tensor([0])])
    assert all(value.isfinite() for value in losses.values())
    known = head.losses(maps, [boxes.nan_to_num()], [torch.tensor([0])])
    assert known["loss_boxes"] > losses["loss_boxes"]
    torch.stack(list(losses.values())).sum().backward()  # type: ignore[no-untyped-call]
    assert all(p.grad is None or bool(p.grad.isfinite().all()) for p in head.parameters())


def test_a_sample_without_boxes_trains() -> None:
    head = CenterHead(4, 4, GROUPS, GRID).train()
    maps = head(torch.randn(1, 4, GRID.size, GRID.size))
    losses = head.losses(maps, [torch.zeros(0, 9)], [torch.zeros(0, dtype=torch.int64)])
    assert float(losses["loss_boxes"]) == 0.0
    assert losses["loss_heat"].isfinite()


def test_focal_loss_by_hand() -> None:
    logits, target = torch.tensor([[0.0, 0.0]]), torch.tensor([[1.0, 0.5]])
    expected = 0.25 * math.log(2) + 0.5**4 * 0.25 * math.log(2)
    assert float(gaussian_focal_loss(logits, target)) == pytest.approx(expected)


def test_gaussian_radius_keeps_the_overlap() -> None:
    """A box whose corners move by the radius overlaps its truth by at least a half, and no more by far."""

    def overlaps(length: float, width: float, radius: float) -> tuple[float, float, float]:
        area = length * width
        shared = (length - radius) * (width - radius)
        inner, outer = ((length + sign * 2 * radius) * (width + sign * 2 * radius) for sign in (-1, 1))
        return shared / (2 * area - shared), inner / area, area / outer

    for length, width in ((10.0, 10.0), (4.6, 1.9), (1.0, 12.0)):
        radius = gaussian_radius(length, width, overlap=0.5)
        assert min(overlaps(length, width, radius)) == pytest.approx(0.5)
        assert gaussian_radius(length, width, overlap=0.1) > radius


def test_gaussian_is_one_at_its_centre_and_cut_at_its_radius() -> None:
    heat = torch.zeros(9, 9)
    draw_gaussian(heat, 1, 4, radius=2)
    assert heat[1, 4] == 1
    assert heat[3, 4] == pytest.approx(math.exp(-4 / (2 * (5 / 6) ** 2)))
    assert float(heat[4:].sum()) == 0.0
    before = heat.clone()
    draw_gaussian(heat, 1, 5, radius=2)
    assert bool((heat >= before).all())


@pytest.mark.parametrize("seed", range(5))
def test_circle_nms_equals_the_loop(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    boxes, scores = torch.rand(30, 9, generator=generator) * 5, torch.rand(30, generator=generator)
    kept = circle_nms(boxes, scores, torch.arange(30), 1.0)
    centres = [(x, y) for x, y in boxes[:, :2].double().tolist()]
    assert kept.tolist() == circle_nms_by_loops(centres, scores.tolist(), 1.0)
    assert circle_nms(boxes, scores, torch.arange(0), 1.0).tolist() == []


def test_corners_of_a_turned_box() -> None:
    box = torch.tensor([[1.0, 2.0, 0.5, 4.0, 2.0, 1.0, math.pi / 2, 0.0, 0.0]])
    corners = box_corners(box)[0]
    assert corners[0].tolist() == pytest.approx([0.0, 4.0, 1.0], abs=1e-5)
    assert corners.mean(dim=0).tolist() == pytest.approx([1.0, 2.0, 0.5], abs=1e-5)


@pytest.mark.parametrize("mirror", [(1.0, 1.0), (-1.0, 1.0), (1.0, -1.0), (-1.0, -1.0)])
def test_transformed_boxes_have_the_transformed_corners(mirror: tuple[float, float]) -> None:
    boxes = random_boxes(5, torch.Generator().manual_seed(4))
    bev = torch.diag(torch.tensor([*mirror, 1.0])) @ (0.95 * rotation_z(0.4))
    moved = transform_boxes(boxes, bev)
    expected, found = box_corners(boxes) @ bev.T, box_corners(moved)
    for wanted, got in zip(expected, found, strict=True):  # the order of corners is mirrored too
        assert float(torch.cdist(wanted, got).min(dim=1).values.max()) < 1e-4
    torch.testing.assert_close(moved[:, 7:9], boxes[:, 7:9] @ bev[:2, :2].T)
