"""`python -m sparsevit.latency` on a device whose every latency is known: what it does and says."""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from sparsevit import SparseSwin, SparsitySpace, SparsityVector, create_backbone
from sparsevit.export import export_model
from sparsevit.latency import LatencyPredictor
from sparsevit.latency import __main__ as command
from sparsevit.latency.__main__ import main
from sparsevit.latency.predictor import LatencySetting, Measurement
from sparsevit.latency.subject import Subject
from sparsevit.latency.timing import TimingLimits
from tests.sparsevit_tests.known_device import Clock
from tests.sparsevit_tests.test_checkpoints import small_task

SPACE = SparsitySpace((2, 2, 6, 2), choices=(0.0, 0.5))
SETTING = LatencySetting("a device", 1, "2.11", "eager", "fp32", 2, (64, 96), "swin_nano", "backbone")


def law(vector: SparsityVector) -> float:
    return 40 - 8 * sum(map(float, vector))


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """A device with a known law; what it was asked to measure."""
    clock, asked = Clock(monkeypatch), []

    @contextmanager
    def subject(backbone: SparseSwin, **options: Any) -> Iterator[Subject]:
        asked.append(options)
        yield replace(
            clock.subject(backbone.config, law), dtype=options["dtype"], runtime=options["runtime"],
            batch_size=options["batch_size"], image_size=options["image_size"],
        )  # fmt: skip

    monkeypatch.setattr(command, "backbone_subject", subject)
    monkeypatch.setattr(command, "busy_warning", lambda: None)
    return asked


@pytest.fixture
def table(tmp_path: Path) -> LatencyPredictor:
    terms = tuple((0.0, -float(gene)) for gene in range(6))
    measured = (
        Measurement(SPACE.dense, 39.5, 0.0125, 9, energy_mj=123.456, peak_mib=87.6),
        Measurement(SPACE.sparsest, 25.25, 0.02, 9),
    )
    found = LatencyPredictor(
        SPACE, 40.0, terms, SETTING, 0.03, None, measured, {"rmspe": 0.01234},
        "2026-01-01T00:00:00+00:00", {"cores": 2},
    )  # fmt: skip
    found.save(tmp_path / "table.json")
    return found


def test_calibrate_measures_160_vectors_of_the_published_choices_or_15_with_a_table(
    device: list[dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = tmp_path / "first.json", tmp_path / "second.json"
    assert main(["calibrate", "swin_nano", str(first), "--choices", "0", "0.5", "--max-rounds", "1"]) == 0
    assert device == [{"batch_size": 1, "image_size": (672, 672), "dtype": "fp32", "runtime": "eager"}]
    found = LatencyPredictor.load(first)
    assert found.space == SPACE
    assert [each.is_held_out for each in found.measurements] == [False] * 110 + [True] * 50
    assert {each.num_repeats for each in found.measurements} == {3}  # at least as many as --min-rounds
    printed = capsys.readouterr()
    *scores, last = printed.out.splitlines()
    assert last == f"written: {first}"
    assert scores == [
        f"{name:>34}  {value:.4g}" for name, value in {**found.scores, "error_bar": found.error_bar}.items()
    ]
    assert printed.err.splitlines()[-1].endswith(" forward passes")
    options = ["--batch-size", "3", "--image-size", "64", "96", "--dtype", "fp16", "--runtime", "compiled"]
    assert main(["calibrate", "swin_nano", str(second), "--prior", str(first), *options]) == 0
    assert device[1:] == [{"batch_size": 3, "image_size": (64, 96), "dtype": "fp16", "runtime": "compiled"}]
    found = LatencyPredictor.load(second)
    assert found.space == SPACE
    assert [each.is_held_out for each in found.measurements] == [False] * 15
    assert (found.setting.dtype, found.setting.batch_size, found.setting.backbone) == ("fp16", 3, "swin_nano")


def test_a_seed_names_the_vectors(device: list[dict[str, Any]], tmp_path: Path) -> None:
    path, found = tmp_path / "table.json", []
    for seed in ([], ["--seed", "0"], ["--seed", "7"]):
        few = ["--num-vectors", "9", "--num-held-out", "3", "--choices", "0", "0.5", *seed]
        assert main(["calibrate", "swin_nano", str(path), *few]) == 0
        found.append([each.vector for each in LatencyPredictor.load(path).measurements])
    assert found[0] == found[1] != found[2]


def test_the_choices_of_a_device_without_a_table_are_the_published_ones(
    device: list[dict[str, Any]], table: LatencyPredictor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spaces: list[SparsitySpace] = []

    def calibrate(
        subject: Subject, name: str, space: SparsitySpace, *others: object, prior: LatencyPredictor | None
    ) -> LatencyPredictor:
        spaces.append(space)
        return table

    monkeypatch.setattr(command, "calibrate", calibrate)
    assert main(["calibrate", "swin_nano", str(tmp_path / "new.json")]) == 0
    assert spaces == [SparsitySpace((2, 2, 6, 2))]


def test_validate_measures_100_vectors_of_its_own_as_the_table_says(
    device: list[dict[str, Any]], table: LatencyPredictor, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    asked = []

    def validate(predictor: LatencyPredictor, subject: Subject, config: Any, count: Any) -> dict[str, float]:
        assert predictor == table
        asked.append(config)
        count(1, 1)
        return {"rmspe": 0.25}

    monkeypatch.setattr(command, "validate", validate)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    assert main(["validate", str(tmp_path / "table.json")]) == 0
    assert device == [{"batch_size": 2, "image_size": (64, 96), "dtype": "fp32", "runtime": "eager"}]
    assert [(config.num_held_out, config.seed) for config in asked] == [(100, 1)]
    assert asked[0].limits == TimingLimits()
    printed = capsys.readouterr()
    assert printed.out == f"{'rmspe':>34}  0.25\n"
    *warnings, last = printed.err.splitlines()
    assert [warning.split("=")[0] for warning in warnings] == [
        "warning: the table is about device", "warning: the table is about torch_version",
    ]  # fmt: skip
    assert last == "1/1 forward passes"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"measures": "detection 1"}, "about the whole model detection 1: give its export with --model"),
        ({"backbone": "swin_x"}, "table.json is about 'swin_x', which is no backbone of this release"),
    ],
)
def test_a_table_that_cannot_be_validated(
    table: LatencyPredictor, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    change: dict[str, Any], message: str,
) -> None:  # fmt: skip
    replace(table, setting=replace(SETTING, **change)).save(tmp_path / "table.json")
    assert main(["validate", str(tmp_path / "table.json")]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["swin_nano", "--measure", "model"],
            "swin_nano is a backbone: for a whole model give the folder of its",
        ),
        (["no/export"], "'no/export' is neither the folder of an export nor a backbone (swin_b, swin_b_win"),
    ],
)
def test_what_is_no_subject(
    device: list[dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str],
    arguments: list[str], message: str,
) -> None:  # fmt: skip
    what, *options = arguments
    assert main(["calibrate", what, str(tmp_path / "table.json"), *options]) == 2
    assert f"error: {message}" in capsys.readouterr().err


def test_all_predictions_are_csv(
    table: LatencyPredictor, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["predict", str(tmp_path / "table.json"), "--all"]) == 0
    header, *rows = capsys.readouterr().out.splitlines()
    assert header == ",".join([*SPACE.gene_names, "latency_ms"])
    expected = [",".join(map(str, [*map(float, v), f"{table.predict(v):.6g}"])) for v in SPACE]
    assert rows == expected
    assert main(["predict", str(tmp_path / "table.json"), "0.5", "0", "0", "0", "0", "0.5"]) == 0
    assert capsys.readouterr().out == "35 ms ± 1.1 ms\n"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("calibrate", "measure this device and write a table"),
        ("validate", "measure vectors that the table has not seen"),
        ("predict", "milliseconds of a vector, or of all, as CSV"),
        ("show", "what was measured, on what, and how well it predicts"),
        (
            "calibrate backbone|export",
            "swin_b, swin_b_window12, swin_l, swin_l_window12, swin_nano, swin_s, ",
        ),
        ("calibrate table", "JSON that is written"),
        ("calibrate --image-size HEIGHT WIDTH", "of a backbone; a model is measured on the image of its"),
        ("calibrate --threads THREADS", "of a CPU"),
        ("calibrate --choices CHOICES [CHOICES ...]", "ratios of a gene"),
        ("calibrate --prior PRIOR", "table of another device, dtype, batch or size to start from"),
        ("calibrate --num-vectors NUM_VECTORS", "that the table is fitted to: 110, or 15 with --prior"),
        ("calibrate --num-held-out NUM_HELD_OUT", "that score it: 50, or none with --prior"),
        ("calibrate --trusted", "the export may import and call the task that it names, if that is not one"),
        ("calibrate --half-width HALF_WIDTH", "of the 95 % confidence interval of a latency, relative, that"),
        ("calibrate --min-rounds MIN_ROUNDS", "of forward passes"),
        ("validate --max-minutes MAX_MINUTES", "after which no further round begins"),
        ("validate --model MODEL", "export of the model that the table is about"),
    ],
)
def test_help(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, words: str, said: str
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    name, _, argument = words.partition(" ")
    with pytest.raises(SystemExit, match="0"):
        main([name, "--help"] if argument else ["--help"])
    found = capsys.readouterr().out
    assert f" {argument or name} {said}" in " ".join(found.split())
    if not argument:
        assert "[-h] calibrate | validate | predict | show ..." in found
        assert "\nCalibrate a device that has nothing but torch" in found
        assert "\n    python -m sparsevit.latency show latency.json\n" in found


def test_show_to_the_letter(
    table: LatencyPredictor, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["show", str(tmp_path / "table.json")]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert shown[0] == "          device  a device"
    assert shown[6] == "      image_size  (64, 96)"
    assert shown[9:] == [
        "            date  2026-01-01T00:00:00+00:00",
        "           cores  2",
        "           dense  40 ms ± 3.0%; measured 39.5 ms ± 1.2%, 123.5 mJ, 88 MiB",
        "        sparsest  25 ms ± 3.0%; measured 25.25 ms ± 2.0%",
        "",
        "     ms added at       0     0.5",
        *(f"{name:>16}    0.00 {-gene + 0.0:7.2f}" for gene, name in enumerate(SPACE.gene_names)),
        "",
        "                             rmspe  0.01234",
    ]
    replace(table, measurements=()).save(tmp_path / "table.json")
    assert main(["show", str(tmp_path / "table.json")]) == 0
    assert capsys.readouterr().out.splitlines()[11:13] == [
        "           dense  40 ms ± 3.0%", "        sparsest  25 ms ± 3.0%",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("is_terminal", "expected"),
    [
        (False, "3/24 calls\n5/24 calls\n12/24 calls\n22/24 calls\n24/24 calls\n"),
        (True, "".join(f"\r{done}/24 calls" for done in (1, 3, 4, 5, 12, 13, 22, 24)) + "\n"),
    ],
)
def test_progress(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, is_terminal: bool, expected: str
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: is_terminal)
    count = command._counter("calls")
    for done in (1, 3, 4, 5, 12, 13, 22, 24):
        count(done, 24)
    assert capsys.readouterr().err == expected


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ([], TimingLimits()),
        (["--max-minutes", "0.5"], TimingLimits(max_seconds=30)),
        (["--min-rounds", "20", "--half-width", "0.1"], TimingLimits(0.1, 20, 20)),
        (["--min-rounds", "2", "--max-rounds", "5"], TimingLimits(min_rounds=2, max_rounds=5)),
    ],
)
@pytest.mark.parametrize("words", [["calibrate", "swin_nano", "t.json"], ["validate", "t.json"]])
def test_limits(words: Sequence[str], options: Sequence[str], expected: TimingLimits) -> None:
    assert command._limits(command._parser().parse_args([*words, *options])) == expected


def test_a_busy_machine_is_told_and_threads_are_set_on_a_cpu_alone(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    threads: list[int] = []
    monkeypatch.setattr(command, "set_num_threads", threads.append)
    monkeypatch.setattr(command, "busy_warning", lambda: "others work")
    assert command._prepare("cpu", 1) == torch.device("cpu")
    assert capsys.readouterr().err == "warning: others work\n"
    assert threads == [1]
    monkeypatch.setattr(command, "busy_warning", lambda: None)
    command._prepare("cpu", None)
    assert command._prepare("meta", 3) == torch.device("meta")
    assert capsys.readouterr().err == ""
    assert threads == [1]


@pytest.fixture
def exported(tmp_path: Path) -> Path:
    task = small_task()
    example = [[torch.rand(3, 40, 60)]]
    export_model(
        tmp_path / "export", task.build_model(create_backbone("swin_nano")), SPACE.sparsest,
        backbone="swin_nano", task="instance_segmentation", task_config=task.config, example=example,
        details={},
    )  # fmt: skip
    return tmp_path / "export"


def test_of_an_export_its_backbone_or_the_whole_model_is_measured(exported: Path) -> None:
    subject: Callable[..., Any] = command._subject
    cpu = torch.device("cpu")
    with subject(
        str(exported), "backbone", 3, (32, 64), "bf16", "eager", cpu, trusted=False
    ) as (found, name):  # fmt: skip
        assert (name, found.measures, found.batch_size, found.image_size) == (
            "swin_nano", "backbone", 3, (32, 64),
        )  # fmt: skip
        assert (found.dtype, found.runtime) == ("bf16", "eager")
    with subject(str(exported), "model", 2, (1, 1), "bf16", "eager", cpu, trusted=False) as (found, name):
        assert (name, found.batch_size, found.image_size) == ("swin_nano", 2, (64, 64))
        assert found.measures.startswith("instance_segmentation ")
        assert found.dtype == "bf16"


def test_a_table_of_a_whole_model_is_validated_with_its_export(
    exported: Path, table: LatencyPredictor, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(command, "busy_warning", lambda: None)
    replace(table, setting=replace(SETTING, measures="another model")).save(tmp_path / "table.json")
    once = ["--num-vectors", "2", "--min-rounds", "1", "--max-rounds", "1"]
    assert main(["validate", str(tmp_path / "table.json"), "--model", str(exported), *once]) == 0
    printed = capsys.readouterr()
    assert "about measures=another model, this is measures=instance_segmentation " in printed.err
    assert "within_error_bar" in printed.out
