"""The supernet: dense equality, selection, gradients."""

import pytest
import torch
import torchvision
from torch import Tensor, nn

from sparsevit import SparseSwin, SparsityVector, SwinConfig, create_backbone, load_backbone_weights
from tests.oracles.swin_loops import loop_forward
from tests.oracles.torchvision_swin import randomize, torchvision_features

TINY = SwinConfig(embed_dim=8, depths=(2, 4, 2), num_heads=(1, 2, 2), window_size=4)


@pytest.fixture(scope="module")
def swin_t_pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[SparseSwin, nn.Module]:
    """Our Swin-T and torchvision's, with the same random weights."""
    torch.manual_seed(0)
    theirs = randomize(torchvision.models.swin_t(weights=None))
    ours = create_backbone("swin_t").eval()
    path = tmp_path_factory.mktemp("swin_t") / "torchvision.pth"
    torch.save(theirs.state_dict(), path)
    load_backbone_weights(ours, path)
    return ours, theirs


@pytest.mark.parametrize("size", [(224, 224), (640, 640), (256, 704), (333, 517)])
def test_ratio_zero_equals_torchvision(
    swin_t_pair: tuple[SparseSwin, nn.Module], size: tuple[int, int]
) -> None:
    ours, theirs = swin_t_pair
    images = torch.randn(2 if size[0] < 300 else 1, 3, *size, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        expected = torchvision_features(theirs, images)
        for sparsity in (None, ours.space.dense):
            for mine, reference in zip(ours(images, sparsity), expected, strict=True):
                assert mine.shape == reference.shape
                assert (mine - reference).norm() / reference.norm() <= 1e-5


@pytest.fixture
def tiny() -> SparseSwin:
    torch.manual_seed(3)
    backbone = SparseSwin(TINY)
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


def test_selection_is_per_image(tiny: SparseSwin) -> None:
    """An image's features do not depend on its neighbours in the batch."""
    images = torch.randn(3, 3, 52, 76, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    vector = SparsityVector((0.5, 0.3, 0.7, 0.4))
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


@pytest.mark.parametrize(("name", "millions"), [("swin_t", 27.5), ("swin_s", 48.8), ("swin_b", 86.7)])
def test_published_sizes(name: str, millions: float) -> None:
    """Parameters of the backbones without classification head, in 10⁶."""
    with torch.device("meta"):
        backbone = create_backbone(name)
    assert sum(p.numel() for p in backbone.parameters()) / 1e6 == pytest.approx(millions, abs=0.1)


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
