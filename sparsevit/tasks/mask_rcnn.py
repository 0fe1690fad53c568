"""torchvision's Mask R-CNN with a feature pyramid on a sparse Swin (arXiv 1703.06870).

The sparsity vector is an argument of `forward`, never state.
"""

from collections import OrderedDict
from dataclasses import dataclass
from typing import Any, cast

from torch import Tensor, nn
from torchvision.models.detection import MaskRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.rpn import RPNHead
from torchvision.ops import FeaturePyramidNetwork, MultiScaleRoIAlign
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from sparsevit.backbone import SparseSwin
from sparsevit.data.sample import IMAGE_MEAN, IMAGE_STD
from sparsevit.sparsity import SparsityVector


@dataclass(frozen=True)
class MaskRCNNConfig:
    """Widths and sampling of the detector. The defaults are those of the paper's recipe.

    Attributes:
        image_size: side of the square that every image is resized to fit and padded to.
        scale_range: of the random resize in training, relative to that square.
    """

    num_classes: int
    image_size: int = 672
    scale_range: tuple[float, float] = (0.5, 1.5)
    fpn_channels: int = 256
    box_channels: int = 1024
    mask_channels: int = 256
    smallest_anchor: int = 32
    num_proposals: int = 1000
    num_rois_per_image: int = 512
    num_detections: int = 100


class SparsePyramid(nn.Module):
    """Backbone and feature pyramid, as torchvision's detectors want them.

    The maps are float32 under autocast too: anchors and boxes take their type from them, and in
    bfloat16 a coordinate beyond 128 is only good to a pixel.
    """

    def __init__(self, body: SparseSwin, out_channels: int) -> None:
        super().__init__()
        self.body = body
        self.fpn = FeaturePyramidNetwork(
            list(body.num_channels), out_channels, extra_blocks=LastLevelMaxPool()
        )
        self.out_channels = out_channels

    def forward(self, images: Tensor, sparsity: SparsityVector | None = None) -> dict[str, Tensor]:
        features = self.body(images, sparsity)
        pyramid: dict[str, Tensor] = self.fpn(
            OrderedDict((str(level), feature.contiguous()) for level, feature in enumerate(features))
        )
        return {level: feature.float() for level, feature in pyramid.items()}


class SparseMaskRCNN(MaskRCNN):
    """torchvision's Mask R-CNN whose `forward` takes a sparsity vector."""

    def __init__(self, backbone: SparseSwin, config: MaskRCNNConfig) -> None:
        levels = [str(level) for level in range(len(backbone.num_channels))]
        sizes = tuple((config.smallest_anchor * 2**level,) for level in range(len(levels) + 1))
        anchors = AnchorGenerator(sizes, ((0.5, 1.0, 2.0),) * len(sizes))
        super().__init__(
            SparsePyramid(backbone, config.fpn_channels),
            min_size=config.image_size,
            max_size=config.image_size,
            size_divisible=config.image_size,
            image_mean=list(IMAGE_MEAN),
            image_std=list(IMAGE_STD),
            rpn_anchor_generator=anchors,
            rpn_head=_ProposalHead(config.fpn_channels, anchors.num_anchors_per_location()[0]),
            rpn_pre_nms_top_n_train=2 * config.num_proposals,
            rpn_pre_nms_top_n_test=config.num_proposals,
            rpn_post_nms_top_n_train=config.num_proposals,
            rpn_post_nms_top_n_test=config.num_proposals,
            rpn_batch_size_per_image=256,
            box_roi_pool=MultiScaleRoIAlign(levels, output_size=7, sampling_ratio=2),
            box_head=TwoMLPHead(config.fpn_channels * 49, config.box_channels),
            box_predictor=_BoxPredictor(config.box_channels, config.num_classes + 1),
            box_batch_size_per_image=config.num_rois_per_image,
            box_detections_per_img=config.num_detections,
            mask_roi_pool=MultiScaleRoIAlign(levels, output_size=14, sampling_ratio=2),
            mask_head=MaskRCNNHeads(config.fpn_channels, (config.mask_channels,) * 4, 1),
            mask_predictor=MaskRCNNPredictor(
                config.mask_channels, config.mask_channels, config.num_classes + 1
            ),
        )

    def forward(
        self,
        images: list[Tensor],
        targets: list[dict[str, Tensor]] | None = None,
        sparsity: SparsityVector | None = None,
    ) -> Any:
        """Losses by name in training mode, one dict of detections per image otherwise.

        Args:
            images: [3, H, W] each, in [0, 1].
            targets: as torchvision's Mask R-CNN takes them; needed in training.
            sparsity: for the backbone; dense if None.
        """
        original_sizes = [(int(image.shape[-2]), int(image.shape[-1])) for image in images]
        batch, targets = cast(
            tuple[ImageList, list[dict[str, Tensor]] | None], self.transform(images, targets)
        )
        features = self.backbone(batch.tensors, sparsity)
        proposals, proposal_losses = self.rpn(batch, features, targets)
        detections, detector_losses = self.roi_heads(features, proposals, batch.image_sizes, targets)
        if self.training:
            return {**detector_losses, **proposal_losses}
        return self.transform.postprocess(detections, batch.image_sizes, original_sizes)


class _ProposalHead(RPNHead):
    """torchvision's, with float32 offsets under autocast."""

    def forward(self, x: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        logits, offsets = super().forward(x)
        return [logit.float() for logit in logits], [offset.float() for offset in offsets]


class _BoxPredictor(FastRCNNPredictor):
    """torchvision's, with float32 offsets under autocast."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        logits, offsets = super().forward(x)
        return logits.float(), offsets.float()
