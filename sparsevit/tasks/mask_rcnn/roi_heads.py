"""From proposals to detections: pooling at fixed strides, boxes, masks.

Legend: R regions of all images of a batch; I detections of one; K classes; S cells of a pooled side.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.detection.roi_heads import RoIHeads, fastrcnn_loss, maskrcnn_inference
from torchvision.ops import batched_nms, clip_boxes_to_image, roi_align

FINEST_REGION = 56
"""Side of a region, in pixels, from which on the second level of the pyramid is pooled (FPN, equation 1)."""


class PyramidPool(nn.Module):
    """RoIAlign from the level of the pyramid that fits a region's size (arXiv 1612.03144, equation 1).

    The strides are given. torchvision's pooler infers them from the first image that it sees, unpadded, and
    keeps them: after a photo of 3:2 on a square input it is off by a factor of two for good.

    Args:
        strides: pixels per cell, one per level.
        output_size: cells per side.
        sampling_ratio: samples per cell and axis, 0 for as many as it covers.
        aligned: whether the centre of a pixel is half a pixel from its corner.
    """

    def __init__(
        self, strides: Sequence[int], output_size: int, *, sampling_ratio: int, aligned: bool
    ) -> None:
        super().__init__()
        self.strides = tuple(strides)
        self.output_size = (output_size, output_size)
        self.sampling_ratio = sampling_ratio
        self.aligned = aligned

    def forward(
        self, features: Mapping[str, Tensor], boxes: list[Tensor], image_shapes: Sequence[tuple[int, int]]
    ) -> Tensor:
        """Pool [R, C, S, S].

        Args:
            features: [B, C, h, w] by level, finest first; those beyond the strides are not pooled.
            boxes: [I, 4] of every image, in pixels of the input.
            image_shapes: not used; torchvision's heads give it.
        """
        maps = list(features.values())[: len(self.strides)]
        regions = torch.cat(boxes)
        images = torch.cat([each.new_full((len(each), 1), index) for index, each in enumerate(boxes)])
        regions = torch.cat((images, regions), dim=1)
        levels = self.levels(regions[:, 1:])
        pooled = maps[0].new_zeros(len(regions), maps[0].shape[1], *self.output_size)
        for level, (feature, stride) in enumerate(zip(maps, self.strides, strict=True)):
            chosen = torch.where(levels == level)[0]
            pooled[chosen] = roi_align(
                feature, regions[chosen].to(feature.dtype), self.output_size, 1 / stride,
                self.sampling_ratio, self.aligned,
            )  # fmt: skip
        return pooled

    def levels(self, boxes: Tensor) -> Tensor:
        """The level that each of [R, 4] is pooled from."""
        side = ((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])).sqrt()
        level = torch.floor(torch.log2(side / FINEST_REGION + 1e-6))
        return level.clamp(0, len(self.strides) - 1).long()


class DetectionHeads(RoIHeads):
    """torchvision's heads for boxes and masks; regions of masks are cut from the truth as features are.

    In evaluation a detection of any size counts, and masks stay as the network gives them.
    """

    def forward(
        self,
        features: dict[str, Tensor],
        proposals: list[Tensor],
        image_shapes: list[tuple[int, int]],
        targets: list[dict[str, Tensor]] | None = None,
    ) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
        """Detections of every image in evaluation, losses by name in training.

        Returns:
            ``boxes`` [I, 4], ``scores`` [I], ``labels`` [I] from 1 and ``masks`` [I, 1, 28, 28] of every
            image, in pixels of the input; losses.
        """
        if self.training:
            return [], self._losses(features, proposals, image_shapes, targets)
        logits, offsets = self._predict(features, proposals, image_shapes)
        boxes, scores, labels = self.postprocess_detections(logits, offsets, proposals, image_shapes)
        mask_logits = self.mask_predictor(self.mask_head(self.mask_roi_pool(features, boxes, image_shapes)))
        masks = maskrcnn_inference(mask_logits.float(), labels)
        columns = zip(boxes, scores, labels, masks, strict=True)
        names = ("boxes", "scores", "labels", "masks")
        return [dict(zip(names, values, strict=True)) for values in columns], {}

    def postprocess_detections(
        self,
        class_logits: Tensor,
        box_regression: Tensor,
        proposals: list[Tensor],
        image_shapes: list[tuple[int, int]],
    ) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """The strongest boxes of every image above the threshold, after NMS in each class."""
        counts = [len(each) for each in proposals]
        decoded = self.box_coder.decode(box_regression, proposals)
        boxes_RK4 = decoded.reshape(*class_logits.shape, 4)[:, 1:]  # without a proposal it comes flat
        scores_RK = class_logits.softmax(-1)[:, 1:]
        found: tuple[list[Tensor], ...] = [], [], []
        for boxes, scores, shape in zip(
            torch.split(boxes_RK4, counts), torch.split(scores_RK, counts), image_shapes, strict=True
        ):
            region, label = torch.where(scores > self.score_thresh)
            candidates = clip_boxes_to_image(boxes, shape)[region, label]
            confidence = scores[region, label]
            kept = batched_nms(candidates, confidence, label, self.nms_thresh)[: self.detections_per_img]
            for values, each in zip(found, (candidates, confidence, label + 1), strict=True):
                values.append(each[kept])
        return found  # type: ignore[return-value]

    def _predict(
        self, features: dict[str, Tensor], proposals: list[Tensor], image_shapes: list[tuple[int, int]]
    ) -> tuple[Tensor, Tensor]:
        pooled = self.box_roi_pool(features, proposals, image_shapes)
        logits, offsets = self.box_predictor(self.box_head(pooled))
        return logits, offsets

    def _losses(
        self,
        features: dict[str, Tensor],
        proposals: list[Tensor],
        image_shapes: list[tuple[int, int]],
        targets: list[dict[str, Tensor]] | None,
    ) -> dict[str, Tensor]:
        assert targets is not None
        proposals, matched, labels, offsets = self.select_training_samples(proposals, targets)
        class_loss, box_loss = fastrcnn_loss(
            *self._predict(features, proposals, image_shapes), labels, offsets
        )
        is_object = [label > 0 for label in labels]
        regions = [each[chosen] for each, chosen in zip(proposals, is_object, strict=True)]
        mask_logits = self.mask_predictor(self.mask_head(self.mask_roi_pool(features, regions, image_shapes)))
        classes = torch.cat([label[chosen] for label, chosen in zip(labels, is_object, strict=True)])
        truths = torch.cat(
            [
                self._cut(target["masks"], region, index[chosen], mask_logits.shape[-1])
                for target, region, index, chosen in zip(targets, regions, matched, is_object, strict=True)
            ]
        )
        own_logits = mask_logits[torch.arange(len(classes), device=classes.device), classes]
        mask_loss = (
            F.binary_cross_entropy_with_logits(own_logits.float(), truths)
            if len(classes)
            else mask_logits.sum() * 0
        )
        return {"loss_classifier": class_loss, "loss_box_reg": box_loss, "loss_mask": mask_loss}

    def _cut(self, masks: Tensor, regions: Tensor, index: Tensor, side: int) -> Tensor:
        """The part of the matched mask in every region, [R, side, side]."""
        boxes = torch.cat((index[:, None].to(regions), regions), dim=1)
        cut: Tensor = roi_align(
            masks[:, None].to(regions), boxes, (side, side), aligned=self.mask_roi_pool.aligned
        )[:, 0]
        return cut
