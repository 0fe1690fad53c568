"""BEVDet (arXiv 2112.11790) on a sparse Swin: six cameras, one bird's-eye view, boxes in 3D.

The sparsity vector is an argument of `forward`, never state. Every camera image is pruned on its own.

Legend: B samples; N cameras; H, W size of a photo, h, w of what the backbone gets.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.resnet import BasicBlock

from sparsevit.backbone import SparseSwin
from sparsevit.checkpoints.foreign import Refused, Renamed
from sparsevit.data.sample import IMAGE_MEAN, IMAGE_STD
from sparsevit.sparsity import SparsityVector
from sparsevit.tasks.center_head import CenterHead, ClassGroup, Detections
from sparsevit.tasks.lift_splat import BevGrid, Cameras, LiftSplat

CLASS_GROUPS = (
    ClassGroup(labels=(0,), radii=(4.0,)),  # car
    ClassGroup(labels=(1, 2), radii=(12.0, 12.0)),  # truck, construction vehicle
    ClassGroup(labels=(3, 4), radii=(10.0, 10.0)),  # bus, trailer
    ClassGroup(labels=(5,), radii=(1.0,)),  # barrier
    ClassGroup(labels=(6, 7), radii=(0.85, 0.85)),  # motorcycle, bicycle
    ClassGroup(labels=(8, 9), radii=(0.175, 0.175)),  # pedestrian, traffic cone
)
"""The task groups of nuScenes, with CenterPoint's radii."""


_MAP_NAMES = {
    "reg": "offset", "height": "height", "dim": "size", "rot": "heading", "vel": "velocity",
    "heatmap": "heat",
}  # fmt: skip
_PUBLIC_NAMES = (
    (r"^img_neck\.conv\.", "neck.merge."),
    (r"^img_view_transformer\.depth_net\.", "view.projection."),
    (r"^img_bev_encoder_backbone\.layers\.", "encoder.stages."),
    (r"^img_bev_encoder_neck\.conv\.", "encoder.neck.merge."),
    (r"^img_bev_encoder_neck\.up2\.1\.", "encoder.neck.refine.0."),
    (r"^img_bev_encoder_neck\.up2\.2\.", "encoder.neck.refine.1."),
    (r"^img_bev_encoder_neck\.up2\.4\.", "encoder.neck.refine.3."),
    (r"^pts_bbox_head\.shared_conv\.conv\.", "head.shared.0."),
    (r"^pts_bbox_head\.shared_conv\.bn\.", "head.shared.1."),
    *(
        (rf"^pts_bbox_head\.task_heads\.(\d+)\.{theirs}\.{inner}", rf"head.branches.\1.{ours}.{ours_inner}")
        for theirs, ours in _MAP_NAMES.items()
        for inner, ours_inner in ((r"0\.conv\.", "0.0."), (r"0\.bn\.", "0.1."), (r"1\.", "1."))
    ),
)
"""Where BEVDet's public code (mmdet3d) keeps our tensors; its Swin is found by itself (``img_backbone``)."""
FOREIGN_FORMATS = (
    Refused(
        "BEVDet of version 1",
        (r"^img_view_transformer\.(dx|bx|nx)$", r"^img_view_transformer\.depthnet\."),
        "its bird's-eye view is in the frame of the lidar, with other conventions for sizes and headings, so "
        "that its boxes would be wrong here. A checkpoint of version 2 or later (depth_net) loads whole; "
        "init_heads=random takes the backbone of this one",
    ),
    Renamed("BEVDet", _PUBLIC_NAMES),
)
"""BEVDet's public code: from version 2 on, frame, sizes (length, width, height) and headings are as here."""


@dataclass(frozen=True)
class BEVDetConfig:
    """Widths and geometry. The defaults are those of BEVDet-Tiny.

    Attributes:
        input_size: height and width that the backbone gets of every camera.
        depth_range: nearest and farthest depth, and step, metres.
        extent: of the bird's-eye view in each direction, metres.
        cell: of the bird's-eye view, metres.
        resize_range: in training, added to the factor that fits the photo's width.
        rotation: in training, of the photos, degrees either way.
        flips: whether photos and the bird's-eye view are mirrored at random in training.
        bev_rotation: in training, of the bird's-eye view, degrees either way.
        bev_scale_range: in training.
    """

    num_classes: int = 10
    input_size: tuple[int, int] = (256, 704)
    neck_channels: int = 512
    view_channels: int = 64
    bev_channels: int = 256
    head_channels: int = 64
    depth_range: tuple[float, float, float] = (1.0, 60.0, 1.0)
    extent: float = 51.2
    cell: float = 0.8
    resize_range: tuple[float, float] = (-0.06, 0.11)
    rotation: float = 5.4
    flips: bool = True
    bev_rotation: float = 22.5
    bev_scale_range: tuple[float, float] = (0.95, 1.05)
    min_score: float = 0.1


class FpnLss(nn.Module):
    """The neck of Lift-Splat: a coarse map, resized, beside a fine one (arXiv 2008.05711, section 4).

    Args:
        upsample: of what comes out, times; 1 for none.
    """

    def __init__(
        self, fine_channels: int, coarse_channels: int, out_channels: int, upsample: int = 1
    ) -> None:
        super().__init__()
        middle = out_channels * 2 if upsample > 1 else out_channels
        self.upsample = upsample
        self.merge = nn.Sequential(
            *_conv_norm_relu(fine_channels + coarse_channels, middle), *_conv_norm_relu(middle, middle)
        )
        self.refine = (
            nn.Sequential(*_conv_norm_relu(middle, out_channels), nn.Conv2d(out_channels, out_channels, 1))
            if upsample > 1
            else nn.Identity()
        )

    def forward(self, fine: Tensor, coarse: Tensor) -> Tensor:
        coarse = F.interpolate(coarse, fine.shape[-2:], mode="bilinear", align_corners=True)
        merged: Tensor = self.merge(torch.cat((fine, coarse), dim=1))
        if self.upsample > 1:
            merged = F.interpolate(merged, scale_factor=self.upsample, mode="bilinear", align_corners=True)
        refined: Tensor = self.refine(merged)
        return refined


class BevEncoder(nn.Module):
    """Residual blocks at halves, quarters and eighths of the grid, joined at its full size."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        widths = [2 * in_channels, 4 * in_channels, 8 * in_channels]
        self.stages = nn.ModuleList(
            nn.Sequential(
                BasicBlock(
                    before, after, stride=2, downsample=nn.Conv2d(before, after, 3, stride=2, padding=1)
                ),
                BasicBlock(after, after),
            )
            for before, after in zip([in_channels, *widths], widths, strict=False)
        )
        self.neck = FpnLss(widths[0], widths[2], out_channels, upsample=2)

    def forward(self, bev: Tensor) -> Tensor:
        features = []
        for stage in self.stages:
            bev = stage(bev)
            features.append(bev)
        merged: Tensor = self.neck(features[0], features[2])
        return merged


class SparseBEVDet(nn.Module):
    """Monocular 3D detection by six cameras in a common bird's-eye view."""

    def __init__(self, backbone: SparseSwin, config: BEVDetConfig) -> None:
        super().__init__()
        self.config = config
        grid = BevGrid(config.extent, config.cell)
        fine, coarse = backbone.num_channels[-2:]
        self.backbone = backbone
        self.neck = FpnLss(fine, coarse, config.neck_channels)
        self.view = LiftSplat(
            config.neck_channels, config.view_channels, backbone.strides[-2], grid, config.depth_range
        )
        self.encoder = BevEncoder(config.view_channels, config.bev_channels)
        self.head = CenterHead(
            config.bev_channels, config.head_channels, CLASS_GROUPS, grid, min_score=config.min_score
        )

    def forward(
        self,
        images: list[Tensor],
        cameras: Sequence[Mapping[str, Tensor]],
        targets: Sequence[Mapping[str, Any]] | None = None,
        sparsity: SparsityVector | None = None,
    ) -> dict[str, Tensor] | list[Detections]:
        """Losses by name in training mode, the detections of every sample otherwise.

        Args:
            images: the inputs of all cameras of a sample, [N, 3, h, w] in [0, 1].
            cameras: per sample, the fields of `Cameras` without their first axis.
            targets: per sample, ``boxes`` [I, 9] in the frame of the bird's-eye view and ``labels`` [I];
                needed in training.
            sparsity: for the backbone; dense if None.
        """
        fields = {
            name: torch.stack([each[name] for each in cameras]).to(images[0].device)
            for name in Cameras._fields
        }
        batch = torch.cat(images)
        mean, std = (batch.new_tensor(values).view(3, 1, 1) for values in (IMAGE_MEAN, IMAGE_STD))
        fine, coarse = self.backbone((batch - mean) / std, sparsity)[-2:]
        features = self.neck(fine.contiguous(), coarse.contiguous())
        with torch.autocast(batch.device.type, enabled=False):  # metres do not bear bfloat16
            bev = self.view(features.float(), Cameras(**fields))
        maps = self.head(self.encoder(bev))
        if self.training:
            assert targets is not None
            boxes, labels = ([target[key] for target in targets] for key in ("boxes", "labels"))
            return self.head.losses(maps, boxes, labels)
        return self.head.decode(maps)


def _conv_norm_relu(in_channels: int, out_channels: int) -> tuple[nn.Module, ...]:
    return (
        nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False),
        nn.BatchNorm2d(out_channels),
        nn.ReLU(inplace=True),
    )
