"""The supernet in the search's workers: one copy of its weights a node."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from pipelines import build
from pipelines.evaluation import SharedTensor, SupernetEvaluatorFactory
from search.evaluator import Evaluator
from search.problem import WORKER
from search.space import Vector
from tests.pipelines_tests.configuration import composed, tiny_run
from tests.search_tests.evaluators import search


@dataclass(frozen=True)
class WhereWeightsAre:
    """Tells which share of a worker's weights lies in memory that processes share."""

    inner: SupernetEvaluatorFactory

    def __call__(self) -> Evaluator:
        weights = self.inner.model().state_dict()
        num_shared = sum(is_shared(each.data_ptr()) for each in weights.values())

        def evaluate(vector: Vector, budget: int | None) -> Mapping[str, float]:
            return {"ap": 1 - sum(vector) / 4, "extra": num_shared / len(weights)}

        return evaluate


def is_shared(address: int) -> bool:
    for line in Path("/proc/self/maps").read_text().splitlines():
        bounds, permissions = line.split()[:2]
        low, high = (int(bound, 16) for bound in bounds.split("-"))
        if low <= address < high:
            return permissions.endswith("s")
    return False


def test_the_workers_of_a_node_share_one_copy_of_the_weights(tmp_path: Path) -> None:
    config = composed(*tiny_run(tmp_path))
    task = build.task(config, 3)
    model = task.build_model(build.backbone(config))
    factory = SupernetEvaluatorFactory(
        backbone=config.backbone.name,
        task=config.task.name,
        task_config=asdict(task.config),
        weights={name: SharedTensor.of(value) for name, value in model.state_dict().items()},
        data_root=tmp_path,
        image_folder=None,
        split="search",
        sample_ids=(),
        batch_size=1,
        device="cpu",
        precision="fp32",
        num_threads=1,
    )
    rebuilt = factory.model().state_dict()
    assert all(torch.equal(rebuilt[name], value) for name, value in model.state_dict().items())
    told = search(tmp_path, 12, WhereWeightsAre(factory), num_workers=2)
    assert len({trial.user_attrs[WORKER] for trial in told}) >= 2
    assert {trial.user_attrs["extra"] for trial in told} == {1.0}


def test_a_shared_tensor_keeps_type_and_shape() -> None:
    for tensor in (
        torch.randn(3, 4).t(),
        torch.tensor(7),
        torch.randn(2, 3).bfloat16(),
        torch.tensor([True, False]),
        torch.empty(0, 5),
    ):
        again = SharedTensor.of(tensor).tensor()
        assert again.dtype == tensor.dtype
        assert again.shape == tensor.shape
        assert torch.equal(again, tensor)
