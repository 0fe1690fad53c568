"""Calibrate a device: measure whole forward passes, fit the predictor, score it on others."""

import itertools
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import partial

import torch

from sparsevit.data.order import seeded
from sparsevit.latency.fitting import (
    AdditiveFit,
    StepPrior,
    fit_additive,
    prior_from_macs,
    prior_from_table,
)
from sparsevit.latency.machine import describe_machine, device_name, naming_lost_device
from sparsevit.latency.macs import count_macs
from sparsevit.latency.memory import peak_mib
from sparsevit.latency.predictor import MIN_NOISE, LatencyPredictor, LatencySetting, Measurement
from sparsevit.latency.scores import error_bar, fit_line, score_predictions
from sparsevit.latency.subject import Subject
from sparsevit.latency.timing import OnProgress, TimingLimits, time_interleaved
from sparsevit.sparsity import SparsitySpace, SparsityVector

MAX_WITH_PRIOR = 15
NUM_FOLDS = 5
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class CalibrationConfig:
    """How much to measure.

    Attributes:
        num_vectors: vectors that the fit sees.
        num_held_out: random vectors that only the scores see.
        limits: how often each is timed.
    """

    num_vectors: int = 110
    num_held_out: int = 50
    limits: TimingLimits = field(default_factory=TimingLimits)
    seed: int = 0

    def __post_init__(self) -> None:
        if self.num_vectors < 7:
            raise ValueError(
                f"a fit needs at least 7 vectors: both ends, one of every stage, one between; got "
                f"{self.num_vectors}"
            )
        if self.num_held_out < 2 and self.num_held_out != 0:
            raise ValueError(f"held-out vectors: none, or at least 2; got {self.num_held_out}")


@dataclass(frozen=True)
class Measured:
    """What an interleaved run found at some vectors.

    Attributes:
        noise: median relative standard error of the latencies.
        warnings: what makes them doubtful, in words.
    """

    measurements: tuple[Measurement, ...]
    dense_ms: float
    noise: float
    drift: float
    outlier_share: float
    warnings: tuple[str, ...]

    @property
    def latencies_ms(self) -> list[float]:
        return [each.latency_ms for each in self.measurements]


def calibrate(
    subject: Subject,
    name: str,
    space: SparsitySpace,
    config: CalibrationConfig,
    on_progress: OnProgress = lambda done, expected: None,
    *,
    prior: LatencyPredictor | None = None,
) -> LatencyPredictor:
    """Measure a subject and fit the additive predictor.

    Args:
        name: of the backbone, for the record.
        prior: the table of another device, dtype, batch or size: with it `MAX_WITH_PRIOR` vectors do.

    Raises:
        ValueError: if `prior` has another space, the batch does not fit into memory, the device goes away,
            or the measurements contradict each other.
    """
    if prior is not None and prior.space != space:
        raise ValueError(
            f"the table to start from has depths {list(prior.space.depths)} and choices "
            f"{list(prior.space.choices)}, this backbone {list(space.depths)} and {list(space.choices)}"
        )
    generator = seeded(config.seed)
    design = design_vectors(space, config.num_vectors, generator)
    held_out = [space.draw(generator) for _ in range(config.num_held_out)]
    measured = measure(subject, [*design, *held_out], config.limits, config.seed, on_progress)
    for warning in measured.warnings:
        logger.warning("warning: %s", warning)
    fitted = measured.latencies_ms[: len(design)]
    macs = partial(count_macs, subject.config, subject.image_size)

    fit_to = partial(_fit, space, prior=prior, macs=macs, noise=measured.noise)
    steps, fit = fit_to(design, fitted)
    measurements = [
        *measured.measurements[: len(design)],
        *(replace(each, is_held_out=True) for each in measured.measurements[len(design) :]),
    ]
    unseen = measured.latencies_ms[len(design) :]
    scores: dict[str, float] = {}
    if unseen:
        predicted = [fit.predict(space, vector) for vector in held_out]
        scores = score_predictions(predicted, unseen)
        intercept, slope = fit_line([macs(vector) for vector in design], fitted)
        baseline = score_predictions([intercept + slope * macs(vector) for vector in held_out], unseen)
        scores |= {f"macs_{key}": value for key, value in baseline.items()}
        bar = error_bar(predicted, unseen)
    else:
        bar = error_bar(_cross_validated(space, design, fitted, fit_to), fitted)
    try:
        return LatencyPredictor(
            space, fit.base_ms, fit.terms_ms,
            describe_setting(name, subject), bar, steps, tuple(measurements),
            scores | {
                "repeat_noise": measured.noise,
                "drift": measured.drift,
                "outlier_share": measured.outlier_share,
                "num_measurements": float(sum(each.num_repeats for each in measurements)),
            },
            datetime.now(UTC).isoformat(timespec="seconds"),
            describe_machine(subject.device),
        )  # fmt: skip
    except ValueError as error:
        raise ValueError(
            f"the measurements contradict each other ({error}; a median varies by {measured.noise:.0%}): the "
            "machine is busy with something else. Calibrate again when it is idle, or measure more vectors"
        ) from None


def validate(
    predictor: LatencyPredictor,
    subject: Subject,
    config: CalibrationConfig,
    on_progress: OnProgress = lambda done, expected: None,
) -> dict[str, float]:
    """Score a predictor on `num_held_out` random vectors, measured now.

    Args:
        config: with a seed that the calibration did not have.

    Returns:
        As `score_predictions`; the same of latencies relative to the dense one (`…_relative_to_dense`),
        which hold where the device as a whole is faster or slower than it was; the dense latency, measured
        and predicted; the share within the table's own error bar; and ``repeat_noise``: the relative
        standard error of a measured latency.
    """
    generator = seeded(config.seed)
    vectors = [predictor.space.draw(generator) for _ in range(config.num_held_out)]
    measured = measure(subject, vectors, config.limits, config.seed, on_progress)
    for warning in measured.warnings:
        logger.warning("warning: %s", warning)
    predicted = [predictor.predict(vector) for vector in vectors]
    scores = score_predictions(predicted, measured.latencies_ms)
    predicted_dense_ms = predictor.predict(predictor.space.dense)
    speed = predicted_dense_ms / measured.dense_ms
    relative = score_predictions([each / speed for each in predicted], measured.latencies_ms)
    if abs(1 / speed - 1) > predictor.error_bar:
        logger.warning(
            "warning: the dense forward pass takes %.4g ms, %.0f%% %s than the table says: the device is %s "
            "than when it was calibrated. Relative to dense, predictions are off by %.1f%% (RMSPE)",
            measured.dense_ms, 100 * abs(1 / speed - 1), "less" if speed > 1 else "more",
            "faster" if speed > 1 else "slower", 100 * relative["rmspe"],
        )  # fmt: skip
    inside = [
        abs(p / m - 1) <= predictor.error_bar for p, m in zip(predicted, measured.latencies_ms, strict=True)
    ]
    return scores | {
        "rmspe_relative_to_dense": relative["rmspe"],
        "within_5_percent_relative_to_dense": relative["within_5_percent"],
        "dense_ms": measured.dense_ms,
        "predicted_dense_ms": predicted_dense_ms,
        "within_error_bar": sum(inside) / len(inside),
        "repeat_noise": measured.noise,
        "drift": measured.drift,
        "outlier_share": measured.outlier_share,
    }


def measure(
    subject: Subject,
    vectors: Sequence[SparsityVector],
    limits: TimingLimits,
    seed: int = 0,
    on_progress: OnProgress = lambda done, expected: None,
) -> Measured:
    """Time the forward passes at some vectors side by side, in random order, against the dense one.

    Raises:
        ValueError: if the batch does not fit into memory, naming one that does, or the device goes away.
    """
    distinct = list(dict.fromkeys(vectors))
    dense = SparsityVector((0.0,) * len(distinct[0]))
    with torch.inference_mode(), naming_lost_device(subject.device):
        made = {vector: subject.call_of(vector) for vector in dict.fromkeys([dense, *distinct])}
        reference, calls = made[dense], [made[vector] for vector in distinct]
        # The first call of each, unused to it; a graph has its memory before.
        peaks = [
            None if subject.runtime == "cuda_graph" else peak_mib(call, subject.device) for call in calls
        ]
        timings = time_interleaved(
            calls, reference, device=subject.device, limits=limits, generator=seeded(seed, 2),
            on_progress=on_progress,
        )  # fmt: skip
    by_vector = {
        vector: Measurement(
            vector,
            timing.median_ms,
            timing.half_width,
            len(timing.times_ms),
            timing.num_outliers,
            energy_mj=timing.energy_mj,
            peak_mib=peak,
        )
        for vector, timing, peak in zip(distinct, timings.calls, peaks, strict=True)
    }
    return Measured(
        tuple(by_vector[vector] for vector in vectors), timings.reference_ms, timings.noise, timings.drift,
        timings.outlier_share, tuple(timings.warnings),
    )  # fmt: skip


def design_vectors(
    space: SparsitySpace, num_vectors: int, generator: torch.Generator
) -> list[SparsityVector]:
    """Vectors to fit on: both ends, every stage alone, one between; as many sweeps as fit; random ones.

    A sweep raises one gene to every choice, the genes after it in its stage as far as they must.
    """
    first = [space.dense, space.sparsest, *_stages_alone(space), space.uniform(space.nearest(0.4))]
    sweeps = _sweeps(space)
    vectors = list(dict.fromkeys([*first, *(sweeps if num_vectors >= len(sweeps) + len(first) else [])]))
    while len(vectors) < num_vectors:
        vectors.append(space.draw(generator))
    return vectors


def describe_setting(name: str, subject: Subject) -> LatencySetting:
    """What a table of this subject, measured here and now, holds for."""
    return LatencySetting(
        device=device_name(subject.device),
        num_threads=torch.get_num_threads() if subject.device.type == "cpu" else 0,
        torch_version=torch.__version__,
        runtime=subject.runtime,
        dtype=subject.dtype,
        batch_size=subject.batch_size,
        image_size=subject.image_size,
        backbone=name,
        measures=subject.measures,
    )


def _fit(
    space: SparsitySpace,
    vectors: Sequence[SparsityVector],
    latencies_ms: Sequence[float],
    *,
    prior: LatencyPredictor | None,
    macs: Callable[[SparsityVector], float],
    noise: float,
) -> tuple[StepPrior, AdditiveFit]:
    """From the table of another setting if there is one, else from the MACs."""
    noise = max(noise, MIN_NOISE)
    if prior is None:
        steps = prior_from_macs(space, vectors, latencies_ms, macs)
    else:
        steps = prior_from_table(space, prior.terms_ms, vectors, latencies_ms, noise)
    return steps, fit_additive(space, vectors, latencies_ms, steps, noise)


def _cross_validated(
    space: SparsitySpace,
    vectors: Sequence[SparsityVector],
    latencies_ms: Sequence[float],
    fit_to: Callable[..., tuple[StepPrior, AdditiveFit]],
) -> list[float]:
    """A prediction of every latency by a fit that has not seen it, nor the others of its fold."""
    predicted = [0.0] * len(vectors)
    for fold in range(NUM_FOLDS):
        seen = [index for index in range(len(vectors)) if index % NUM_FOLDS != fold]
        _, fit = fit_to([vectors[index] for index in seen], [latencies_ms[index] for index in seen])
        for index in range(fold, len(vectors), NUM_FOLDS):
            predicted[index] = fit.predict(space, vectors[index])
    return predicted


def _stages_alone(space: SparsitySpace) -> list[SparsityVector]:
    """Every stage as sparse as it can be, the others dense."""
    ends = space.split(space.dense.ratios), space.split(space.sparsest.ratios)
    return [
        SparsityVector(tuple(itertools.chain(*ends[0][:stage], ends[1][stage], *ends[0][stage + 1 :])))
        for stage in range(len(space.group_sizes))
    ]


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
