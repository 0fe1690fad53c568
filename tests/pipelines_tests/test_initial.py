"""What a run starts from: other people's checkpoints, settled before any work, and told."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from pipelines import build
from pipelines.artifacts import ArtifactStore
from pipelines.context import WEIGHTS_FILE, Run
from pipelines.stages.search import evaluator_factory
from pipelines.tracking import NoTracker
from pipelines.workflow import run_pipeline
from sparsevit.checkpoints import CheckpointError, read_weights
from sparsevit.checkpoints.backbone import named_weights
from sparsevit.data.coco import CocoInstances
from sparsevit.data.errors import DataError
from sparsevit.tasks.mask_rcnn import MaskRCNNConfig, PhotoInput, SparseMaskRCNN
from sparsevit.tasks.mask_rcnn.mmdet import export_mmdet
from tests.pipelines_tests.configuration import composed, tiny_run

CLASSES = ("triangle", "disc", "square")  # in another order than the data's
TESTED = """
model = dict(test_cfg=dict(rpn=dict(max_per_img=25), rcnn=dict(score_thr=0.3)))
test_pipeline = [dict(type='Resize', scale=(96, 64), keep_ratio=True)]
"""


def a_detector(folder: Path, **changes: Any) -> Path:
    """A checkpoint of mmdet, of the size of the embedded experiment."""
    config = composed(*tiny_run(folder))
    task = build.task(config, 3)
    assert isinstance(task.config, MaskRCNNConfig)
    torch.manual_seed(0)
    model = SparseMaskRCNN(build.backbone(config), replace(task.config, smallest_anchor=32))
    export_mmdet(model, folder / "plain.pth", CLASSES)
    content = torch.load(folder / "plain.pth", weights_only=True)
    content["meta"] = {"dataset_meta": {"classes": CLASSES}, "cfg": TESTED, **changes}
    path = folder / "epoch_12.pth"
    torch.save(content, path)
    return path


def run_of(folder: Path, *overrides: str) -> Run:
    return Run(composed(*tiny_run(folder, *overrides)), ArtifactStore(folder / "stages"), NoTracker())


def test_a_checkpoint_of_mmdet_is_used_whole_with_its_settings(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = a_detector(tmp_path)
    caplog.set_level("INFO")
    results = run_pipeline(composed(*tiny_run(tmp_path, f"init={path}", "until=train", "tracking=none")))
    assert results["train"].metrics["num_steps"] == 0
    trained, theirs = read_weights(results["train"].folder / WEIGHTS_FILE), read_weights(path)
    rows = trained["roi_heads.box_predictor.cls_score.weight"]
    order = [3, 1, 2, 0]  # background, disc, square, triangle of triangle, disc, square, background
    assert torch.equal(rows, theirs["roi_head.bbox_head.fc_cls.weight"][order])
    told = next(message for message in caplog.messages if "was tested with" in message)
    assert "input within 96×64 pixels, padded to multiples of 32, here within 64×64 pixels" in told
    assert "num_proposals 25, here 30" in told and "score_threshold 0.3, here 0.05" in told
    assert told.endswith("The checkpoint's are kept: init_settings=recipe takes those of the configuration")
    size = "latency is measured on inputs of latency.image_size=[64, 64]"
    assert any(size in message for message in caplog.messages)


def test_settings_are_the_checkpoint_s_or_the_recipe_s(tmp_path: Path) -> None:
    path = a_detector(tmp_path)
    its = run_of(tmp_path, f"init={path}").task.config
    assert (its.input, its.score_threshold) == (PhotoInput(96, 64, resize="uint8"), 0.3)
    ours = run_of(tmp_path, f"init={path}", "init_settings=recipe").task.config
    assert (ours.photo_input, ours.score_threshold) == (PhotoInput(64, 64, divisor=64), 0.05)
    for config in (its, ours):  # what the weights are only right with
        assert config.smallest_anchor == 32
        assert config.image_size == 64  # of training
        assert config.conventions.roi_sampling_ratio == 0


def test_workers_and_exports_get_the_settled_task(tmp_path: Path) -> None:
    run = run_of(tmp_path, f"init={a_detector(tmp_path)}")
    model, report = run.initial_model()
    assert report is not None and report.uncovered == report.unused == ()
    assert isinstance(model, SparseMaskRCNN)
    assert model.config == run.task.config


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ((), "among which are no disc"),
        (("init_classifier=random",), None),
        (("init_heads=random",), None),
    ],
)
def test_other_classes(tmp_path: Path, overrides: tuple[str, ...], message: str | None) -> None:
    path = a_detector(tmp_path, dataset_meta={"classes": ("cat", "dog", "bird")})
    run = run_of(tmp_path, f"init={path}", *overrides)
    if message is not None:
        with pytest.raises(CheckpointError, match=message):
            run.initial_model()
        return
    _, report = run.initial_model()
    assert report is not None
    heads = {name.split(".")[0] for name in report.uncovered}
    if overrides == ("init_heads=random",):
        assert heads == {"backbone", "rpn", "roi_heads"}  # the pyramid is in the first
        assert any(name.startswith("roi_head.") for name in report.unused)
    else:
        assert len(report.uncovered) == 6 and all("predictor" in name for name in report.uncovered)
        assert run.task.config.num_classes == 3


@pytest.mark.parametrize(
    ("prefix", "head"),
    [
        ("backbone.", "decode_head.convs.{}.weight"),  # UPerNet of mmseg
        ("backbone.", "panoptic_head.transformer_decoder.layers.{}.norm.weight"),  # Mask2Former of mmdet
        ("encoders.camera.backbone.", "encoders.lidar.backbone.conv_input.{}.weight"),  # BEVFusion
    ],
)
def test_heads_of_another_model_stop_the_run_before_any_work(tmp_path: Path, prefix: str, head: str) -> None:
    """Nothing is dropped in silence; with the user's word the backbone is taken."""
    backbone, _ = named_weights(build.backbone(composed()), "mmdet")
    weights = {f"{prefix}{name}": value for name, value in backbone.items()}
    heads = {head.format(index): torch.zeros(2) for index in range(7)}
    torch.save({"state_dict": weights | heads}, tmp_path / "other.pth")
    overrides = tiny_run(tmp_path, f"init={tmp_path / 'other.pth'}", "tracking=none", "until=train")
    message = (
        "other.pth holds more than a backbone, and 7 of its tensors have no place in this model: "
        f"{head.format(0)}, .*init_heads=random takes the backbone"
    )
    with pytest.raises(CheckpointError, match=message):
        run_pipeline(composed(*overrides))
    assert not list((tmp_path / "out").glob("coco/stages/train-*/result.json"))
    model, report = run_of(tmp_path, *overrides[-3:], "init_heads=random").initial_model()
    assert report is not None and len(report.unused) == 7
    assert isinstance(model, SparseMaskRCNN)
    name = "patch_embed.projection.weight"
    assert torch.equal(model.backbone.body.patch_embed.proj.weight.cpu(), backbone[name])


def test_a_backbone_trained_on_imagenet_is_no_loss(tmp_path: Path) -> None:
    weights = build.backbone(composed()).state_dict()
    classifier = {"head.weight": torch.zeros(1000, 256), "head.bias": torch.zeros(1000)}
    torch.save({"model": weights | classifier}, tmp_path / "swin.pth")
    _, report = run_of(tmp_path, f"init={tmp_path / 'swin.pth'}").initial_model()
    assert report is not None and report.unused == ("head.weight", "head.bias")


def test_check_looks_at_data_and_weights_and_does_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = a_detector(tmp_path)
    results = run_pipeline(composed(*tiny_run(tmp_path, f"init={path}", "until=check")))
    assert results == {}
    assert not (tmp_path / "out").exists()
    printed = capsys.readouterr().out
    assert "train:     12 samples of 'train'" in printed and "64×64 pixels" in printed
    (disc,) = (line.split() for line in printed.splitlines() if line.startswith("disc"))
    run = run_of(tmp_path)
    for count, split in zip(disc[1:], run.splits, strict=True):
        labels = torch.cat([split[index][1]["labels"] for index in range(len(split))])
        assert int(count) == int((labels == 1).sum())
    assert "written by mmdet, its backbone by mmdet" in printed
    assert "not in it, so trained anew: nothing" in printed and "in it and not used: nothing" in printed
    assert "longest_side: 96" in printed and "score_threshold: 0.3" in printed
    run_pipeline(composed(*tiny_run(tmp_path, "until=check")))
    assert "checkpoint:  none: the model is trained from random weights" in capsys.readouterr().out


def test_photos_in_a_folder_of_their_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`data.images` names it; the driver and the workers of the search look there."""
    drawn = run_of(tmp_path).train_set
    (drawn.root / "train").rename(drawn.root / "photos")
    splits = ["data.train=train", "data.search=train", "data.val=train"]
    mine = [f"data.root={tmp_path / 'data'}", "data.generated.root=elsewhere", *splits]
    with pytest.raises(DataError, match="put the images there, or name their folder"):
        run_pipeline(composed(*tiny_run(tmp_path, *mine, "until=check")))
    overrides = tiny_run(tmp_path, *mine, "data.images=photos")
    run_pipeline(composed(*overrides, "until=check"))
    assert "12 samples of 'train'" in capsys.readouterr().out
    run = Run(composed(*overrides), ArtifactStore(tmp_path), NoTracker())
    scores = evaluator_factory(run, run.build_model())()(run.space.sparsest, 2)
    assert set(scores) == {"box_ap", "mask_ap"}


def test_a_search_needs_something_to_score_by(tmp_path: Path) -> None:
    drawn = run_of(tmp_path).search_set
    assert isinstance(drawn, CocoInstances)
    dataset = json.loads(drawn.annotation_file.read_text())
    first = sorted(image["id"] for image in dataset["images"])[:2]
    dataset["annotations"] = [each for each in dataset["annotations"] if each["image_id"] not in first]
    drawn.annotation_file.write_text(json.dumps(dataset))
    message = "search.num_images=2: the first 2 of the 6 images of 'search' have no annotation that counts"
    with pytest.raises(DataError, match=message):
        run_pipeline(composed(*tiny_run(tmp_path, "search.num_images=2", "tracking=none")))
    assert not list((tmp_path / "out").glob("coco/stages/train-*/result.json"))
    run_of(tmp_path, "search.num_images=3").verify_images()
