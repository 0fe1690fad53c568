"""Instance segmentation: mask AP of a Mask R-CNN on data in COCO format."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sparsevit.backbone import SparseSwin
from sparsevit.data.sample import Transform
from sparsevit.data.split import DataSplit
from sparsevit.sparsity import SparsityVector
from sparsevit.tasks.mask_rcnn import MaskRCNNConfig, SparseMaskRCNN
from sparsevit.tasks.mask_rcnn.mmdet import MMDetMaskRCNN
from sparsevit.tasks.predictions import predictions_of, to_inputs
from sparsevit.tasks.protocol import Batch


class InstanceSegmentation:
    """The task of the COCO experiment: mask AP of a Mask R-CNN."""

    metric = "mask_ap"
    metrics = ("box_ap", "mask_ap")
    example = "predictions = model([image])  # [3, H, W] in [0, 1]; docs/instance-segmentation.md"
    class_layers = r"^roi_heads\..*(cls_score|bbox_pred|mask_fcn_logits)"
    foreign_formats = (MMDetMaskRCNN(),)
    chance = 0.01
    first_label = 1  # as torchvision counts: 0 is the background

    def __init__(self, config: MaskRCNNConfig) -> None:
        self.config = config

    @property
    def data(self) -> type[DataSplit]:
        # Imported here, so that a device that only runs the model does without pycocotools.
        from sparsevit.data.coco import CocoInstances

        return CocoInstances

    def training_transform(self) -> Transform:
        from sparsevit.data.augmentation import instance_augmentation

        return instance_augmentation(self.config.image_size, self.config.scale_range)

    def build_model(self, backbone: SparseSwin) -> SparseMaskRCNN:
        return SparseMaskRCNN(backbone, self.config)

    def backbone_of(self, model: nn.Module) -> SparseSwin:
        assert isinstance(model, SparseMaskRCNN)
        return model.backbone.body

    def losses(self, model: nn.Module, batch: Batch, sparsity: SparsityVector | None) -> dict[str, Tensor]:
        device = next(model.parameters()).device
        images = to_inputs(batch[0], device)
        targets = [
            {key: target[key].to(device).as_subclass(Tensor) for key in ("boxes", "labels", "masks")}
            for target in batch[1]
        ]
        losses: dict[str, Tensor] = model(images, targets, sparsity)
        return losses

    @torch.inference_mode()
    def evaluate(
        self,
        model: nn.Module,
        dataset: DataSplit,
        sparsity: SparsityVector | None,
        *,
        batch_size: int,
        device: torch.device,
        on_batch: Callable[[int], None] = lambda num_images: None,
    ) -> Mapping[str, float]:
        """Box and mask AP by pycocotools, and the mask AP of every class that occurs."""
        from sparsevit.data.coco import CocoInstances
        from sparsevit.data.coco_metrics import average_precision, to_results

        assert isinstance(dataset, CocoInstances)
        results: list[dict[str, Any]] = []
        threshold = self.config.mask_threshold
        for target, detections in predictions_of(
            model, dataset, sparsity, batch_size=batch_size, device=device, on_batch=on_batch
        ):
            results += to_results(
                detections, target["image_id"], dataset.category_ids, mask_threshold=threshold
            )
        box_ap, _ = average_precision(dataset.coco, results, dataset.sample_ids, "bbox")
        mask_ap, by_category = average_precision(dataset.coco, results, dataset.sample_ids, "segm")
        names = dict(zip(dataset.category_ids, dataset.class_names, strict=True))
        return {
            "box_ap": box_ap,
            "mask_ap": mask_ap,
            **{f"mask_ap/{names[category]}": value for category, value in by_category.items()},
        }

    def inputs(self, dataset: DataSplit, indices: Sequence[int]) -> tuple[list[Tensor]]:
        return (to_inputs([dataset[index][0] for index in indices], torch.device("cpu")),)

    @torch.inference_mode()
    def draw(
        self, model: nn.Module, dataset: DataSplit, index: int, sparsity: SparsityVector | None
    ) -> Mapping[str, Tensor]:
        from sparsevit.tasks.drawing import draw_instances

        image, target = dataset[index]
        (found,) = model(to_inputs([image], next(model.parameters()).device), sparsity=sparsity)
        is_sure = found["scores"] > 0.5
        boxes, labels, masks = (found[key][is_sure].cpu() for key in ("boxes", "labels", "masks"))
        names = dataset.class_names
        return {
            "ground truth": draw_instances(image, target["boxes"], target["labels"], target["masks"], names),
            "prediction": draw_instances(
                image, boxes, labels, masks[:, 0] >= self.config.mask_threshold, names
            ),
        }
