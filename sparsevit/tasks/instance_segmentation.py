"""Instance segmentation: mask AP of a Mask R-CNN on data in COCO format."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from sparsevit.backbone import SparseSwin
from sparsevit.data.sample import collate
from sparsevit.sparsity import SparsityVector
from sparsevit.tasks.mask_rcnn import MaskRCNNConfig, SparseMaskRCNN, SparsePyramid
from sparsevit.tasks.protocol import Batch


class InstanceSegmentation:
    """The task of the COCO experiment: mask AP of a Mask R-CNN."""

    metric = "mask_ap"
    metrics = ("box_ap", "mask_ap")
    class_layers = r"cls_score|bbox_pred|mask_fcn_logits"

    def __init__(self, config: MaskRCNNConfig) -> None:
        self.config = config

    def build_model(self, backbone: SparseSwin) -> SparseMaskRCNN:
        return SparseMaskRCNN(backbone, self.config)

    def backbone_of(self, model: nn.Module) -> SparseSwin:
        assert isinstance(model, SparseMaskRCNN)
        pyramid = model.backbone
        assert isinstance(pyramid, SparsePyramid)
        return pyramid.body

    def losses(self, model: nn.Module, batch: Batch, sparsity: SparsityVector | None) -> dict[str, Tensor]:
        device = next(model.parameters()).device
        images = [image.to(device).as_subclass(Tensor) / 255 for image in batch[0]]
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
        dataset: Dataset[Any],
        sparsity: SparsityVector | None,
        *,
        batch_size: int,
        device: torch.device,
        on_batch: Callable[[int], None] = lambda num_images: None,
    ) -> Mapping[str, float]:
        """Box and mask AP by pycocotools, over the images of `dataset`."""
        # Imported here, so that a device that only runs the model does without pycocotools.
        from sparsevit.data.coco import CocoInstances
        from sparsevit.data.coco_metrics import average_precision, to_results

        assert isinstance(dataset, CocoInstances)
        was_training = model.training
        model.eval()
        results: list[dict[str, Any]] = []
        for images, targets in DataLoader(dataset, batch_size, collate_fn=collate):
            inputs = [image.to(device).as_subclass(Tensor) / 255 for image in images]
            for target, detections in zip(targets, model(inputs, sparsity=sparsity), strict=True):
                results += to_results(detections, target["image_id"], dataset.category_ids)
            on_batch(len(images))
        model.train(was_training)
        return {
            "box_ap": average_precision(dataset.coco, results, dataset.image_ids, "bbox"),
            "mask_ap": average_precision(dataset.coco, results, dataset.image_ids, "segm"),
        }
