"""Calibration: the predictor recovers what it should, and refuses what it must."""

import itertools
import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from sparsevit import SparseSwin, SparsitySpace, SparsityVector, SwinConfig, create_backbone
from sparsevit.backbone import BACKBONES
from sparsevit.latency import LatencyPredictor
from sparsevit.latency.calibration import CalibrationConfig, design_vectors, measure
from sparsevit.latency.fitting import fit_additive, prior_from_macs, prior_from_table
from sparsevit.latency.macs import count_macs
from sparsevit.latency.predictor import LatencySetting, Measurement
from sparsevit.latency.scores import error_bar, score_predictions
from sparsevit.latency.subject import backbone_subject
from sparsevit.latency.timing import TimingLimits

SPACE = SparsitySpace((2, 2, 6, 2))
SETTING = LatencySetting("a device", 2, "2.11", "eager", "fp32", 1, (672, 672), "swin_t", "backbone")


def true_latency(vector: SparsityVector) -> float:
    weights = (9.0, 7.0, 4.0, 4.0, 4.0, 3.0)
    return 50 - sum(weight * float(ratio**0.8) for weight, ratio in zip(weights, vector, strict=True))


def macs_of_swin_t(vector: SparsityVector) -> float:
    return count_macs(BACKBONES["swin_t"], (672, 672), vector)


def fitted(noise: float = 0.0, trusted_noise: float | None = None) -> LatencyPredictor:
    rng = np.random.default_rng(0)
    vectors = design_vectors(SPACE, 110, torch.Generator().manual_seed(0))
    latencies = [true_latency(vector) * (1 + noise * rng.standard_normal()) for vector in vectors]
    prior = prior_from_macs(SPACE, vectors, latencies, macs_of_swin_t)
    fit = fit_additive(SPACE, vectors, latencies, prior, noise if trusted_noise is None else trusted_noise)
    measurements = tuple(
        Measurement(vector, latency, 1.96 * noise, 5)
        for vector, latency in zip(vectors, latencies, strict=True)
    )
    return LatencyPredictor(
        SPACE, fit.base_ms, fit.terms_ms, SETTING, 0.03, prior, measurements, {"rmspe": 0.01},
        "2026-01-01T00:00:00+00:00",
    )  # fmt: skip


def root_mean_square_error(predictor: LatencyPredictor) -> float:
    generator = torch.Generator().manual_seed(9)
    unseen = [SPACE.draw(generator) for _ in range(200)]
    errors = [predictor.predict(vector) / true_latency(vector) - 1 for vector in unseen]
    return float(np.sqrt(np.mean(np.square(errors))))


def test_the_noisier_the_measurements_the_more_the_macs_count() -> None:
    noisy = root_mean_square_error(fitted(noise=0.1))
    assert noisy < 0.6 * root_mean_square_error(fitted(noise=0.1, trusted_noise=0.0))


def test_additive_latency_is_recovered_from_110_measurements() -> None:
    predictor = fitted()
    generator = torch.Generator().manual_seed(9)
    for _ in range(100):
        vector = SPACE.draw(generator)
        assert predictor.predict(vector) == pytest.approx(true_latency(vector), rel=1e-3)


def test_prediction_never_grows_with_a_ratio_even_from_noisy_measurements() -> None:
    predictor = fitted(noise=0.05)
    for row in predictor.terms_ms:
        assert row[0] == 0
        assert all(a >= b for a, b in itertools.pairwise(row))


def test_json_round_trip(tmp_path: Path) -> None:
    predictor = fitted()
    predictor.save(tmp_path / "latency.json")
    assert LatencyPredictor.load(tmp_path / "latency.json") == predictor
    content = json.loads((tmp_path / "latency.json").read_text())
    assert content["setting"]["device"] == "a device"
    assert content["setting"]["image_size"] == [672, 672]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema_version": 99}, "schema version 99"),
        ({"schema_version": 2}, "schema version 2, this release reads 3"),
        ({"base_ms": -1.0}, "must be finite and the base positive"),
        ({"base_ms": 20.0}, "the sparsest vector would take -.* ms; latencies are positive"),
        ({"error_bar": math.nan}, "the error bar must be finite and at least 0, got nan"),
        ({"base_ms": math.inf}, "must be finite and the base positive"),
        ({"terms_ms": {}}, "is not a usable latency table"),
    ],
)
def test_unusable_table(tmp_path: Path, change: dict[str, object], message: str) -> None:
    path = tmp_path / "latency.json"
    fitted().save(path)
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match=message):
        LatencyPredictor.load(path)


def test_truncated_table(tmp_path: Path) -> None:
    path = tmp_path / "latency.json"
    fitted().save(path)
    path.write_text(path.read_text()[:100])
    with pytest.raises(ValueError, match="is not a usable latency table"):
        LatencyPredictor.load(path)


def test_vector_outside_the_calibrated_space() -> None:
    with pytest.raises(ValueError, match=r"which is not one of the choices"):
        fitted().predict(SparsityVector((0.05,) * 6))


def test_scores_in_closed_form() -> None:
    scores = score_predictions([1.0, 2.3, 2.79, 4.16], [1.0, 2.0, 3.0, 4.0])
    assert scores["rmspe"] == pytest.approx(math.sqrt((0.15**2 + 0.07**2 + 0.04**2) / 4))
    assert scores["within_5_percent"] == 0.5
    assert scores["within_10_percent"] == 0.75
    assert scores["spearman"] == pytest.approx(1.0)
    assert score_predictions([1, 2, 3], [3, 2, 1])["spearman"] == pytest.approx(-1.0)
    assert score_predictions([1, 1, 2, 2], [1, 1, 2, 2])["spearman"] == pytest.approx(1.0)
    assert math.isnan(score_predictions([1, 1], [1, 2])["spearman"])


@pytest.mark.parametrize(
    ("predicted", "measured", "message"),
    [
        ([], [], "need two or more pairs"),
        ([1.0, 2.0], [1.0], "need two or more pairs"),
        ([1.0, math.nan], [1.0, 2.0], "must be finite"),
        ([1.0, 2.0], [1.0, 0.0], "measurements positive"),
    ],
)
def test_scores_refuse_bad_values(predicted: list[float], measured: list[float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        score_predictions(predicted, measured)


@pytest.mark.parametrize(
    ("ratios", "published_g"),
    [
        ((0, 0, 0, 0, 0, 0), 161.6),
        ((0.3, 0, 0.1, 0.2, 0.2, 0), 139.3),
        ((0.6, 0, 0.2, 0.4, 0.5, 0), 116.3),
        ((0.7, 0, 0.2, 0.4, 0.5, 0), 113.6),
    ],
)
def test_macs_equal_the_published(ratios: tuple[float, ...], published_g: float) -> None:
    """SparseViT, table 2: Swin-T, four images of 672×672."""
    macs = 4 * count_macs(BACKBONES["swin_t"], (672, 672), SparsityVector(ratios))
    assert macs / 1e9 == pytest.approx(published_g, abs=0.06)


@pytest.mark.parametrize(
    ("size", "ratio"), [((224, 224), 0.0), ((224, 224), 0.4), ((100, 152), 0.0), ((64, 176), 0.0)]
)
def test_macs_are_those_that_the_backbone_computes(size: tuple[int, int], ratio: float) -> None:
    backbone = create_backbone("swin_t").eval()
    vector = backbone.space.uniform(ratio)
    with FlopCounterMode(display=False) as counter:
        backbone(torch.zeros(1, 3, *size), vector)
    assert counter.get_total_flops() == 2 * count_macs(backbone.config, size, vector)


@pytest.mark.parametrize("size", [(23, 30), (37, 22), (21, 53)])
def test_macs_of_a_small_backbone_whose_every_grid_is_odd(size: tuple[int, int]) -> None:
    """What is left of a patch is cut off; grids are padded for windows and for merging."""
    backbone = SparseSwin(SwinConfig(6, (1, 1, 3), (1, 2, 3), window_size=3, patch_size=2, mlp_ratio=1.5))
    with FlopCounterMode(display=False) as counter:
        backbone.eval()(torch.zeros(1, 3, *size))
    assert counter.get_total_flops() == 2 * count_macs(backbone.config, size, backbone.space.dense)


@pytest.mark.parametrize(
    ("gene", "terms", "message"),
    [
        ("stage1.pair1", [0.0, -1.0, -0.5], "the terms of stage1.pair1 must begin at 0 and never grow"),
        ("stage3.pair2", [0.5, 0.0, -1.0], "the terms of stage3.pair2 must begin at 0"),
        ("stage4.pair1", [0.0, math.nan, -1.0], "must be finite"),
    ],
)
def test_terms_that_no_device_has(tmp_path: Path, gene: str, terms: list[float], message: str) -> None:
    path = tmp_path / "latency.json"
    fitted().save(path)
    content = json.loads(path.read_text())
    content["terms_ms"][gene][:3] = terms
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message):
        LatencyPredictor.load(path)


@pytest.mark.parametrize("latency", [-1.0, 0.0, math.inf])
def test_a_measurement_that_no_device_gives(tmp_path: Path, latency: float) -> None:
    path = tmp_path / "latency.json"
    fitted().save(path)
    content = json.loads(path.read_text())
    content["measurements"][3]["latency_ms"] = latency
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="a latency must be positive and finite"):
        LatencyPredictor.load(path)


def stretched_latency(vector: SparsityVector) -> float:
    """As of another device: every stage scales on its own."""
    weights = (4.0, 5.0, 2.6, 2.6, 2.6, 1.2)
    return 30 - sum(weight * float(ratio**0.8) for weight, ratio in zip(weights, vector, strict=True))


def test_fifteen_measurements_and_a_table_of_another_device_do() -> None:
    rng = np.random.default_rng(1)
    vectors = design_vectors(SPACE, 15, torch.Generator().manual_seed(0))
    latencies = [stretched_latency(vector) * (1 + 0.01 * rng.standard_normal()) for vector in vectors]
    errors = {}
    for name, prior in (
        ("table", prior_from_table(SPACE, fitted().terms_ms, vectors, latencies, 0.01)),
        ("MACs", prior_from_macs(SPACE, vectors, latencies, macs_of_swin_t)),
    ):
        fit = fit_additive(SPACE, vectors, latencies, prior, 0.01)
        generator = torch.Generator().manual_seed(9)
        unseen = [SPACE.draw(generator) for _ in range(200)]
        wrong = [fit.predict(SPACE, vector) / stretched_latency(vector) - 1 for vector in unseen]
        errors[name] = float(np.sqrt(np.mean(np.square(wrong))))
    assert errors["table"] < 0.015
    assert errors["table"] < 0.7 * errors["MACs"]


def test_a_design_has_both_ends_and_every_stage_alone() -> None:
    for number in (7, 15, 110):
        vectors = design_vectors(SPACE, number, torch.Generator().manual_seed(0))
        assert len(vectors) == number
        assert {SPACE.dense, SPACE.sparsest} <= {*vectors}
        alone = [(0.8, 0, 0, 0, 0, 0), (0, 0.8, 0, 0, 0, 0), (0, 0, 0.8, 0.8, 0.8, 0), (0, 0, 0, 0, 0, 0.8)]
        assert {SparsityVector(ratios) for ratios in alone} <= {*vectors}
        assert all(vector in SPACE for vector in vectors)


def test_a_large_design_raises_every_gene_to_every_choice() -> None:
    """The genes after it in its stage go along, all others are dense."""
    vectors = {*design_vectors(SPACE, 110, torch.Generator().manual_seed(0))}
    for choice in SPACE.choices:
        for raised in ((0,), (1,), (2, 3, 4), (3, 4), (4,), (5,), range(6)):
            assert SparsityVector(tuple(choice * (gene in raised) for gene in range(6))) in vectors


def test_a_refit_learns_what_is_measured_and_keeps_what_is_not() -> None:
    """The device turns out to gain less from the first stage than the table says."""
    before = fitted(noise=0.01)

    def really(vector: SparsityVector) -> float:
        return true_latency(vector) + 6 * vector.ratios[0]

    generator = torch.Generator().manual_seed(5)
    new = [Measurement(v, really(v), 0.005, 9) for v in (SPACE.draw(generator) for _ in range(40))]
    after = before.refitted(new)
    assert len(after.measurements) == 110 + 40
    unseen = [SPACE.draw(generator) for _ in range(100)]
    pruned = [vector for vector in unseen if vector.ratios[0] >= 0.5]

    def error(predictor: LatencyPredictor) -> float:
        return float(np.mean([abs(predictor.predict(v) / really(v) - 1) for v in pruned]))

    assert error(after) < 0.75 * error(before)
    assert after.prior == before.prior


def test_a_refit_sees_nothing_that_is_held_out() -> None:
    """Neither of the table nor of what is new; its error bar is of all of these."""
    table = fitted(noise=0.01)
    generator = torch.Generator().manual_seed(5)
    new = [Measurement(v, 1.1 * true_latency(v), 0.005, 9) for v in (SPACE.draw(generator) for _ in range(9))]
    expected = table.refitted(new)

    def held_out(factor: float) -> list[Measurement]:
        return [
            Measurement(vector, factor * expected.predict(vector), 0.005, 9, is_held_out=True)
            for vector in (SPACE.draw(generator) for _ in range(30))
        ]

    scored = replace(table, measurements=(*table.measurements, *held_out(2.0)))
    found = scored.refitted([*new, *held_out(4.0)])
    assert (found.base_ms, found.terms_ms) == (expected.base_ms, expected.terms_ms)
    assert found.error_bar == pytest.approx(1 - 1 / 4)
    assert expected.error_bar == table.error_bar  # nothing is held out: it stays


def test_a_table_without_measurements_cannot_be_refitted() -> None:
    with pytest.raises(ValueError, match="no measurements of its own"):
        replace(fitted(), measurements=()).refitted([])


@pytest.mark.parametrize(
    ("errors", "expected"),
    [
        ([0.01 * k for k in range(1, 101)], 0.96),  # ⌈101 · 0.95⌉ = 96th of 100
        ([0.01 * k for k in range(1, 11)], 0.10),  # too few for 95 %: the largest
    ],
)
def test_error_bars_hold_errors_of_the_unseen(errors: list[float], expected: float) -> None:
    assert error_bar([1 + error for error in errors], [1.0] * len(errors)) == pytest.approx(expected)


def test_measuring_leaves_the_backbone_as_it_was() -> None:
    backbone = create_backbone("swin_nano").train()
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    with backbone_subject(backbone, batch_size=1, image_size=(64, 64), dtype="bf16") as subject:
        measured = measure(subject, [backbone.space.dense], TimingLimits.exactly(1))
    assert [each.vector for each in measured.measurements] == [backbone.space.dense]
    assert backbone.training
    for name, value in backbone.state_dict().items():
        assert torch.equal(value, before[name])


@pytest.mark.parametrize(
    ("create", "message"),
    [
        (lambda: CalibrationConfig(num_vectors=3), "a fit needs at least 7 vectors"),
        (lambda: CalibrationConfig(num_held_out=1), "held-out vectors: none, or at least 2; got 1"),
        (lambda: TimingLimits(min_rounds=0), "rounds: 1 ≤ min_rounds ≤ max_rounds, got 0 and 12"),
        (lambda: TimingLimits(min_rounds=5, max_rounds=4), "got 5 and 4"),
        (lambda: TimingLimits(max_half_width=0.0), "max_half_width lies between 0 and 1, got 0.0"),
        (lambda: TimingLimits(max_seconds=0.0), "the time limit must be positive, got 0.0 s"),
    ],
)
def test_bad_calibration_configuration(create: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        create()
