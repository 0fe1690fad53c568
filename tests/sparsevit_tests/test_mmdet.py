"""Mask R-CNNs of mmdet and its relatives: the same predictions here, or a sentence that says why not."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2.functional import pil_to_tensor

from sparsevit import create_backbone
from sparsevit.checkpoints import CheckpointError, import_checkpoint, load_model_weights, read_weights
from sparsevit.tasks.instance_segmentation import InstanceSegmentation
from sparsevit.tasks.mask_rcnn import Conventions, MaskRCNNConfig, PhotoInput, SparseMaskRCNN
from sparsevit.tasks.mask_rcnn.mmdet import export_mmdet
from sparsevit.tasks.mask_rcnn.mmdet_config import parse_config
from sparsevit.tasks.mask_rcnn.photos import resize_uint8
from tests.sparsevit_tests.test_checkpoints import microsoft_names

DATA = Path(__file__).parents[3] / "shared" / "data"
GOLDEN = DATA / "mmdet_mask_rcnn"
SMALL = MaskRCNNConfig(
    num_classes=3, image_size=64, fpn_channels=16, box_channels=16, mask_channels=16,
    smallest_anchor=16, num_proposals=20, num_rois_per_image=16, num_detections=5,
)  # fmt: skip
CLASSES = ("dog", "cat", "traffic light")
needs_golden = pytest.mark.skipif(not GOLDEN.is_dir(), reason=f"no predictions of mmdet at {GOLDEN}")


def model_of(config: MaskRCNNConfig = SMALL, seed: int = 0) -> SparseMaskRCNN:
    torch.manual_seed(seed)
    return SparseMaskRCNN(create_backbone("swin_nano"), config).eval()


def load(path: Path, class_names: tuple[str, ...] | None, config: MaskRCNNConfig = SMALL) -> SparseMaskRCNN:
    """The model of a file, tested as the file says."""
    task = InstanceSegmentation(config)
    imported = import_checkpoint(path, task.foreign_formats, config, class_names)
    model = model_of(imported.tested_config, seed=1)
    report = load_model_weights(model, model.backbone.body, imported, class_layers=task.class_layers)
    assert report.uncovered == report.unused == ()
    assert report.format == "mmdet"
    return model


def theirs(folder: Path, *, text: str = "", classes: Any = CLASSES) -> tuple[SparseMaskRCNN, dict[str, Any]]:
    """A random model, and what mmdet 3 would write of it."""
    model = model_of()
    export_mmdet(model, folder / "own.pth", CLASSES)
    content = torch.load(folder / "own.pth", weights_only=True)
    content["meta"] = {"mmdet_version": "3.3.0", "dataset_meta": {"classes": classes}, "cfg": text}
    return model, content


def saved(folder: Path, content: Any) -> Path:
    torch.save(content, folder / "epoch_12.pth")
    return folder / "epoch_12.pth"


@needs_golden
@pytest.mark.parametrize("photo", ["000000005001", "000000062554", "000000460229"])
@pytest.mark.parametrize("source", ["resized", "photo"])
def test_predictions_are_mmdet_s(photo: str, source: str) -> None:
    """Random weights, saved and run by mmdet 3.3.0 itself on photos of 4:3, 3:2 and 3:5."""
    golden = json.loads((GOLDEN / "golden.json").read_text())
    model = load(GOLDEN / "epoch_1.pth", tuple(golden["classes"]))
    longest, shortest = golden["scale"]
    config = replace(model.config, input=PhotoInput(longest, shortest, resize="uint8"))
    model.config = config  # the file does not say at which size it was tested
    expected = np.load(GOLDEN / f"{photo}.npz")
    pixels = pil_to_tensor(Image.open(DATA / "coco_small" / "val2017" / f"{photo}.jpg").convert("RGB"))
    given = torch.from_numpy(expected["resized_bgr"][::-1].copy())
    size = (pixels.shape[1], pixels.shape[2])
    assert torch.equal(resize_uint8(pixels, config.photo_input.size_of(*size)), given)
    with torch.inference_mode():
        (found,) = model.detect([given / 255], [size]) if source == "resized" else model([pixels / 255])
    assert len(found["boxes"]) == len(expected["boxes"]) == 100
    masks = np.unpackbits(expected["masks"])[: np.prod(expected["mask_shape"])].reshape(
        expected["mask_shape"]
    )
    num_equal = 0
    for box, score, label, mask in zip(
        torch.from_numpy(expected["boxes"]), expected["scores"], expected["labels"], masks, strict=True
    ):
        distance = (found["boxes"] - box).abs().amax(dim=1) + 1e3 * (found["labels"] - 1 != int(label))
        nearest = int(distance.argmin())
        if distance[nearest] < 0.01 and abs(float(found["scores"][nearest]) - score) < 1e-5:
            num_equal += 1
            assert np.sum((found["masks"][nearest, 0] >= 0.5).numpy() != mask) <= 4
    assert num_equal >= 95


def assert_same_predictions(
    one: SparseMaskRCNN, other: SparseMaskRCNN, order: list[int] | None = None
) -> None:
    """Equal, with labels of the second in another order if one is given."""
    photo = torch.rand(3, 50, 70, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        (expected,), (found,) = one([photo]), other([photo])
    assert len(expected["boxes"]) > 0
    labels = found["labels"] if order is None else torch.tensor(order)[found["labels"] - 1] + 1
    assert torch.equal(labels, expected["labels"])
    for name in ("boxes", "scores", "masks"):
        torch.testing.assert_close(found[name], expected[name], atol=1e-5, rtol=1e-5)


def test_what_goes_home_comes_back_to_the_same_bits(tmp_path: Path) -> None:
    """Weights and settings, also those that mmdet does not have."""
    odd = replace(
        SMALL, score_threshold=0.01, input=PhotoInput(96, 64, divisor=64),
        conventions=Conventions(roi_aligned=False, mask_pasting="integer", anchor_ratios=(0.5, 1.0, 2.0)),
    )  # fmt: skip
    model = model_of(odd)
    export_mmdet(model, tmp_path / "home.pth", CLASSES)
    back = load(tmp_path / "home.pth", CLASSES)
    assert back.config == odd
    for name, value in model.state_dict().items():
        assert torch.equal(back.state_dict()[name], value), name
    assert_same_predictions(model, back)
    export_mmdet(back, tmp_path / "again.pth", CLASSES)
    once, again = (read_weights(tmp_path / name) for name in ("home.pth", "again.pth"))
    assert once.keys() == again.keys()
    assert all(torch.equal(value, again[name]) for name, value in once.items())


def test_an_export_has_mmdet_s_names_shapes_and_order(tmp_path: Path) -> None:
    model, content = theirs(tmp_path)
    weights = content["state_dict"]
    shapes = {name: tuple(value.shape) for name, value in weights.items() if not name.startswith("backbone.")}
    assert shapes["roi_head.bbox_head.fc_cls.weight"] == (4, 16)
    assert shapes["roi_head.bbox_head.fc_reg.weight"] == (12, 16)
    assert shapes["roi_head.mask_head.conv_logits.weight"] == (3, 16, 1, 1)
    assert shapes["neck.lateral_convs.3.conv.weight"] == (16, 256, 1, 1)
    assert {name.split(".")[0] for name in weights} == {"backbone", "neck", "rpn_head", "roi_head"}
    assert "backbone.stages.0.blocks.0.attn.w_msa.qkv.weight" in weights
    background = model.roi_heads.box_predictor.cls_score.weight[0]
    assert torch.equal(weights["roi_head.bbox_head.fc_cls.weight"][-1], background)


@needs_golden
def test_an_export_of_an_import_has_the_names_that_mmdet_wrote(tmp_path: Path) -> None:
    model = load(GOLDEN / "epoch_1.pth", None)
    export_mmdet(model, tmp_path / "home.pth", ("thing0", "thing1", "thing2"))
    mmdet_s, ours = read_weights(GOLDEN / "epoch_1.pth"), read_weights(tmp_path / "home.pth")
    assert ours.keys() == mmdet_s.keys()
    assert all(torch.equal(value, ours[name]) for name, value in mmdet_s.items())


def test_classes_are_mapped_by_name(tmp_path: Path) -> None:
    model, content = theirs(tmp_path)
    names = ("Traffic_light", "dog", "cat")
    back = load(saved(tmp_path, content), names)
    original = replace(back.config, num_classes=3)
    model.config = original
    rebuilt = SparseMaskRCNN(create_backbone("swin_nano"), original).eval()
    rebuilt.load_state_dict(model.state_dict())
    assert_same_predictions(rebuilt, back, order=[2, 0, 1])


def test_classes_that_the_data_lacks_are_left_out_and_told(tmp_path: Path) -> None:
    model, content = theirs(tmp_path)
    path = saved(tmp_path, content)
    imported = import_checkpoint(path, InstanceSegmentation(SMALL).foreign_formats, SMALL, ("cat",))
    assert imported.config.num_classes == 1
    assert imported.notes[0].startswith("2 of its 3 classes are not in the data and are left out")
    offsets = imported.weights["roi_heads.box_predictor.bbox_pred.weight"]
    assert torch.equal(offsets[4:], model.roi_heads.box_predictor.bbox_pred.weight[8:12])


@pytest.mark.parametrize("key", ["CLASSES", "dataset_meta"])
def test_classes_stand_where_mmdet_2_and_3_write_them(tmp_path: Path, key: str) -> None:
    _, content = theirs(tmp_path)
    content["meta"] = (
        {"CLASSES": CLASSES} if key == "CLASSES" else {"dataset_meta": {"classes": list(CLASSES)}}
    )
    formats = InstanceSegmentation(SMALL).foreign_formats
    message = (
        r"was trained on 3 classes, among which are no bird \(1 of the data's 2\); it has dog, cat, traffic"
    )
    with pytest.raises(CheckpointError, match=message):
        import_checkpoint(saved(tmp_path, content), formats, SMALL, ("bird", "cat"))


def test_classes_without_names_must_be_as_many(tmp_path: Path) -> None:
    _, content = theirs(tmp_path)
    content["meta"] = {}
    path, formats = saved(tmp_path, content), InstanceSegmentation(SMALL).foreign_formats
    assert "does not name its 3 classes" in import_checkpoint(path, formats, SMALL, ("a", "b", "c")).notes[0]
    with pytest.raises(
        CheckpointError, match=r"3 classes, which it does not name, but here are 2. init_class"
    ):
        import_checkpoint(path, formats, SMALL, ("a", "b"))


def test_boxes_that_all_classes_share_are_repeated(tmp_path: Path) -> None:
    """Class-agnostic boxes: the same offsets whatever the class."""
    _, content = theirs(tmp_path)
    weights = content["state_dict"]
    for leaf in ("weight", "bias"):
        name = f"roi_head.bbox_head.fc_reg.{leaf}"
        weights[name] = weights[name][:4]
    back = load(saved(tmp_path, content), CLASSES)
    rows = back.roi_heads.box_predictor.bbox_pred.weight.detach()
    assert torch.all(rows[:4] == 0)
    for label in (1, 2, 3):
        assert torch.equal(rows[4 * label : 4 * label + 4], weights["roi_head.bbox_head.fc_reg.weight"])


def test_swin_transformer_object_detection(tmp_path: Path) -> None:
    """Microsoft's names and order in the backbone, mmdet's in everything else."""
    model, content = theirs(tmp_path)
    rest = {n: v for n, v in content["state_dict"].items() if not n.startswith("backbone.")}
    backbone = {f"backbone.{n}": v for n, v in microsoft_names(model.backbone.body).items()}
    index = {"backbone.layers.0.blocks.0.attn.relative_position_index": torch.zeros(16, 16)}
    content["state_dict"] = rest | backbone | index
    back = load(saved(tmp_path, content), CLASSES)
    for name, value in model.state_dict().items():
        assert torch.equal(back.state_dict()[name], value), name


@pytest.mark.parametrize(
    "wrap",
    [
        lambda weights: {"state_dict": weights},
        lambda weights: {"state_dict": {f"model.{name}": value for name, value in weights.items()}},
        lambda weights: {"model_state_dict": {f"module._orig_mod.{n}": v for n, v in weights.items()}},
        lambda weights: weights,
        lambda weights: {"state_dict": {f"net.detector.{n}": v for n, v in weights.items()}, "epoch": 3},
    ],
    ids=["state_dict", "lightning", "ddp and compiled", "bare", "nested"],
)
def test_wrappers(tmp_path: Path, wrap: Callable[[dict[str, Tensor]], Any]) -> None:
    model, content = theirs(tmp_path)
    back = load(saved(tmp_path, wrap(content["state_dict"])), CLASSES)
    assert torch.equal(back.rpn.head.cls_logits.weight, model.rpn.head.cls_logits.weight)


MMDET_3 = """
auto_scale_lr = dict(base_batch_size=16)
custom = some_function(3)
model = dict(
    backbone=dict(type='SwinTransformer', depths=[2, 2, 6, 2]),
    data_preprocessor=dict(bgr_to_rgb=True, mean=[123.675, 116.28, 103.53], pad_size_divisor=64,
                           std=[58.395, 57.12, 57.375]),
    roi_head=dict(
        bbox_head=dict(bbox_coder=dict(target_stds=[0.05, 0.05, 0.1, 0.1])),
        bbox_roi_extractor=dict(roi_layer=dict(output_size=7, sampling_ratio=2, type='RoIAlign'))),
    rpn_head=dict(anchor_generator=dict(ratios=[0.5, 1.0, 2.0], scales=[4], strides=[4, 8, 16, 32, 64])),
    test_cfg=dict(
        rcnn=dict(mask_thr_binary=0.4, max_per_img=30, nms=dict(iou_threshold=0.6, type='nms'),
                  score_thr=0.1),
        rpn=dict(max_per_img=300, min_bbox_size=0, nms=dict(iou_threshold=0.8, type='nms'), nms_pre=500)),
    type='MaskRCNN')
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(keep_ratio=True, scale=(1000, 600), type='Resize'),
    dict(type='PackDetInputs')]
"""
MMDET_2 = """
model = dict(type='MaskRCNN')
test_cfg = dict(rpn=dict(nms_pre=700, max_num=200, nms_thr=0.75), rcnn=dict(score_thr=0.2))
data = dict(test=dict(pipeline=[
    dict(type='LoadImageFromFile'),
    dict(type='MultiScaleFlipAug', img_scale=(672, 640), flip=False, transforms=[
        dict(type='Resize', keep_ratio=False), dict(type='RandomFlip'),
        dict(type='Normalize', mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375], to_rgb=True),
        dict(type='Pad', size_divisor=32)])]))
"""


def test_settings_of_mmdet_3(tmp_path: Path) -> None:
    _, content = theirs(tmp_path, text=MMDET_3)
    formats = InstanceSegmentation(SMALL).foreign_formats
    imported = import_checkpoint(saved(tmp_path, content), formats, SMALL, CLASSES)
    conventions = Conventions(roi_sampling_ratio=2, box_weights=(20.0, 20.0, 10.0, 10.0))
    bound = replace(SMALL, smallest_anchor=16, conventions=conventions)
    assert imported.config == bound
    assert imported.tested_config == replace(
        bound, input=PhotoInput(1000, 600, divisor=64, resize="uint8"), num_proposals=300,
        num_proposals_per_level=500, num_detections=30, proposal_overlap=0.8, detection_overlap=0.6,
        score_threshold=0.1, mask_threshold=0.4,
    )  # fmt: skip


def test_settings_of_mmdet_2(tmp_path: Path) -> None:
    _, content = theirs(tmp_path)
    content["meta"] = {"mmdet_version": "2.25.0", "CLASSES": CLASSES, "config": MMDET_2}
    formats = InstanceSegmentation(SMALL).foreign_formats
    tested = import_checkpoint(saved(tmp_path, content), formats, SMALL, CLASSES).tested_config
    assert tested.input == PhotoInput(672, 640, fixed_size=(640, 672), resize="uint8")
    assert (tested.num_proposals, tested.num_proposals_per_level, tested.proposal_overlap) == (200, 700, 0.75)
    assert (tested.score_threshold, tested.num_detections, tested.smallest_anchor) == (0.2, 100, 32)
    assert tested.conventions == Conventions(roi_sampling_ratio=0)


@pytest.mark.parametrize("text", ["", "model = dict(type='MaskRCNN')", "no Python at all ("])
def test_settings_that_a_file_does_not_say_are_mmdet_s_own(tmp_path: Path, text: str) -> None:
    _, content = theirs(tmp_path, text=text)
    formats = InstanceSegmentation(SMALL).foreign_formats
    imported = import_checkpoint(saved(tmp_path, content), formats, SMALL, CLASSES)
    assert [note for note in imported.notes if "does not say at which size it was tested" in note]
    tested = imported.tested_config
    assert tested.input == PhotoInput(64, 64, divisor=64, resize="uint8")  # not said, so the user's
    assert (tested.num_proposals, tested.num_proposals_per_level, tested.num_detections) == (1000, 1000, 100)
    assert (tested.proposal_overlap, tested.detection_overlap, tested.score_threshold) == (0.7, 0.5, 0.05)


def test_a_configuration_is_parsed_and_never_run(tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    text = f"import os\nx = open({str(marker)!r}, 'w')\ny = [dict(a=1, b=exit())]\nz = {{'k': -2, 3: None}}"
    assert parse_config(text) == {"y": [{"a": 1}], "z": {"k": -2, "3": None}}
    assert not marker.exists()


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            "nms=dict(iou_threshold=0.6, type='nms')",
            "nms=dict(type='soft_nms')",
            "rcnn.nms.type='soft_nms' instead",
        ),
        ("mean=[123.675", "mean=[103.53", r"data_preprocessor.mean=\[103.53, 116.28, 103.53\] instead of"),
        ("scales=[4]", "scales=[4, 8]", r"has anchors of the scales \[4, 8\] at the strides"),
        (
            "strides=[4, 8",
            "strides=[4, 4",
            r"at the strides \[4, 4, 16, 32, 64\]; here is one of whole pixels",
        ),
        (
            "scale=(1000, 600)",
            "scale=0.5",
            "was tested with photos resized by 0.5; here photos are",
        ),
        ("type='RoIAlign'", "type='RoIPool'", "roi_layer.type='RoIPool' instead of 'RoIAlign'"),
        (
            "bbox_head=dict(",
            "bbox_head=dict(cls_predictor_cfg=dict(type='NormedLinear'), ",
            "type='NormedLinear'",
        ),
        (
            "target_stds=[0.05",
            "target_means=[0.1, 0, 0, 0], target_stds=[0.05",
            r"target_means=\[0.1, 0, 0, 0\]",
        ),
        (
            "type='nms'),\n                  score_thr",
            "type='nms', class_agnostic=True), score_thr",
            "class_agnostic",
        ),
        ("mean=[123.675, 116.28, 103.53], ", "", "data_preprocessor.mean='none' instead of"),
        ("min_bbox_size=0", "min_bbox_size=5", "min_bbox_size=5 instead of 0"),
        ("min_bbox_size=0", "nms_across_levels=True", "nms_across_levels=True instead of False"),
        ("bgr_to_rgb=True", "bgr_to_rgb=False", "data_preprocessor.bgr_to_rgb=False instead of True"),
        ("max_per_img=30", "max_per_img='many'", "cannot be used .ValueError: num_detections must be"),
        ("score_thr=0.1", "score_thr=7", "settings that cannot be used .ValueError: score_threshold must be"),
        ("target_stds=[0.05", "target_stds=[0.0", "carries settings that cannot be used .ZeroDivisionError"),
    ],
)
def test_what_ours_does_not_do_is_refused(tmp_path: Path, old: str, new: str, message: str) -> None:
    assert old in MMDET_3
    _, content = theirs(tmp_path, text=MMDET_3.replace(old, new, 1))
    formats = InstanceSegmentation(SMALL).foreign_formats
    with pytest.raises(CheckpointError, match=message):
        import_checkpoint(saved(tmp_path, content), formats, SMALL, CLASSES)


def test_what_mmdet_2_says_of_pixels_is_heeded(tmp_path: Path) -> None:
    """Its normalisation is a step of the pipeline: one of Caffe's would be another input without a word."""
    _, content = theirs(tmp_path)
    mean, turn = "mean=[123.675, 116.28, 103.53]", "to_rgb=True"
    formats = InstanceSegmentation(SMALL).foreign_formats
    for old, new, message in (
        (
            mean,
            "mean=[103.53, 116.28, 123.675]",
            r"tested with Normalize\(mean=\[103.53, 116.28, 123.675\]\)",
        ),
        (turn, "to_rgb=False", r"tested with Normalize\(to_rgb=False\)"),
        ("type='Pad'", "pad_val=114, type='Pad'", r"tested with Pad\(pad_val=114\)"),
    ):
        assert old in MMDET_2
        content["meta"] = {"config": MMDET_2.replace(old, new), "CLASSES": CLASSES}
        with pytest.raises(CheckpointError, match=message):
            import_checkpoint(saved(tmp_path, content), formats, SMALL, CLASSES)


def test_settings_of_our_own_that_are_none(tmp_path: Path) -> None:
    _, content = theirs(tmp_path)
    content["meta"] = {"sparsevit": {"num_classes": 3, "nonsense": 1}}
    formats = InstanceSegmentation(SMALL).foreign_formats
    with pytest.raises(CheckpointError, match="carries settings that cannot be used .TypeError"):
        import_checkpoint(saved(tmp_path, content), formats, SMALL, CLASSES)


def cascade(content: dict[str, Any]) -> None:
    weights = content["state_dict"]
    for name in [name for name in weights if name.startswith("roi_head.bbox_head.")]:
        weights[name.replace("bbox_head.", "bbox_head.0.")] = weights.pop(name)


def boxes_alone(content: dict[str, Any]) -> None:
    for name in [name for name in content["state_dict"] if "mask_head" in name]:
        del content["state_dict"][name]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (cascade, r"is a Cascade R-CNN, with several box heads in a row \(roi_head.bbox_head.0"),
        (
            boxes_alone,
            "is no Mask R-CNN .* roi_head.mask_head.convs.0.conv.weight, .* are missing. init_heads=random",
        ),
        (
            lambda content: content["meta"].update(mmdet_version="1.2.0"),
            "was written by mmdet 1.2.0: before 2.0",
        ),
    ],
)
def test_relatives_are_refused(tmp_path: Path, change: Callable[[Any], None], message: str) -> None:
    _, content = theirs(tmp_path)
    change(content)
    formats = InstanceSegmentation(SMALL).foreign_formats
    with pytest.raises(CheckpointError, match=message):
        import_checkpoint(saved(tmp_path, content), formats, SMALL, CLASSES)


def test_a_layer_that_is_not_ours_is_named(tmp_path: Path) -> None:
    _, content = theirs(tmp_path)
    content["state_dict"]["neck.lateral_convs.0.bn.weight"] = torch.ones(16)
    with pytest.raises(CheckpointError, match="another model. Unexpected: neck.lateral_convs.0.bn.weight"):
        load(saved(tmp_path, content), CLASSES)
