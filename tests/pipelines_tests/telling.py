"""A task whose every score tells where it came from: split, images, weights, vector, precision."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torchvision.transforms import v2

from sparsevit.backbone import SparseSwin
from sparsevit.data.coco import CocoBoxes
from sparsevit.data.sample import Transform
from sparsevit.data.split import DataSplit
from sparsevit.sparsity import SparsityVector
from sparsevit.tasks.predictions import to_inputs
from sparsevit.tasks.protocol import Batch

NUM_STEPS = {"train": 3, "adapt": 5, "finetune": 8}
"""Training steps that the weights of a stage have seen, in `configuration.TELLING_RUN`."""
OF_SPLIT = {"train": 0.1, "search": 0.3, "report": 0.6}
OF_STEPS = {3: 0.004, 5: 0.0, 8: 0.006}
COST_OF_GENE = (0.001, 0.004, 0.002, 0.0005, 0.006, 0.003)
OF_CLASS = 0.05


def told(
    split: str, stage: str, vector: Sequence[float], *, num_images: int = 6, precision: str = "fp32"
) -> float:
    """The score of the weights that a stage leaves; no two of these arguments give the same."""
    return _told(split, NUM_STEPS[stage], vector, num_images, is_bf16=precision == "bf16")


def _told(split: str, num_steps: int, vector: Sequence[float], num_images: int, *, is_bf16: bool) -> float:
    cost = sum(cost * ratio for cost, ratio in zip(COST_OF_GENE, vector, strict=True))
    return OF_SPLIT[split] + OF_STEPS.get(num_steps, 0.009) - cost + 1e-4 * is_bf16 + 1e-5 * num_images


@dataclass(frozen=True)
class Config:
    num_classes: int


class Counted(nn.Module):
    """A backbone that counts its training steps."""

    num_steps: Tensor

    def __init__(self, backbone: SparseSwin) -> None:
        super().__init__()
        self.backbone = backbone
        self.register_buffer("num_steps", torch.zeros(()))

    def forward(self, images: list[Tensor], sparsity: SparsityVector | None = None) -> Sequence[Tensor]:
        return tuple(self.backbone(torch.stack(images), sparsity))


class Telling:
    metric = "score"
    metrics = ("score",)
    chance = 0.0
    example = "features = model([image])"
    class_layers = "no layer at all"
    first_label = 1
    foreign_formats = ()
    data: ClassVar[type[DataSplit]] = CocoBoxes

    def __init__(self, options: Mapping[str, Any]) -> None:
        self.config = Config(**options)

    def training_transform(self) -> Transform:
        transform: Transform = v2.Identity()
        return transform

    def build_model(self, backbone: SparseSwin) -> nn.Module:
        return Counted(backbone)

    def backbone_of(self, model: nn.Module) -> SparseSwin:
        assert isinstance(model, Counted)
        return model.backbone

    def losses(self, model: nn.Module, batch: Batch, sparsity: SparsityVector | None) -> dict[str, Tensor]:
        assert isinstance(model, Counted)
        model.num_steps += 1
        features = model(to_inputs(batch[0], torch.device("cpu")), sparsity)
        return {"loss": features[-1].float().square().mean()}

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
        assert isinstance(model, Counted) and sparsity is not None
        score = _told(
            dataset.split, int(model.num_steps), sparsity.ratios, len(dataset),
            is_bf16=torch.is_autocast_enabled(device.type),
        )  # fmt: skip
        return {"score": score, "score/disc": score + OF_CLASS}

    def inputs(self, dataset: DataSplit, indices: Sequence[int]) -> tuple[list[Tensor]]:
        return (to_inputs([dataset[index][0] for index in indices], torch.device("cpu")),)

    @torch.inference_mode()
    def draw(
        self, model: nn.Module, dataset: DataSplit, index: int, sparsity: SparsityVector | None
    ) -> Mapping[str, Tensor]:
        image = dataset[index][0]
        model(to_inputs([image], torch.device("cpu")), sparsity=sparsity)
        return {"ground truth": image.as_subclass(Tensor)}
