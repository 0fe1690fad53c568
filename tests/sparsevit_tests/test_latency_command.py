"""`python -m sparsevit.latency`: a device is measured, the table is checked, asked and shown."""

import csv
import io
import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from sparsevit import SparsitySpace, SparsityVector
from sparsevit.latency import LatencyPredictor
from sparsevit.latency.__main__ import main
from sparsevit.latency.predictor import LatencySetting

TERMS = (0.0, -1.0, -1.5, -2.0, -2.25, -3.0, -4.0, -4.0, -5.0)
SETTING = LatencySetting("another device", 1, "2.11", "eager", "fp32", 2, (64, 96), "swin_nano", "backbone")


@pytest.fixture
def table(tmp_path: Path) -> Path:
    """A table whose every answer is known."""
    path = tmp_path / "latency.json"
    scales = (1.0, 0.5, 0.25, 0.25, 0.5, 1.0)
    terms = tuple(tuple(scale * term for term in TERMS) for scale in scales)
    LatencyPredictor(
        SparsitySpace((2, 2, 6, 2)), 40.0, terms, SETTING, error_bar=0.03, scores={"rmspe": 0.012}
    ).save(path)
    return path


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_calibrate_then_validate_and_show(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "latency.json"
    measure = ["--num-vectors", "24", "--num-held-out", "4", "--max-rounds", "3"]
    measure += ["--image-size", "64", "96", "--batch-size", "2", "--threads", "1", "--dtype", "bf16"]
    assert main(["calibrate", "swin_nano", str(path), *measure]) == 0
    printed = capsys.readouterr()
    assert "rmspe" in printed.out and f"written: {path}" in printed.out
    assert "passes" in printed.err
    predictor = LatencyPredictor.load(path)
    setting = predictor.setting
    assert (setting.backbone, setting.image_size, setting.batch_size) == ("swin_nano", (64, 96), 2)
    assert (setting.dtype, setting.num_threads) == ("bf16", 1)
    assert predictor.provenance["cores"] >= 1
    assert predictor.provenance["processor"]
    assert predictor.predict(predictor.space.sparsest) < predictor.predict(predictor.space.dense)
    assert main(["validate", str(path), "--num-vectors", "4", "--min-rounds", "1", "--max-rounds", "1"]) == 0
    printed = capsys.readouterr()
    assert "spearman" in printed.out
    assert "the table is about" not in printed.err  # the same machine and threads
    assert main(["show", str(path)]) == 0
    shown = capsys.readouterr().out
    for words in ("(64, 96)", "bf16", "stage3.pair2", "dense", "repeat_noise", setting.device):
        assert words in shown


def test_validate_says_what_differs(table: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["validate", str(table), "--num-vectors", "2", "--min-rounds", "1", "--max-rounds", "1"]) == 0
    warnings = capsys.readouterr().err
    assert "the table is about device=another device, this is device=" in warnings
    assert "the table is about torch_version=2.11, this is" in warnings
    assert "about dtype" not in warnings


def test_validate_tells_a_slower_device_from_a_wrong_table(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    """A table of a device that is ten times as slow: off everywhere, and right relative to dense."""
    path, slower = tmp_path / "latency.json", tmp_path / "slower.json"
    measure = ["--num-vectors", "20", "--num-held-out", "0", "--max-rounds", "3"]
    assert main(["calibrate", "swin_nano", str(path), *measure, "--image-size", "128", "160"]) == 0
    table = LatencyPredictor.load(path)
    terms = tuple(tuple(10 * term for term in row) for row in table.terms_ms)
    replace(table, base_ms=10 * table.base_ms, terms_ms=terms, error_bar=0.3).save(slower)
    capsys.readouterr()
    assert main(["validate", str(slower), "--num-vectors", "4", "--max-rounds", "3"]) == 0
    printed = capsys.readouterr().out
    scores = {name: float(value) for name, value in map(str.split, printed.splitlines())}
    assert scores["rmspe_relative_to_dense"] < 1.0 < scores["rmspe"]
    assert scores["predicted_dense_ms"] == pytest.approx(10 * table.base_ms, rel=1e-3)
    assert scores["dense_ms"] < 0.7 * scores["predicted_dense_ms"]
    assert "less than the table says: the device is faster than when it was calibrated" in caplog.text


def test_predict_one_and_all(table: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["predict", str(table), "0.1", "0", "0", "0.2", "0.8", "0.3"]) == 0
    expected = 40 - 1.0 - 0.25 * 1.5 - 0.5 * 5.0 - 2.0
    assert capsys.readouterr().out == f"{expected:.4g} ms ± {0.03 * expected:.2g} ms\n"
    assert main(["predict", str(table), "--all"]) == 0
    header, *rows = csv.reader(io.StringIO(capsys.readouterr().out))
    predictor = LatencyPredictor.load(table)
    assert header == [*predictor.space.gene_names, "latency_ms"]
    assert len(rows) == predictor.space.size == 120_285
    for row in rows[::5000]:
        *ratios, latency = map(float, row)
        assert latency == pytest.approx(predictor.predict(SparsityVector(tuple(ratios))), rel=1e-5)


def test_a_closed_pipe_is_no_error(table: Path) -> None:
    command = f"{sys.executable} -m sparsevit.latency predict {table} --all | head -2"
    result = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True)
    assert result.stdout.startswith("stage1.pair1,")
    assert result.stderr == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["show", "nowhere.json"],
            "there is no latency table nowhere.json: `python -m sparsevit.latency cal",
        ),
        (["predict", "TABLE"], "give the ratios of one vector, or --all"),
        (["predict", "TABLE", "0.1", "--all"], "give the ratios of one vector, or --all"),
        (["predict", "TABLE", "0.1", "0.2"], "has 2 ratios, but depths [2, 2, 6, 2] need 6"),
        (["predict", "TABLE", *"000000", "--"], None),
        (["predict", "TABLE", "0.15", *"00000"], "stage1.pair1 is 0.15, which is not one of the choices"),
        (["predict", "TABLE", "0", "0", "0.5", "0.1", "0.5", "0"], "ratios may not decrease inside a stage"),
        (["calibrate", "swin_nano", "/nowhere/table.json"], "there is no folder /nowhere for the table"),
        (["calibrate", "swin_nano", "t.json", "--device", "gpu"], "the device 'gpu' cannot be used: "),
        (
            ["calibrate", "swin_nano", "t.json", "--batch-size", "0"],
            "batch and image size start at 1, got 0",
        ),
        (["calibrate", "swin_nano", "t.json", "--threads", "0"], "--threads must be at least 1, got 0"),
        (["calibrate", "swin_nano", "t.json", "--choices", "0.5", "0.1"], "choices must be increasing"),
        (["validate", "BROKEN"], "is not a usable latency table: schema version 99"),
    ],
)
def test_bad_input_is_named_at_once(
    table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
    arguments: list[str], message: str | None,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    broken = tmp_path / "broken.json"
    broken.write_text(json.dumps(json.loads(table.read_text()) | {"schema_version": 99}))
    named = {"TABLE": str(table), "BROKEN": str(broken)}
    code = main([named.get(argument, argument) for argument in arguments])
    error = capsys.readouterr().err
    if message is None:
        assert code == 0
    else:
        assert code == 2
        assert message in error
        assert "Traceback" not in error
    assert not (tmp_path / "t.json").exists()
