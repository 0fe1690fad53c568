"""The supernet: selection, gradients, sizes."""

from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn

from sparsevit import SparseSwin, SparsityVector, SwinConfig, create_backbone
from tests.oracles.swin_loops import loop_forward

TINY = SwinConfig(embed_dim=8, depths=(2, 4, 2), num_heads=(1, 2, 2), window_size=4)


@pytest.fixture
def tiny() -> SparseSwin:
    return randomized(TINY)


def randomized(config: SwinConfig, **options: Any) -> SparseSwin:
    torch.manual_seed(3)
    backbone = SparseSwin(config, **options)
    for parameter in backbone.parameters():
        nn.init.normal_(parameter, std=0.3)
    return backbone.double().eval()


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("size", [(48, 48), (36, 52), (16, 40)])
def test_random_vectors_equal_the_loop_oracle(tiny: SparseSwin, seed: int, size: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(seed)
    vector = tiny.space.draw(generator)
    images = torch.randn(2, 3, *size, generator=generator, dtype=torch.float64)
    with torch.inference_mode():
        expected, _ = loop_forward(tiny, images, vector.ratios)
        for mine, reference in zip(tiny(images, vector), expected, strict=True):
            torch.testing.assert_close(mine, reference, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("pruned", ["identity", "zero"])
@pytest.mark.parametrize("ratios", [(0.5, 0.0, 0.4), (0.0, 0.3, 0.3), (0.0, 0.0, 0.0)])
def test_odd_shapes_equal_the_loop_oracle(
    pruned: Literal["identity", "zero"], ratios: tuple[float, ...]
) -> None:
    """Odd depths, windows, grids and patches; tokens of pruned windows that stay or are cleared."""
    odd = SwinConfig(6, (1, 3), (1, 3), window_size=3, patch_size=2, mlp_ratio=1.5)
    backbone = randomized(odd, pruned=pruned)
    images = torch.randn(2, 3, 23, 14, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    with torch.inference_mode():
        expected, _ = loop_forward(backbone, images[:, :, :22], ratios, is_cleared=pruned == "zero")
        features = backbone(images, SparsityVector(ratios))
    trained = backbone(images, SparsityVector(ratios))
    for mine, in_training, reference in zip(features, trained, expected, strict=True):
        torch.testing.assert_close(mine, reference, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(in_training.detach(), reference, rtol=1e-9, atol=1e-9)
        assert mine.is_contiguous(memory_format=torch.channels_last)


def test_large_images_in_parts_are_as_a_whole(tiny: SparseSwin) -> None:
    """Inference takes more than a megabyte part by part, training never does."""
    images = torch.randn(2, 3, 205, 330, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    vector = SparsityVector((0.5, 0.3, 0.7, 0.4))
    with torch.inference_mode():
        features = tiny(images, vector)
    for mine, reference in zip(features, tiny(images, vector), strict=True):
        torch.testing.assert_close(mine, reference.detach(), rtol=1e-9, atol=1e-9)


def test_plans_serve_all_images_of_a_size(tiny: SparseSwin) -> None:
    vector = SparsityVector((0.5, 0.3, 0.7, 0.4))
    plans = tiny.plan(vector, (36, 52), torch.device("cpu"))
    images = torch.randn(2, 3, 36, 52, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    with torch.inference_mode():
        for image in (images[:1], images):
            assert all(map(torch.equal, tiny.run(image, plans), tiny(image, vector)))


def test_the_smallest_image_is_a_patch(tiny: SparseSwin) -> None:
    images = torch.randn(1, 3, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    with torch.inference_mode():
        expected, _ = loop_forward(tiny, images, (0.5, 0.3, 0.7, 0.4))
        for mine, reference in zip(tiny(images, SparsityVector((0.5, 0.3, 0.7, 0.4))), expected, strict=True):
            assert mine.shape[2:] == (1, 1)
            torch.testing.assert_close(mine, reference, rtol=1e-9, atol=1e-9)
    with pytest.raises(ValueError, match="an image of 3×9 pixels is smaller than a patch of 4×4"):
        tiny(torch.zeros(1, 3, 3, 9, dtype=torch.float64))


def test_kept_windows_are_nested_inside_a_stage(tiny: SparseSwin) -> None:
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    with torch.inference_mode():
        _, kept = loop_forward(tiny, images, (0.2, 0.1, 0.6, 0.4))
    second_stage = kept[2:6]
    assert second_stage[2] < second_stage[0]
    assert second_stage[3] < second_stage[1]


def test_pruned_windows_pass_their_stage_untouched(tiny: SparseSwin) -> None:
    """Only the first stage is pruned; a token that no kept window covers leaves it as it came."""
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    with torch.inference_mode():
        tokens = tiny.patch_embed(images)
        plan = tiny.plan(SparsityVector((0.8, 0.0, 0.0, 0.0)), (64, 64), images.device)[0]
        after = tiny.stages[0](tokens.clone(), plan)
        _, kept = loop_forward(tiny, images, (0.8, 0.0, 0.0, 0.0))
    is_covered = torch.zeros(2, 16, 16, dtype=torch.bool)
    for block, shift in ((0, 0), (1, 2)):
        for b, row, column in kept[block]:
            for i in range(4):
                for j in range(4):
                    is_covered[b, (4 * row + i + shift) % 16, (4 * column + j + shift) % 16] = True
    assert 0 < int(is_covered.sum()) < is_covered.numel()
    assert torch.equal(after[~is_covered], tokens[~is_covered])
    assert (after[is_covered] != tokens[is_covered]).any(dim=-1).all()


@pytest.mark.parametrize("ratios", [(0.5, 0.3, 0.7, 0.4), (0.0, 0.0, 0.0, 0.0)])
def test_selection_is_per_image(tiny: SparseSwin, ratios: tuple[float, ...]) -> None:
    """An image's features do not depend on its neighbours in the batch."""
    images = torch.randn(3, 3, 52, 76, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    vector = SparsityVector(ratios)
    with torch.inference_mode():
        together = tiny(images, vector)
        alone = [tiny(image[None], vector) for image in images]
    for level, features in enumerate(together):
        for index, feature in enumerate(features):
            torch.testing.assert_close(feature, alone[index][level][0], rtol=1e-10, atol=1e-10)


def test_gradients_match_finite_differences() -> None:
    torch.manual_seed(0)
    config = SwinConfig(embed_dim=4, depths=(2, 2), num_heads=(1, 2), window_size=2)
    backbone = SparseSwin(config).double().train()
    for parameter in backbone.parameters():
        nn.init.normal_(parameter, std=0.5)
    vector = SparsityVector((0.4, 0.5))
    images = torch.randn(1, 3, 20, 28, dtype=torch.float64)
    weight = backbone.get_parameter("stages.0.blocks.0.attn.qkv.weight")

    def forward(images: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        features = torch.func.functional_call(
            backbone, {"stages.0.blocks.0.attn.qkv.weight": weight}, (images, vector)
        )
        return tuple(features)

    inputs = (images.requires_grad_(), weight.detach().clone().requires_grad_())
    assert torch.autograd.gradcheck(forward, inputs, eps=1e-7, atol=1e-5, fast_mode=True)


def test_training_and_inference_agree(tiny: SparseSwin) -> None:
    images = torch.randn(2, 3, 48, 48, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    vector = SparsityVector((0.3, 0.1, 0.5, 0.2))
    with torch.inference_mode():
        expected = tiny(images, vector)
    for mine, reference in zip(tiny.train()(images, vector), expected, strict=True):
        torch.testing.assert_close(mine, reference)


def test_evaluation_is_deterministic_and_leaves_its_arguments_alone(tiny: SparseSwin) -> None:
    images = torch.randn(2, 3, 48, 60, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    before = images.clone()
    vector = SparsityVector((0.3, 0.1, 0.5, 0.2))
    with torch.inference_mode():
        first, second = tiny(images, vector), tiny(images, vector)
    assert torch.equal(images, before)
    assert vector == SparsityVector((0.3, 0.1, 0.5, 0.2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


PUBLISHED = {"swin_t": 28_288_354, "swin_s": 49_606_258, "swin_b": 87_768_224, "swin_l": 196_532_476}
"""Parameters of the classifiers of 1000 classes (torchvision and timm)."""


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes(name: str) -> None:
    """A backbone has no classifier, but a norm for every stage."""
    with torch.device("meta"):
        backbone = create_backbone(name)
    *others, last = backbone.num_channels
    expected = PUBLISHED[name] - 1000 * (last + 1) + 2 * sum(others)
    assert sum(parameter.numel() for parameter in backbone.parameters()) == expected


@pytest.mark.parametrize("name", ["swin_b", "swin_l"])
def test_wider_windows_have_longer_tables_and_nothing_else(name: str) -> None:
    with torch.device("meta"):
        plain, wide = create_backbone(name), create_backbone(f"{name}_window12")
    shapes = {key: tuple(value.shape) for key, value in plain.named_parameters()}
    for key, value in wide.named_parameters():
        expected = shapes.pop(key)
        is_table = key.endswith("relative_position_bias_table")
        assert tuple(value.shape) == ((23 * 23, expected[1]) if is_table else expected)
    assert not shapes


def test_weights_begin_as_in_swin() -> None:
    """Linear layers at a standard deviation of 0.02, biases at zero."""
    torch.manual_seed(0)
    backbone = create_backbone("swin_nano")
    for name, layer in backbone.named_modules():
        if isinstance(layer, nn.Linear):
            assert layer.weight.std().item() == pytest.approx(0.02, rel=0.1), name
            assert abs(layer.weight.mean().item()) < 0.002, name
            assert layer.bias is None or not layer.bias.any(), name


@pytest.mark.parametrize("ratio", [0.0, 0.4])
def test_bfloat16_autocast_is_close_to_float32(tiny: SparseSwin, ratio: float) -> None:
    backbone, vector = tiny.float(), tiny.space.uniform(ratio)
    images = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected = backbone(images, vector)
        with torch.autocast("cpu", torch.bfloat16):
            features = backbone(images, vector)
    for low, feature in zip(features, expected, strict=True):
        assert 0 < (low.float() - feature).norm() < 0.05 * feature.norm()


def test_unknown_backbone_lists_the_known() -> None:
    with pytest.raises(ValueError, match=r"unknown backbone 'swin_x'; choose one of swin_nano, swin_t"):
        create_backbone("swin_x")


def test_vector_of_another_backbone(tiny: SparseSwin) -> None:
    with pytest.raises(ValueError, match=r"has 2 ratios, but depths \[2, 4, 2\] need 4"):
        tiny(torch.zeros(1, 3, 32, 32, dtype=torch.float64), SparsityVector((0.1, 0.2)))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_equals_cpu(tiny: SparseSwin) -> None:
    images = torch.randn(2, 3, 52, 76, dtype=torch.float64)
    vector = SparsityVector((0.5, 0.3, 0.7, 0.4))
    with torch.inference_mode():
        expected = tiny(images, vector)
        features = tiny.cuda()(images.cuda(), vector)
    for mine, reference in zip(features, expected, strict=True):
        torch.testing.assert_close(mine.cpu(), reference, rtol=1e-8, atol=1e-8)


def test_weights_may_be_assigned_to_a_backbone_without_memory(tiny: SparseSwin) -> None:
    """Built on the meta device and filled afterwards, as large models are."""
    with torch.device("meta"):
        empty = SparseSwin(TINY).double().eval()
    filled = empty.to_empty(device="cpu")
    filled.load_state_dict(tiny.state_dict())
    images = torch.randn(1, 3, 40, 56, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    with torch.inference_mode():
        for mine, expected in zip(filled(images), tiny(images), strict=True):
            assert torch.equal(mine, expected)
