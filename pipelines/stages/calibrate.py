"""Stage 3: measure the device and fit the latency predictor, or take a table that was made elsewhere."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipelines import build
from pipelines.artifacts import path_digest
from pipelines.context import Run
from pipelines.progress import progress_bar
from sparsevit.latency import LatencyPredictor
from sparsevit.latency.calibration import calibrate, num_calls

logger = logging.getLogger(__name__)
PREDICTOR_FILE = "latency.json"


class Calibrate:
    """Latency depends on the backbone and the machine, not on weights or data."""

    name = "calibrate"
    needs: tuple[str, ...] = ()

    def depends_on(self, run: Run) -> Mapping[str, Any]:
        path = run.config.latency.path
        return {
            "backbone": run.config.backbone.name,
            "choices": list(run.space.choices),
            "latency": {**build.plain(run.config.latency), "path": None},
            "machine": run.machine() if path is None else path_digest(Path(path)),
        }

    def execute(self, run: Run, folder: Path) -> Mapping[str, float]:
        predictor = build.latency_table(run.config)
        if predictor is None:
            predictor = self._measure(run)
        elif predictor.setting.device != run.machine()["device"]:
            logger.warning(
                "  the latency table is of %s; the report measures here, on %s",
                predictor.setting.device, run.machine()["device"],
            )  # fmt: skip
        predictor.save(folder / PREDICTOR_FILE)
        return {
            "dense_ms": predictor.predict(run.space.dense),
            "sparsest_ms": predictor.predict(run.space.sparsest),
            **predictor.scores,
        }

    def _measure(self, run: Run) -> LatencyPredictor:
        config = build.calibration(run.config)
        backbone = build.backbone(run.config).to(run.device)
        with progress_bar(num_calls(run.space, config), "calibrate: forward passes", unit="pass") as advance:
            return calibrate(backbone, run.config.backbone.name, run.space, config, advance)

    def score(self, run: Run) -> Mapping[str, float]:
        return {}
