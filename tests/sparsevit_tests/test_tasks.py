"""What holds for every task, whatever it sees: the vector reaches the backbone, and mode and memory stay."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sparsevit import SparsityVector, create_backbone
from sparsevit.data.coco import CocoInstances
from sparsevit.data.sample import IGNORED
from sparsevit.tasks import Task
from sparsevit.tasks.detection_3d import Detection3D
from sparsevit.tasks.predictions import predictions_of
from sparsevit.tasks.protocol import Batch
from sparsevit.tasks.semantic_segmentation import SemanticSegmentation
from tests.sparsevit_tests.coco_format import write_plain
from tests.sparsevit_tests.test_bevdet import SMALL as SMALL_BEVDET
from tests.sparsevit_tests.test_bevdet import cameras
from tests.sparsevit_tests.test_checkpoints import small_task
from tests.sparsevit_tests.test_mask2former import SMALL as SMALL_MASK2FORMER

VECTOR = SparsityVector((0.5, 0.3, 0.2, 0.4, 0.6, 0.0))


@dataclass(frozen=True)
class Case:
    """A task, what its model takes beside images, and the image and target of a sample."""

    task: Task
    beside: tuple[Any, ...]
    image: Tensor
    target: dict[str, Any]

    @property
    def batch(self) -> Batch:
        return [self.image], [self.target]


def instances() -> Case:
    masks = torch.zeros(1, 64, 64, dtype=torch.uint8)
    masks[:, 10:50, 10:50] = 1
    target = {
        "boxes": torch.tensor([[10.0, 10.0, 50.0, 50.0]]),
        "labels": torch.tensor([2]),
        "masks": masks,
    }
    return Case(small_task(), (), torch.randint(0, 255, (3, 64, 64)).to(torch.uint8), target)


def label_maps() -> Case:
    labels = torch.full((64, 64), IGNORED, dtype=torch.uint8)
    labels[:40] = 3
    image = torch.randint(0, 255, (3, 64, 64)).to(torch.uint8)
    return Case(SemanticSegmentation(SMALL_MASK2FORMER), (), image, {"labels": labels})


def boxes_3d() -> Case:
    beside = cameras()[0]
    target = {
        **beside,
        "boxes": torch.tensor([[3.0, 1.0, 0.5, 4.0, 2.0, 1.5, 0.3, 1.0, 0.0]]),
        "labels": torch.tensor([0]),
    }
    image = torch.randint(0, 255, (2, 3, 64, 96)).to(torch.uint8)
    return Case(Detection3D(SMALL_BEVDET), ([beside],), image, target)


class Recording(nn.Module):
    """A model that notes what it is given, and predicts how bright every image is."""

    def __init__(self) -> None:
        super().__init__()
        self.given: list[tuple[int, bool, SparsityVector | None]] = []

    def forward(self, images: list[Tensor], *, sparsity: SparsityVector | None) -> list[float]:
        self.given.append((len(images), self.training, sparsity))
        assert all(type(image) is Tensor for image in images)
        return [float(image.mean()) for image in images]


@pytest.mark.parametrize("is_training", [True, False])
def test_every_evaluation_gives_images_and_vector_to_the_model_in_order(
    tmp_path: Path, is_training: bool
) -> None:
    """In evaluation mode, in [0, 1]; afterwards the model is in the mode that it was in."""
    dataset, model, batches = CocoInstances(write_plain(tmp_path), "val"), Recording(), list[int]()
    found = predictions_of(
        model.train(is_training), dataset, VECTOR, batch_size=3, device=torch.device("cpu"),
        on_batch=batches.append,
    )  # fmt: skip
    for index, (target, brightness) in enumerate(found):
        image, expected = dataset[index]
        assert target["image_id"] == expected["image_id"]
        assert brightness == pytest.approx(float(image.float().mean()) / 255)
    assert model.given == [(3, False, VECTOR), (1, False, VECTOR)]
    assert batches == [3, 1]
    assert model.training == is_training


@pytest.mark.parametrize("make", [instances, label_maps, boxes_3d])
@pytest.mark.parametrize("vector", [VECTOR, None])
def test_the_vector_reaches_the_backbone(make: Any, vector: SparsityVector | None) -> None:
    torch.manual_seed(0)
    case: Case = make()
    model = case.task.build_model(create_backbone("swin_nano"))
    backbone = case.task.backbone_of(model)
    given: list[Any] = []

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given.append(kwargs.get("sparsity", args[1] if len(args) > 1 else None))

    backbone.register_forward_pre_hook(note, with_kwargs=True)
    losses = case.task.losses(model.train(), case.batch, vector)
    assert all(bool(value.isfinite()) for value in losses.values())
    with torch.inference_mode():
        model.eval()([case.image / 255], *case.beside, sparsity=vector)
    assert given == [vector, vector]
