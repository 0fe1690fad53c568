"""Fits to the digit: least squares and priors against their closed forms; designs; what is a table."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from sparsevit import SparsitySpace, SparsityVector
from sparsevit.latency import LatencyPredictor
from sparsevit.latency.calibration import CalibrationConfig, design_vectors
from sparsevit.latency.fitting import (
    AdditiveFit,
    StepPrior,
    _nonnegative_least_squares,
    fit_additive,
    prior_from_macs,
    prior_from_table,
)
from sparsevit.latency.predictor import LatencySetting, Measurement
from sparsevit.latency.scores import error_bar, fit_line, score_predictions

Array = NDArray[np.float64]
SPACE = SparsitySpace((2, 4), choices=(0.0, 0.4, 0.8))
SETTING = LatencySetting("a device", 2, "2.11", "eager", "fp32", 1, (672, 96), "swin_t", "backbone")
TERMS = ((0.0, -2.0, -3.0), (0.0, -4.0, -5.0), (0.0, -1.0, -4.0))
STEPS = (2.0, 1.0, 4.0, 1.0, 1.0, 3.0)


def by_table(vector: SparsityVector, factors: Sequence[float] = (1.0, 1.0, 1.0)) -> float:
    return 40 + sum(
        factor * row[SPACE.choices.index(ratio)]
        for factor, row, ratio in zip(factors, TERMS, vector, strict=True)
    )


def test_a_step_is_worth_what_its_macs_are() -> None:
    """Give or take half of it, or of 0.3 times the mean where that is more."""
    vectors = list(SPACE)
    found = prior_from_macs(SPACE, vectors, [5 + 2 * by_table(each) for each in vectors], by_table)
    assert found.savings_ms == pytest.approx([2 * step for step in STEPS])
    least = 0.3 * 2 * float(np.mean(STEPS))
    assert found.spread_ms == pytest.approx([0.5 * max(2 * step, least) for step in STEPS])
    slower = prior_from_macs(SPACE, vectors, [90 - by_table(each) for each in vectors], by_table)
    assert slower == StepPrior((0.0,) * 6, (0.0,) * 6)


def test_a_table_is_stretched_by_stages() -> None:
    vectors = list(SPACE)
    latencies = [by_table(each, (2.0, 0.5, 0.5)) for each in vectors]
    found = prior_from_table(SPACE, TERMS, vectors, latencies, 1e-9)
    stretched = np.array(STEPS) * [2, 2, 0.5, 0.5, 0.5, 0.5]
    assert found.savings_ms == pytest.approx(stretched.tolist(), rel=1e-4)
    least = 0.05 * stretched.mean()
    assert found.spread_ms == pytest.approx([0.2 * max(step, least) for step in stretched], rel=1e-4)


@pytest.mark.parametrize("noise", [0.01, 0.1, 1e6])
def test_the_stretch_of_a_stage_is_drawn_to_that_of_all(noise: float) -> None:
    vectors = [*SPACE][::3]
    latencies = np.array([by_table(each, (1.3, 0.8, 0.8)) for each in vectors])
    saved = np.array([[-TERMS[0][SPACE.choices.index(v.ratios[0])], 0.0] for v in vectors])
    saved[:, 1] = 40 - saved[:, 0] - [by_table(each) for each in vectors]
    one = np.ones((len(vectors), 1))
    overall = np.linalg.lstsq(
        np.hstack((one, -saved.sum(axis=1, keepdims=True))) / latencies[:, None], one[:, 0], rcond=None
    )[0][1]
    trust = noise / (0.3 * overall)
    rows = np.vstack((np.hstack((one, -saved)) / latencies[:, None], [[0, trust, 0], [0, 0, trust]]))
    target = np.concatenate((one[:, 0], [trust * overall] * 2))
    expected = np.linalg.lstsq(rows, target, rcond=None)[0][1:]
    found = prior_from_table(SPACE, TERMS, vectors, latencies.tolist(), noise)
    stage_of_step = [0, 0, 1, 1, 1, 1]
    assert found.savings_ms == pytest.approx((expected[stage_of_step] * STEPS).tolist(), rel=1e-5)


def test_a_fit_is_the_most_probable_table() -> None:
    """Every latency has the same relative error, every step the spread of its prior."""
    rng = np.random.default_rng(0)
    vectors = [*SPACE][::4]
    latencies = np.array([by_table(each) * (1 + 0.01 * rng.standard_normal()) for each in vectors])
    prior = StepPrior((2.1, 1.2, 3.5, 0.9, 1.5, 2.0), (0.5, 0.4, 0.3, 0.2, 0.1, 0.6))
    reached = np.array(
        [[float(ratio >= choice) for ratio in each for choice in (0.4, 0.8)] for each in vectors]
    )
    trust = 0.02 / np.array(prior.spread_ms)
    rows = np.vstack(
        (
            np.hstack((np.ones((len(vectors), 1)), -reached)) / latencies[:, None],
            np.hstack((np.zeros((6, 1)), np.diag(trust))),
        )
    )
    target = np.concatenate((np.ones(len(vectors)), trust * prior.savings_ms))
    base, *steps = np.linalg.lstsq(rows, target, rcond=None)[0]
    assert min(steps) > 0
    found = fit_additive(SPACE, vectors, latencies.tolist(), prior, 0.02)
    assert found.base_ms == pytest.approx(base)
    for row, (first, second) in zip(found.terms_ms, np.reshape(steps, (3, 2)), strict=True):
        assert row == pytest.approx((0.0, -first, -first - second))


def test_a_step_without_a_spread_is_free() -> None:
    """Of steps that nobody has measured it is nothing: the prior has no say without a spread."""
    unknown = StepPrior((9.0,) * 6, (0.0,) * 6)
    found = fit_additive(SPACE, [SPACE.dense, SparsityVector((0.8, 0.0, 0.0))], [40.0, 37.0], unknown, 0.01)
    assert found.base_ms == pytest.approx(40)
    assert found.terms_ms[0][2] == pytest.approx(-3)
    assert found.terms_ms[1:] == ((0.0, 0.0, 0.0), (0.0, 0.0, 0.0))


def test_nonnegative_least_squares_are_optimal() -> None:
    """Where x is 0 the gradient pushes it down, elsewhere it is 0 (Karush, Kuhn, Tucker)."""
    rng = np.random.default_rng(1)
    design, target = rng.standard_normal((30, 8)), rng.standard_normal(30)
    design[:, 3] = 0
    x = _nonnegative_least_squares(design, target)
    gradient = design.T @ (design @ x - target)
    assert x.min() == 0 < x.max()
    assert x[3] == 0
    assert np.abs(gradient[x > 0]).max() < 1e-8
    assert gradient.min() > -1e-8
    once = _nonnegative_least_squares(design, target, num_sweeps=1)
    assert not np.allclose(once, x, atol=1e-3)
    assert np.sum((design @ once - target) ** 2) < np.sum(target**2)


def test_a_design_takes_the_sweeps_as_soon_as_they_fit() -> None:
    """Five vectors first, of which the uniform one and others are part of the 33 of the sweeps."""
    space = SparsitySpace((2, 4))
    sweeps = {space.uniform(choice) for choice in space.choices}
    for choice in space.choices:
        sweeps |= {
            SparsityVector(tuple(choice * (gene in raised) for gene in range(3)))
            for raised in ((0,), (1, 2), (2,))
        }
    assert len(sweeps) == 33
    first = [space.dense, space.sparsest, SparsityVector((0.8, 0, 0)), SparsityVector((0, 0.8, 0.8))]
    for number, holds in ((7, False), (37, False), (38, True), (60, True)):
        found = design_vectors(space, number, torch.Generator().manual_seed(0))
        assert found[:5] == [*first, space.uniform(0.4)]
        assert len(found) == number
        assert (sweeps <= set(found)) == holds
        assert holds or len(sweeps & set(found)) < 20


@pytest.mark.parametrize(("num_vectors", "num_held_out"), [(7, 0), (7, 2), (110, 50)])
def test_the_least_calibrations(num_vectors: int, num_held_out: int) -> None:
    config = CalibrationConfig(num_vectors, num_held_out)
    assert (config.num_vectors, config.num_held_out, config.seed) == (num_vectors, num_held_out, 0)
    assert CalibrationConfig() == CalibrationConfig(110, 50)


@pytest.mark.parametrize(
    ("num_vectors", "num_held_out", "message"),
    [(6, 0, "at least 7 vectors: .* got 6"), (7, -1, "none, or at least 2; got -1")],
)
def test_calibrations_that_are_too_small(num_vectors: int, num_held_out: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CalibrationConfig(num_vectors, num_held_out)


@pytest.mark.parametrize("half_width", [-0.01, np.inf, np.nan])
def test_a_half_width_that_no_measurement_has(half_width: float) -> None:
    assert Measurement(SPACE.dense, 1e-3, 0.0, 1).num_outliers == 0
    with pytest.raises(ValueError, match="a latency must be positive and finite, got 1.0 ms at"):
        Measurement(SPACE.dense, 1.0, half_width, 1)


@pytest.mark.parametrize(
    ("base_ms", "terms", "bar", "message"),
    [
        (0.0, TERMS, 0.0, "the base positive, got base 0.0 ms"),
        (12.0, TERMS, 0.0, "the sparsest vector would take 0 ms; latencies are positive"),
        (40.0, TERMS[:2], 0.0, "the table must have 3 rows of 3 terms"),
        (40.0, (*TERMS, TERMS[0]), 0.0, "the table must have 3 rows of 3 terms"),
        (40.0, (*TERMS[:2], TERMS[0][:2]), 0.0, "the table must have 3 rows of 3 terms"),
        (40.0, (*TERMS[:2], (-0.5, -1.0, -2.0)), 0.0, r"of stage2.pair2 must begin at 0 .* got \[-0.5"),
        (40.0, TERMS, -0.1, "the error bar must be finite and at least 0, got -0.1"),
        (40.0, TERMS, np.inf, "the error bar must be finite and at least 0, got inf"),
    ],
)
def test_what_is_no_table(
    base_ms: float, terms: tuple[tuple[float, ...], ...], bar: float, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        LatencyPredictor(SPACE, base_ms, terms, SETTING, bar)


def test_a_table_may_be_flat_and_small() -> None:
    flat = LatencyPredictor(SPACE, 1e-3, ((0.0,) * 3,) * 3, SETTING)
    assert flat.predict(SPACE.sparsest) == 1e-3
    assert (flat.error_bar, flat.prior, flat.measurements, flat.scores) == (0.0, None, (), {})
    assert (flat.date, flat.provenance) == ("", {})
    assert LatencyPredictor(SPACE, 12.5, TERMS, SETTING).predict(SPACE.sparsest) == 0.5


def test_a_setting_in_words() -> None:
    assert SETTING.description == "the backbone, eager, batch 1, 672×96, fp32"
    of_model = replace(SETTING, measures="detection 12ab")
    assert of_model.description == "the whole model (detection 12ab), eager, batch 1, 672×96, fp32"


def test_all_predictions_are_in_the_order_of_the_space() -> None:
    space = SparsitySpace((2, 4, 3), choices=(0.0, 0.3, 0.7))
    terms = tuple((0.0, -float(gene + 1), -2.5 * (gene + 1)) for gene in range(space.num_genes))
    predictor = LatencyPredictor(space, 50.0, terms, SETTING)
    ratios, latencies = predictor.predict_all()
    assert [SparsityVector(tuple(row)) for row in ratios.tolist()] == list(space)
    np.testing.assert_allclose(latencies, [predictor.predict(vector) for vector in space])


def test_a_table_comes_back_with_all_it_had(tmp_path: Path) -> None:
    measured = (
        Measurement(SPACE.dense, 40.5, 0.01, 3, 1, energy_mj=2.5, peak_mib=7.5),
        Measurement(SPACE.sparsest, 20.5, 0.02, 4, is_held_out=True),
    )
    table = LatencyPredictor(
        SPACE, 40.0, TERMS, SETTING, 0.1, StepPrior(STEPS, (0.5,) * 6), measured, {"rmspe": 0.01},
        "2026-01-01T00:00:00+00:00", {"cores": 2},
    )  # fmt: skip
    path = tmp_path / "table.json"
    table.save(path)
    assert LatencyPredictor.load(path) == table
    assert [each.name for each in tmp_path.iterdir()] == ["table.json"]
    content = json.loads(path.read_text())
    del content["choices"]
    path.write_text(json.dumps(content))
    message = r"table.json is not a usable latency table: 'choices' is missing; calibrate again"
    with pytest.raises(ValueError, match=message):
        LatencyPredictor.load(path)


@pytest.mark.parametrize(("half_width", "noise"), [(0.002, 0.01), (0.098, 0.05)])
def test_a_refit_is_a_fit_of_all_with_their_noise(half_width: float, noise: float) -> None:
    """Of what is seen alone, the median; at least 1 %."""
    prior = StepPrior((2.1, 1.2, 3.5, 0.9, 1.5, 2.0), (0.5, 0.4, 0.3, 0.2, 0.1, 0.6))
    measured = [
        Measurement(v, by_table(v) * (1 + 0.02 * (i % 3)), half_width, 3) for i, v in enumerate(SPACE)
    ]
    loose = [replace(each, half_width=0.5) for each in measured[:2]]
    held_out = tuple(replace(each, half_width=0.9, is_held_out=True) for each in measured)
    table = LatencyPredictor(SPACE, 40.0, TERMS, SETTING, 0.1, prior, (*measured[:6], *held_out))
    new = [*loose, *measured[6:]]
    found = table.refitted(new)
    seen = [*measured[:6], *new]
    expected = fit_additive(SPACE, [m.vector for m in seen], [m.latency_ms for m in seen], prior, noise)
    assert found.base_ms == pytest.approx(expected.base_ms)
    np.testing.assert_allclose(found.terms_ms, expected.terms_ms, atol=1e-9)
    assert found.measurements == (*table.measurements, *new)
    wrong = [abs(found.predict(each.vector) / each.latency_ms - 1) for each in held_out]
    assert found.error_bar == pytest.approx(max(wrong))
    with pytest.raises(ValueError, match="no measurements of its own"):
        replace(table, prior=None).refitted(new)


def test_a_line_and_scores_in_closed_form() -> None:
    assert fit_line([1, 2, 4], [5.0, 7.0, 11.0]) == pytest.approx((3, 2))
    scores = score_predictions([1.049, 0.951, 1.051, 0.949, 1.099, 0.901, 1.101, 0.899], [1.0] * 8)
    assert (scores["within_5_percent"], scores["within_10_percent"]) == (0.25, 0.75)
    assert np.isnan(scores["spearman"])
    assert score_predictions([1, 2, 2, 5], [1, 2, 3, 4])["spearman"] == pytest.approx(4.5 / np.sqrt(4.5 * 5))
    assert error_bar([1.1, 0.7], [1.0, 1.0], coverage=0.3) == pytest.approx(0.1)
    assert AdditiveFit(40.0, TERMS).predict(SPACE, SparsityVector((0.4, 0.0, 0.8))) == 34
