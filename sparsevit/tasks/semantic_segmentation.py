"""Semantic segmentation: mean IoU of a Mask2Former on data in the layout of Cityscapes."""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from sparsevit.backbone import SparseSwin
from sparsevit.data.sample import Transform
from sparsevit.data.split import DataSplit
from sparsevit.sparsity import SparsityVector
from sparsevit.tasks.mask2former import FOREIGN_FORMATS, Mask2FormerConfig, SparseMask2Former
from sparsevit.tasks.predictions import predictions_of, to_inputs
from sparsevit.tasks.protocol import Batch


class SemanticSegmentation:
    """The task of the Cityscapes experiment: mean IoU of a Mask2Former."""

    metric = "miou"
    metrics = ("miou",)
    example = "label_maps = model([image])  # [3, H, W] in [0, 1]; docs/cityscapes.md"
    class_layers = r"^(class_predictor|criterion)\."
    foreign_formats = FOREIGN_FORMATS
    first_label = 0

    def __init__(self, config: Mask2FormerConfig) -> None:
        self.config = config

    @property
    def chance(self) -> float:
        """More than what naming one class everywhere gives: the share of its pixels, over all classes."""
        return 1 / self.config.num_classes

    @property
    def data(self) -> type[DataSplit]:
        from sparsevit.data.cityscapes import CityscapesFrames

        return CityscapesFrames

    def training_transform(self) -> Transform:
        from sparsevit.data.augmentation import segmentation_augmentation

        return segmentation_augmentation(self.config.crop_size, self.config.scale_range)

    def build_model(self, backbone: SparseSwin) -> SparseMask2Former:
        return SparseMask2Former(backbone, self.config)

    def backbone_of(self, model: nn.Module) -> SparseSwin:
        assert isinstance(model, SparseMask2Former)
        return model.backbone

    def losses(self, model: nn.Module, batch: Batch, sparsity: SparsityVector | None) -> dict[str, Tensor]:
        device = next(model.parameters()).device
        labels = [target["labels"].to(device).as_subclass(Tensor) for target in batch[1]]
        losses: dict[str, Tensor] = model(to_inputs(batch[0], device), labels, sparsity)
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
        """Mean IoU of whole images, and the IoU of every class that occurs."""
        from sparsevit.data.segmentation_metrics import class_ious, confusion_matrix, mean_iou

        num_classes = self.config.num_classes
        confusion = torch.zeros(num_classes, num_classes, dtype=torch.int64)
        for target, label_map in predictions_of(
            model, dataset, sparsity, batch_size=batch_size, device=device, on_batch=on_batch
        ):
            truth = target["labels"].as_subclass(Tensor)
            confusion += confusion_matrix(truth, label_map.cpu(), num_classes)
        ious = class_ious(confusion)
        by_class = zip(dataset.class_names, ious.tolist(), strict=True)
        return {
            "miou": mean_iou(ious),
            **{f"iou/{name}": iou for name, iou in by_class if iou == iou},  # NaN: it does not occur
        }

    def inputs(self, dataset: DataSplit, indices: Sequence[int]) -> tuple[list[Tensor]]:
        return (to_inputs([dataset[index][0] for index in indices], torch.device("cpu")),)

    @torch.inference_mode()
    def draw(
        self, model: nn.Module, dataset: DataSplit, index: int, sparsity: SparsityVector | None
    ) -> Mapping[str, Tensor]:
        from sparsevit.data.cityscapes import CLASSES
        from sparsevit.tasks.drawing import draw_label_map

        image, target = dataset[index]
        device = next(model.parameters()).device
        (predicted,) = model(to_inputs([image], device), sparsity=sparsity)
        colours = [each.colour for each in CLASSES]
        return {
            "ground truth": draw_label_map(image, target["labels"], colours),
            "prediction": draw_label_map(image, predicted.cpu(), colours),
        }
