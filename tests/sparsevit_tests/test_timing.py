"""Timing to the digit: when calls of known latency are timed, and what is made of their times."""

import itertools
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from sparsevit.latency import timing
from sparsevit.latency.energy import EnergyMeter
from sparsevit.latency.timing import Timing, TimingLimits, Timings, time_interleaved, warm_up
from tests.sparsevit_tests.known_device import Clock

CPU = torch.device("cpu")


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def test_a_timing_in_closed_form() -> None:
    found = Timing((10.0, 12.0, 11.0, 11.0), 0.04)
    assert found.median_ms == 11
    assert found.noise == pytest.approx(1.2533 * 0.04 / 2)
    assert found.half_width == pytest.approx(1.96 * 1.2533 * 0.04 / 2)
    assert found.energy_mj is None


@pytest.mark.parametrize(("spread", "expected"), [(0.0, 2), (0.01, 2), (0.0102, 1), (0.2, 0)])
def test_an_outlier_is_five_deviations_off_and_at_least_5_percent(spread: float, expected: int) -> None:
    times = (10.0, 10.0, 10.0, 10.0, 10.0, 10.5, 10.505, 9.4)
    assert Timing(times, spread).num_outliers == expected


def test_a_run_in_closed_form() -> None:
    calls = (Timing((10.0,) * 4, 0.1), Timing((10.0, 10.0, 30.0), 0.0), Timing((7.0,), 0.02))
    found = Timings(calls, (10.0, 20.0, 99.0, 1.0, 99.0, 1.0, 30.0, 33.0, 33.0))
    assert found.reference_ms == 30
    assert found.drift == pytest.approx(33 / 15 - 1)
    assert found.outlier_share == pytest.approx(1 / 8)
    assert found.noise == pytest.approx(1.2533 * 0.02)
    assert Timings(calls, (10.0, 99.0, 8.0)).drift == pytest.approx(-0.2)


@pytest.mark.parametrize(
    ("last", "expected"),
    [
        (12.5, ["the device became 25% slower while it was measured: it is throttled, or busy with "]),
        (6.0, ["the device became 40% faster while it was measured: it is throttled, or busy with "]),
        (10.9, []),
        (9.1, []),
    ],
)
def test_a_drift_of_more_than_a_tenth_is_told(last: float, expected: list[str]) -> None:
    found = Timings((Timing((1.0,), 0.0),), (10.0, last)).warnings
    assert found == [warning + "something else" for warning in expected]


@pytest.mark.parametrize(
    ("times", "expected"),
    [
        ((10.0,), 0.0),
        ((10.0, 12.0), 1.4826 / 11 * 2 / 1.2),
        ((13.0, 10.0, 11.0), 1.4826 / 11 * 3 / 2.2),
    ],
)
def test_a_robust_deviation(times: tuple[float, ...], expected: float) -> None:
    assert timing._relative_mad(times) == pytest.approx(expected)


def test_a_time_is_divided_by_the_five_references_about_it() -> None:
    references = [4.0, 5.0, 6.0, 7.0, 8.0, 20.0, 9.0]
    samples = [[timing._Sample(10.0, number, None) for number in range(7)]]
    (found,) = timing._timings(samples, references)
    medians = (6, 6, 6, 7, 8, 8, 8)  # of references 1 to 5, or 2 to 6, or 3 to 7
    assert found.times_ms == pytest.approx([10 * 7 / median for median in medians])
    (found,) = timing._timings([[timing._Sample(10.0, 0, None), timing._Sample(10.0, 1, None)]], [4.0, 6.0])
    assert found.times_ms == pytest.approx([10, 10])  # both by the median of all there are


def test_a_spread_is_that_of_a_call_and_of_all_and_energy_is_a_mean() -> None:
    def samples(*pairs: tuple[float, float | None]) -> list[timing._Sample]:
        return [timing._Sample(elapsed, 0, spent) for elapsed, spent in pairs]

    found = timing._timings(
        [samples((10, 3.0), (12, None), (11, 5.0)), samples((20, None)), samples((5, 1), (5, 1), (6, 1))],
        [1.0],
    )
    own = 1.4826 / 11 * 3 / 2.2
    pooled = sorted([own, 0.0, 0.0])[1]
    assert [each.energy_mj for each in found] == [4.0, None, 1.0]
    assert found[0].spread == pytest.approx(math.sqrt((2 * own**2 + 4 * pooled**2) / 6))
    (alone,) = timing._timings([samples((10, None), (12, None), (11, None))], [1.0])
    assert alone.spread == pytest.approx(own)  # 2 of its own and 4 of the pool, which is its own too


def run(
    calls: list[Callable[[], None]], reference: Callable[[], None], limits: TimingLimits
) -> tuple[Timings, list[tuple[int, int]]]:
    progress: list[tuple[int, int]] = []
    found = time_interleaved(
        calls, reference, device=CPU, limits=limits, generator=torch.Generator().manual_seed(0),
        on_progress=lambda done, expected: progress.append((done, expected)),
    )  # fmt: skip
    return found, progress


def test_progress_expects_what_is_left(clock: Clock) -> None:
    """Three calls are sure after the least rounds, one is never."""
    calls = [clock.call(1.0), clock.call(1.0), clock.call(1.0), clock.call(1.0, 2.0, 4.0)]
    found, progress = run(calls, clock.call(1.0), TimingLimits(min_rounds=3, max_rounds=5))
    assert progress == [*((done, 12) for done in range(1, 13)), (13, 13), (14, 14)]
    assert [len(each.times_ms) for each in found.calls] == [3, 3, 3, 5]


def test_a_call_that_is_just_sure_is_not_timed_again(clock: Clock) -> None:
    def found(limits: TimingLimits) -> Timing:
        return run([clock.call(8.0, 9.0, 10.0)], clock.call(1.0), limits)[0].calls[0]

    limits = TimingLimits(found(TimingLimits.exactly(3)).half_width, max_rounds=9)
    assert len(found(limits).times_ms) == 3


@pytest.mark.parametrize(("max_seconds", "expected"), [(1.0, 1), (2.0, 2), (8.0, 4), (8.5, 4), (1e9, 7)])
def test_the_time_limit_is_looked_at_after_every_round(
    clock: Clock, max_seconds: float, expected: int
) -> None:
    """Rounds take 2, 4, 2, 4 … s, with the reference."""
    clock.now = 1000
    limits = TimingLimits(min_rounds=7, max_rounds=7, max_seconds=max_seconds)
    found, _ = run([clock.call(1.0, 3.0)], clock.call(1.0), limits)
    assert len(found.calls[0].times_ms) == expected


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        ([5, 5, 5, 4.95], 6),
        ([9, 9, 4, 4, 9, 9], 6),
        ([9, 9, 9, 5, 9, 9], 7),
        ([9, 9, 9, 8, 7, 6, 7, 7, 7], 9),
        ([0.95**k for k in range(60)], 30),
    ],
)
def test_warm_up_compares_three_calls_with_three(clock: Clock, seconds: list[float], expected: int) -> None:
    lasting = itertools.chain(seconds, itertools.repeat(seconds[-1]))

    def call() -> None:
        clock.now += next(lasting)

    times = warm_up(call, CPU)
    assert len(times) == expected
    assert times[:4] == pytest.approx([1000 * each for each in seconds[:4]])


def test_energy_of_a_long_call_is_the_mean_of_its_rounds(
    clock: Clock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As long as ten steps of the counter: no calls are made for the energy alone."""
    zone = tmp_path / "intel-rapl:0"
    zone.mkdir()
    counter = zone / "energy_uj"
    counter.write_text("0")
    meter = EnergyMeter(CPU, tmp_path)
    meter.step_s = 1
    monkeypatch.setattr(timing, "EnergyMeter", lambda device: meter)
    spent = iter([3000, 5000, 10_000])

    def call() -> None:
        clock.now += 10
        counter.write_text(str(int(counter.read_text()) + next(spent)))

    def disturbing() -> None:
        clock.now += 10
        counter.write_text(str(int(counter.read_text()) + 77_000))

    found, _ = run([call], disturbing, TimingLimits.exactly(3))
    assert found.calls[0].energy_mj == pytest.approx(6)
    assert next(spent, None) is None


@pytest.mark.parametrize(
    ("limits", "expected"),
    [
        (TimingLimits(), (0.02, 3, 12, None)),
        (TimingLimits.exactly(4), (0.02, 4, 4, None)),
        (TimingLimits(min_rounds=1, max_rounds=1), (0.02, 1, 1, None)),
    ],
)
def test_limits(limits: TimingLimits, expected: tuple[object, ...]) -> None:
    assert (limits.max_half_width, limits.min_rounds, limits.max_rounds, limits.max_seconds) == expected


def test_a_half_width_of_one_is_none() -> None:
    with pytest.raises(ValueError, match="max_half_width lies between 0 and 1, got 1"):
        TimingLimits(max_half_width=1.0)
