"""3D detection: the official metrics of nuScenes for a BEVDet."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sparsevit.backbone import SparseSwin
from sparsevit.data.sample import Transform
from sparsevit.data.split import DataSplit
from sparsevit.sparsity import SparsityVector
from sparsevit.tasks.bevdet import FOREIGN_FORMATS, BEVDetConfig, SparseBEVDet
from sparsevit.tasks.lift_splat import Cameras
from sparsevit.tasks.predictions import predictions_of, to_inputs
from sparsevit.tasks.protocol import Batch

MIN_DRAWN_SCORE = 0.3  # what counts in the evaluation would hide the pictures


class Detection3D:
    """The task of the nuScenes experiment: mAP of a BEVDet."""

    metric = "map"
    metrics = ("map", "nds", "mate", "mase", "maoe", "mave", "maae")
    example = "detections = model([images], [cameras])  # [6, 3, h, w] in [0, 1]; docs/nuscenes.md"
    class_layers = r"^head\.branches\.\d+\.heat\.1\."
    foreign_formats = FOREIGN_FORMATS
    chance = 0.01
    first_label = 0

    def __init__(self, config: BEVDetConfig) -> None:
        self.config = config

    @property
    def data(self) -> type[DataSplit]:
        from sparsevit.data.nuscenes import NuScenesSamples

        return NuScenesSamples

    def training_transform(self) -> Transform:
        from sparsevit.data.camera_views import camera_augmentation

        config = self.config
        return camera_augmentation(
            config.input_size,
            resize_range=config.resize_range,
            degrees=config.rotation,
            flips=config.flips,
            bev_degrees=config.bev_rotation,
            bev_scale_range=config.bev_scale_range,
        )

    def build_model(self, backbone: SparseSwin) -> SparseBEVDet:
        return SparseBEVDet(backbone, self.config)

    def backbone_of(self, model: nn.Module) -> SparseSwin:
        assert isinstance(model, SparseBEVDet)
        return model.backbone

    def losses(self, model: nn.Module, batch: Batch, sparsity: SparsityVector | None) -> dict[str, Tensor]:
        device = next(model.parameters()).device
        targets = [{key: target[key].to(device) for key in ("boxes", "labels")} for target in batch[1]]
        losses: dict[str, Tensor] = model(to_inputs(batch[0], device), _cameras(batch[1]), targets, sparsity)
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
        """mAP, NDS and the five true-positive errors of the devkit, and the AP of every class."""
        from sparsevit.data.nuscenes import NuScenesSamples
        from sparsevit.data.nuscenes_metrics import detection_metrics, to_results

        assert isinstance(dataset, NuScenesSamples)
        results: dict[str, list[dict[str, Any]]] = {}
        for target, found in predictions_of(
            model, self._seen(dataset), sparsity,
            batch_size=batch_size, device=device, on_batch=on_batch, beside_images=_cameras_beside,
        ):  # fmt: skip
            token = target["sample_id"]
            results[token] = to_results(
                found.boxes, found.scores, found.labels, token, target["ego_to_global"]
            )
        return detection_metrics(dataset.tables, dataset.sample_ids, results)

    def inputs(
        self, dataset: DataSplit, indices: Sequence[int]
    ) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
        seen = self._seen(dataset)
        images, targets = zip(*(seen[index] for index in indices), strict=True)
        return to_inputs(images, torch.device("cpu")), _cameras(targets)

    @torch.inference_mode()
    def draw(
        self, model: nn.Module, dataset: DataSplit, index: int, sparsity: SparsityVector | None
    ) -> Mapping[str, Tensor]:
        from sparsevit.tasks.drawing_3d import draw_cameras, draw_ground

        images, target = self._seen(dataset)[index]
        device = next(model.parameters()).device
        (found,) = model(to_inputs([images], device), _cameras([target]), sparsity=sparsity)
        is_drawn = (found.scores > MIN_DRAWN_SCORE).cpu()
        cameras = Cameras(*(target[name] for name in Cameras._fields))
        pictures: dict[str, Tensor] = {}
        for title, boxes, labels in (
            ("ground truth", target["boxes"], target["labels"]),
            ("prediction", found.boxes.cpu()[is_drawn], found.labels.cpu()[is_drawn]),
        ):
            pictures[title] = draw_cameras(images, boxes, labels, cameras)
            pictures[f"{title}, from above"] = draw_ground(boxes, labels, self.config.extent)
        return pictures

    def _seen(self, dataset: DataSplit) -> DataSplit:
        """The data set as the evaluation looks at it."""
        from sparsevit.data.camera_views import camera_inputs

        seen = dataset.subset(dataset.sample_ids)
        seen.transform = camera_inputs(self.config.input_size)
        return seen


def _cameras(targets: Sequence[Mapping[str, Any]]) -> list[dict[str, Tensor]]:
    return [{name: target[name] for name in Cameras._fields} for target in targets]


def _cameras_beside(targets: Sequence[Mapping[str, Any]]) -> tuple[list[dict[str, Tensor]]]:
    return (_cameras(targets),)
