"""One training stage by itself: how it reads its data, what it logs, and what it leaves."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import get_worker_info

from pipelines.artifacts import ArtifactStore
from pipelines.context import WEIGHTS_FILE, Run
from pipelines.stages.training import train_stage
from pipelines.tracking import NoTracker
from sparsevit.checkpoints import read_weights
from sparsevit.data.sample import Sample, Transform
from sparsevit.sparsity import SparsityVector
from sparsevit.tasks.protocol import Batch
from tests.pipelines_tests.configuration import composed, telling_run
from tests.pipelines_tests.telling import Telling


def with_readers(image: Tensor, target: dict[str, Any]) -> Sample:
    """A sample that says how many processes read the data beside the one that trains."""
    info = get_worker_info()
    return image, {**target, "num_readers": 0 if info is None else info.num_workers}


class Noting(Telling):
    """Notes the readers of every sample that it learns from."""

    def __init__(self, options: Mapping[str, Any]) -> None:
        super().__init__(options)
        self.num_readers: list[int] = []

    def training_transform(self) -> Transform:
        return with_readers

    def losses(self, model: nn.Module, batch: Batch, sparsity: SparsityVector | None) -> dict[str, Tensor]:
        self.num_readers += [target["num_readers"] for target in batch[1]]
        return super().losses(model, batch, sparsity)


class Curves(NoTracker):
    """Keeps what is logged."""

    def __init__(self) -> None:
        self.logged: list[tuple[str, int, set[str]]] = []

    def log_metrics(self, key: str, metrics: Mapping[str, float], step: int = 0) -> None:
        self.logged.append((key, step, set(metrics)))


def run_of(folder: Path, *overrides: str) -> Run:
    """Twelve images, one a step."""
    own = ["task.name=tests.pipelines_tests.test_training_stage:Noting", "train.batch_size=1"]
    return Run(composed(*telling_run(folder, *own, *overrides)), ArtifactStore(folder), Curves())


def test_what_a_training_stage_reads_logs_and_leaves(tmp_path: Path) -> None:
    run = run_of(tmp_path, "train.num_workers=1")
    task, model = run.task, run.build_model()
    assert isinstance(task, Noting) and isinstance(run.tracker, Curves)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    vectors: list[SparsityVector] = []

    def draw(generator: torch.Generator) -> SparsityVector:
        vectors.append(run.space.draw(generator))
        return vectors[-1]

    assert train_stage(run, "train", model, run.config.train, tmp_path, draw) == 12
    assert task.num_readers == 12 * [1]
    assert len(set(vectors)) > 6
    assert run.tracker.logged == [("train", 10, {"loss"})]
    assert run.train_set.transform is None  # evaluation sees images as they are
    assert {path.name for path in tmp_path.iterdir() if path.is_file()} == {WEIGHTS_FILE}
    written = read_weights(tmp_path / WEIGHTS_FILE)
    trained = model.state_dict()
    assert all(torch.equal(written[name], value) for name, value in trained.items())
    assert any(not torch.equal(before[name], value) for name, value in trained.items())

    def no_step(generator: torch.Generator) -> SparsityVector:
        pytest.fail("weights that are finished are not trained again")

    again = run.build_model()
    assert train_stage(run, "train", again, run.config.train, tmp_path, no_step) == 12
    assert all(torch.equal(written[name], value) for name, value in again.state_dict().items())
