"""Calibrate a device: measure whole forward passes, fit the predictor, score it on others."""

import copy
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial

import torch

from sparsevit.backbone import SparseSwin
from sparsevit.data.order import seeded
from sparsevit.latency.machine import describe_machine, device_name
from sparsevit.latency.macs import count_macs
from sparsevit.latency.predictor import LatencyPredictor, LatencySetting, fit_line, score_predictions
from sparsevit.latency.timing import time_interleaved_ms
from sparsevit.sparsity import SparsitySpace, SparsityVector

MIN_NOISE = 0.01  # of a latency that repeats better than the additive model fits it
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class CalibrationConfig:
    """How much to measure.

    Attributes:
        num_vectors: vectors that the fit sees, one-gene sweeps included.
        num_held_out: random vectors that only the scores see.
        num_rounds: forward passes per vector.
    """

    batch_size: int = 1
    image_size: tuple[int, int] = (672, 672)
    dtype: str = "fp32"
    num_vectors: int = 80
    num_held_out: int = 30
    num_rounds: int = 5
    seed: int = 0

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {sorted(DTYPES)}, got {self.dtype!r}")
        if min(self.batch_size, self.num_rounds, *self.image_size) < 1 or self.num_held_out < 2:
            raise ValueError(f"batch, image size and rounds start at 1, held-out vectors at 2: {self}")


def calibrate(
    backbone: SparseSwin,
    name: str,
    space: SparsitySpace,
    config: CalibrationConfig,
    on_call: Callable[[], None] = lambda: None,
) -> LatencyPredictor:
    """Measure `backbone` on the device it is on, and fit the additive predictor.

    Args:
        name: of the backbone, for the record.
        on_call: called `num_calls` times.
    """
    generator = seeded(config.seed)
    design = design_vectors(space, config.num_vectors, generator)
    held_out = [space.draw(generator) for _ in range(config.num_held_out)]
    device = next(backbone.parameters()).device
    latencies, noise = measure_ms(backbone, [*design, *held_out], config, on_call)
    fitted, unseen = latencies[: len(design)], latencies[len(design) :]
    macs = partial(count_macs, backbone.config, config.image_size)
    predictor = LatencyPredictor.fit(
        space, design, fitted, describe_setting(name, config, device), macs=macs, noise=max(noise, MIN_NOISE)
    )
    if predictor.predict(space.sparsest) <= 0:
        raise ValueError(
            f"the measurements contradict each other (a median varies by {noise:.0%}): the machine is busy "
            "with something else; calibrate again when it is idle, or raise latency.num_rounds"
        )
    scores = score_predictions([predictor.predict(vector) for vector in held_out], unseen)
    intercept, slope = fit_line([macs(vector) for vector in design], fitted)
    baseline = score_predictions([intercept + slope * macs(vector) for vector in held_out], unseen)
    scores |= {f"macs_{key}": value for key, value in baseline.items()}
    scores |= {
        "repeat_noise": noise,
        "num_measurements": float(config.num_rounds * len(latencies)),
    }
    return replace(
        predictor,
        scores=scores,
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        provenance=describe_machine(device),
    )


def validate(
    predictor: LatencyPredictor,
    backbone: SparseSwin,
    config: CalibrationConfig,
    on_call: Callable[[], None] = lambda: None,
) -> dict[str, float]:
    """Score a predictor on `num_held_out` random vectors, measured now on the device `backbone` is on.

    Args:
        config: of what the predictor is about, with a seed that its calibration did not have.
        on_call: called after each of ``num_rounds · num_held_out`` forward passes.

    Returns:
        As `score_predictions`, and ``repeat_noise``: the relative standard error of a measured latency.
    """
    generator = seeded(config.seed)
    vectors = [predictor.space.draw(generator) for _ in range(config.num_held_out)]
    latencies, noise = measure_ms(backbone, vectors, config, on_call)
    scores = score_predictions([predictor.predict(vector) for vector in vectors], latencies)
    return scores | {"repeat_noise": noise}


def num_calls(space: SparsitySpace, config: CalibrationConfig) -> int:
    """How often `calibrate` calls back."""
    return config.num_rounds * (max(config.num_vectors, len(_sweeps(space))) + config.num_held_out)


def design_vectors(
    space: SparsitySpace, num_vectors: int, generator: torch.Generator
) -> list[SparsityVector]:
    """Vectors to fit on: every gene swept alone, the uniform ones, random ones for the rest."""
    vectors = _sweeps(space)
    while len(vectors) < num_vectors:
        vectors.append(space.draw(generator))
    return vectors


def measure_ms(
    backbone: SparseSwin,
    vectors: Sequence[SparsityVector],
    config: CalibrationConfig,
    on_call: Callable[[], None] = lambda: None,
) -> tuple[list[float], float]:
    """Median milliseconds of the forward pass at every vector, and the relative noise of a median.

    The noise is the median over vectors of the standard error of their median.
    """
    device = next(backbone.parameters()).device
    dtype = DTYPES[config.dtype]
    measured = copy.deepcopy(backbone).eval().to(dtype)
    generator = seeded(config.seed, 1)
    images = torch.randn(config.batch_size, 3, *config.image_size, generator=generator).to(device, dtype)

    def forward(vector: SparsityVector) -> Callable[[], object]:
        return lambda: measured(images, vector)

    with torch.inference_mode():
        times, _ = time_interleaved_ms(
            [forward(vector) for vector in vectors],
            forward(backbone.space.dense),
            device=device,
            num_rounds=config.num_rounds,
            generator=generator,
            on_call=on_call,
        )
    noise = [
        1.2533 * statistics.stdev(row) / statistics.mean(row) / len(row) ** 0.5
        for row in times
        if len(row) > 1
    ]
    return [statistics.median(row) for row in times], statistics.median(noise) if noise else 0.0


def describe_setting(name: str, config: CalibrationConfig, device: torch.device) -> LatencySetting:
    return LatencySetting(
        device=device_name(device),
        num_threads=torch.get_num_threads() if device.type == "cpu" else 0,
        torch_version=torch.__version__,
        dtype=config.dtype,
        batch_size=config.batch_size,
        image_size=config.image_size,
        backbone=name,
    )


def _sweeps(space: SparsitySpace) -> list[SparsityVector]:
    """One gene at every choice, the genes after it in its stage raised as far as they must be."""
    sweeps = [space.uniform(choice) for choice in space.choices]
    start = 0
    for num_pairs in space.group_sizes:
        for gene in range(start, start + num_pairs):
            for choice in space.choices[1:]:
                ratios = list(space.dense)
                ratios[gene : start + num_pairs] = [choice] * (start + num_pairs - gene)
                sweeps.append(SparsityVector(tuple(ratios)))
        start += num_pairs
    return list(dict.fromkeys(sweeps))
