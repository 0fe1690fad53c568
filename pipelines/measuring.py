"""What the stages measure: the backbone or the whole model that the configuration names, where it says."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

import torch
from torch import nn

from pipelines import build
from pipelines.context import Run
from pipelines.progress import expected_progress
from search.lane import run_in_lane
from sparsevit.backbone import SparseSwin
from sparsevit.latency import LatencyPredictor
from sparsevit.latency.calibration import CalibrationConfig, Measured, calibrate, measure
from sparsevit.latency.machine import set_num_threads
from sparsevit.latency.subject import (
    Subject,
    backbone_subject,
    model_name,
    model_subject,
    num_samples,
)
from sparsevit.latency.timing import OnProgress, TimingLimits
from sparsevit.sparsity import SparsitySpace, SparsityVector

T = TypeVar("T")


@dataclass(frozen=True)
class SubjectFactory:
    """Makes the subject where it is measured; travels there with its weights."""

    measure: str
    model: nn.Module | None  # of a whole model
    backbone: SparseSwin
    inputs: tuple[Any, ...]
    name: str
    batch_size: int
    image_size: tuple[int, int]
    dtype: str
    runtime: str
    device: str
    num_threads: int

    @contextmanager
    def __call__(self) -> Iterator[Subject]:
        """The subject, with as many threads as the driver has.

        Raises:
            ValueError: if the real image reaches the backbone in another size than the configuration says.
        """
        num_threads = torch.get_num_threads()
        set_num_threads(self.num_threads)
        device = torch.device(self.device)
        try:
            if self.model is None:
                with backbone_subject(
                    self.backbone.to(device), batch_size=self.batch_size, image_size=self.image_size,
                    dtype=self.dtype, runtime=self.runtime,
                ) as subject:  # fmt: skip
                    yield subject
                return
            with model_subject(
                self.model.to(device), self.backbone, self.inputs,
                name=self.name, dtype=self.dtype, runtime=self.runtime,
            ) as subject:  # fmt: skip
                if subject.image_size != self.image_size:
                    height, width = subject.image_size
                    raise ValueError(
                        f"latency.image_size={list(self.image_size)}, but the backbone sees the photo that "
                        f"is measured in {height}×{width}: set latency.image_size=[{height},{width}]"
                    )
                yield subject
        finally:
            set_num_threads(num_threads)


def subject_factory(run: Run, stage: str | None) -> SubjectFactory:
    """What the configuration measures, with the weights that a stage left; None for random ones."""
    latency = run.config.latency
    if latency.measure == "model":
        assert stage is not None
        model = run.model_of(stage)
        backbone = run.task.backbone_of(model)
        (first, *_) = run.task.inputs(run.search_set, [0])
        count = num_samples(first, latency.batch_size)
        indices = [index % len(run.search_set) for index in range(count)]
        inputs = run.task.inputs(run.search_set, indices)
        name = model_name(run.config.task.name, asdict(run.task.config))
    else:
        model, inputs, name = None, (), "backbone"
        backbone = build.backbone(run.config) if stage is None else run.task.backbone_of(run.model_of(stage))
    height, width = latency.image_size
    return SubjectFactory(
        latency.measure, model, backbone, inputs, name, latency.batch_size, (height, width), latency.dtype,
        latency.runtime, str(run.device), torch.get_num_threads(),
    )  # fmt: skip


def measure_vectors(
    run: Run, stage: str, vectors: Sequence[SparsityVector], limits: TimingLimits, label: str
) -> Measured:
    """Latencies of some vectors, now, where the configuration says that they are measured."""
    factory = subject_factory(run, stage)
    with expected_progress(label, unit="pass") as on_progress:
        return _alone(run, _Measure(factory, tuple(vectors), limits, run.config.seed), on_progress)


def calibrate_here(run: Run, config: CalibrationConfig, label: str) -> LatencyPredictor:
    """A table of what the configuration measures, where it says that it is measured."""
    factory = subject_factory(run, "train" if run.config.latency.measure == "model" else None)
    work = _Calibrate(factory, run.config.backbone.name, run.space, config, build.prior_table(run.config))
    with expected_progress(label, unit="pass") as on_progress:
        return _alone(run, work, on_progress)


@dataclass(frozen=True)
class _Measure:
    factory: SubjectFactory
    vectors: tuple[SparsityVector, ...]
    limits: TimingLimits
    seed: int

    def __call__(self, on_progress: OnProgress) -> Measured:
        with self.factory() as subject:
            return measure(subject, self.vectors, self.limits, self.seed, on_progress)


@dataclass(frozen=True)
class _Calibrate:
    factory: SubjectFactory
    name: str
    space: SparsitySpace
    config: CalibrationConfig
    prior: LatencyPredictor | None

    def __call__(self, on_progress: OnProgress) -> LatencyPredictor:
        with self.factory() as subject:
            return calibrate(subject, self.name, self.space, self.config, on_progress, prior=self.prior)


def _alone(run: Run, work: Callable[[OnProgress], T], on_progress: OnProgress) -> T:
    """In the lane of the cluster that is kept for it, or here."""
    config = build.engine(run.config)
    if config.latency_lane is None:
        return work(on_progress)
    return run_in_lane(work, config)
