"""The whole way for Cityscapes on a dozen small frames, by the same stages as every experiment."""

import json
from pathlib import Path

import pandas as pd
import pytest
import torch
from PIL import Image
from transformers import Mask2FormerConfig as LibraryConfig
from transformers import Mask2FormerForUniversalSegmentation, SwinConfig

from pipelines.workflow import STAGES, run_pipeline
from sparsevit import load_exported
from sparsevit.backbone import BACKBONES
from sparsevit.data.streets import StreetsConfig, write_streets
from tests.pipelines_tests.command_line import run_command
from tests.pipelines_tests.configuration import arguments, composed, tiny_run


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run, by the command line."""
    folder = tmp_path_factory.mktemp("cityscapes")
    result = run_command(arguments(folder, "tracking=none", experiment="cityscapes"), folder)
    assert result.returncode == 0, result.stderr[-3000:]
    (folder / "stdout.txt").write_text(result.stdout)
    return folder


def report_of(folder: Path) -> Path:
    return next(folder.glob("out/cityscapes/stages/report-*"))


def test_the_same_stages_and_the_same_table(finished: Path) -> None:
    found = {path.parent.name.split("-")[0] for path in finished.glob("out/cityscapes/stages/*/result.json")}
    assert found == {stage.name for stage in STAGES}
    printed = (finished / "stdout.txt").read_text()
    for words in ("cityscapes at scale embedded", "miou before", "miou after", "speed-up"):
        assert words in printed


def test_the_report_has_every_class_and_pictures(finished: Path) -> None:
    report = report_of(finished)
    classes = pd.read_csv(report / "classes.csv", index_col="class")
    assert {"iou/road", "iou/sky", "iou/car"} <= set(classes.index)
    assert classes["dense"].between(0, 1).all()
    with Image.open(report / "pictures.png") as sheet:
        assert min(sheet.size) > 500
    page = (report / "report.html").read_text()
    assert "iou/road" in page
    assert "data:image/png;base64," in page


def test_export_loads_and_predicts_label_maps(finished: Path) -> None:
    model = load_exported(report_of(finished) / "export")
    assert model.config["classes"][:2] == ["road", "sidewalk"]
    with torch.inference_mode():
        (label_map,) = model([torch.rand(3, 64, 100)])
    assert label_map.shape == (64, 100)
    assert int(label_map.max()) < 19


def test_scores_of_the_front_are_of_the_metric_alone(finished: Path) -> None:
    front = json.loads((report_of(finished) / "front.json").read_text())
    assert front["members"]
    for member in front["members"]:
        assert set(member) == {"vector", "miou", "latency_ms", "predicted_ms"}


def test_a_folder_of_transformers_is_imported_whole(tmp_path: Path) -> None:
    """Nothing is trained: the dense model is the one that transformers saved."""
    shape = BACKBONES["swin_nano"]
    config = LibraryConfig(
        backbone_config=SwinConfig(
            embed_dim=shape.embed_dim, depths=list(shape.depths), num_heads=list(shape.num_heads),
            window_size=shape.window_size, out_features=["stage1", "stage2", "stage3", "stage4"],
        ),
        num_labels=19, feature_size=32, mask_feature_size=32, hidden_dim=32, encoder_feedforward_dim=128,
        dim_feedforward=256, encoder_layers=2, decoder_layers=4, num_attention_heads=4, num_queries=24,
    )  # fmt: skip
    Mask2FormerForUniversalSegmentation(config).save_pretrained(tmp_path / "mask2former")
    overrides = tiny_run(
        tmp_path, f"init={tmp_path / 'mask2former'}", "until=train", "tracking=none", experiment="cityscapes"
    )
    results = run_pipeline(composed(*overrides, experiment="cityscapes"))
    assert results["train"].metrics["num_steps"] == 0
    assert 0 <= results["train"].metrics["miou"] < 0.3


def test_bad_data_that_a_loading_process_finds_is_a_message(tmp_path: Path) -> None:
    """It reaches the command line under its own type, but from PyTorch's code."""
    write_streets(
        tmp_path / "mine", StreetsConfig(image_size=(64, 128), num_images={"train": 6, "search": 3, "val": 3})
    )
    for path in (tmp_path / "mine" / "gtFine" / "train").rglob("*.png"):
        Image.new("L", (128, 64), 200).save(path)
    overrides = ("data.verify=none", "train.num_workers=1", "until=train", "tracking=none")
    mine = f"data.root={tmp_path / 'mine'}"
    result = run_command(arguments(tmp_path, mine, *overrides, experiment="cityscapes"), tmp_path)
    assert result.returncode == 2, result.stderr[-2000:]
    assert "has the label ids [200]" in result.stderr
