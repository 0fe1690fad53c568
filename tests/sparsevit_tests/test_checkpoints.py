"""Weight files: formats, and everything that can be wrong with one."""

from pathlib import Path

import pytest
import torch
import torchvision
from torch import nn

from sparsevit import SparseSwin, create_backbone, load_backbone_weights
from sparsevit.checkpoints import (
    CheckpointError,
    import_checkpoint,
    load_model_weights,
    read_weights,
    write_weights,
)
from sparsevit.tasks.instance_segmentation import InstanceSegmentation
from sparsevit.tasks.mask_rcnn import MaskRCNNConfig


def small_task(num_classes: int = 3) -> InstanceSegmentation:
    return InstanceSegmentation(
        MaskRCNNConfig(
            num_classes=num_classes, image_size=64, fpn_channels=16, box_channels=16, mask_channels=16,
            smallest_anchor=16, num_proposals=20, num_rois_per_image=16, num_detections=5,
        )
    )  # fmt: skip


def microsoft_names(backbone: SparseSwin) -> dict[str, torch.Tensor]:
    """Our weights under the names of Microsoft's detection checkpoints."""
    renamed = {}
    for name, value in backbone.state_dict().items():
        parts = name.split(".")
        if parts[0] == "stages":
            parts[0] = "layers"
        elif parts[0] == "downsamples":
            parts = ["layers", parts[1], "downsample", *parts[2:]]
        elif parts[0] == "norms":
            parts = [f"norm{parts[1]}", *parts[2:]]
        renamed[".".join(parts)] = value
    return renamed


def test_torchvision_classifier(tmp_path: Path) -> None:
    theirs = torchvision.models.swin_t(weights=None)
    torch.save(theirs.state_dict(), tmp_path / "swin.pth")
    backbone = create_backbone("swin_t")
    report = load_backbone_weights(backbone, tmp_path / "swin.pth")
    assert report.format == "torchvision"
    heads = {name for name in report.left_over if not name.endswith("relative_position_index")}
    assert heads == {"head.weight", "head.bias"}
    assert all(name.startswith("norms.") for name in report.missing)
    for mine, its in (
        ("stages.2.blocks.5.attn.qkv.weight", "features.5.5.attn.qkv.weight"),
        ("downsamples.1.reduction.weight", "features.4.reduction.weight"),
    ):
        assert torch.equal(backbone.get_parameter(mine), theirs.get_parameter(its))


@pytest.mark.parametrize("prefix", ["", "backbone.", "module.backbone."])
def test_microsoft_names_under_any_prefix(tmp_path: Path, prefix: str) -> None:
    source, target = create_backbone("swin_nano"), create_backbone("swin_nano")
    named = {prefix + name: value for name, value in microsoft_names(source).items()}
    extra = {prefix + "layers.0.blocks.0.attn.relative_position_index": torch.zeros(16, 16)}
    torch.save({"model": named | extra, "epoch": 3}, tmp_path / "swin.pth")
    report = load_backbone_weights(target, tmp_path / "swin.pth")
    assert report.format == "microsoft"
    assert report.missing == ()
    for name, value in source.state_dict().items():
        assert torch.equal(target.state_dict()[name], value), name


def test_own_format_round_trip_is_bit_exact(tmp_path: Path) -> None:
    source, target = create_backbone("swin_nano"), create_backbone("swin_nano")
    write_weights(tmp_path / "own.safetensors", source.state_dict())
    assert load_backbone_weights(target, tmp_path / "own.safetensors").format == "sparsevit"
    for name, value in source.state_dict().items():
        assert torch.equal(target.state_dict()[name], value), name


def test_written_file_can_be_read_by_whom_the_umask_lets(tmp_path: Path) -> None:
    (tmp_path / "plain").touch()
    write_weights(tmp_path / "own.safetensors", {"weight": torch.zeros(2)})
    assert (tmp_path / "own.safetensors").stat().st_mode == (tmp_path / "plain").stat().st_mode


def load(
    task: InstanceSegmentation,
    model: nn.Module,
    path: Path,
    *,
    loads_classifier: bool = True,
    loads_heads: bool = True,
) -> tuple[str, ...]:
    return load_model_weights(
        model, task.backbone_of(model), import_checkpoint(path, task.foreign_formats, task.config),
        class_layers=task.class_layers, loads_classifier=loads_classifier, loads_heads=loads_heads,
    ).uncovered  # fmt: skip


def test_backbone_of_another_size_lists_the_shapes(tmp_path: Path) -> None:
    torch.save(torchvision.models.swin_b(weights=None).state_dict(), tmp_path / "swin_b.pth")
    with pytest.raises(CheckpointError, match="not a checkpoint of this backbone"):
        load_backbone_weights(create_backbone("swin_t"), tmp_path / "swin_b.pth")


def test_another_network_altogether(tmp_path: Path) -> None:
    torch.save(torchvision.models.resnet18(weights=None).state_dict(), tmp_path / "resnet.pth")
    with pytest.raises(CheckpointError, match="holds no Swin backbone. Unexpected: conv1.weight"):
        load_backbone_weights(create_backbone("swin_t"), tmp_path / "resnet.pth")


def test_model_of_other_classes(tmp_path: Path) -> None:
    task = small_task(3)
    path = tmp_path / "three.safetensors"
    write_weights(path, task.build_model(create_backbone("swin_nano")).state_dict())
    model = small_task(5).build_model(create_backbone("swin_nano"))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    message = r"was trained on 3 classes, but here are 5 \(.*\). init_classifier=random loads all but"
    with pytest.raises(CheckpointError, match=message):
        load(task, model, path)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    uncovered = load(task, model, path, loads_classifier=False)
    assert len(uncovered) == 6
    assert all("predictor" in name for name in uncovered)
    assert all(torch.equal(model.state_dict()[name], before[name]) for name in uncovered)
    saved = read_weights(path)
    assert all(torch.equal(v, saved[n]) for n, v in model.state_dict().items() if n not in uncovered)


def test_model_of_other_width_is_refused(tmp_path: Path) -> None:
    task = small_task()
    write_weights(tmp_path / "nano.safetensors", task.build_model(create_backbone("swin_nano")).state_dict())
    with pytest.raises(CheckpointError, match="checkpoint of another model"):
        load(task, task.build_model(create_backbone("swin_t")), tmp_path / "nano.safetensors")


def test_foreign_tensors_beside_the_model_are_refused(tmp_path: Path) -> None:
    task = small_task()
    model = task.build_model(create_backbone("swin_nano"))
    write_weights(tmp_path / "more.safetensors", {**model.state_dict(), "extra.weight": torch.zeros(2)})
    with pytest.raises(CheckpointError, match="checkpoint of another model. Unexpected: extra.weight"):
        load(task, model, tmp_path / "more.safetensors")


def test_backbone_file_leaves_the_heads_uncovered(tmp_path: Path) -> None:
    task = small_task()
    source = create_backbone("swin_nano")
    write_weights(tmp_path / "backbone.safetensors", source.state_dict())
    model = task.build_model(create_backbone("swin_nano"))
    uncovered = load(task, model, tmp_path / "backbone.safetensors")
    assert set(uncovered) == {name for name in model.state_dict() if not name.startswith("backbone.body.")}
    for name, value in task.backbone_of(model).state_dict().items():
        assert torch.equal(value, source.state_dict()[name]), name


@pytest.mark.parametrize("name", ["backbone.body.norms.1.weight", "rpn.head.cls_logits.bias"])
def test_nan_in_weights_is_named_and_nothing_is_loaded(tmp_path: Path, name: str) -> None:
    task = small_task()
    weights = task.build_model(create_backbone("swin_nano")).state_dict()
    weights[name][1] = float("nan")
    write_weights(tmp_path / "diverged.pth", weights)
    model = task.build_model(create_backbone("swin_nano"))
    before = {each: value.clone() for each, value in model.state_dict().items()}
    with pytest.raises(CheckpointError, match=rf"diverged.pth holds NaN or infinity: {name} \(1 of"):
        load(task, model, tmp_path / "diverged.pth")
    assert all(torch.equal(value, before[each]) for each, value in model.state_dict().items())


def test_infinity_in_a_backbone_is_named(tmp_path: Path) -> None:
    weights = create_backbone("swin_nano").state_dict()
    weights["patch_embed.proj.bias"][:3] = float("inf")
    write_weights(tmp_path / "diverged.safetensors", weights)
    message = r"holds NaN or infinity: patch_embed.proj.bias \(3 of 32 values\)"
    with pytest.raises(CheckpointError, match=message):
        load_backbone_weights(create_backbone("swin_nano"), tmp_path / "diverged.safetensors")


def test_the_backbone_that_would_fit_is_named(tmp_path: Path) -> None:
    write_weights(tmp_path / "small.safetensors", create_backbone("swin_nano").state_dict())
    message = "small.safetensors is not a checkpoint of this backbone, but of swin_nano"
    with pytest.raises(CheckpointError, match=message):
        load_backbone_weights(create_backbone("swin_t"), tmp_path / "small.safetensors")


def test_heads_stay_random_on_request(tmp_path: Path) -> None:
    task = small_task()
    source = task.build_model(create_backbone("swin_nano"))
    write_weights(tmp_path / "whole.safetensors", source.state_dict())
    model = task.build_model(create_backbone("swin_nano"))
    uncovered = load(task, model, tmp_path / "whole.safetensors", loads_heads=False)
    assert set(uncovered) == {name for name in model.state_dict() if not name.startswith("backbone.body.")}
    name = "backbone.body.norms.0.weight"
    assert torch.equal(model.state_dict()[name], source.state_dict()[name])
    assert not torch.equal(model.rpn.head.cls_logits.weight, source.rpn.head.cls_logits.weight)


def test_backbone_of_a_classifier_or_of_masked_images_is_taken(tmp_path: Path) -> None:
    """What was of use in its training alone is no loss; norms that it lacks are named as untrained."""
    task = small_task()
    weights = {f"encoder.{n}": v for n, v in microsoft_names(create_backbone("swin_nano")).items()}
    for stage in range(3):
        del weights[f"encoder.norm{stage}.weight"], weights[f"encoder.norm{stage}.bias"]
    torch.save({"model": weights | {"encoder.mask_token": torch.zeros(1, 1, 32)}}, tmp_path / "masked.pth")
    uncovered = load(task, task.build_model(create_backbone("swin_nano")), tmp_path / "masked.pth")
    norms = [name for name in uncovered if name.startswith("backbone.body.")]
    assert norms == [f"backbone.body.norms.{s}.{leaf}" for s in range(3) for leaf in ("bias", "weight")]
