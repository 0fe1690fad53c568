"""Stage 3: measure the device and fit the latency predictor, or take a table that was made elsewhere."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipelines import build
from pipelines.artifacts import path_digest
from pipelines.context import Run
from pipelines.measuring import calibrate_here
from pipelines.schema import ConfigSchema

logger = logging.getLogger(__name__)
PREDICTOR_FILE = "latency.json"


class Calibrate:
    """Latency depends on the backbone and the machine; only that of a whole model on weights and data too."""

    name = "calibrate"

    def needs(self, config: ConfigSchema) -> tuple[str, ...]:
        return ("train",) if config.latency.measure == "model" else ()

    def depends_on(self, run: Run) -> Mapping[str, Any]:
        config = run.config
        path, prior = config.latency.path, config.latency.prior
        depends_on = {
            "backbone": config.backbone.name,
            "choices": list(run.space.choices),
            "latency": {**build.plain(config.latency), "path": None, "prior": None},
            "prior": None if prior is None else path_digest(Path(prior)),
            "machine": run.machine() if path is None else path_digest(Path(path)),
            "lane": config.cluster.latency_lane,
        }
        if config.latency.measure == "model":
            depends_on["photos"] = run.data_fingerprint(run.search_set)
        return depends_on

    def execute(self, run: Run, folder: Path) -> Mapping[str, float]:
        predictor = build.latency_table(run.config)
        if predictor is None:
            config = build.calibration(run.config)
            predictor = calibrate_here(run, config, "calibrate: forward passes")
        elif predictor.setting.device != run.machine()["device"]:
            logger.warning(
                "  the latency table is of %s; the report measures here, on %s",
                predictor.setting.device, run.machine()["device"],
            )  # fmt: skip
        predictor.save(folder / PREDICTOR_FILE)
        return {
            "dense_ms": predictor.predict(run.space.dense),
            "sparsest_ms": predictor.predict(run.space.sparsest),
            "error_bar": predictor.error_bar,
            **predictor.scores,
        }

    def score(self, run: Run) -> Mapping[str, float]:
        return {}

    def remark(self, run: Run) -> str | None:
        return None
