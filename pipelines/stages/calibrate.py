"""Stage 3: measure the device and fit the latency predictor."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipelines import build
from pipelines.context import Run
from pipelines.progress import progress_bar
from sparsevit.latency.calibration import calibrate, num_calls

PREDICTOR_FILE = "latency.json"


class Calibrate:
    """Latency depends on the backbone and the machine, not on weights or data."""

    name = "calibrate"
    needs: tuple[str, ...] = ()

    def depends_on(self, run: Run) -> Mapping[str, Any]:
        return {
            "backbone": run.config.backbone.name,
            "choices": list(run.space.choices),
            "latency": build.plain(run.config.latency),
            "machine": run.machine(),
        }

    def execute(self, run: Run, folder: Path) -> Mapping[str, float]:
        config = build.calibration(run.config)
        backbone = build.backbone(run.config).to(run.device)
        with progress_bar(num_calls(run.space, config), "calibrate: forward passes", unit="pass") as advance:
            predictor = calibrate(backbone, run.config.backbone.name, run.space, config, advance)
        predictor.save(folder / PREDICTOR_FILE)
        return {
            "dense_ms": predictor.predict(run.space.dense),
            "sparsest_ms": predictor.predict(run.space.sparsest),
            **predictor.scores,
        }

    def score(self, run: Run) -> Mapping[str, float]:
        return {}
