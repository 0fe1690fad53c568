"""The evaluator of the search: a supernet in a worker, scored on the search split."""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from search.evaluator import Evaluator
from sparsevit.allocator import keep_freed_memory
from sparsevit.backbone import create_backbone
from sparsevit.data.split import open_split
from sparsevit.latency.machine import set_num_threads
from sparsevit.precision import autocast
from sparsevit.sparsity import SparsityVector
from sparsevit.tasks import create_task


@dataclass(frozen=True)
class SharedTensor:
    """A tensor as bytes, which the workers of a node read where Ray's object store has them."""

    data: NDArray[np.uint8]
    dtype: torch.dtype
    shape: tuple[int, ...]

    @classmethod
    def of(cls, tensor: Tensor) -> "SharedTensor":
        flat = tensor.detach().cpu().contiguous().flatten()
        return cls(flat.view(torch.uint8).numpy(), tensor.dtype, tuple(tensor.shape))

    def tensor(self) -> Tensor:
        """The tensor, without a copy. It may be in memory that cannot be written to."""
        if not self.data.size:
            return torch.empty(self.shape, dtype=self.dtype)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The given NumPy array is not writable", UserWarning)
            return torch.from_numpy(self.data).view(self.dtype).reshape(self.shape)


@dataclass(frozen=True)
class SupernetEvaluatorFactory:
    """Everything a worker needs to build the supernet; travels through Ray's object store.

    On the CPU the workers of a node share one copy of the weights.
    """

    backbone: str
    task: str
    task_config: Mapping[str, Any]
    weights: Mapping[str, SharedTensor]
    data_root: Path
    image_folder: str | None
    split: str
    sample_ids: tuple[Any, ...]
    batch_size: int
    device: str
    precision: str
    num_threads: int

    def __call__(self) -> Evaluator:
        set_num_threads(self.num_threads)
        keep_freed_memory()
        device = torch.device(self.device)
        task = create_task(self.task, self.task_config)
        model = self.model().to(device)
        dataset = open_split(task.data, self.data_root, self.split, self.image_folder).subset(self.sample_ids)
        all_samples = dataset.sample_ids

        def evaluate(vector: SparsityVector, budget: int | None) -> Mapping[str, float]:
            dataset.sample_ids = all_samples[:budget]
            with autocast(self.precision, device):
                scores = task.evaluate(model, dataset, vector, batch_size=self.batch_size, device=device)
            return {name: scores[name] for name in task.metrics}

        return evaluate

    def model(self) -> nn.Module:
        """The supernet on the CPU, to be scored, not trained."""
        model = create_task(self.task, self.task_config).build_model(create_backbone(self.backbone))
        weights = {name: value.tensor() for name, value in self.weights.items()}
        model.load_state_dict(weights, assign=True)
        return model.eval()
