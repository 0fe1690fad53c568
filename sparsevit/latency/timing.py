"""Timing of calls side by side: warmed up, interleaved, drift divided out, repeated until sure."""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch

from sparsevit.latency.energy import EnergyMeter

Call = Callable[[], object]
OnProgress = Callable[[int, int], None]
"""Called with the calls that are done and those that are expected in all."""

MEDIAN_OVER_MEAN = 1.2533  # standard error of a median of normal values against that of their mean
SIGMA_OVER_MAD = 1.4826
Z_95 = 1.96
MAX_WARM_UP = 30
REFERENCE_EVERY = 3  # calls
NUM_NEAREST = 5  # references that a time is compared with
MAX_DRIFT = 0.1
LONG_IN_STEPS = 10  # of the energy counter: from there on, one call tells what it used


@dataclass(frozen=True)
class TimingLimits:
    """When a latency has been measured often enough.

    Attributes:
        max_half_width: relative half-width of the 95 % confidence interval of a median.
        min_rounds, max_rounds: times that every call is timed.
        max_seconds: for all calls together; the round that is under way is finished. None: no limit.

    Raises:
        ValueError: for a number out of range.
    """

    max_half_width: float = 0.02
    min_rounds: int = 3
    max_rounds: int = 12
    max_seconds: float | None = None

    def __post_init__(self) -> None:
        if not 1 <= self.min_rounds <= self.max_rounds:
            raise ValueError(
                f"rounds: 1 ≤ min_rounds ≤ max_rounds, got {self.min_rounds} and {self.max_rounds}"
            )
        if not 0 < self.max_half_width < 1:
            raise ValueError(f"max_half_width lies between 0 and 1, got {self.max_half_width}")
        if self.max_seconds is not None and not self.max_seconds > 0:
            raise ValueError(f"the time limit must be positive, got {self.max_seconds} s")

    @classmethod
    def exactly(cls, num_rounds: int) -> "TimingLimits":
        """So many rounds, whatever comes out."""
        return cls(min_rounds=num_rounds, max_rounds=num_rounds)


@dataclass(frozen=True)
class Timing:
    """How long a call takes.

    Attributes:
        times_ms: every time, the machine's drift divided out.
        spread: relative standard deviation of a single time, without outliers.
        energy_mj: of one call, where the device tells.
    """

    times_ms: tuple[float, ...]
    spread: float
    energy_mj: float | None = None

    @property
    def median_ms(self) -> float:
        return float(statistics.median(self.times_ms))

    @property
    def noise(self) -> float:
        """Relative standard error of the median."""
        return float(MEDIAN_OVER_MEAN * self.spread / len(self.times_ms) ** 0.5)

    @property
    def half_width(self) -> float:
        """Of the 95 % confidence interval of the median, relative to it."""
        return Z_95 * self.noise

    @property
    def num_outliers(self) -> int:
        """Times more than five standard deviations from the median."""
        bound = 5 * max(self.spread, 0.01) * self.median_ms
        return sum(abs(each - self.median_ms) > bound for each in self.times_ms)


@dataclass(frozen=True)
class Timings:
    """What one interleaved run found: a `Timing` per call, and how the machine did meanwhile.

    Attributes:
        references_ms: raw times of the reference, in order.
    """

    calls: tuple[Timing, ...]
    references_ms: tuple[float, ...]

    @property
    def reference_ms(self) -> float:
        return statistics.median(self.references_ms)

    @property
    def drift(self) -> float:
        """By what share the reference became slower from the first to the last quarter of the run."""
        quarter = max(1, len(self.references_ms) // 4)
        first, last = self.references_ms[:quarter], self.references_ms[-quarter:]
        return statistics.median(last) / statistics.median(first) - 1

    @property
    def noise(self) -> float:
        """Median over the calls of the relative standard error of their medians."""
        return statistics.median(timing.noise for timing in self.calls)

    @property
    def outlier_share(self) -> float:
        num_times = sum(len(timing.times_ms) for timing in self.calls)
        return sum(timing.num_outliers for timing in self.calls) / num_times

    @property
    def warnings(self) -> list[str]:
        """What makes these times doubtful, in words."""
        if abs(self.drift) <= MAX_DRIFT:
            return []
        change = "slower" if self.drift > 0 else "faster"
        return [
            f"the device became {abs(self.drift):.0%} {change} while it was measured: it is throttled, or "
            "busy with something else"
        ]


def time_once_ms(call: Call, device: torch.device) -> float:
    """Milliseconds of one call, the device's queue drained before and after."""
    synchronize(device)
    start = time.perf_counter()
    call()
    synchronize(device)
    return 1000 * (time.perf_counter() - start)


def time_interleaved(
    calls: Sequence[Call],
    reference: Call,
    *,
    device: torch.device,
    limits: TimingLimits,
    generator: torch.Generator,
    on_progress: OnProgress = lambda done, expected: None,
) -> Timings:
    """Time all calls side by side, in another random order each round, until every median is sure.

    The machine's speed drifts, so between the calls `reference` is timed, and every time is divided by the
    median of the references nearest to it and multiplied by that of all. A call that is sure enough is not
    timed again.
    """
    warm_up(reference, device)
    meter = EnergyMeter(device)
    samples: list[list[_Sample]] = [[] for _ in calls]
    references: list[float] = []
    open_calls = list(range(len(calls)))
    num_done, start = 0, time.monotonic()
    while open_calls:
        order = torch.randperm(len(open_calls), generator=generator).tolist()
        num_rounds = len(samples[open_calls[0]])
        expected = num_done + len(open_calls) * max(1, limits.min_rounds - num_rounds)
        for position, index in enumerate(open_calls[place] for place in order):
            if position % REFERENCE_EVERY == 0:
                references.append(time_once_ms(reference, device))
            before_mj = meter.read_mj()
            elapsed_ms = time_once_ms(calls[index], device)
            spent_mj = None if before_mj is None else (meter.read_mj() or before_mj) - before_mj
            samples[index].append(_Sample(elapsed_ms, len(references) - 1, spent_mj))
            num_done += 1
            on_progress(num_done, expected)
        num_rounds += 1
        is_late = limits.max_seconds is not None and time.monotonic() - start > limits.max_seconds
        timings = _timings(samples, references)
        if num_rounds >= limits.max_rounds or is_late:
            break
        if num_rounds >= limits.min_rounds:
            open_calls = [index for index in open_calls if timings[index].half_width > limits.max_half_width]
    timings = _timings(samples, references)
    for index, timing in enumerate(timings):
        if timing.energy_mj is not None and timing.median_ms < LONG_IN_STEPS * 1000 * meter.step_s:
            energy_mj = meter.measure_mj(partial(time_once_ms, calls[index], device))
            timings[index] = replace(timing, energy_mj=energy_mj)
    return Timings(tuple(timings), tuple(references))


def warm_up(call: Call, device: torch.device) -> list[float]:
    """Call until three times in a row are no faster than the three before by more than 2 %.

    Returns:
        Milliseconds of every call, at most `MAX_WARM_UP`.
    """
    times = [time_once_ms(call, device) for _ in range(6)]
    while len(times) < MAX_WARM_UP and min(times[-3:]) < 0.98 * min(times[-6:-3]):
        times.append(time_once_ms(call, device))
    return times


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what it was given."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


@dataclass(frozen=True)
class _Sample:
    """One timed call: the reference before it by number, and the energy where the device tells."""

    elapsed_ms: float
    reference: int
    spent_mj: float | None


def _timings(samples: Sequence[Sequence[_Sample]], references_ms: Sequence[float]) -> list[Timing]:
    """Drift divided out. Few times say little about their spread: every call's is taken with all others'."""
    overall = statistics.median(references_ms)
    last = len(references_ms) - NUM_NEAREST
    nearby = []
    for number in range(len(references_ms)):
        first = max(0, min(number - NUM_NEAREST // 2, last))
        nearby.append(statistics.median(references_ms[first : first + NUM_NEAREST]))
    times = [[each.elapsed_ms * overall / nearby[each.reference] for each in of_call] for of_call in samples]
    spreads = [_relative_mad(row) for row in times]
    pooled = statistics.median(spreads)
    return [
        Timing(
            tuple(row),
            ((len(row) - 1) * own**2 + 4 * pooled**2) ** 0.5 / (len(row) + 3) ** 0.5,
            statistics.fmean(spent)
            if (spent := [each.spent_mj for each in of_call if each.spent_mj is not None])
            else None,
        )
        for row, own, of_call in zip(times, spreads, samples, strict=True)
    ]


def _relative_mad(times: Sequence[float]) -> float:
    """A robust standard deviation, relative to the median: few disturbed times do not count."""
    if len(times) < 2:
        return 0.0
    median = statistics.median(times)
    deviation = statistics.median(abs(each - median) for each in times)
    # Of few values it is too small by about this factor (Croux and Rousseeuw 1992).
    return SIGMA_OVER_MAD * deviation / median * len(times) / (len(times) - 0.8)
