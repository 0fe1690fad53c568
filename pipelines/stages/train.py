"""Stage 1: the dense model, imported or trained."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipelines import build
from pipelines.artifacts import path_digest
from pipelines.context import WEIGHTS_FILE, Run
from pipelines.schema import ConfigSchema
from pipelines.stages.training import train_stage, training_key
from pipelines.verdict import chance_remark
from sparsevit.checkpoints import write_weights

logger = logging.getLogger(__name__)


class Train:
    """Weights that cover the whole model are imported; otherwise the dense model is trained."""

    name = "train"

    def needs(self, config: ConfigSchema) -> tuple[str, ...]:
        return ()

    def depends_on(self, run: Run) -> Mapping[str, Any]:
        initial = build.initial_weights(run.config)
        backbone = build.plain(run.config.backbone)
        del backbone["choices"]  # the dense model knows none
        return {
            **training_key(run.config.train, run),
            "init": "scratch" if initial is None else path_digest(initial),
            "loads_classifier": initial is not None and build.loads_classifier(run.config),
            "loads_heads": initial is not None and build.loads_heads(run.config),
            "settings": None if initial is None else run.config.init_settings,
            "task": build.plain(run.config.task),
            "backbone": backbone,
        }

    def execute(self, run: Run, folder: Path) -> Mapping[str, float]:
        model, report = run.initial_model()
        num_steps = 0
        if report is None or report.uncovered:
            if report is not None:
                logger.info(
                    "  the weights leave %d tensors untrained, so the model is trained",
                    len(report.uncovered),
                )
            num_steps = train_stage(run, self.name, model, run.config.train, folder, lambda generator: None)
        else:
            write_weights(folder / WEIGHTS_FILE, model.state_dict())
        return {"num_steps": num_steps}

    def score(self, run: Run) -> Mapping[str, float]:
        """Accuracy on the report split, dense and where adaptation has most to do."""
        dense = run.accuracy(self.name, run.report_set, run.space.dense, "of the dense model")
        sparsest = run.accuracy(self.name, run.report_set, run.space.sparsest, "at the sparsest")
        return {**dense, **{f"sparsest_{name}": value for name, value in sparsest.items()}}

    def remark(self, run: Run) -> str | None:
        return chance_remark(run)
