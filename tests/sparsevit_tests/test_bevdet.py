"""BEVDet on the sparse backbone: shapes, training, pruning by camera, and the public code's checkpoints."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from sparsevit import SparsityVector, create_backbone
from sparsevit.checkpoints import (
    CheckpointError,
    export_backbone_weights,
    import_checkpoint,
    load_model_weights,
    read_weights,
)
from sparsevit.precision import autocast
from sparsevit.tasks.bevdet import BEVDetConfig, SparseBEVDet
from sparsevit.tasks.detection_3d import Detection3D
from tests.sparsevit_tests.test_bev import camera_setup

SMALL = BEVDetConfig(
    input_size=(64, 96), neck_channels=16, view_channels=8, bev_channels=16, head_channels=8,
    depth_range=(1.0, 9.0, 1.0), extent=12.8, cell=0.8, min_score=0.0,
)  # fmt: skip


def small_model() -> SparseBEVDet:
    torch.manual_seed(0)
    return SparseBEVDet(create_backbone("swin_nano"), SMALL)


def cameras() -> list[dict[str, Tensor]]:
    setup = camera_setup(torch.eye(3))
    return [{name: getattr(setup, name)[0] for name in setup._fields}] * 2


def images() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.rand(2, 3, 64, 96, generator=generator) for _ in range(2)]


def test_detections_of_every_sample() -> None:
    model = small_model().eval()
    with torch.inference_mode():
        found = model(images(), cameras())
    assert len(found) == 2
    for each in found:
        assert each.boxes.shape == (len(each.scores), 9)
        assert 0 < len(each.scores) <= 500
        assert bool((each.scores.diff() <= 0).all())
        assert set(each.labels.tolist()) <= set(range(10))


def test_samples_and_cameras_do_not_influence_each_other() -> None:
    """Also under pruning, which ranks the windows of every image alone."""
    model = small_model().eval()
    vector = SparsityVector((0.5,) * 6)
    batch = images()
    with torch.inference_mode():
        together = model.backbone(torch.cat(batch), vector)
        alone = model.backbone(batch[1][1:], vector)
        for whole, part in zip(together, alone, strict=True):
            torch.testing.assert_close(whole[3:], part, atol=1e-5, rtol=1e-4)
        both, one = model(batch, cameras(), sparsity=vector), model(batch[1:], cameras()[1:], sparsity=vector)
    torch.testing.assert_close(both[1].scores[:20], one[0].scores[:20], atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_training_step_reaches_every_parameter(precision: str) -> None:
    model = small_model().train()
    boxes = torch.tensor(
        [[3.0, 1.0, 0.5, 4.0, 2.0, 1.5, 0.3, 1.0, 0.0], [-5.0, 2.0, 0.5, 0.7, 0.7, 1.7, 0, 0, 0]]
    )
    targets = [
        {"boxes": boxes, "labels": torch.tensor([0, 8])},
        {"boxes": boxes[:0], "labels": torch.zeros(0).long()},
    ]
    with autocast(precision, torch.device("cpu")):
        losses = model(images(), cameras(), targets, SparsityVector((0.3,) * 6))
    assert set(losses) == {"loss_heat", "loss_boxes"}
    torch.stack(list(losses.values())).sum().backward()  # type: ignore[no-untyped-call]
    without = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    # The maps of groups without a box are trained by their heat alone; unused stages have no gradient.
    regressed = ("offset", "height", "size", "heading", "velocity")
    unexplained = [
        name
        for name in without
        if not name.startswith("backbone.norms.") and not any(f".{each}." in name for each in regressed)
    ]
    assert unexplained == []


def mmdet3d_weights(model: SparseBEVDet, folder: Path) -> dict[str, Tensor]:
    """A file of the public code, written from the documented mapping, name by name."""
    export_backbone_weights(model.backbone, folder / "swin.pth", "mmdet")
    weights = {f"img_backbone.{name}": value for name, value in read_weights(folder / "swin.pth").items()}
    theirs_of = {
        "offset": "reg",
        "height": "height",
        "size": "dim",
        "heading": "rot",
        "velocity": "vel",
        "heat": "heatmap",
    }
    for name, value in model.state_dict().items():
        parts = name.split(".")
        if parts[0] == "neck":
            theirs = ["img_neck", "conv", *parts[2:]]
        elif parts[0] == "view":
            theirs = ["img_view_transformer", "depth_net", *parts[2:]]
        elif parts[:2] == ["encoder", "stages"]:
            theirs = ["img_bev_encoder_backbone", "layers", *parts[2:]]
        elif parts[:3] == ["encoder", "neck", "merge"]:
            theirs = ["img_bev_encoder_neck", "conv", *parts[3:]]
        elif parts[:3] == ["encoder", "neck", "refine"]:
            theirs = ["img_bev_encoder_neck", "up2", str(int(parts[3]) + 1), *parts[4:]]
        elif parts[:2] == ["head", "shared"]:
            theirs = ["pts_bbox_head", "shared_conv", ("conv", "bn")[int(parts[2])], *parts[3:]]
        elif parts[:2] == ["head", "branches"]:
            inner = ["0", ("conv", "bn")[int(parts[5])]] if parts[4] == "0" else ["1"]
            rest = parts[6:] if parts[4] == "0" else parts[5:]
            theirs = ["pts_bbox_head", "task_heads", parts[2], theirs_of[parts[3]], *inner, *rest]
        else:
            assert parts[0] == "backbone", name
            continue
        weights[".".join(theirs)] = value
    return weights


def test_checkpoint_of_the_public_code_loads_whole(tmp_path: Path) -> None:
    source, target = small_model(), SparseBEVDet(create_backbone("swin_nano"), SMALL)
    torch.save({"state_dict": mmdet3d_weights(source, tmp_path)}, tmp_path / "bevdet.pth")
    task = Detection3D(SMALL)
    imported = import_checkpoint(tmp_path / "bevdet.pth", task.foreign_formats, SMALL)
    report = load_model_weights(target, target.backbone, imported, class_layers=task.class_layers)
    assert report.uncovered == report.unused == ()
    for name, value in source.state_dict().items():
        assert torch.equal(target.state_dict()[name], value), name


@pytest.mark.parametrize(
    ("added", "removed"),
    [
        (("img_view_transformer.dx", "img_view_transformer.bx", "img_view_transformer.nx"), ()),
        (("img_view_transformer.depthnet.weight",), ("img_view_transformer.depth_net.weight",)),
    ],
)
def test_version_1_is_refused_by_its_marks(
    tmp_path: Path, added: tuple[str, ...], removed: tuple[str, ...]
) -> None:
    weights = mmdet3d_weights(small_model(), tmp_path)
    weights = {name: value for name, value in weights.items() if name not in removed}
    torch.save({"state_dict": weights | dict.fromkeys(added, torch.zeros(3))}, tmp_path / "old.pth")
    message = rf"old.pth is BEVDet of version 1, as {added[0]}.* in it tell: its bird's-eye view is in the"
    with pytest.raises(CheckpointError, match=message):
        import_checkpoint(tmp_path / "old.pth", Detection3D(SMALL).foreign_formats, SMALL)


def test_full_size_is_bevdet_tiny() -> None:
    with torch.device("meta"):
        model = SparseBEVDet(create_backbone("swin_t"), BEVDetConfig())
    assert model.view.grid.size == 128
    assert model.view.stride == 16
    assert model.view.projection.weight.shape == (59 + 64, 512, 1, 1)
    assert 40e6 < sum(parameter.numel() for parameter in model.parameters()) < 60e6
