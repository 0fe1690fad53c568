"""The front of a search, measured while it grows: where predictions are off, the table is refitted."""

import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from pipelines import build
from pipelines.context import Run
from pipelines.measuring import measure_vectors
from pipelines.stages.calibrate import PREDICTOR_FILE
from search.progress import SearchProgress
from sparsevit.latency import LatencyPredictor
from sparsevit.latency.machine import busy_warning
from sparsevit.latency.predictor import Measurement
from sparsevit.sparsity import SparsityVector

logger = logging.getLogger(__name__)
MAX_CHANGE = 0.1  # of the dense latency since the calibration, before it is worth a warning


class MeasuredFront:
    """The latency table of a search, and what was measured for its front.

    Both are kept in the search's folder, so that an interrupted search goes on with them. A table of
    another device is never refitted: nothing can be measured for it here.
    """

    def __init__(self, run: Run, folder: Path) -> None:
        self._run = run
        self._path = folder / PREDICTOR_FILE
        calibrated = run.results["calibrate"].folder / PREDICTOR_FILE
        self.predictor = LatencyPredictor.load(self._path if self._path.is_file() else calibrated)
        if not self._path.is_file():
            self.predictor.save(self._path)
        self.num_refits = int(self.predictor.scores.get("num_refits", 0))
        self._measured = {each.vector: each for each in self.predictor.measurements}
        here = run.machine()
        setting = self.predictor.setting
        is_here = setting.device == here["device"] and setting.num_threads in (0, here["threads"])
        self._can_measure = is_here or run.config.cluster.latency_lane is not None

    @property
    def every(self) -> int | None:
        """Evaluations between two measurements; None where there are none during the search."""
        search = self._run.config.search
        if search.deterministic and search.measure_every is not None:
            logger.info("  deterministic: the front is measured at the end, no table is refitted")
            return None
        return search.measure_every if self._can_measure else None

    def predict(self, vector: SparsityVector) -> float:
        """Milliseconds by the table as it is now."""
        return self.predictor.predict(vector)

    def details(self, vector: SparsityVector) -> Mapping[str, float]:
        """What was measured for a vector, by name; nothing if nothing was."""
        found = self._measured.get(vector)
        if found is None:
            return {}
        known = {
            "measured_ms": found.latency_ms,
            "measured_half_width": found.half_width,
            "energy_mj": found.energy_mj,
            "peak_mib": found.peak_mib,
        }
        return {name: value for name, value in known.items() if value is not None}

    def measure(self, progress: SearchProgress) -> bool:
        """Measure the members of the front that are not measured yet. Nothing else may run meanwhile.

        Returns:
            Whether the table was refitted, because a prediction was off by more than its error bar.
        """
        members = [member.vector for member in progress.front.members]
        new = [vector for vector in members if vector not in self._measured]
        if not new or not self._can_measure:
            return False
        config = self._run.config
        warning = busy_warning() if config.cluster.latency_lane is None else None
        if warning is not None:
            logger.warning("  warning: %s", warning)
        limits = build.calibration(config).limits
        label = f"search: measure {len(new)} members of the front"
        found = measure_vectors(self._run, "adapt", new, limits, label)
        for text in found.warnings:
            logger.warning("  warning: %s", text)
        dense = self._measured.get(self._run.space.dense)
        speed = (dense.latency_ms if dense else self.predictor.base_ms) / found.dense_ms
        if abs(speed - 1) > MAX_CHANGE:
            logger.warning(
                "  warning: the dense model takes %.4g ms, %.0f%% %s than when the device was calibrated; "
                "members are compared with it",
                found.dense_ms, 100 * abs(1 / speed - 1), "less" if speed > 1 else "more",
            )  # fmt: skip
        measured = [replace(each, latency_ms=speed * each.latency_ms) for each in found.measurements]
        off = [each for each in measured if self._is_off(each)]
        self._measured |= {each.vector: each for each in measured}
        is_refitted = bool(off) and not config.search.deterministic and self.predictor.prior is not None
        if is_refitted:
            before = self.predictor.error_bar
            self.num_refits += 1
            self.predictor = self.predictor.refitted(measured)
            logger.info(
                "  %d of %d new front members are off by more than ±%.1f%%: the latency table is refitted "
                "(now ±%.1f%%)",
                len(off), len(new), 100 * before, 100 * self.predictor.error_bar,
            )  # fmt: skip
        else:
            everything = (*self.predictor.measurements, *measured)
            self.predictor = replace(self.predictor, measurements=everything)
        scores = {**self.predictor.scores, "num_refits": float(self.num_refits)}
        self.predictor = replace(self.predictor, scores=scores)
        self.predictor.save(self._path)
        return is_refitted

    def _is_off(self, measured: Measurement) -> bool:
        error = abs(self.predictor.predict(measured.vector) / measured.latency_ms - 1)
        return error > self.predictor.error_bar + measured.half_width
