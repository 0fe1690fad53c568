"""What a task is: the seam between the supernet and everything that trains or scores it."""

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from sparsevit.backbone import SparseSwin
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
    def class_layers(self) -> str:
        """Regular expression of the parameters whose shape depends on the number of classes."""

    @property
    def config(self) -> Any:
        """The dataclass that the task was built from, for the export."""

    def build_model(self, backbone: SparseSwin) -> nn.Module:
        """Build the whole model, randomly initialised, around a backbone."""

    def backbone_of(self, model: nn.Module) -> SparseSwin:
        """The backbone inside a model that `build_model` made."""

    def losses(self, model: nn.Module, batch: Batch, sparsity: SparsityVector | None) -> dict[str, Tensor]:
        """The named losses of a batch, model in training mode. Their sum is minimised."""

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
        """The official metrics on a data set, in [0, 1]."""
