"""What users and researchers choose, and what they may get wrong."""

import pytest
import torch
from torch import Tensor, nn

from sparsevit import SparseSwin, SparsityVector, SwinConfig, create_backbone
from sparsevit.backbone import BACKBONES, SparseStage
from sparsevit.block import SwinBlock
from sparsevit.scoring import SCORES, rank_windows, score_tokens
from sparsevit.windows import window_grid

TINY = SwinConfig(embed_dim=8, depths=(2, 2, 2), num_heads=(1, 2, 2), window_size=4)
IMAGES = torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(0))
SPARSE = SparsityVector((0.5, 0.5, 0.5))


def tiny(**options: object) -> SparseSwin:
    torch.manual_seed(0)
    backbone = SparseSwin(TINY, **options).eval()  # type: ignore[arg-type]
    for parameter in backbone.parameters():
        nn.init.normal_(parameter, std=0.2)
    return backbone


@torch.no_grad()
def first_map(backbone: SparseSwin, sparsity: SparsityVector = SPARSE) -> Tensor:
    feature: Tensor = backbone(IMAGES, sparsity)[0]
    return feature


def test_score_decides_which_windows_stay() -> None:
    maps = {name: first_map(tiny(score=name)) for name in SCORES}
    assert not torch.equal(maps["mean_abs"], maps["random"])
    assert torch.equal(first_map(tiny(score="random")), maps["random"])
    own = first_map(tiny(score=lambda tokens: tokens.abs().mean(dim=-1)))
    assert torch.equal(own, maps["mean_abs"])


def test_l2_score_ranks_by_the_norm_of_the_whole_window() -> None:
    tokens = torch.randn(1, 64, 8)
    grid = window_grid((8, 8), 4, (0, 0), tokens.device)
    norms = [tokens[0, rows].norm() for rows in grid.tokens_MN]
    expected = torch.stack(norms).argsort(descending=True)
    assert torch.equal(rank_windows(score_tokens(tokens, SCORES["l2"]), grid)[0], expected)


def test_no_gradient_flows_through_a_score() -> None:
    tokens = torch.randn(1, 4, 8, requires_grad=True)
    assert not score_tokens(tokens, lambda x: x.sum(dim=-1)).requires_grad


def test_pruned_windows_keep_their_tokens_or_none() -> None:
    backbone = tiny()
    backbone.norms[0] = nn.Identity()
    cleared = tiny(pruned="zero")
    cleared.norms[0] = nn.Identity()
    kept, zeroed = first_map(backbone), first_map(cleared)
    is_zero = (zeroed == 0).all(dim=1)
    assert 0.3 < is_zero.float().mean() < 0.8
    assert (kept != 0).any(dim=1).all()
    assert torch.equal(first_map(cleared, cleared.space.dense), first_map(backbone, backbone.space.dense))


def counting(drop_path_rate: float) -> SparseSwin:
    """A backbone whose every block adds 1 to every token, and whose stages begin at 0."""
    backbone = SparseSwin(TINY, drop_path_rate)
    for name, parameter in backbone.named_parameters():
        nn.init.constant_(parameter, float(name.endswith("mlp.fc2.bias")))
    for stage in range(3):
        backbone.norms[stage] = nn.Identity()
    return backbone


def test_stochastic_depth_grows_linearly_and_keeps_the_mean() -> None:
    """Block b of 6 goes with probability 0.8 · b / 5, per image; what stays is that much larger."""
    torch.manual_seed(0)
    backbone, images = counting(0.8), torch.zeros(600, 3, 16, 16)
    with torch.no_grad():
        trained = [each.flatten(1)[:, 0] for each in backbone.train()(images)]
        evaluated = [each.unique().tolist() for each in backbone.eval()(images[:1])]
    assert evaluated == [[2.0]] * 3
    rates = [0.8 * block / 5 for block in range(6)]
    for stage, value in enumerate(trained):
        first, second = rates[2 * stage : 2 * stage + 2]
        sums = {(a, b): a / (1 - first) + b / (1 - second) for a in (0, 1) for b in (0, 1) if a or first > 0}
        shares = {kept: float((value - total).abs().lt(1e-4).float().mean()) for kept, total in sums.items()}
        expected = {(a, b): abs(a - first) * abs(b - second) for a, b in sums}
        assert shares == pytest.approx(expected, abs=0.07)  # give or take 0.02
        assert sum(shares.values()) == pytest.approx(1)


@pytest.mark.parametrize(
    ("frozen_stages", "frozen"),
    [
        (-1, ()),
        (0, ("patch_embed.",)),
        (1, ("patch_embed.", "stages.0.", "norms.0.")),
        (2, ("patch_embed.", "stages.0.", "norms.0.", "downsamples.0.", "stages.1.", "norms.1.")),
        (3, ("",)),
    ],
)
def test_frozen_parts_and_no_others_keep_their_weights_and_evaluation_mode(
    frozen_stages: int, frozen: tuple[str, ...]
) -> None:
    """A merging belongs to the stage that it leads to."""
    backbone = tiny(frozen_stages=frozen_stages).train()
    trained = [p for p in backbone.parameters() if p.requires_grad]
    before = {name: value.clone() for name, value in backbone.named_parameters()}
    if trained:
        sum(feature.square().sum() for feature in backbone(IMAGES, SPARSE)).backward()
        torch.optim.Adam(trained, lr=1e-2).step()  # as far, however small a gradient is
    for name, value in backbone.named_parameters():
        assert torch.equal(value, before[name]) == name.startswith(frozen), name
    for name, module in backbone.named_modules():
        if "." in name:  # not the network, nor its lists
            assert module.training != f"{name}.".startswith(frozen), name


def test_one_block_alone_is_never_dropped() -> None:
    """The first block's probability is 0, and it is the last one too."""
    backbone = SparseSwin(SwinConfig(8, (1,), (1,), window_size=4), 0.9).train()
    with torch.no_grad():
        for mine, expected in zip(backbone(IMAGES), backbone.eval()(IMAGES), strict=True):
            torch.testing.assert_close(mine, expected)


def test_options_of_a_backbone_by_name() -> None:
    """Each reaches the network: what it alone changes is there."""

    def own_score(tokens: Tensor) -> Tensor:
        return tokens.sum(dim=-1)

    backbone = create_backbone(
        "swin_nano", drop_path_rate=0.33, score=own_score, pruned="zero", frozen_stages=2, checkpoints=True
    )
    assert backbone.config == BACKBONES["swin_nano"]
    for stage in backbone.stages:
        assert isinstance(stage, SparseStage)
        assert (stage.score, stage.pruned) == (own_score, "zero")
    blocks = [block for block in backbone.modules() if isinstance(block, SwinBlock)]
    assert [block.drop_path_rate for block in blocks] == pytest.approx([0.03 * index for index in range(12)])
    assert all(block.checkpoints for block in blocks)
    assert not any(parameter.requires_grad for parameter in backbone.stages[1].parameters())
    assert all(parameter.requires_grad for parameter in backbone.stages[2].parameters())


def test_a_backbone_by_name_is_the_paper_s_unless_told() -> None:
    backbone = create_backbone("swin_nano").train()
    assert all(parameter.requires_grad for parameter in backbone.parameters())
    blocks = [block for block in backbone.modules() if isinstance(block, SwinBlock)]
    assert not any(block.checkpoints or block.drop_path_rate for block in blocks)
    tokens = torch.randn(1, 6, 4)
    for stage in backbone.stages:
        assert isinstance(stage, SparseStage)
        assert stage.pruned == "identity"
        torch.testing.assert_close(stage.score(tokens), tokens.abs().mean(dim=-1))


def test_checkpoints_change_memory_and_nothing_else() -> None:
    """Of what is kept for the backward pass less than half stays, weights and all."""
    gradients, kept = [], []
    for checkpoints in (False, True):
        backbone = tiny(checkpoints=checkpoints).train()
        saved: dict[int, int] = {}

        def note(tensor: Tensor, saved: dict[int, int] = saved) -> Tensor:
            storage = tensor.untyped_storage()
            saved[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            loss = sum(feature.square().mean() for feature in backbone(IMAGES, SPARSE))
        loss.backward()
        kept.append(sum(saved.values()))
        gradients.append([parameter.grad for parameter in backbone.parameters()])
    assert kept[1] < kept[0] / 2
    for plain, again in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, again)


def test_feature_info_describes_the_maps() -> None:
    backbone = tiny()
    for info, feature in zip(backbone.feature_info, backbone(IMAGES), strict=True):
        assert feature.shape[1:] == (info.num_channels, 64 // info.stride, 96 // info.stride)


@pytest.mark.parametrize("sparsity", [SparsityVector((0.0,) * 3), SPARSE])
def test_non_finite_pixels_stay_in_their_image(sparsity: SparsityVector) -> None:
    backbone, images = tiny(), IMAGES.clone()
    images[0, :, 5, 5] = float("nan")
    images[0, :, 50, 50] = float("inf")
    with torch.no_grad():
        for spoilt, clean in zip(backbone(images, sparsity), backbone(IMAGES, sparsity), strict=True):
            torch.testing.assert_close(spoilt[1], clean[1])
            assert spoilt[0].isnan().any()


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.zeros(3, 64, 64), r"images are a batch \[B, 3, h, w\], got the shape \[3, 64, 64\]"),
        (torch.zeros(1, 4, 64, 64), r"got the shape \[1, 4, 64, 64\]"),
        (torch.zeros(1, 1, 64, 64), r"got the shape \[1, 1, 64, 64\]"),
        (torch.zeros(1, 3, 64, 64, dtype=torch.uint8), "floating point and normalised, got torch.uint8"),
        (torch.zeros(0, 3, 64, 64), "the batch holds no image"),
        (torch.zeros(1, 3, 64, 3), "64×3 pixels is smaller than a patch of 4×4"),
    ],
)
def test_bad_images(images: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny()(images)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"score": "best"}, "unknown score 'best'; choose one of mean_abs, l2, random, or pass a function"),
        ({"pruned": "mean"}, "unknown pruned='mean'; choose one of identity, zero"),
        ({"frozen_stages": 5}, "frozen_stages lies in -1 … 4, got 5"),
        ({"frozen_stages": -2}, "frozen_stages lies in -1 … 4, got -2"),
        ({"drop_path_rate": -0.1}, r"drop_path_rate lies in \[0, 1\), got -0.1"),
        ({"drop_path_rate": 1.0}, r"drop_path_rate lies in \[0, 1\), got 1.0"),
    ],
)
def test_bad_options(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        create_backbone("swin_nano", **options)  # type: ignore[arg-type]


def test_score_of_another_shape() -> None:
    with pytest.raises(ValueError, match=r"one number per token, \[2, 384\], but it returned \[2, 384, 8\]"):
        first_map(tiny(score=lambda tokens: tokens))


def test_vector_of_another_depth() -> None:
    with pytest.raises(ValueError, match=r"has 6 ratios, but depths \[2, 2, 2\] need 3"):
        tiny()(IMAGES, SparsityVector((0.0,) * 6))


def test_random_scores_are_the_same_everywhere_and_spread_evenly() -> None:
    x = torch.zeros(2, 4000, 3)
    scores = SCORES["random"](x)
    compiled = torch.compile(SCORES["random"], fullgraph=True, backend="eager")
    assert torch.equal(compiled(x), scores)
    assert scores.min() >= 0 and scores.max() < 1
    counts = torch.histc(scores, bins=10, min=0, max=1)
    assert (counts - 800).abs().max() < 120
    assert not torch.equal(scores[0], scores[1])
