"""Mask2Former on the sparse backbone: equal to transformers' own, loadable from its checkpoints."""

import pickle
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import (
    Mask2FormerConfig as LibraryConfig,
)
from transformers import Mask2FormerForUniversalSegmentation, Mask2FormerImageProcessor, SwinConfig

from sparsevit import SparseSwin, SparsityVector, create_backbone
from sparsevit.backbone import BACKBONES
from sparsevit.checkpoints import CheckpointError, import_checkpoint, load_model_weights
from sparsevit.checkpoints.backbone import named_weights
from sparsevit.checkpoints.detectron2_mask2former import Detectron2Mask2Former
from sparsevit.data.sample import IGNORED
from sparsevit.precision import autocast
from sparsevit.tasks.mask2former import Mask2FormerConfig, SparseMask2Former
from sparsevit.tasks.semantic_segmentation import SemanticSegmentation

SMALL = Mask2FormerConfig(
    num_classes=5, crop_size=(64, 64), feature_channels=32, hidden_channels=48, encoder_hidden_channels=40,
    encoder_layers=1, decoder_layers=2, num_heads=4, num_queries=7, num_points=64,
)  # fmt: skip


def load(model: SparseMask2Former, path: Path, *, loads_classifier: bool = True) -> tuple[str, ...]:
    task = SemanticSegmentation(SMALL)
    return load_model_weights(
        model, model.backbone, import_checkpoint(path, task.foreign_formats, task.config),
        class_layers=task.class_layers, loads_classifier=loads_classifier,
    ).uncovered  # fmt: skip


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> tuple[Mask2FormerForUniversalSegmentation, Path]:
    """A small Mask2Former with random weights, and the folder where transformers saved it."""
    shape = BACKBONES["swin_nano"]
    torch.manual_seed(0)
    model = Mask2FormerForUniversalSegmentation(
        LibraryConfig(
            backbone_config=SwinConfig(
                embed_dim=shape.embed_dim, depths=list(shape.depths), num_heads=list(shape.num_heads),
                window_size=shape.window_size, out_features=["stage1", "stage2", "stage3", "stage4"],
            ),
            num_labels=5, feature_size=32, mask_feature_size=32, hidden_dim=32, encoder_feedforward_dim=40,
            dim_feedforward=48, encoder_layers=1, decoder_layers=3, num_attention_heads=4, num_queries=7,
            train_num_points=64,
        )
    ).eval()  # fmt: skip
    with torch.no_grad():
        for (
            parameter
        ) in model.parameters():  # biases begin as zeros, and would not show that they were swapped
            parameter += 0.02 * torch.randn_like(parameter)
    folder = tmp_path_factory.mktemp("mask2former")
    model.save_pretrained(folder)
    return model, folder


@pytest.mark.parametrize("size", [(256, 256), (256, 384), (160, 224)])
def test_logits_equal_those_of_transformers(
    library: tuple[Mask2FormerForUniversalSegmentation, Path], size: tuple[int, int]
) -> None:
    theirs, folder = library
    ours = SparseMask2Former(create_backbone("swin_nano"), SMALL).eval()
    assert load(ours, folder) == ()
    images = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        expected = theirs(images)
        class_logits, mask_logits = ours.logits(images)
    torch.testing.assert_close(class_logits[-1], expected.class_queries_logits, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(mask_logits[-1], expected.masks_queries_logits, atol=1e-4, rtol=1e-4)


def test_label_maps_equal_those_of_transformers(
    library: tuple[Mask2FormerForUniversalSegmentation, Path],
) -> None:
    """At 384×384, the size that the library's post-processing goes through."""
    theirs, folder = library
    ours = SparseMask2Former(create_backbone("swin_nano"), SMALL).eval()
    load(ours, folder)
    image = torch.rand(3, 384, 384, generator=torch.Generator().manual_seed(2))
    with torch.inference_mode():
        (label_map,) = ours([image])
        outputs = theirs(ours.to_batch([image])[0])
    processor = Mask2FormerImageProcessor()
    (expected,) = processor.post_process_semantic_segmentation(outputs, [(384, 384)])
    assert (label_map == expected).float().mean() > 0.9999


@pytest.mark.parametrize("size", [(160, 160), (130, 101)], ids=["same", "padded"])
def test_losses_equal_those_of_transformers(
    library: tuple[Mask2FormerForUniversalSegmentation, Path], size: tuple[int, int]
) -> None:
    """Padding of the smaller image belongs to no mask, neither that of class 0 nor any other."""
    theirs, folder = library
    ours = SparseMask2Former(create_backbone("swin_nano"), SMALL)
    load(ours, folder)
    sizes = ((160, 160), size)
    images = [
        torch.rand(3, *each, generator=torch.Generator().manual_seed(seed))
        for seed, each in enumerate(sizes, start=3)
    ]
    labels = [torch.zeros(each, dtype=torch.uint8) for each in sizes]
    for each in labels:
        each[:20], each[20:40, :30], each[60:] = 2, 4, IGNORED
    classes = torch.tensor([0, 2, 4])
    masks = [torch.zeros(3, 160, 160) for _ in labels]
    for mask, each in zip(masks, labels, strict=True):
        mask[:, : each.shape[0], : each.shape[1]] = (each == classes.view(-1, 1, 1)).float()
    torch.manual_seed(5)
    losses = ours.train()(images, labels)
    torch.manual_seed(5)
    expected = theirs(ours.to_batch(images)[0], mask_labels=masks, class_labels=[classes, classes]).loss
    torch.testing.assert_close(torch.stack(list(losses.values())).sum(), expected, rtol=1e-4, atol=1e-4)


def test_inputs_are_those_of_transformers() -> None:
    """Normalised by ImageNet's statistics, then padded with zeros to multiples of 32."""
    images = [torch.rand(3, 130, 101), torch.rand(3, 97, 150)]
    processor = Mask2FormerImageProcessor(do_resize=False, do_rescale=False, size_divisor=32)
    batch, sizes = SparseMask2Former(create_backbone("swin_nano"), SMALL).to_batch(images)
    assert batch.shape == (2, 3, 160, 160)
    assert sizes == [(130, 101), (97, 150)]
    for index, image in enumerate(images):
        (expected,) = processor(images=image, return_tensors="pt")["pixel_values"]
        found = batch[index, :, : expected.shape[1], : expected.shape[2]]
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
        assert torch.count_nonzero(batch[index]) == torch.count_nonzero(expected)


def test_checkpoint_of_another_number_of_classes(
    library: tuple[Mask2FormerForUniversalSegmentation, Path],
) -> None:
    model = SparseMask2Former(
        create_backbone("swin_nano"), Mask2FormerConfig(**{**vars(SMALL), "num_classes": 9})
    )
    message = (
        r"was trained on 5 classes, but here are 9 \(class_predictor.bias\). init_classifier=random loads"
    )
    with pytest.raises(CheckpointError, match=message):
        load(model, library[1])
    uncovered = load(model, library[1], loads_classifier=False)
    assert uncovered == ("class_predictor.bias", "class_predictor.weight", "criterion.empty_weight")


def test_checkpoint_of_another_width(library: tuple[Mask2FormerForUniversalSegmentation, Path]) -> None:
    model = SparseMask2Former(
        create_backbone("swin_nano"), Mask2FormerConfig(**{**vars(SMALL), "num_queries": 9})
    )
    with pytest.raises(
        CheckpointError, match="checkpoint of another model. Of another shape: transformer.quer"
    ):
        load(model, library[1])


def test_images_of_any_size_and_a_vector() -> None:
    torch.manual_seed(0)
    model = SparseMask2Former(create_backbone("swin_nano"), SMALL).eval()
    images = [torch.rand(3, 50, 70), torch.rand(3, 64, 41)]
    with torch.no_grad():
        for parameter in model.parameters():  # as they begin, one class is everywhere
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    with torch.inference_mode():
        dense = model(images)
        sparse = model(images, sparsity=SparsityVector((0.8,) * 6))
    assert not all(map(torch.equal, dense, sparse))
    for maps in (dense, sparse):
        assert [tuple(each.shape) for each in maps] == [(50, 70), (64, 41)]
        assert all(each.dtype == torch.uint8 and int(each.max()) < 5 for each in maps)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_training_step_under_autocast(precision: str) -> None:
    model = SparseMask2Former(create_backbone("swin_nano"), SMALL).train()
    images = [torch.rand(3, 64, 64) for _ in range(2)]
    labels = [
        torch.randint(0, 5, (64, 64), dtype=torch.uint8),
        torch.full((64, 64), IGNORED, dtype=torch.uint8),
    ]
    with autocast(precision, torch.device("cpu")):
        losses = model(images, labels, SparsityVector((0.4,) * 6))
    assert set(losses) == {"loss_cross_entropy", "loss_mask", "loss_dice"}
    total: Tensor = torch.stack(list(losses.values())).sum()
    total.backward()  # type: ignore[no-untyped-call]
    without = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert without == []


def test_a_batch_without_any_label_teaches_that_nothing_is_there() -> None:
    model = SparseMask2Former(create_backbone("swin_nano"), SMALL).train()
    losses = model([torch.rand(3, 64, 64)], [torch.full((64, 64), IGNORED, dtype=torch.uint8)])
    assert losses["loss_mask"] == losses["loss_dice"] == 0
    assert losses["loss_cross_entropy"] > 0
    torch.stack(list(losses.values())).sum().backward()  # type: ignore[no-untyped-call]
    gradient = model.class_predictor.bias.grad
    assert gradient is not None
    assert (gradient[:-1] > 0).all() and gradient[-1] < 0
    assert all(p.grad is None or bool(p.grad.isfinite().all()) for p in model.parameters())


@pytest.mark.parametrize("vector", [None, SparsityVector((0.5,) * 6)])
def test_images_of_other_sizes_do_not_matter(vector: SparsityVector | None) -> None:
    model = SparseMask2Former(create_backbone("swin_nano"), SMALL).eval()
    small, large = torch.rand(3, 60, 90), torch.rand(3, 128, 128)
    with torch.inference_mode():
        (alone,) = model([small], sparsity=vector)
        _, beside, _ = model([large, small, large], sparsity=vector)
    assert torch.equal(alone, beside)


def test_another_window_size_is_said(
    library: tuple[Mask2FormerForUniversalSegmentation, Path], caplog: pytest.LogCaptureFixture
) -> None:
    shape = replace(BACKBONES["swin_nano"], window_size=7)
    load(SparseMask2Former(SparseSwin(shape), SMALL), library[1])
    assert "has another window size: 12 tables of relative positions were resampled" in caplog.text


# transformers' names, which ours begin otherwise, as Detectron2 has them; in this order.
DETECTRON2_NAMES = (
    ("model.pixel_level_module.decoder.", "sem_seg_head.pixel_decoder."),
    ("model.transformer_module.decoder.layers.", "sem_seg_head.predictor.LAYER."),
    ("model.transformer_module.decoder.", "sem_seg_head.predictor."),
    ("model.transformer_module.", "sem_seg_head.predictor."),
    (
        r"pixel_decoder\.encoder\.layers\.(\d+)\.self_attn_layer_norm",
        r"pixel_decoder.encoder.layers.\1.norm1",
    ),
    (r"pixel_decoder\.encoder\.layers\.(\d+)\.final_layer_norm", r"pixel_decoder.encoder.layers.\1.norm2"),
    (r"pixel_decoder\.encoder\.layers\.(\d+)\.fc", r"pixel_decoder.encoder.layers.\1.linear"),
    (r"pixel_decoder\.(encoder|level_embed)", r"pixel_decoder.transformer.\1"),
    ("input_projections", "input_proj"),
    ("mask_projection", "mask_features"),
    (r"(adapter_1|layer_1)\.1\.", r"\1.norm."),
    (r"(adapter_1|layer_1)\.0\.", r"\1."),
    (r"LAYER\.(\d+)\.self_attn_layer_norm", r"transformer_self_attention_layers.\1.norm"),
    (r"LAYER\.(\d+)\.cross_attn_layer_norm", r"transformer_cross_attention_layers.\1.norm"),
    (r"LAYER\.(\d+)\.final_layer_norm", r"transformer_ffn_layers.\1.norm"),
    (r"LAYER\.(\d+)\.fc", r"transformer_ffn_layers.\1.linear"),
    (r"LAYER\.(\d+)\.self_attn", r"transformer_self_attention_layers.\1.self_attn"),
    (r"LAYER\.(\d+)\.cross_attn", r"transformer_cross_attention_layers.\1.multihead_attn"),
    ("predictor.layernorm", "predictor.decoder_norm"),
    (r"mask_predictor\.mask_embedder\.(\d)\.0", r"mask_embed.layers.\1"),
    ("queries_embedder", "query_embed"),
    ("queries_features", "query_feat"),
    ("^class_predictor", "sem_seg_head.predictor.class_embed"),
)


def names_of_detectron2(library: tuple[Mask2FormerForUniversalSegmentation, Path]) -> dict[str, Tensor]:
    """The weights of transformers' model as the authors' code saves them."""
    ours = SparseMask2Former(create_backbone("swin_nano"), SMALL)
    load(ours, library[1])
    of_backbone, left_out = named_weights(ours.backbone, "microsoft")
    assert left_out == ()
    named = {f"backbone.{name}": value for name, value in of_backbone.items()}
    for name, value in library[0].state_dict().items():
        if name.startswith("model.pixel_level_module.encoder."):
            continue
        for theirs, detectron2 in DETECTRON2_NAMES:
            name = re.sub(theirs, detectron2, name)
        if name.startswith("sem_seg_head.predictor") and name.split(".")[-2] in (
            "q_proj",
            "k_proj",
            "v_proj",
        ):
            layer, part, leaf = name.rsplit(".", 2)
            joined = named.setdefault(f"{layer}.in_proj_{leaf}", torch.cat([torch.zeros_like(value)] * 3))
            joined.chunk(3)["qkv".index(part[0])].copy_(value)
        else:
            named[name] = value
    return named


def first_version(name: str) -> str:
    """Names before version 2 of the authors' code."""
    return name.replace("sem_seg_head.pixel_decoder.", "sem_seg_head.").replace("query_feat", "static_query")


PUBLISHED = (
    "backbone.patch_embed.proj.weight", "backbone.layers.0.downsample.reduction.weight",
    "backbone.norm3.bias", "criterion.empty_weight", "sem_seg_head.pixel_decoder.adapter_1.weight",
    "sem_seg_head.pixel_decoder.adapter_1.norm.weight", "sem_seg_head.pixel_decoder.input_proj.2.1.bias",
    "sem_seg_head.pixel_decoder.layer_1.norm.bias", "sem_seg_head.pixel_decoder.mask_features.bias",
    "sem_seg_head.pixel_decoder.transformer.encoder.layers.0.linear1.bias",
    "sem_seg_head.pixel_decoder.transformer.encoder.layers.0.norm2.weight",
    "sem_seg_head.pixel_decoder.transformer.encoder.layers.0.self_attn.sampling_offsets.bias",
    "sem_seg_head.pixel_decoder.transformer.level_embed", "sem_seg_head.predictor.class_embed.weight",
    "sem_seg_head.predictor.decoder_norm.bias", "sem_seg_head.predictor.level_embed.weight",
    "sem_seg_head.predictor.mask_embed.layers.2.bias", "sem_seg_head.predictor.query_embed.weight",
    "sem_seg_head.predictor.query_feat.weight",
    "sem_seg_head.predictor.transformer_cross_attention_layers.1.multihead_attn.in_proj_bias",
    "sem_seg_head.predictor.transformer_cross_attention_layers.1.multihead_attn.out_proj.weight",
    "sem_seg_head.predictor.transformer_cross_attention_layers.1.norm.weight",
    "sem_seg_head.predictor.transformer_ffn_layers.1.linear2.weight",
    "sem_seg_head.predictor.transformer_ffn_layers.1.norm.bias",
    "sem_seg_head.predictor.transformer_self_attention_layers.1.norm.bias",
    "sem_seg_head.predictor.transformer_self_attention_layers.1.self_attn.in_proj_weight",
    "sem_seg_head.predictor.transformer_self_attention_layers.1.self_attn.out_proj.bias",
)  # fmt: skip
"""A name of every kind, as they stand in the files that the authors publish."""


@pytest.mark.parametrize("kind", ["model.pkl", "model.pth", "first.pkl"])
def test_logits_of_a_file_of_detectron2_equal_those_of_transformers(
    library: tuple[Mask2FormerForUniversalSegmentation, Path], tmp_path: Path, kind: str
) -> None:
    named = names_of_detectron2(library)
    assert set(PUBLISHED) <= named.keys()
    if kind == "first.pkl":
        named = {first_version(name): value for name, value in named.items()}
    if kind == "model.pth":
        torch.save({"model": {f"module.{name}": value for name, value in named.items()}}, tmp_path / kind)
    else:
        arrays = {name: value.numpy() for name, value in named.items()}
        (tmp_path / kind).write_bytes(pickle.dumps({"model": arrays, "__author__": "somebody"}))
    ours = SparseMask2Former(create_backbone("swin_nano"), SMALL).eval()
    assert load(ours, tmp_path / kind) == ()
    images = torch.randn(2, 3, 160, 224, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        expected = library[0](images)
        class_logits, mask_logits = ours.logits(images)
    torch.testing.assert_close(class_logits[-1], expected.class_queries_logits, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(mask_logits[-1], expected.masks_queries_logits, atol=1e-4, rtol=1e-4)
    assert torch.equal(ours.criterion.empty_weight, library[0].criterion.empty_weight)


def test_file_of_detectron2_that_lacks_a_tensor_or_has_another(
    library: tuple[Mask2FormerForUniversalSegmentation, Path], tmp_path: Path
) -> None:
    named = names_of_detectron2(library)
    model = SparseMask2Former(create_backbone("swin_nano"), SMALL)
    torch.save({**named, "sem_seg_head.predictor.input_proj.0.weight": torch.zeros(2)}, tmp_path / "more.pth")
    with pytest.raises(CheckpointError, match=r"sem_seg_head\.predictor\.input_proj\.0\.weight"):
        load(model, tmp_path / "more.pth")
    del named["sem_seg_head.predictor.transformer_self_attention_layers.1.self_attn.in_proj_bias"]
    torch.save(named, tmp_path / "less.pth")
    with pytest.raises(
        CheckpointError, match=r"Missing: transformer\.decoder\.layers\.1\.self_attn\.k_proj\.bias"
    ):
        load(model, tmp_path / "less.pth")


def test_only_detectron2_is_taken_for_it(library: tuple[Mask2FormerForUniversalSegmentation, Path]) -> None:
    assert Detectron2Mask2Former().recognises(names_of_detectron2(library))
    assert not Detectron2Mask2Former().recognises(library[0].state_dict())
    assert not Detectron2Mask2Former().recognises(
        SparseMask2Former(create_backbone("swin_nano"), SMALL).state_dict()
    )
