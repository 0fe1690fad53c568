"""CenterPoint's head (arXiv 2006.11275): boxes as peaks of a heat map, for groups of classes.

Legend: B samples; Y, X cells, rows along y, columns along x; K classes of a group; I boxes of a
sample; T boxes that are regressed.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sparsevit.tasks.lift_splat import BevGrid

REGRESSED = {"offset": 2, "height": 1, "size": 3, "heading": 2, "velocity": 2}
"""Channels of what is regressed at a peak: place in its cell, z, log of the size, sine and cosine, m/s."""
WEIGHTS = {"offset": 1.0, "height": 1.0, "size": 1.0, "heading": 1.0, "velocity": 0.2}
INITIAL_HEAT = 0.1
MIN_OVERLAP = 0.1
MIN_RADIUS = 2


@dataclass(frozen=True)
class ClassGroup:
    """Classes that share a heat map's regression: their numbers, and how close two of them may be.

    Attributes:
        radii: metres between centres below which the weaker of two boxes of a class goes (circle NMS).
    """

    labels: tuple[int, ...]
    radii: tuple[float, ...]


@dataclass(frozen=True)
class Detections:
    """Boxes of one sample, strongest first: [I, 9], scores [I], labels [I]."""

    boxes: Tensor
    scores: Tensor
    labels: Tensor


class CenterHead(nn.Module):
    """A heat map per class and box parameters per group, from a bird's-eye view.

    Args:
        num_boxes: per sample and group, at most.
        min_score: of a box that is reported.
    """

    def __init__(
        self,
        in_channels: int,
        channels: int,
        groups: Sequence[ClassGroup],
        grid: BevGrid,
        *,
        num_boxes: int = 500,
        min_score: float = 0.1,
    ) -> None:
        super().__init__()
        self.groups = tuple(groups)
        self.grid = grid
        self.num_boxes = num_boxes
        self.min_score = min_score
        self.shared = _convolution(in_channels, channels)
        self.branches = nn.ModuleList(
            nn.ModuleDict(
                {
                    name: nn.Sequential(
                        _convolution(channels, channels), nn.Conv2d(channels, out, 3, padding=1)
                    )
                    for name, out in {"heat": len(group.labels), **REGRESSED}.items()
                }
            )
            for group in groups
        )
        for branches in self.branches:
            last = branches["heat"][-1]  # type: ignore[index]
            nn.init.constant_(last.bias, -math.log(1 / INITIAL_HEAT - 1))

    def forward(self, bev: Tensor) -> list[dict[str, Tensor]]:
        """Maps by name, [B, channels, Y, X], for every group; ``heat`` in logits."""
        shared = self.shared(bev)
        return [
            {name: branch(shared).float() for name, branch in branches.items()}  # type: ignore[operator]
            for branches in self.branches
        ]

    def losses(
        self, maps: Sequence[Mapping[str, Tensor]], boxes: Sequence[Tensor], labels: Sequence[Tensor]
    ) -> dict[str, Tensor]:
        """Focal loss of the heat maps and L1 of the boxes, summed over the groups.

        Args:
            boxes: [I, 9] per sample, in the frame of the bird's-eye view.
            labels: [I] per sample.
        """
        heat_loss, box_loss = [], []
        for group, found in zip(self.groups, maps, strict=True):
            targets = [self.encode(group, each, label) for each, label in zip(boxes, labels, strict=True)]
            heat = torch.stack([target.heat for target in targets])
            heat_loss.append(gaussian_focal_loss(found["heat"], heat))
            box_loss.append(self._box_loss(found, targets))
        return {
            "loss_heat": torch.stack(heat_loss).sum(),
            "loss_boxes": 0.25 * torch.stack(box_loss).sum(),
        }

    def encode(self, group: ClassGroup, boxes: Tensor, labels: Tensor) -> "GroupTargets":
        """What the maps of a group should be for the boxes of a sample."""
        side = self.grid.size
        heat = boxes.new_zeros(len(group.labels), side, side)
        column = (boxes[:, :2] + self.grid.extent) / self.grid.cell
        is_here = (column >= 0).all(1) & (column < side).all(1)
        is_here &= torch.isin(labels, labels.new_tensor(group.labels))
        boxes, labels, column = boxes[is_here], labels[is_here], column[is_here]
        cell = column.floor()
        for box, label, (x, y) in zip(boxes, labels.tolist(), cell.tolist(), strict=True):
            radius = max(
                MIN_RADIUS,
                int(gaussian_radius(float(box[3]) / self.grid.cell, float(box[4]) / self.grid.cell)),
            )
            channel = heat[group.labels.index(label)]
            draw_gaussian(channel, int(y), int(x), radius)
        regressed = {
            "offset": column - cell,
            "height": boxes[:, 2:3],
            "size": boxes[:, 3:6].log(),
            "heading": torch.stack((boxes[:, 6].sin(), boxes[:, 6].cos()), dim=1),
            "velocity": boxes[:, 7:9],
        }
        return GroupTargets(heat, (cell[:, 1] * side + cell[:, 0]).long(), regressed)

    def decode(self, maps: Sequence[Mapping[str, Tensor]]) -> list[Detections]:
        """The boxes of every sample, in the frame of the bird's-eye view."""
        num_samples = len(maps[0]["heat"])
        per_group = [
            [self._decode_group(group, found, sample) for group, found in zip(self.groups, maps, strict=True)]
            for sample in range(num_samples)
        ]
        return [_strongest(found, self.num_boxes) for found in per_group]

    def _decode_group(self, group: ClassGroup, maps: Mapping[str, Tensor], sample: int) -> Detections:
        heat = maps["heat"][sample].sigmoid()
        num_cells = heat[0].numel()
        scores, index = heat.flatten().topk(min(self.num_boxes, heat.numel()))
        index, scores = index[scores > self.min_score], scores[scores > self.min_score]
        cells = index % num_cells
        labels = torch.tensor(group.labels, device=heat.device)[index // num_cells]
        values = {name: maps[name][sample].flatten(1)[:, cells].T for name in REGRESSED}
        corner = torch.stack((cells % self.grid.size, cells // self.grid.size), dim=1)
        boxes = torch.cat(
            (
                self.grid.centre_of(corner + values["offset"]),
                values["height"],
                values["size"].clamp(-5, 5).exp(),
                torch.atan2(values["heading"][:, :1], values["heading"][:, 1:]),
                values["velocity"],
            ),
            dim=1,
        )
        radii = dict(zip(group.labels, group.radii, strict=True))
        kept = [
            circle_nms(boxes, scores, (labels == label).nonzero().flatten(), radius)
            for label, radius in radii.items()
        ]
        kept_index = torch.cat(kept)
        return Detections(boxes[kept_index], scores[kept_index], labels[kept_index])

    def _box_loss(self, maps: Mapping[str, Tensor], targets: Sequence["GroupTargets"]) -> Tensor:
        losses = []
        num_boxes = max(1, sum(len(target.cells) for target in targets))
        for name, weight in WEIGHTS.items():
            flat = maps[name].flatten(2)
            found = torch.cat([flat[sample][:, each.cells].T for sample, each in enumerate(targets)])
            wanted = torch.cat([each.regressed[name] for each in targets])
            is_known = wanted.isfinite()  # velocities may be missing
            difference = torch.where(is_known, found - wanted.nan_to_num(), 0.0)
            losses.append(weight * difference.abs().sum() / num_boxes)
        return torch.stack(losses).sum()


@dataclass(frozen=True)
class GroupTargets:
    """What the maps of a group should be.

    Attributes:
        heat: [K, Y, X] in [0, 1], 1 at a centre.
        cells: of the boxes, ``y · X + x``: [T].
        regressed: by the names of `REGRESSED`: [T, channels].
    """

    heat: Tensor
    cells: Tensor
    regressed: Mapping[str, Tensor]


def gaussian_focal_loss(logits: Tensor, target: Tensor) -> Tensor:
    """Penalty-reduced focal loss of heat maps (CornerNet, arXiv 1808.01244, equation 1)."""
    log_p, log_not_p = nn.functional.logsigmoid(logits), nn.functional.logsigmoid(-logits)
    p = logits.sigmoid()
    is_centre = target == 1
    at_centres = -((1 - p) ** 2) * log_p * is_centre
    elsewhere = -((1 - target) ** 4) * p**2 * log_not_p * ~is_centre
    return (at_centres.sum() + elsewhere.sum()) / is_centre.sum().clamp(min=1)


def gaussian_radius(length: float, width: float, overlap: float = MIN_OVERLAP) -> float:
    """How far a box may be off and still overlap its truth by `overlap`, in cells (CornerNet, 3.1).

    The smallest over the three cases: both corners moved the same way, both inwards, both outwards. (The
    released code of CornerNet and its heirs takes other roots of the same equations.)
    """
    total, area = length + width, length * width
    moved = total - math.sqrt(total**2 - 4 * area * (1 - overlap) / (1 + overlap))
    shrunk = total - math.sqrt(total**2 - 4 * area * (1 - overlap))
    grown = -total + math.sqrt(total**2 + 4 * area * (1 - overlap) / overlap)
    return min(moved / 2, shrunk / 4, grown / 4)


def draw_gaussian(heat_YX: Tensor, y: int, x: int, radius: int) -> None:
    """Raise a heat map, in place, to a bell around a cell."""
    sigma = (2 * radius + 1) / 6
    rows, columns = (
        torch.arange(max(0, centre - radius), min(size, centre + radius + 1), device=heat_YX.device)
        for centre, size in ((y, heat_YX.shape[0]), (x, heat_YX.shape[1]))
    )
    bell = (
        -((rows[:, None] - y) ** 2 + (columns[None, :] - x) ** 2).to(heat_YX.dtype) / (2 * sigma**2)
    ).exp()
    window = heat_YX[int(rows[0]) : int(rows[-1]) + 1, int(columns[0]) : int(columns[-1]) + 1]
    torch.maximum(window, bell, out=window)


def circle_nms(boxes: Tensor, scores: Tensor, index: Tensor, radius: float) -> Tensor:
    """Of the boxes with these numbers, those with no stronger one within `radius` metres."""
    order = index[scores[index].argsort(descending=True, stable=True)]
    centres = boxes[order, :2]
    is_close = (torch.cdist(centres, centres) < radius).cpu()
    is_kept = torch.ones(len(order), dtype=torch.bool)
    for strongest in range(len(order)):
        if is_kept[strongest]:
            is_kept[strongest + 1 :] &= ~is_close[strongest, strongest + 1 :]
    return order[is_kept.to(order.device)]


def _strongest(found: Sequence[Detections], limit: int) -> Detections:
    boxes, scores, labels = (
        torch.cat([getattr(each, name) for each in found]) for name in ("boxes", "scores", "labels")
    )
    order = scores.argsort(descending=True, stable=True)[:limit]
    return Detections(boxes[order], scores[order], labels[order])


def _convolution(in_channels: int, out_channels: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1, bias=False),
        nn.BatchNorm2d(out_channels),
        nn.ReLU(inplace=True),
    )
