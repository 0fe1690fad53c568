"""One run: its configuration, its data, its models, and the results of its stages."""

import logging
import platform
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from pipelines import build
from pipelines.artifacts import ArtifactStore, StageResult, content_key, read_json, write_json
from pipelines.initial import load_initial, read_initial, settled_task, told
from pipelines.progress import progress_bar
from pipelines.schema import ConfigSchema
from pipelines.tracking import NoTracker, Tracker
from sparsevit.checkpoints import CheckpointError, ModelReport, read_weights
from sparsevit.data.errors import DataError
from sparsevit.data.split import DataSplit
from sparsevit.latency.machine import device_name
from sparsevit.precision import autocast, resolve_precision
from sparsevit.sparsity import SparsitySpace, SparsityVector
from sparsevit.tasks import Task

WEIGHTS_FILE = "model.safetensors"
SCORES_FILE = "scores.json"
logger = logging.getLogger(__name__)


class Stage(Protocol):
    """A step of the run. Its result is a function of `depends_on` and of the stages it needs."""

    @property
    def name(self) -> str: ...

    def needs(self, config: ConfigSchema) -> tuple[str, ...]:
        """Names of the stages whose results it uses."""

    def depends_on(self, run: "Run") -> Mapping[str, Any]:
        """Everything but the needed stages that the result is a function of, as JSON-like values."""

    def execute(self, run: "Run", folder: Path) -> Mapping[str, float]:
        """Do the work, files in `folder`; go on from what a killed process left there."""

    def score(self, run: "Run") -> Mapping[str, float]:
        """What to know about the finished stage that depends on more than its result: accuracies."""

    def remark(self, run: "Run") -> str | None:
        """A sentence that belongs beside its figures, if one does. The stage is in `run.results`."""


@dataclass
class Run:
    """What the stages share. `results` holds the finished stages, by name."""

    config: ConfigSchema
    store: ArtifactStore
    tracker: Tracker | NoTracker
    results: dict[str, StageResult] = field(default_factory=dict)
    _evaluated: tuple[Path, nn.Module] | None = None  # the model that was evaluated last

    @cached_property
    def device(self) -> torch.device:
        return build.device(self.config)

    @cached_property
    def space(self) -> SparsitySpace:
        return build.space(self.config)

    @cached_property
    def splits(self) -> tuple[DataSplit, DataSplit, DataSplit]:
        with progress_bar(None, "write the generated data") as advance:
            splits = build.data_splits(self.config, advance)
        num_dropped = sum({split.split: split.num_dropped for split in splits}.values())
        if num_dropped:
            logger.info("dropped %d annotations whose box or mask has no area", num_dropped)
        return splits

    @property
    def train_set(self) -> DataSplit:
        return self.splits[0]

    @property
    def search_set(self) -> DataSplit:
        return self.splits[1]

    @property
    def report_set(self) -> DataSplit:
        return self.splits[2]

    @cached_property
    def task(self) -> Task:
        """The task, set as the initial weights need it."""
        task = build.task(self.config, len(self.train_set.class_names))
        imported = read_initial(self.config, task, self.train_set.class_names)
        if imported is not None:
            for sentence in told(self.config, task, imported):
                logger.info("  %s", sentence)
        return settled_task(self.config, task, imported)

    def verify_images(self) -> None:
        """Look at every image before long work starts, as closely as `data.verify` says."""
        if self.config.data.verify == "none":
            return
        with progress_bar(sum(map(len, self.splits)), "check the images", unit="image") as advance:
            for split in self.splits:
                split.verify(decode=self.config.data.verify == "decode", on_sample=advance)
        self._verify_search_images()

    def _verify_search_images(self) -> None:
        """The images that a vector is scored on have something to score it by."""
        num_images = self.config.search.num_images
        if num_images is None or num_images >= len(self.search_set):
            return
        counts = self.search_set.subset(self.search_set.sample_ids[:num_images]).class_counts()
        if counts and not any(counts.values()):
            raise DataError(
                f"search.num_images={num_images}: the first {num_images} of the {len(self.search_set)} "
                f"images of {self.search_set.split!r} have no annotation that counts, so that every vector "
                "would score the same: raise it, or leave it out"
            )

    def build_model(self) -> nn.Module:
        """The whole model with random weights, on the CPU."""
        with torch.random.fork_rng():
            torch.manual_seed(self.config.seed)
            return self.task.build_model(build.backbone(self.config))

    def initial_model(self) -> tuple[nn.Module, ModelReport | None]:
        """The model that training starts from, on the run's device, and what its weights are of."""
        model = self.build_model()
        imported = read_initial(self.config, self.task, self.train_set.class_names)
        report = None if imported is None else load_initial(self.config, self.task, model, imported)
        return model.to(self.device), report

    def model_of(self, stage: str) -> nn.Module:
        """The model that a finished stage left."""
        return self._model_in(self.results[stage].folder)

    def accuracy(
        self, stage: str, dataset: DataSplit, sparsity: SparsityVector, label: str
    ) -> Mapping[str, float]:
        """The task's metrics of the model that a finished stage left."""
        scores = self.scores(stage, dataset, sparsity, label)
        return {name: scores[name] for name in self.task.metrics}

    def scores(
        self, stage: str, dataset: DataSplit, sparsity: SparsityVector, label: str
    ) -> Mapping[str, float]:
        """The metrics and their parts, such as the accuracy of every class."""
        return self.scores_in(self.results[stage].folder, dataset, sparsity, f"{stage}: accuracy {label}")

    def scores_in(
        self, folder: Path, dataset: DataSplit, sparsity: SparsityVector, label: str
    ) -> Mapping[str, float]:
        """`scores` of the weights in the folder of a stage, which need not be finished.

        Kept beside its weights, so that it is computed once, whoever asks.
        """
        path = folder / SCORES_FILE
        precision = resolve_precision(self.config.evaluation.precision, self.device)
        key = content_key([self.data_fingerprint(dataset), list(sparsity.ratios), precision])
        known = read_json(path) if path.is_file() else {}
        if key not in known:
            if self._evaluated is None or self._evaluated[0] != folder:
                self._evaluated = folder, self._model_in(folder)
            start = time.monotonic()
            with (
                progress_bar(len(dataset), label, unit="image") as advance,
                autocast(precision, self.device),
            ):
                scores = self.task.evaluate(
                    self._evaluated[1], dataset, sparsity,
                    batch_size=self.config.evaluation.batch_size, device=self.device, on_batch=advance,
                )  # fmt: skip
            known[key] = {
                "split": dataset.split,
                "vector": str(sparsity),
                "precision": precision,
                "seconds_per_image": (time.monotonic() - start) / len(dataset),
                "scores": dict(scores),
            }
            write_json(path, known)
        scores = known[key]["scores"]
        return dict(scores)

    def forget_scores(self, folder: Path) -> None:
        """Do away with what `scores_in` knows of a folder, before its weights change."""
        (folder / SCORES_FILE).unlink(missing_ok=True)
        self._evaluated = None

    def _model_in(self, folder: Path) -> nn.Module:
        path = folder / WEIGHTS_FILE
        model = self.build_model()
        try:
            model.load_state_dict(read_weights(path))
        except RuntimeError as error:
            raise CheckpointError(f"{path} does not fit the model of this run: {error}") from error
        return model.to(self.device)

    def seed_for(self, stage: str) -> int:
        """A seed of its own for every training stage."""
        return self.config.seed + ("train", "adapt", "finetune").index(stage)

    def data_fingerprint(self, *splits: DataSplit) -> list[Any]:
        """What a result knows of its data: annotations, the images used, and their folder if one is named."""
        folder = self.config.data.images
        return [
            {"annotations": self._digest(split), "images": split.sample_ids, "folder": folder}
            for split in splits
        ]

    def machine(self) -> dict[str, Any]:
        """What a measured time depends on."""
        return {
            "device": device_name(self.device),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "host": platform.node(),
        }

    def _digest(self, split: DataSplit) -> str:
        if id(split) not in self._digests:
            self._digests[id(split)] = split.digest()
        return self._digests[id(split)]

    @cached_property
    def _digests(self) -> dict[int, str]:
        return {}
