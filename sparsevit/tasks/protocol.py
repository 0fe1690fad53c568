"""What a task is: the seam between the supernet and everything that trains or scores it."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from sparsevit.backbone import SparseSwin
from sparsevit.checkpoints.foreign import ForeignFormat
from sparsevit.data.sample import Transform
from sparsevit.data.split import DataSplit
from sparsevit.sparsity import SparsityVector

Batch = tuple[list[Tensor], list[dict[str, Any]]]


class Task(Protocol):
    """One kind of perception. A new detector or data set is a new object of this form."""

    @property
    def metrics(self) -> tuple[str, ...]:
        """Names of everything that `evaluate` gives."""

    @property
    def metric(self) -> str:
        """The key of `evaluate` that the search maximises."""

    @property
    def example(self) -> str:
        """A line of Python that calls an exported ``model``."""

    @property
    def class_layers(self) -> str:
        """Regular expression of the parameters whose shape depends on the number of classes."""

    @property
    def foreign_formats(self) -> Sequence[ForeignFormat]:
        """How other libraries write the model; the first that recognises a file counts.

        The backbone is recognised without, and so is a file of ours.
        """

    @property
    def chance(self) -> float:
        """What `metric` exceeds as soon as a model has learnt anything."""

    @property
    def first_label(self) -> int:
        """The label in predictions that stands for the first class of the data."""

    @property
    def data(self) -> type[DataSplit]:
        """The format of the data sets that the task reads."""

    @property
    def config(self) -> Any:
        """The dataclass that the task was built from, for the export."""

    def build_model(self, backbone: SparseSwin) -> nn.Module:
        """Build the whole model, randomly initialised, around a backbone."""

    def backbone_of(self, model: nn.Module) -> SparseSwin:
        """The backbone inside a model that `build_model` made."""

    def training_transform(self) -> Transform:
        """The augmentation of training samples; it draws from PyTorch's global generator."""

    def losses(self, model: nn.Module, batch: Batch, sparsity: SparsityVector | None) -> dict[str, Tensor]:
        """The named losses of a batch, model in training mode. Their sum is minimised."""

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
        """The official metrics on a data set, in [0, 1].

        Beside `metrics` it may give parts of them, such as ``iou/road``, for the report.
        """

    def inputs(self, dataset: DataSplit, indices: Sequence[int]) -> tuple[Any, ...]:
        """What a model in evaluation mode takes for some samples: a list of images in [0, 1], perhaps more.

        Every part is a list with an entry per sample, on the CPU.
        """

    def draw(
        self, model: nn.Module, dataset: DataSplit, index: int, sparsity: SparsityVector | None
    ) -> Mapping[str, Tensor]:
        """Pictures of one sample, [3, H, W] uint8 by name: the ground truth and what the model predicts.

        The model is in evaluation mode and makes one forward pass.
        """
