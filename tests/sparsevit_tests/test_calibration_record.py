"""What calibration and validation record and say, given what was timed."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from typing import Any

import pytest
import torch

from sparsevit import SparsitySpace, SparsityVector, SwinConfig
from sparsevit.data.order import seeded
from sparsevit.latency import LatencyPredictor, calibration
from sparsevit.latency.calibration import CalibrationConfig, calibrate, measure, validate
from sparsevit.latency.fitting import fit_additive, prior_from_macs
from sparsevit.latency.machine import describe_machine, device_name
from sparsevit.latency.macs import count_macs
from sparsevit.latency.predictor import LatencySetting
from sparsevit.latency.scores import error_bar
from sparsevit.latency.subject import Subject
from sparsevit.latency.timing import Timing, TimingLimits, Timings

SHAPE = SwinConfig(embed_dim=8, depths=(2, 2), num_heads=(1, 2), window_size=4)
SPACE = SparsitySpace(SHAPE.depths, choices=(0.0, 0.4, 0.8))
CPU = torch.device("cpu")
REFERENCES = (40.0, 60.0, 60.0, 60.0)  # half as slow again as at first

Law = Callable[[SparsityVector], float]


def law(vector: SparsityVector) -> float:
    first, second = map(float, vector)
    return 60 - 20 * first - 25 * second**2 + 9 * first * second


def subject(runtime: str = "eager") -> Subject:
    def call_of(vector: SparsityVector) -> Callable[[], object]:
        return partial(list, [vector])  # what time_interleaved is given tells its vector

    return Subject("backbone", SHAPE, 3, (64, 96), "bf16", runtime, CPU, call_of)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What timing was asked for; it answers by `law`, with other words by what is put under ``law``."""
    found: dict[str, Any] = {"law": law, "references": (60.0,) * 4, "spread": 0.1}

    def time_interleaved(
        calls: Sequence[Callable[[], list[SparsityVector]]], reference: Callable[[], list[SparsityVector]],
        **options: Any,
    ) -> Timings:  # fmt: skip
        found.update(options, reference=reference()[0])
        latencies = [found["law"](call()[0]) for call in calls]
        return Timings(
            tuple(Timing((ms, ms, ms, 3 * ms), found["spread"], ms / 10) for ms in latencies),
            found["references"],
        )

    monkeypatch.setattr(calibration, "time_interleaved", time_interleaved)
    monkeypatch.setattr(calibration, "peak_mib", lambda call, device: 5.0 + len(call()))
    return found


def test_a_measurement_has_all_that_was_found(asked: dict[str, Any]) -> None:
    vectors, limits = [SPACE.sparsest, SPACE.dense, SPACE.sparsest], TimingLimits.exactly(4)
    asked["references"] = REFERENCES
    found = measure(subject(), vectors, limits, seed=7, on_progress=print)
    assert (asked["device"], asked["limits"], asked["on_progress"]) == (CPU, limits, print)
    assert asked["generator"].initial_seed() == seeded(7, 2).initial_seed()
    assert asked["reference"] == SPACE.dense
    assert [each.vector for each in found.measurements] == vectors
    first = found.measurements[0]
    assert first.latency_ms == law(SPACE.sparsest)
    assert first.half_width == pytest.approx(1.96 * 1.2533 * 0.1 / 2)
    assert (first.num_repeats, first.num_outliers, first.is_held_out) == (4, 1, False)
    assert (first.energy_mj, first.peak_mib) == (first.latency_ms / 10, 6.0)
    assert (found.dense_ms, found.drift) == (60, 0.5)
    assert found.noise == pytest.approx(1.2533 * 0.1 / 2)
    assert found.outlier_share == 0.25
    assert found.warnings == (
        "the device became 50% slower while it was measured: it is throttled, or busy with something else",
    )
    measure(subject(), vectors, limits)
    assert asked["generator"].initial_seed() == seeded(0, 2).initial_seed()


def test_a_graph_has_its_memory_before_its_first_call(asked: dict[str, Any]) -> None:
    (found,) = measure(subject("cuda_graph"), [SPACE.sparsest], TimingLimits.exactly(1)).measurements
    assert found.peak_mib is None


def test_the_device_that_is_lost_is_named(asked: dict[str, Any]) -> None:
    def lost(vector: SparsityVector) -> float:
        raise torch.AcceleratorError("gone")

    asked["law"] = lost
    with pytest.raises(ValueError, match="the device cpu stopped answering while it was measured: gone"):
        measure(subject(), [SPACE.dense], TimingLimits.exactly(1))


def test_a_table_records_its_setting_its_machine_and_how_it_was_measured(
    asked: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    asked["references"] = REFERENCES
    before = datetime.now(UTC).replace(microsecond=0)
    table = calibrate(subject("compiled"), "tiny", SPACE, CalibrationConfig(12, 3))
    assert before <= datetime.fromisoformat(table.date) <= datetime.now(UTC)
    assert table.setting == LatencySetting(
        device_name(CPU), torch.get_num_threads(), torch.__version__, "compiled", "bf16", 3, (64, 96),
        "tiny", "backbone",
    )  # fmt: skip
    assert table.provenance == describe_machine(CPU)
    assert table.scores["repeat_noise"] == pytest.approx(1.2533 * 0.1 / 2)
    assert table.scores["drift"] == 0.5
    assert table.scores["outlier_share"] == 0.25
    assert table.scores["num_measurements"] == 4 * 15
    assert {f"macs_{name}" for name in table.scores} >= {"macs_rmspe", "macs_spearman"}
    assert [each.message for each in caplog.records] == [
        "warning: the device became 50% slower while it was measured: it is throttled, or busy with "
        "something else"
    ]
    other = replace(subject(), device=torch.device("meta"))
    assert calibration.describe_setting("tiny", other).num_threads == 0


def test_a_seed_draws_the_vectors_and_the_orders(asked: dict[str, Any]) -> None:
    first, again, other = (
        calibrate(subject(), "tiny", SPACE, CalibrationConfig(12, 9, seed=seed)) for seed in (3, 3, 4)
    )
    assert asked["generator"].initial_seed() == seeded(4, 2).initial_seed()
    vectors = [[each.vector for each in table.measurements] for table in (first, again, other)]
    assert vectors[0] == vectors[1] != vectors[2]
    generator = seeded(3)
    design = calibration.design_vectors(SPACE, 12, generator)
    assert vectors[0] == [*design, *(SPACE.draw(generator) for _ in range(9))]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("spread", "noise"), [(0.1, 1.2533 * 0.1 / 2), (0.001, 0.01)])
def test_without_held_out_vectors_every_fold_of_five_is_predicted_by_the_others(
    asked: dict[str, Any], spread: float, noise: float, seed: int
) -> None:
    asked["spread"] = spread
    table = calibrate(subject(), "tiny", SPACE, CalibrationConfig(13, 0, seed=seed))
    vectors = [each.vector for each in table.measurements]

    def macs(vector: SparsityVector) -> float:
        return count_macs(SHAPE, (64, 96), vector)

    def predict(seen: list[SparsityVector], vector: SparsityVector) -> float:
        latencies = [law(each) for each in seen]
        prior = prior_from_macs(SPACE, seen, latencies, macs)
        return fit_additive(SPACE, seen, latencies, prior, noise).predict(SPACE, vector)

    predicted = [
        predict([each for other, each in enumerate(vectors) if other % 5 != number % 5], vector)
        for number, vector in enumerate(vectors)
    ]
    assert table.error_bar == pytest.approx(error_bar(predicted, [law(vector) for vector in vectors]))
    assert table.predict(SPACE.sparsest) == pytest.approx(predict(vectors, SPACE.sparsest))
    assert not any(each.is_held_out for each in table.measurements)


def test_measurements_that_contradict_each_other(asked: dict[str, Any]) -> None:
    """Either stage saves nearly all, both together nothing: the table would go below zero."""
    ends = SparsitySpace(SHAPE.depths, choices=(0.0, 0.8))

    def impossible(vector: SparsityVector) -> float:
        return 40 if vector == ends.dense else 100 if vector == ends.sparsest else 3

    asked["law"] = impossible
    message = (
        r"contradict each other \(the sparsest vector would take -.* a median varies by 6%\): the machine"
    )
    with pytest.raises(ValueError, match=message):
        calibrate(subject(), "tiny", ends, CalibrationConfig(7, 0))


def a_table(asked: dict[str, Any]) -> LatencyPredictor:
    terms = ((0.0, -8.0, -16.0), (0.0, -4.0, -20.0))
    table = calibrate(subject(), "tiny", SPACE, CalibrationConfig(12, 0))
    return replace(table, base_ms=60.0, terms_ms=terms, error_bar=0.05)


@pytest.mark.parametrize(
    ("dense_ms", "expected"),
    [
        (60.0, None),
        (62.9, None),
        (57.2, None),
        (80.0, "80 ms, 33% more than the table says: the device is slower"),
        (48.0, "48 ms, 20% less than the table says: the device is faster"),
    ],
)
def test_validation_tells_a_device_of_another_speed(
    asked: dict[str, Any], caplog: pytest.LogCaptureFixture, dense_ms: float, expected: str | None
) -> None:
    table = a_table(asked)
    speed = 60 / dense_ms
    asked.update(references=(dense_ms,) * 4, law=lambda vector: 1.1 * table.predict(vector) / speed)
    scores = validate(table, subject(), CalibrationConfig(num_held_out=9, seed=2))
    wrong = 1 - 1 / 1.1
    assert scores["rmspe_relative_to_dense"] == pytest.approx(wrong)
    assert scores["within_5_percent_relative_to_dense"] == 0
    assert [each.message for each in caplog.records] == [
        f"warning: the dense forward pass takes {words} than when it was calibrated. Relative to dense, "
        f"predictions are off by {100 * wrong:.1f}% (RMSPE)"
        for words in [expected]
        if words is not None
    ]


def test_validation_has_the_share_within_the_error_bar_and_how_it_was_measured(
    asked: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    """On the half of the vectors whose first stage is pruned the table is off by a tenth."""
    table = a_table(asked)
    asked.update(
        references=REFERENCES, law=lambda vector: table.predict(vector) * (1.1 if vector.ratios[0] else 1)
    )
    caplog.set_level(logging.WARNING)
    scores = validate(table, subject(), CalibrationConfig(num_held_out=20, seed=2), print)
    assert (asked["on_progress"], asked["generator"].initial_seed()) == (print, seeded(2, 2).initial_seed())
    generator = seeded(2)
    vectors = [SPACE.draw(generator) for _ in range(20)]
    dense = [vector.ratios[0] == 0 for vector in vectors]
    assert scores["within_error_bar"] == sum(dense) / 20
    assert scores["within_5_percent"] == scores["within_5_percent_relative_to_dense"] == sum(dense) / 20
    assert (scores["dense_ms"], scores["predicted_dense_ms"]) == (60, 60)
    assert scores["repeat_noise"] == pytest.approx(1.2533 * 0.1 / 2)
    assert (scores["drift"], scores["outlier_share"]) == (0.5, 0.25)
    (record,) = caplog.records
    assert record.message.startswith("warning: the device became 50% slower while it was measured")
