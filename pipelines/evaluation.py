"""The evaluator of the search: a supernet in a worker, scored on the search split."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from search.evaluator import Evaluator
from sparsevit.backbone import create_backbone
from sparsevit.precision import autocast
from sparsevit.sparsity import SparsityVector
from sparsevit.tasks import create_task


@dataclass(frozen=True)
class SupernetEvaluatorFactory:
    """Everything a worker needs to build the supernet; travels through Ray's object store."""

    backbone: str
    task: str
    task_config: Mapping[str, Any]
    weights: Mapping[str, Tensor]
    data_root: Path
    split: str
    sample_ids: tuple[Any, ...]
    batch_size: int
    device: str
    precision: str
    num_threads: int

    def __call__(self) -> Evaluator:
        torch.set_num_threads(self.num_threads)
        device = torch.device(self.device)
        task = create_task(self.task, self.task_config)
        model = task.build_model(create_backbone(self.backbone))
        model.load_state_dict(dict(self.weights))
        model.eval().to(device)
        dataset = task.data(self.data_root, self.split).subset(self.sample_ids)
        all_samples = dataset.sample_ids

        def evaluate(vector: SparsityVector, budget: int | None) -> Mapping[str, float]:
            dataset.sample_ids = all_samples[:budget]
            with autocast(self.precision, device):
                scores = task.evaluate(model, dataset, vector, batch_size=self.batch_size, device=device)
            return {name: scores[name] for name in task.metrics}

        return evaluate
