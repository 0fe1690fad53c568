"""Calibration: the predictor recovers what it should, and refuses what it must."""

import itertools
import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from sparsevit import SparsitySpace, SparsityVector, create_backbone
from sparsevit.backbone import BACKBONES
from sparsevit.latency import LatencyPredictor
from sparsevit.latency.calibration import CalibrationConfig, calibrate, design_vectors, measure_ms, num_calls
from sparsevit.latency.macs import count_macs
from sparsevit.latency.predictor import LatencySetting, score_predictions

SPACE = SparsitySpace((2, 2, 6, 2))
SETTING = LatencySetting("a device", 2, "2.11", "fp32", 1, (672, 672), "swin_t")


def true_latency(vector: SparsityVector) -> float:
    weights = (9.0, 7.0, 4.0, 4.0, 4.0, 3.0)
    return 50 - sum(weight * float(ratio**0.8) for weight, ratio in zip(weights, vector, strict=True))


def macs_of_swin_t(vector: SparsityVector) -> float:
    return count_macs(BACKBONES["swin_t"], (672, 672), vector)


def fitted(noise: float = 0.0, trusted_noise: float | None = None) -> LatencyPredictor:
    rng = np.random.default_rng(0)
    vectors = design_vectors(SPACE, 110, torch.Generator().manual_seed(0))
    latencies = [true_latency(vector) * (1 + noise * rng.standard_normal()) for vector in vectors]
    trusted_noise = trusted_noise or noise + 1e-6
    return LatencyPredictor.fit(SPACE, vectors, latencies, SETTING, macs=macs_of_swin_t, noise=trusted_noise)


def root_mean_square_error(predictor: LatencyPredictor) -> float:
    generator = torch.Generator().manual_seed(9)
    unseen = [SPACE.draw(generator) for _ in range(200)]
    errors = [predictor.predict(vector) / true_latency(vector) - 1 for vector in unseen]
    return float(np.sqrt(np.mean(np.square(errors))))


def test_the_noisier_the_measurements_the_more_the_macs_count() -> None:
    noisy = root_mean_square_error(fitted(noise=0.1))
    assert noisy < 0.6 * root_mean_square_error(fitted(noise=0.1, trusted_noise=1e-6))


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
    predictor = replace(fitted(), scores={"rmspe": 0.01}, date="2026-01-01T00:00:00+00:00")
    predictor.save(tmp_path / "latency.json")
    assert LatencyPredictor.load(tmp_path / "latency.json") == predictor
    content = json.loads((tmp_path / "latency.json").read_text())
    assert content["setting"]["device"] == "a device"
    assert content["setting"]["image_size"] == [672, 672]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema_version": 99}, "schema version 99"),
        ({"base_ms": -1.0}, "must be finite and the base positive"),
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
    scores = score_predictions([1.0, 2.2, 2.79, 4.0], [1.0, 2.0, 3.0, 4.0])
    assert scores["rmspe"] == pytest.approx(math.sqrt((0.1**2 + 0.07**2) / 4))
    assert scores["within_5_percent"] == 0.5
    assert scores["within_10_percent"] == pytest.approx(0.75, abs=0.26)
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


def test_calibration_measures_a_real_backbone() -> None:
    backbone = create_backbone("swin_nano")
    config = CalibrationConfig(image_size=(128, 128), num_vectors=40, num_held_out=6, num_rounds=2)
    calls = []
    predictor = calibrate(backbone, "swin_nano", backbone.space, config, lambda: calls.append(1))
    assert len(calls) == num_calls(backbone.space, config)
    assert predictor.predict(backbone.space.sparsest) < predictor.predict(backbone.space.dense)
    assert {"rmspe", "spearman", "macs_rmspe", "repeat_noise"} <= set(predictor.scores)
    assert predictor.setting.torch_version == torch.__version__


def test_measuring_leaves_the_backbone_as_it_was() -> None:
    backbone = create_backbone("swin_nano").train()
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    config = CalibrationConfig(image_size=(64, 64), dtype="bf16", num_rounds=1)
    measure_ms(backbone, [backbone.space.dense], config)
    assert backbone.training
    for name, value in backbone.state_dict().items():
        assert torch.equal(value, before[name])


def test_bad_calibration_configuration() -> None:
    with pytest.raises(ValueError, match=r"dtype must be one of \['bf16', 'fp16', 'fp32'\], got 'int8'"):
        CalibrationConfig(dtype="int8")
    with pytest.raises(ValueError, match="batch, image size and rounds start at 1"):
        CalibrationConfig(batch_size=0)
