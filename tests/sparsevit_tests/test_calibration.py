"""Calibration of devices whose every latency is known: what the fit sees, and what it is scored on."""

from dataclasses import replace

import numpy as np
import pytest

from sparsevit import SparsitySpace, SparsityVector, SwinConfig, create_backbone
from sparsevit.latency import LatencyPredictor
from sparsevit.latency.calibration import CalibrationConfig, calibrate, measure, validate
from sparsevit.latency.macs import count_macs
from sparsevit.latency.subject import backbone_subject
from sparsevit.latency.timing import TimingLimits
from tests.sparsevit_tests.known_device import Clock, Law

SHAPE = SwinConfig(embed_dim=8, depths=(2, 4), num_heads=(1, 2), window_size=4)
SPACE = SparsitySpace(SHAPE.depths)
ONCE = TimingLimits.exactly(1)


def additive(vector: SparsityVector) -> float:
    first, second, third = vector.ratios
    return 40 - 9 * float(first**0.8) - 7 * float(second**1.2) - 6 * third


def interacting(vector: SparsityVector) -> float:
    """No additive table fits it, so that every vector which a fit sees moves the fit."""
    return additive(vector) + 10 * vector.ratios[0] * vector.ratios[2]


def stepwise(vector: SparsityVector) -> float:
    """A gene saves all or nothing, which its MACs do not tell."""
    first, second, third = vector.ratios
    return 40.0 - 12 * (first > 0.4) - 10 * (second > 0.6) - 6 * (third > 0.2)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def calibrated(
    clock: Clock, law: Law, num_vectors: int, num_held_out: int, prior: LatencyPredictor | None = None
) -> LatencyPredictor:
    config = CalibrationConfig(num_vectors, num_held_out, limits=ONCE)
    return calibrate(clock.subject(SHAPE, law), "tiny", SPACE, config, prior=prior)


def errors(predictor: LatencyPredictor, law: Law, vectors: list[SparsityVector]) -> list[float]:
    """Relative, of predictions."""
    return [abs(predictor.predict(vector) / law(vector) - 1) for vector in vectors]


def test_an_additive_device_is_told_everywhere(clock: Clock) -> None:
    predictor = calibrated(clock, additive, 60, 20)
    assert np.mean(errors(predictor, additive, list(SPACE))) < 0.015
    assert predictor.base_ms == pytest.approx(40, rel=0.01)
    assert predictor.scores["within_5_percent"] == 1
    assert predictor.scores["macs_rmspe"] > 2 * predictor.scores["rmspe"]
    assert all(each.latency_ms == pytest.approx(additive(each.vector)) for each in predictor.measurements)
    assert [each.is_held_out for each in predictor.measurements] == [False] * 60 + [True] * 20


def test_what_is_held_out_moves_no_term(clock: Clock) -> None:
    alone, scored = (calibrated(clock, interacting, 40, number) for number in (0, 30))
    assert scored.base_ms == pytest.approx(alone.base_ms)
    np.testing.assert_allclose(scored.terms_ms, alone.terms_ms, rtol=1e-6, atol=1e-6)


def test_scores_and_error_bar_are_of_what_is_held_out(clock: Clock) -> None:
    predictor = calibrated(clock, interacting, 40, 30)
    held_out = [each.vector for each in predictor.measurements if each.is_held_out]
    found = errors(predictor, interacting, held_out)
    assert predictor.error_bar == pytest.approx(sorted(found)[29])  # ⌈31 · 0.95⌉ = 30th of 30
    assert predictor.scores["rmspe"] == pytest.approx(np.sqrt(np.mean(np.square(found))))
    design = [each.vector for each in predictor.measurements if not each.is_held_out]
    macs = [count_macs(SHAPE, (64, 64), vector) for vector in (*design, *held_out)]
    slope, intercept = np.polyfit(macs[:40], [interacting(vector) for vector in design], 1)
    by_macs = [(intercept + slope * m) / interacting(v) - 1 for m, v in zip(macs[40:], held_out, strict=True)]
    assert predictor.scores["macs_rmspe"] == pytest.approx(np.sqrt(np.mean(np.square(by_macs))))


def test_without_held_out_vectors_the_error_bar_holds_for_vectors_that_no_fit_saw(clock: Clock) -> None:
    """Twelve vectors are fitted almost exactly, whatever the other 393 of the space do."""
    predictor = calibrated(clock, stepwise, 12, 0)
    everywhere = errors(predictor, stepwise, list(SPACE))
    fitted = max(errors(predictor, stepwise, [each.vector for each in predictor.measurements]))
    assert np.mean(np.array(everywhere) <= fitted) < 0.5
    assert np.mean(np.array(everywhere) <= predictor.error_bar) > 0.8
    assert predictor.error_bar < max(everywhere)
    assert "rmspe" not in predictor.scores


def test_a_table_of_another_device_is_what_the_fit_starts_from(clock: Clock) -> None:
    """Of a device that is 2.5 times as fast: few measurements find the factor, the table has the rest."""
    steps = ((12, 5), (10, 7), (6, 3))  # what a gene saves, and from which choice on
    exact = tuple(tuple(-saving * float(place >= at) for place in range(9)) for saving, at in steps)
    table = replace(calibrated(clock, stepwise, 12, 2), base_ms=40.0, terms_ms=exact)
    assert max(errors(table, stepwise, list(SPACE))) < 1e-9

    def slower(vector: SparsityVector) -> float:
        return 2.5 * stepwise(vector)

    with_table, without = (calibrated(clock, slower, 12, 2, prior) for prior in (table, None))
    assert max(errors(with_table, slower, list(SPACE))) < 0.02
    assert max(errors(without, slower, list(SPACE))) > 0.2


def test_every_vector_has_the_latency_that_was_measured_at_it(clock: Clock) -> None:
    """In the order that was asked for, repeated or not; each is timed once."""
    first, second = SparsityVector((0.5, 0.1, 0.3)), SPACE.sparsest
    found = measure(clock.subject(SHAPE, additive), [first, second, SPACE.dense, first], ONCE)
    assert [each.vector for each in found.measurements] == [first, second, SPACE.dense, first]
    assert found.latencies_ms == pytest.approx([additive(each.vector) for each in found.measurements])
    assert found.dense_ms == pytest.approx(40)


@pytest.mark.parametrize(("slowdown", "within"), [(1.0, 1.0), (1.02, 1.0), (2.0, 0.0)])
def test_validation_in_closed_form(clock: Clock, slowdown: float, within: float) -> None:
    """A table that is right, on the device as it is today."""
    table = replace(calibrated(clock, additive, 40, 2), error_bar=0.05)
    law = {vector: table.predict(vector) * slowdown for vector in SPACE}
    config = CalibrationConfig(num_held_out=20, limits=ONCE, seed=5)
    scores = validate(table, clock.subject(SHAPE, law.__getitem__), config)
    assert scores["rmspe"] == pytest.approx(abs(1 / slowdown - 1), abs=1e-9)
    assert scores["rmspe_relative_to_dense"] == pytest.approx(0, abs=1e-9)
    assert scores["within_error_bar"] == within
    assert scores["within_5_percent_relative_to_dense"] == 1
    assert scores["dense_ms"] == pytest.approx(slowdown * scores["predicted_dense_ms"])
    assert scores["spearman"] == pytest.approx(1)


def test_a_real_backbone() -> None:
    backbone = create_backbone("swin_nano")
    config = CalibrationConfig(num_vectors=40, num_held_out=6, limits=TimingLimits.exactly(2))
    calls: list[tuple[int, int]] = []
    with backbone_subject(backbone, batch_size=2, image_size=(128, 96)) as subject:
        predictor = calibrate(
            subject, "swin_nano", backbone.space, config,
            lambda done, expected: calls.append((done, expected)),
        )  # fmt: skip
    num_calls = 2 * len({each.vector for each in predictor.measurements})
    assert [done for done, _ in calls] == [*range(1, num_calls + 1)]
    assert {expected for _, expected in calls} == {num_calls}
    assert {"rmspe", "spearman", "macs_rmspe", "repeat_noise", "drift"} <= set(predictor.scores)
    setting = predictor.setting
    assert (setting.backbone, setting.batch_size, setting.dtype) == ("swin_nano", 2, "fp32")
    assert (setting.image_size, setting.measures, setting.runtime) == ((128, 96), "backbone", "eager")
    assert all(each.num_repeats == 2 for each in predictor.measurements)


def test_a_prior_of_another_space_is_refused(clock: Clock) -> None:
    table = calibrated(clock, additive, 12, 2)
    space = SparsitySpace(SHAPE.depths, choices=(0.0, 0.5))
    with pytest.raises(ValueError, match=r"the table to start from has depths \[2, 4\] and choices"):
        calibrate(clock.subject(SHAPE, additive), "tiny", space, CalibrationConfig(), prior=table)
