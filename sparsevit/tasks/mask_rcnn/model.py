"""Mask R-CNN with a feature pyramid on a sparse Swin (arXiv 1703.06870), from torchvision's parts.

The sparsity vector is an argument of `forward`, never state.

Legend: I detections; H, W size of a photo.
"""

from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torchvision.models.detection._utils import BoxCoder
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from sparsevit.backbone import SparseSwin
from sparsevit.sparsity import SparsityVector
from sparsevit.tasks.mask_rcnn.anchors import StridedAnchors
from sparsevit.tasks.mask_rcnn.config import MaskRCNNConfig
from sparsevit.tasks.mask_rcnn.pasting import paste_masks
from sparsevit.tasks.mask_rcnn.photos import resize_photo, to_input
from sparsevit.tasks.mask_rcnn.roi_heads import DetectionHeads, PyramidPool


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


class SparseMaskRCNN(nn.Module):
    """Instance segmentation: boxes, and a mask in each."""

    def __init__(self, backbone: SparseSwin, config: MaskRCNNConfig) -> None:
        super().__init__()
        self.config = config
        self.backbone = SparsePyramid(backbone, config.fpn_channels)
        self.rpn = _proposal_network(len(backbone.num_channels) + 1, config)
        self.roi_heads = _detection_heads(len(backbone.num_channels), config)

    def forward(
        self,
        images: list[Tensor],
        targets: list[dict[str, Tensor]] | None = None,
        sparsity: SparsityVector | None = None,
    ) -> dict[str, Tensor] | list[dict[str, Tensor]]:
        """Losses by name in training mode, the detections of every image otherwise.

        In training the images are inputs already, of whatever size the augmentation gave them; otherwise each
        is resized as `config.photo_input` says.

        Args:
            images: [3, H, W] each, RGB in [0, 1].
            targets: ``boxes`` [I, 4], ``labels`` [I] from 1 and ``masks`` [I, H, W] of every image; needed in
                training.
            sparsity: for the backbone; dense if None.

        Returns:
            Of every image, strongest first: ``boxes`` [I, 4] (x1, y1, x2, y2 in its pixels), ``scores`` [I],
            ``labels`` [I] from 1 and ``masks`` [I, 1, H, W], probabilities.
        """
        if self.training:
            return self._losses(images, targets, sparsity)
        photos = [resize_photo(image, self.config.photo_input) for image in images]
        return self.detect(photos, [(image.shape[-2], image.shape[-1]) for image in images], sparsity)

    def detect(
        self,
        photos: Sequence[Tensor],
        sizes: Sequence[tuple[int, int]],
        sparsity: SparsityVector | None = None,
    ) -> list[dict[str, Tensor]]:
        """Detections in photos that are resized already, in the pixels of the photos' own `sizes`.

        Photos that are padded to the same size go together, so that none depends on the others.
        """
        padded = [self.config.photo_input.padded(photo.shape[-2], photo.shape[-1]) for photo in photos]
        found: dict[int, dict[str, Tensor]] = {}
        for size in dict.fromkeys(padded):
            members = [index for index, each in enumerate(padded) if each == size]
            batch = to_input([photos[index] for index in members], self.config.photo_input)
            features = self.backbone(batch.tensors, sparsity)
            proposals, _ = self.rpn(batch, features)
            detections, _ = self.roi_heads(features, proposals, batch.image_sizes)
            for index, detected, resized in zip(members, detections, batch.image_sizes, strict=True):
                found[index] = self._on_photo(detected, resized, sizes[index])
        return [found[index] for index in range(len(photos))]

    def _on_photo(
        self, detected: dict[str, Tensor], resized: tuple[int, int], size: tuple[int, int]
    ) -> dict[str, Tensor]:
        scale_y, scale_x = (whole / part for whole, part in zip(size, resized, strict=True))
        boxes = detected["boxes"] * detected["boxes"].new_tensor((scale_x, scale_y, scale_x, scale_y))
        masks = paste_masks(detected["masks"], boxes, size, self.config.conventions.mask_pasting)
        return detected | {"boxes": boxes, "masks": masks}

    def _losses(
        self,
        images: list[Tensor],
        targets: list[dict[str, Tensor]] | None,
        sparsity: SparsityVector | None,
    ) -> dict[str, Tensor]:
        assert targets is not None
        batch = to_input(images, self.config.photo_input)
        features = self.backbone(batch.tensors, sparsity)
        proposals, proposal_losses = self.rpn(batch, features, targets)
        _, detector_losses = self.roi_heads(features, proposals, batch.image_sizes, targets)
        return {**detector_losses, **proposal_losses}


class _ProposalHead(RPNHead):
    """torchvision's, with float32 offsets under autocast."""

    def forward(self, x: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        logits, offsets = super().forward(x)
        return [logit.float() for logit in logits], [offset.float() for offset in offsets]


class _BoxPredictor(FastRCNNPredictor):
    """torchvision's, with float32 offsets under autocast.

    No loss reaches the offsets of the background: they are 0 and stay so, as in a checkpoint of mmdet's,
    which has none.
    """

    def __init__(self, in_channels: int, num_classes: int) -> None:
        super().__init__(in_channels, num_classes + 1)
        with torch.no_grad():
            self.bbox_pred.weight[:4] = 0
            self.bbox_pred.bias[:4] = 0

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        logits, offsets = super().forward(x)
        return logits.float(), offsets.float()


class _MaskPredictor(MaskRCNNPredictor):
    """torchvision's, whose mask of the background is 0 as well."""

    def __init__(self, in_channels: int, channels: int, num_classes: int) -> None:
        super().__init__(in_channels, channels, num_classes + 1)
        with torch.no_grad():
            self.mask_fcn_logits.weight[0] = 0
            self.mask_fcn_logits.bias[0] = 0


def _proposal_network(num_levels: int, config: MaskRCNNConfig) -> RegionProposalNetwork:
    conventions = config.conventions
    if len(conventions.anchor_strides) != num_levels:
        raise ValueError(
            f"anchor_strides must be one per level of the pyramid, {num_levels}, got "
            f"{list(conventions.anchor_strides)}"
        )
    sides = tuple(config.smallest_anchor * 2**level for level in range(num_levels))
    anchors = StridedAnchors(sides, conventions)
    per_level = config.num_proposals_per_level or config.num_proposals
    network = RegionProposalNetwork(
        anchors,
        _ProposalHead(config.fpn_channels, len(conventions.anchor_ratios)),
        fg_iou_thresh=0.7,
        bg_iou_thresh=0.3,
        batch_size_per_image=256,
        positive_fraction=0.5,
        pre_nms_top_n={"training": 2 * per_level, "testing": per_level},
        post_nms_top_n={"training": config.num_proposals, "testing": config.num_proposals},
        nms_thresh=config.proposal_overlap,
    )
    network.box_coder = BoxCoder(conventions.proposal_weights)
    network.min_size = torch.finfo(torch.float32).tiny  # a proposal of any size counts, but of none at all
    return network


def _detection_heads(num_levels: int, config: MaskRCNNConfig) -> DetectionHeads:
    conventions = config.conventions
    box_pool, mask_pool = (
        PyramidPool(
            conventions.anchor_strides[:num_levels],
            output_size,
            sampling_ratio=conventions.roi_sampling_ratio,
            aligned=conventions.roi_aligned,
        )
        for output_size in (7, 14)
    )
    return DetectionHeads(
        box_pool,
        TwoMLPHead(config.fpn_channels * 49, config.box_channels),
        _BoxPredictor(config.box_channels, config.num_classes),
        fg_iou_thresh=0.5,
        bg_iou_thresh=0.5,
        batch_size_per_image=config.num_rois_per_image,
        positive_fraction=0.25,
        bbox_reg_weights=conventions.box_weights,
        score_thresh=config.score_threshold,
        nms_thresh=config.detection_overlap,
        detections_per_img=config.num_detections,
        mask_roi_pool=mask_pool,
        mask_head=MaskRCNNHeads(config.fpn_channels, (config.mask_channels,) * 4, 1),
        mask_predictor=_MaskPredictor(config.mask_channels, config.mask_channels, config.num_classes),
    )
