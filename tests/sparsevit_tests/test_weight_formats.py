"""Other libraries build and save their models; we load them and compute the same features."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision
import transformers
from safetensors.torch import load_file, save_file
from timm.layers.pos_embed_rel import resize_rel_pos_bias_table_simple
from torch import Tensor, nn
from torch.nn import functional as F

from sparsevit import (
    BACKBONES,
    SparseSwin,
    SwinConfig,
    create_backbone,
    export_backbone_weights,
    load_backbone_weights,
)
from sparsevit.checkpoints import CheckpointError
from sparsevit.checkpoints.files import read_weights
from sparsevit.checkpoints.formats import concatenated_order, unfold_order
from tests.oracles.torchvision_swin import normed, randomize, torchvision_features

SMALL = SwinConfig(embed_dim=24, depths=(2, 2, 4, 2), num_heads=(1, 2, 4, 8))
# Hugging Face pads images to whole patches, and drops the shift of both axes where the last grid is
# not larger than a window on one; neither happens at these sizes.
PADDED, WHOLE = (252, 332), (448, 672)
FORMATS = ("torchvision", "timm", "huggingface", "mmdet", "microsoft", "sparsevit")


def torchvision_model(config: SwinConfig) -> nn.Module:
    return randomize(
        torchvision.models.SwinTransformer(
            [config.patch_size] * 2, config.embed_dim, list(config.depths), list(config.num_heads),
            [config.window_size] * 2,
        )
    )  # fmt: skip


def timm_model(config: SwinConfig) -> nn.Module:
    return randomize(
        timm.models.swin_transformer.SwinTransformer(
            img_size=WHOLE, window_size=config.window_size, embed_dim=config.embed_dim,
            depths=config.depths, num_heads=config.num_heads, num_classes=5,
        )
    )  # fmt: skip


def huggingface_model(config: SwinConfig, kind: type = transformers.SwinBackbone) -> nn.Module:
    settings = transformers.SwinConfig(
        embed_dim=config.embed_dim, depths=list(config.depths), num_heads=list(config.num_heads),
        window_size=config.window_size,
    )  # fmt: skip
    settings.out_features = ["stage1", "stage2", "stage3", "stage4"]
    return randomize(kind(settings))


def timm_features(model: nn.Module, images: Tensor) -> list[Tensor]:
    features, x = [], model.get_submodule("patch_embed")(images)
    for layer in model.get_submodule("layers").children():
        x = layer(x)
        features.append(x)
    return normed(features, model.get_submodule("norm"))


def huggingface_features(model: nn.Module, images: Tensor) -> list[Tensor]:
    return list(model(images).feature_maps)


def assert_same_features(backbone: SparseSwin, expected: Sequence[Tensor], images: Tensor) -> None:
    with torch.inference_mode():
        for mine, theirs in zip(backbone.eval()(images), expected, strict=True):
            assert mine.shape == theirs.shape
            assert (mine - theirs).norm() / theirs.norm() <= 1e-5


@dataclass(frozen=True)
class Library:
    build: Callable[[SwinConfig], nn.Module]
    features: Callable[[nn.Module, Tensor], list[Tensor]]


TORCHVISION = Library(torchvision_model, torchvision_features)
TIMM = Library(timm_model, timm_features)
HUGGINGFACE = Library(huggingface_model, huggingface_features)


@pytest.mark.parametrize(
    ("library", "size"),
    [
        (TORCHVISION, WHOLE),
        (TORCHVISION, PADDED),
        (HUGGINGFACE, WHOLE),
        (HUGGINGFACE, PADDED),
        (TIMM, WHOLE),  # timm rolls before it pads, so it is no oracle at other sizes
    ],
)
def test_features_equal(tmp_path: Path, library: Library, size: tuple[int, int]) -> None:
    model = library.build(SMALL)
    torch.save(model.state_dict(), tmp_path / "model.pth")
    backbone = SparseSwin(SMALL)
    load_backbone_weights(backbone, tmp_path / "model.pth")
    images = torch.randn(2, 3, *size)
    with torch.inference_mode():
        expected = library.features(model, images)
    assert_same_features(backbone, expected, images)


@pytest.mark.parametrize("name", ["swin_b_window12", "swin_l_window12"])
def test_window_12(tmp_path: Path, name: str) -> None:
    config = BACKBONES[name]
    model = huggingface_model(config)
    model.save_pretrained(tmp_path)  # type: ignore[operator]
    backbone = create_backbone(name)
    load_backbone_weights(backbone, tmp_path)
    images = torch.randn(1, 3, 420, 512)
    with torch.inference_mode():
        expected = huggingface_features(model, images)
    assert_same_features(backbone, expected, images)


@pytest.mark.parametrize("prefix", ["", "backbone.", "module.", "module.model.backbone.", "ema.", "student."])
@pytest.mark.parametrize("format", FORMATS)
def test_round_trip_is_bit_exact_under_any_prefix(tmp_path: Path, format: str, prefix: str) -> None:
    source, target = randomize(SparseSwin(SMALL)), SparseSwin(SMALL)
    assert isinstance(source, SparseSwin)
    path = tmp_path / ("folder" if format == "huggingface" else "weights.safetensors")
    left_out = export_backbone_weights(source, path, format)
    if prefix:
        file = path / "model.safetensors" if path.is_dir() else path
        named = {prefix + name: value for name, value in load_file(file).items()}
        save_file({**named, "roi_head.bbox_head.fc.weight": torch.zeros(3)}, file)
    report = load_backbone_weights(target, path)
    assert report.format == format
    assert report.missing == left_out
    assert report.resized == ()
    assert all(name.startswith("norms.") for name in left_out)
    own = source.state_dict()
    for name, value in target.state_dict().items():
        if name not in left_out:
            assert torch.equal(value, own[name]), name


def test_adapted_weights_go_home_to_torchvision(tmp_path: Path) -> None:
    source = randomize(SparseSwin(SMALL))
    assert isinstance(source, SparseSwin)
    export_backbone_weights(source, tmp_path / "home.pth", "torchvision")
    model = torchvision_model(SMALL)
    weights = torch.load(tmp_path / "home.pth", weights_only=True)
    outcome = model.load_state_dict(weights, strict=False)
    assert outcome.unexpected_keys == []
    assert outcome.missing_keys == ["head.weight", "head.bias"]
    images = torch.randn(1, 3, *PADDED)
    with torch.inference_mode():
        last = torchvision_features(model, images)[-1]
        assert (source(images)[-1] - last).norm() / last.norm() <= 1e-5


def test_adapted_weights_go_home_to_timm(tmp_path: Path) -> None:
    source = randomize(SparseSwin(SMALL))
    assert isinstance(source, SparseSwin)
    export_backbone_weights(source, tmp_path / "home.safetensors", "timm")
    model = timm_model(SMALL)
    outcome = model.load_state_dict(load_file(tmp_path / "home.safetensors"), strict=False)
    assert outcome.unexpected_keys == []
    assert outcome.missing_keys == ["head.fc.weight", "head.fc.bias"]
    images = torch.randn(1, 3, *WHOLE)
    with torch.inference_mode():
        last = timm_features(model, images)[-1]
        assert (source(images)[-1] - last).norm() / last.norm() <= 1e-5


def test_adapted_weights_go_home_to_huggingface(tmp_path: Path) -> None:
    source = randomize(SparseSwin(SMALL))
    assert isinstance(source, SparseSwin)
    export_backbone_weights(source, tmp_path / "home", "huggingface")
    loaded: Any = transformers.SwinBackbone.from_pretrained(tmp_path / "home", output_loading_info=True)
    model, outcome = loaded
    assert not outcome["missing_keys"] and not outcome["unexpected_keys"]
    images = torch.randn(1, 3, *PADDED)
    with torch.inference_mode():
        expected = huggingface_features(model.eval(), images)
    assert_same_features(source, expected, images)


@pytest.mark.parametrize("safe", [True, False])
@pytest.mark.parametrize(
    "kind", [transformers.SwinModel, transformers.SwinForImageClassification, transformers.SwinBackbone]
)
def test_huggingface_with_or_without_head(tmp_path: Path, kind: type, safe: bool) -> None:
    """On disk names are those of version 4, in memory those of version 5."""
    model = huggingface_model(SMALL, kind)
    backbone = SparseSwin(SMALL)
    if safe:
        model.save_pretrained(tmp_path)  # type: ignore[operator]
    else:
        torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    report = load_backbone_weights(backbone, tmp_path)
    assert report.format == "huggingface"
    assert len(report.missing) == (0 if kind is transformers.SwinBackbone else 6)
    weights = model.state_dict()
    query = next(name for name in weights if name.endswith("layers.2.blocks.3.attention.q_proj.weight"))
    mine = backbone.get_parameter("stages.2.blocks.3.attn.qkv.weight")
    assert torch.equal(mine[: len(mine) // 3], weights[query])


def test_sharded_folder(tmp_path: Path) -> None:
    model = huggingface_model(SMALL)
    model.save_pretrained(tmp_path, max_shard_size="1MB")  # type: ignore[operator]
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    assert load_backbone_weights(SparseSwin(SMALL), tmp_path).missing == ()
    next(tmp_path.glob("model-*.safetensors")).unlink()
    with pytest.raises(CheckpointError, match="names shards that are not there: model-0"):
        load_backbone_weights(SparseSwin(SMALL), tmp_path)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's account of memory")
@pytest.mark.parametrize("name", ["model.safetensors", "model.pth"])
def test_weights_are_mapped_from_disk(tmp_path: Path, name: str) -> None:
    export_backbone_weights(create_backbone("swin_t"), tmp_path / name, "timm")
    before = anonymous_mib()
    weights = read_weights(tmp_path / name)
    assert sum(value.nbytes for value in weights.values()) > 100 * 2**20
    assert anonymous_mib() - before < 10


def anonymous_mib() -> float:
    """Memory of this process that no file stands behind."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon:")) / 1024


def test_folder_without_weights(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="holds neither model.safetensors nor pytorch_model.bin"):
        load_backbone_weights(SparseSwin(SMALL), tmp_path)


def test_timm_backbone_of_features_only(tmp_path: Path) -> None:
    """Its maps, channels last, are those of our stages before their norms, which it lacks."""
    model = randomize(timm.create_model("swin_tiny_patch4_window7_224", features_only=True))
    torch.save(model.state_dict(), tmp_path / "features.pth")
    backbone = create_backbone("swin_t").eval()
    report = load_backbone_weights(backbone, tmp_path / "features.pth")
    assert report.format == "timm"
    assert report.missing == tuple(f"norms.{s}.{leaf}" for s in range(4) for leaf in ("weight", "bias"))
    for stage in range(4):
        backbone.norms[stage] = nn.Identity()
    images = torch.randn(1, 3, 224, 224)
    with torch.inference_mode():
        expected = [each.permute(0, 3, 1, 2) for each in model.eval()(images)]
    assert_same_features(backbone, expected, images)


def mmdet_file(backbone: SparseSwin, path: Path) -> None:
    """Names and patch merging of mmdet, written here by hand from its documentation."""
    weights = {}
    for name, value in backbone.state_dict().items():
        theirs = name.replace("patch_embed.proj", "patch_embed.projection")
        theirs = theirs.replace(".attn.", ".attn.w_msa.")
        theirs = theirs.replace(".mlp.fc1.", ".ffn.layers.0.0.").replace(".mlp.fc2.", ".ffn.layers.1.")
        if name.startswith("norms."):
            theirs = f"norm{name[6:]}"
        if name.startswith("downsamples."):
            stage = name.split(".")[1]
            theirs = name.replace(f"downsamples.{stage}", f"stages.{stage}.downsample")
            channels = value.shape[-1] // 4
            corners = value.reshape(-1, 4, channels)  # (row, column): (0, 0), (1, 0), (0, 1), (1, 1)
            unfolded = torch.empty(corners.shape[0], channels, 2, 2)
            for corner, (row, column) in enumerate([(0, 0), (1, 0), (0, 1), (1, 1)]):
                unfolded[:, :, row, column] = corners[:, corner]
            value = unfolded.reshape(value.shape)
        weights[f"backbone.{theirs}"] = value
    weights["rpn_head.rpn_conv.weight"] = torch.zeros(2)
    torch.save({"state_dict": weights, "meta": {"epoch": 12}}, path)


def test_mmdet_detector(tmp_path: Path) -> None:
    source, target = SparseSwin(SMALL), SparseSwin(SMALL)
    randomize(source)
    mmdet_file(source, tmp_path / "detector.pth")
    report = load_backbone_weights(target, tmp_path / "detector.pth")
    assert (report.format, report.prefix, report.missing) == ("mmdet", "backbone.", ())
    assert report.left_over == ("rpn_head.rpn_conv.weight",)
    for name, value in target.state_dict().items():
        assert torch.equal(value, source.state_dict()[name]), name


def test_unfold_order_is_that_of_unfold() -> None:
    images = torch.randn(1, 3, 4, 4)
    columns = F.unfold(images, 2, stride=2)  # [1, 12, 4]
    corners = [images[:, :, row::2, column::2].flatten(2) for column in (0, 1) for row in (0, 1)]
    merged = torch.cat(corners, dim=1)
    assert torch.equal(unfold_order(merged.transpose(1, 2)), columns.transpose(1, 2))
    assert torch.equal(concatenated_order(columns.transpose(1, 2)), merged.transpose(1, 2))


def test_averaged_weights_are_preferred(tmp_path: Path) -> None:
    plain, averaged, target = (SparseSwin(SMALL) for _ in range(3))
    torch.save(
        {"state_dict": plain.state_dict(), "state_dict_ema": averaged.state_dict(), "epoch": 3},
        tmp_path / "timm.pth",
    )
    load_backbone_weights(target, tmp_path / "timm.pth")
    assert torch.equal(target.patch_embed.proj.weight, averaged.patch_embed.proj.weight)


def test_several_backbones_need_a_prefix(tmp_path: Path) -> None:
    student, teacher, target = (SparseSwin(SMALL) for _ in range(3))
    both = {f"student.{name}": value for name, value in student.state_dict().items()}
    both |= {f"teacher.{name}": value for name, value in teacher.state_dict().items()}
    torch.save(both, tmp_path / "both.pth")
    with pytest.raises(CheckpointError, match="several backbones, under 'student.', 'teach"):
        load_backbone_weights(target, tmp_path / "both.pth")
    load_backbone_weights(target, tmp_path / "both.pth", prefix="teacher.")
    assert torch.equal(target.patch_embed.proj.weight, teacher.patch_embed.proj.weight)
    with pytest.raises(CheckpointError, match="holds no Swin backbone under the prefix 'nobody.'"):
        load_backbone_weights(target, tmp_path / "both.pth", prefix="nobody.")


def test_another_window_size_resizes_the_bias_tables(tmp_path: Path) -> None:
    """timm resizes them by the same bicubic interpolation."""
    source = SparseSwin(SMALL)
    large = SwinConfig(SMALL.embed_dim, SMALL.depths, SMALL.num_heads, window_size=12)
    target = SparseSwin(large)
    export_backbone_weights(source, tmp_path / "seven.safetensors", "timm")
    report = load_backbone_weights(target, tmp_path / "seven.safetensors")
    assert len(report.resized) == sum(SMALL.depths)
    name = "stages.2.blocks.1.attn.relative_position_bias_table"
    expected = resize_rel_pos_bias_table_simple(
        source.state_dict()[name], new_window_size=(12, 12), new_bias_shape=(23 * 23, 4)
    )
    torch.testing.assert_close(target.state_dict()[name], expected, rtol=1e-4, atol=1e-5)


def test_error_leaves_the_backbone_as_it_was(tmp_path: Path) -> None:
    backbone = SparseSwin(SMALL)
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    weights = dict(SparseSwin(SMALL).state_dict())
    del weights["stages.3.blocks.1.mlp.fc2.weight"]
    weights["stages.0.blocks.0.attn.lora"] = torch.zeros(1)
    weights["stages.0.blocks.0.norm1.bias"] = torch.zeros(5)
    save_file(weights, tmp_path / "odd.safetensors")
    with pytest.raises(CheckpointError) as caught:
        load_backbone_weights(backbone, tmp_path / "odd.safetensors")
    for named in ("stages.3.blocks.1.mlp.fc2.weight", "stages.0.blocks.0.attn.lora", r"(5,) in the file"):
        assert named in str(caught.value)
    for name, value in backbone.state_dict().items():
        assert torch.equal(value, before[name])


def test_unknown_export_format(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match="unknown format 'onnx'; choose one of huggingface, microsoft, mmdet"
    ):
        export_backbone_weights(SparseSwin(SMALL), tmp_path / "x.pth", "onnx")
