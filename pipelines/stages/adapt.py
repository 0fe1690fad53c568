"""Stage 2: sparsity-aware adaptation (SparseViT, section 3.3)."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipelines.context import Run
from pipelines.schema import ConfigSchema
from pipelines.stages.training import train_stage, training_key
from sparsevit.adaptation import sampling_law


class Adapt:
    """The dense weights learn to cope with any vector: another one at every step."""

    name = "adapt"

    def needs(self, config: ConfigSchema) -> tuple[str, ...]:
        return ("train",)

    def depends_on(self, run: Run) -> Mapping[str, Any]:
        return {**training_key(run.config.adapt, run), "choices": list(run.space.choices)}

    def execute(self, run: Run, folder: Path) -> Mapping[str, float]:
        model = run.model_of("train")
        law = sampling_law(run.config.adapt.law)
        num_steps = train_stage(
            run, self.name, model, run.config.adapt, folder, lambda generator: law(run.space, generator)
        )
        return {"num_steps": num_steps}

    def score(self, run: Run) -> Mapping[str, float]:
        """Accuracy on the search split at both ends of the space."""
        dense = run.accuracy(self.name, run.search_set, run.space.dense, "of the dense model")
        sparsest = run.accuracy(self.name, run.search_set, run.space.sparsest, "at the sparsest")
        return {
            **{f"search_{name}": value for name, value in dense.items()},
            **{f"search_sparsest_{name}": value for name, value in sparsest.items()},
        }

    def remark(self, run: Run) -> str | None:
        return None
