"""The kernels for GPUs against plain PyTorch in float64; without a GPU, as Triton interprets them."""

import copy
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from sparsevit import SparseSwin, SparsityVector, backbone, linear, scoring
from sparsevit.attention import WindowAttention
from sparsevit.backbone import PatchEmbedding, PatchMerging
from sparsevit.block import KeptWindows
from sparsevit.kept_windows import trace_kept_windows
from sparsevit.windows import WindowGrid, window_grid
from tests.sparsevit_tests.tiny_swin import TINY, random_backbone

gpu_kernels = pytest.importorskip("sparsevit.gpu_kernels", reason="needs Triton")

HAS_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if HAS_GPU else "cpu")
DTYPES = [torch.float16, torch.bfloat16] if HAS_GPU else [torch.float16]  # bfloat16 is not interpreted right
TOLERANCE = {torch.float16: 1e-3, torch.bfloat16: 8e-3}
SINK = 30


@pytest.fixture(autouse=True)
def kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Inference, with the kernels on any device."""

    def takes_kernels(device: torch.device, dtype: torch.dtype) -> bool:
        return dtype in DTYPES and not torch.is_grad_enabled()

    torch.manual_seed(0)
    if not HAS_GPU:
        for module in (backbone, linear, scoring):
            monkeypatch.setattr(module, "is_gpu_inference", takes_kernels)
    with torch.inference_mode():
        yield


@pytest.fixture(params=DTYPES, ids=str)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    chosen: torch.dtype = request.param
    return chosen


def random_of(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.5)
    return module.to(DEVICE, dtype).eval()


def draw(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(*shape).to(DEVICE, dtype)


def rows_with_padding() -> Tensor:
    rows = torch.randperm(SINK)[:21]
    rows[[3, 17]] = SINK
    return rows.to(DEVICE)


def assert_near(found: Tensor, expected: Tensor) -> None:
    """Within a few roundings of the largest value."""
    assert found.shape == expected.shape
    bound = TOLERANCE.get(found.dtype, 1e-5) * max(1.0, expected.abs().max().item())
    torch.testing.assert_close(found.double(), expected.double(), rtol=0, atol=2 * bound)


@pytest.mark.parametrize("size", [(64, 64), (39, 50), (14, 14)])
@pytest.mark.parametrize(("channels", "patch_size"), [(24, 4), (96, 4), (32, 2), (32, 1), (192, 8), (96, 14)])
def test_embeds_patches(dtype: torch.dtype, size: tuple[int, int], channels: int, patch_size: int) -> None:
    layer = random_of(PatchEmbedding(channels, patch_size), dtype)
    images = draw(2, 3, *size, dtype=dtype)
    expected = copy.deepcopy(layer).double()(images.double())
    assert_near(layer(images), expected)


@pytest.mark.parametrize("channels", [16, 96, 384, 1536])
def test_normalizes_rows(dtype: torch.dtype, channels: int) -> None:
    norm = random_of(nn.LayerNorm(channels), dtype)
    x, rows = draw(SINK + 1, channels, dtype=dtype), rows_with_padding()
    x[SINK] = torch.nan  # is not read
    expected = copy.deepcopy(norm).double()(x.double())
    assert_near(gpu_kernels.normalize(x[:SINK], norm, dtype), expected[:SINK])
    expected[SINK] = 0
    assert_near(gpu_kernels.normalize(x, norm, dtype, rows, SINK), expected[rows])


@pytest.mark.parametrize("size", [(6, 8), (5, 7), (1, 1), (1, 6)])
def test_merges_corners(dtype: torch.dtype, size: tuple[int, int]) -> None:
    merging = random_of(PatchMerging(24), dtype)
    x = draw(2, *size, 24, dtype=dtype)
    assert_near(merging(x), copy.deepcopy(merging).double()(x.double()))


@pytest.mark.parametrize("channels", [16, 96, 1536])
def test_adds_rows_in_place(dtype: torch.dtype, channels: int) -> None:
    norm = random_of(nn.LayerNorm(channels), dtype)
    x, rows = draw(SINK + 1, channels, dtype=dtype), rows_with_padding()
    update = draw(len(rows), channels, dtype=dtype)
    expected = x.double()
    is_real = rows != SINK
    expected[rows[is_real]] += update[is_real].double()
    plain = x.clone()
    normed = gpu_kernels.add_rows_(x, rows, update, SINK, norm, dtype)
    assert_near(x, expected)
    assert_near(normed[is_real], copy.deepcopy(norm).double()(x.double())[rows[is_real]])
    assert gpu_kernels.add_rows_(plain, rows, update, SINK).numel() == 0
    assert torch.equal(plain, x)


def test_adds_to_a_residual_stream_of_higher_precision(dtype: torch.dtype) -> None:
    x, rows = torch.randn(SINK, 32, device=DEVICE), torch.arange(SINK, device=DEVICE)
    update = draw(SINK, 32, dtype=dtype)
    expected = x.double() + update.double()
    gpu_kernels.add_rows_(x, rows, update, SINK)
    assert_near(x, expected)


@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize(
    ("window_size", "num_heads", "width"), [(4, 1, 16), (7, 3, 32), (12, 2, 20), (3, 2, 8)]
)
def test_attends(dtype: torch.dtype, window_size: int, num_heads: int, width: int, shift: int) -> None:
    attention = WindowAttention(num_heads * width, num_heads, window_size)
    random_of(attention, dtype)
    shifts = (shift * (window_size // 2),) * 2
    grid = window_grid((3 * window_size - 1, 2 * window_size + 2), window_size, shifts, DEVICE)
    kept = torch.tensor([5, 0, 8], device=DEVICE)
    mask_type = grid.mask_type_M[kept] if shift else None
    qkv = draw(len(kept), window_size**2, 3 * num_heads * width, dtype=dtype)
    bias = gpu_kernels.tile_bias(attention.relative_position_bias_table, window_size, grid.mask_TNN, dtype)
    found = gpu_kernels.attend(qkv, bias, mask_type, num_heads)
    reference = copy.deepcopy(attention).double()
    assert_near(found, reference.attend(qkv.double(), reference.logit_bias(grid), mask_type))


@pytest.mark.parametrize("order", [1, 2])
def test_scores_rows(dtype: torch.dtype, order: int) -> None:
    x = draw(2, 33, 48, dtype=dtype)
    score = {1: scoring.mean_abs, 2: scoring.l2}[order]
    assert_near(gpu_kernels.score_rows(x, order), score(x.double()))


@pytest.mark.parametrize("size", [(9, 14), (30, 26)])
@pytest.mark.parametrize("shift", [0, 2])
@pytest.mark.parametrize("ratio", [0.0, 0.3, 0.9])
def test_selects_what_the_ranking_selects(size: tuple[int, int], shift: int, ratio: float) -> None:
    grid: WindowGrid = window_grid(size, 4, (shift, shift), DEVICE)
    scores_BL = torch.rand(3, grid.num_tokens, device=DEVICE)
    scores_BL[1, : grid.num_tokens // 2] = 0.5  # ties
    scores_BL[2, 5], scores_BL[2, 0] = torch.nan, torch.inf
    num_kept = max(1, round(grid.num_windows * (1 - ratio)))
    found = KeptWindows.select_on_gpu(grid, scores_BL, num_kept, 3)
    kept_BK = scoring.rank_windows(scores_BL, grid)[:, :num_kept]
    expected = KeptWindows.gather(grid, kept_BK, 3)
    assert torch.equal(found.rows_PN, expected.rows_PN)
    if expected.mask_type_P is None:
        assert found.mask_type_P is None
    else:
        assert found.mask_type_P is not None
        assert torch.equal(found.mask_type_P, expected.mask_type_P)


@pytest.mark.parametrize("ratios", [(0, 0, 0, 0), (0.5, 0.3, 0.7, 0.4), (0, 0, 0.6, 0.8)])
@pytest.mark.parametrize("options", [{}, {"pruned": "zero", "score": "l2"}, {"score": "random"}])
@pytest.mark.parametrize("size", [(64, 64), (52, 77)])
def test_backbone_equals_the_plain_one(
    dtype: torch.dtype, ratios: tuple[float, ...], options: dict[str, str], size: tuple[int, int]
) -> None:
    reference = SparseSwin(TINY, **options).eval()  # type: ignore[arg-type]
    reference.load_state_dict(random_backbone().state_dict())
    reference = reference.to(DEVICE, dtype).double()
    images = draw(2, 3, *size, dtype=dtype)
    vector = SparsityVector(ratios)
    half = copy.deepcopy(reference).to(dtype)
    with trace_kept_windows(half) as trace, trace_kept_windows(reference) as expected_trace:
        features, expected = half(images, vector), reference(images.double(), vector)
    for found, feature in zip(features, expected, strict=True):
        assert found.dtype == dtype
        assert (found.double() - feature).norm() < 4 * TOLERANCE[dtype] * feature.norm()
    for share, expected_share in zip(trace.shares, expected_trace.shares, strict=True):
        assert torch.equal(share, expected_share)


def test_autocast_takes_them_too(dtype: torch.dtype) -> None:
    swin = random_backbone().to(DEVICE)
    images, vector = torch.randn(2, 3, 52, 77, device=DEVICE), SparsityVector((0.5, 0, 0.7, 0.4))
    expected = copy.deepcopy(swin).double()(images.double(), vector)
    with torch.autocast(DEVICE.type, dtype):
        features = swin(images, vector)
    for found, feature in zip(features, expected, strict=True):
        assert found.dtype == torch.float32
        assert (found.double() - feature).norm() < 4 * TOLERANCE[dtype] * feature.norm()


def test_hooks_of_layers_are_respected(dtype: torch.dtype) -> None:
    swin = random_backbone().to(DEVICE)
    layers = [module for module in swin.modules() if isinstance(module, nn.Linear)]
    called: list[nn.Module] = []
    for layer in layers:
        layer.register_forward_hook(lambda module, inputs, output: called.append(module))
    with torch.autocast(DEVICE.type, dtype):
        swin(torch.randn(1, 3, 32, 32, device=DEVICE))
    assert set(called) == set(layers)


def assert_as_plain(swin: SparseSwin, dtype: torch.dtype) -> None:
    """Features by the kernels are those of the generic way."""
    images, vector = draw(2, 3, 52, 77, dtype=dtype), SparsityVector((0.5, 0.3, 0.7, 0.4))
    expected = copy.deepcopy(swin).double()(images.double(), vector)
    for found, feature in zip(swin.to(dtype)(images, vector), expected, strict=True):
        assert (found.double() - feature).norm() < 4 * TOLERANCE[dtype] * feature.norm()


def test_weights_in_channels_last_layout(dtype: torch.dtype) -> None:
    swin = random_backbone().to(DEVICE)
    assert_as_plain(swin.to(memory_format=torch.channels_last), dtype)


@pytest.mark.parametrize(
    "score",
    [
        lambda x: torch.arange(x.shape[1], device=x.device).sin().float().expand(len(x), -1),
        lambda x: x[..., 0].float(),
        lambda x: scoring.mean_abs(x[..., :8]),
    ],
)
def test_scores_of_the_user_in_any_layout(dtype: torch.dtype, score: scoring.Score) -> None:
    swin = random_backbone().to(DEVICE)
    for stage in swin.stages:
        stage.score = score  # type: ignore[assignment]
    assert_as_plain(swin, dtype)


def test_hooks_of_norms_and_other_norms_are_respected(dtype: torch.dtype) -> None:
    swin = random_backbone().to(DEVICE)
    swin.norms[0] = nn.Identity()
    swin.norms[1] = nn.LayerNorm(TINY.embed_dim * 2, elementwise_affine=False)
    block = swin.get_submodule("stages.2.blocks.1")
    block.norm2 = nn.LayerNorm(TINY.embed_dim * 4, bias=False).to(DEVICE)
    kinds = (nn.LayerNorm, nn.Conv2d)
    modules = [module for module in swin.modules() if isinstance(module, kinds)]
    called: list[nn.Module] = []

    def double(module: nn.Module, inputs: object, output: Tensor) -> Tensor:
        called.append(module)
        return 2 * output

    for module in modules:
        module.register_forward_hook(double)
    assert_as_plain(swin, dtype)
    called.clear()
    swin(draw(1, 3, 32, 32, dtype=dtype))
    assert set(modules) <= set(called)


def test_a_block_in_training_mode_takes_no_kernels(dtype: torch.dtype) -> None:
    """As for stochastic depth at test time; with padding and pruned windows."""
    swin = random_backbone().to(DEVICE)
    swin.get_submodule("stages.1.blocks.2").train()
    assert_as_plain(swin, dtype)


@pytest.mark.skipif(not HAS_GPU, reason="needs a CUDA device")
def test_graphs_replay_what_was_captured(dtype: torch.dtype) -> None:
    """CUDA graphs of several vectors, and a compiled graph, live side by side."""
    swin = random_backbone().to(DEVICE, dtype)
    images = draw(2, 3, 52, 77, dtype=dtype)
    vectors = [SparsityVector((ratio,) * 4) for ratio in (0.0, 0.3, 0.7)]
    expected = [swin(images, vector) for vector in vectors]
    replays = []
    for vector in vectors:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            features = swin(images, vector)
        replays.append((graph, features))
    for _ in range(2):
        for (graph, features), plain in zip(replays, expected, strict=True):
            graph.replay()
            torch.cuda.synchronize()
            assert all(map(torch.equal, features, plain))
    compiled = torch.compile(swin.specialize(vectors[1], (52, 77)), fullgraph=True, dynamic=False)
    for found, feature in zip(compiled(images), expected[1], strict=True):
        assert (found - feature).norm() < 2 * TOLERANCE[dtype] * feature.norm()
