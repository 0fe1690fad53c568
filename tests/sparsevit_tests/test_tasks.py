"""What holds for every task, whatever it sees: the vector reaches the backbone, and mode and memory stay."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch

from sparsevit import SparsityVector, create_backbone
from sparsevit.data.sample import IGNORED
from sparsevit.tasks import Task
from sparsevit.tasks.detection_3d import Detection3D
from sparsevit.tasks.protocol import Batch
from sparsevit.tasks.semantic_segmentation import SemanticSegmentation
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
    image: torch.Tensor
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


@pytest.mark.parametrize("make", [instances, label_maps, boxes_3d])
@pytest.mark.parametrize("vector", [VECTOR, None])
def test_the_vector_reaches_the_backbone(make: Any, vector: SparsityVector | None) -> None:
    torch.manual_seed(0)
    case: Case = make()
    model = case.task.build_model(create_backbone("swin_nano"))
    backbone = case.task.backbone_of(model)
    given: list[Any] = []

    def note(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given.append(kwargs.get("sparsity", args[1] if len(args) > 1 else None))

    backbone.register_forward_pre_hook(note, with_kwargs=True)
    losses = case.task.losses(model.train(), case.batch, vector)
    assert all(bool(value.isfinite()) for value in losses.values())
    with torch.inference_mode():
        model.eval()([case.image / 255], *case.beside, sparsity=vector)
    assert given == [vector, vector]
