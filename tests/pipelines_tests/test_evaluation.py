"""The supernet in the search's workers: one copy of its weights a node."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from pipelines import build
from pipelines.evaluation import SharedTensor, SupernetEvaluatorFactory
from search.dispatch import Budget
from search.encoding import vector_of
from search.engine import EngineConfig
from search.evaluator import Evaluator
from search.find_front import find_front
from search.problem import WORKER
from search.samplers import SamplerConfig
from search.space import Vector
from search.study import counted_trials, read_study
from tests.pipelines_tests.configuration import composed, tiny_run
from tests.search_tests.evaluators import PROBLEM, SPACE


@dataclass(frozen=True)
class WhereWeightsAre:
    """Tells which share of a worker's weights lies in memory that processes share."""

    inner: SupernetEvaluatorFactory

    def __call__(self) -> Evaluator:
        weights = self.inner.model().state_dict()
        num_shared = sum(is_shared(each.data_ptr()) for each in weights.values())

        def evaluate(vector: Vector, budget: int | None) -> Mapping[str, float]:
            share = num_shared / len(weights)
            return {"ap": 1 - sum(vector) / 4, "extra": share, "num_samples": float(budget or 0)}

        return evaluate


def is_shared(address: int) -> bool:
    for line in Path("/proc/self/maps").read_text().splitlines():
        bounds, permissions = line.split()[:2]
        low, high = (int(bound, 16) for bound in bounds.split("-"))
        if low <= address < high:
            return permissions.endswith("s")
    return False


def test_the_workers_of_a_node_share_one_copy_of_the_weights(tmp_path: Path) -> None:
    """In a whole search of one call, which also tells them how many samples a vector is scored on."""
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
    study = tmp_path / "study.journal"
    front = find_front(
        PROBLEM, WhereWeightsAre(factory), study, Budget(12), sampler=SamplerConfig("random"),
        engine=EngineConfig(num_workers=2), sample_budget=7,
    )  # fmt: skip
    told = counted_trials(read_study(study))
    assert len(told) == 12
    assert {member.vector for member in front.members} <= {vector_of(trial, SPACE) for trial in told}
    assert len({trial.user_attrs[WORKER] for trial in told}) >= 2
    assert {trial.user_attrs["extra"] for trial in told} == {1.0}
    assert {trial.user_attrs["num_samples"] for trial in told} == {7.0}


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
