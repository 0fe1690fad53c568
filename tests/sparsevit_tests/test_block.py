"""The windows that a block is given, as rows of the residual stream, against loops over them."""

import pytest
import torch
from torch import Tensor

from sparsevit import block
from sparsevit.backbone import BACKBONES, SparseSwin, SwinConfig
from sparsevit.block import KeptWindows, SwinBlock, WindowChunk
from sparsevit.windows import WindowGrid, window_grid

CPU = torch.device("cpu")
WINDOW = 4
KEPT = torch.tensor([[3, 0], [1, 2]])


def grid_of(height: int, width: int, shift: int = 0) -> WindowGrid:
    """One that no other test has."""
    window_grid.cache_clear()
    return window_grid((height, width), WINDOW, (shift, shift), CPU)


@pytest.mark.parametrize("kept_BK", [None, KEPT])
@pytest.mark.parametrize(("size", "shift"), [((8, 8), 0), ((8, 8), 2), ((7, 6), 0), ((7, 6), 2)])
def test_rows_of_kept_windows(kept_BK: Tensor | None, size: tuple[int, int], shift: int) -> None:
    grid, num_tokens = grid_of(*size, shift), size[0] * size[1]
    found = KeptWindows.gather(grid, kept_BK, 2)
    numbers = [[0, 1, 2, 3]] * 2 if kept_BK is None else kept_BK.tolist()
    rows = [
        [
            token + image * num_tokens if token < num_tokens else 2 * num_tokens
            for token in grid.tokens_MN[m].tolist()
        ]
        for image in range(2)
        for m in numbers[image]
    ]
    assert found.rows_PN.tolist() == rows
    assert (found.num_images, found.grid) == (2, grid)
    is_padded = size == (7, 6)
    padding = [[row == 2 * num_tokens for row in window] for window in rows]
    if is_padded:
        assert found.is_padding_PN is not None and found.is_padding_PN.tolist() == padding
    else:
        assert found.is_padding_PN is None
    flat = [not each for window in padding for each in window]
    positions = [number for number, is_there in enumerate(flat) if is_there]
    if is_padded and kept_BK is None:
        assert found.positions_S is not None and found.positions_S.tolist() == positions
    else:
        assert found.positions_S is None
    types = [int(grid.mask_type_M[m]) for image in range(2) for m in numbers[image]]
    if shift:
        assert found.mask_type_P is not None and found.mask_type_P.tolist() == types
    else:
        assert found.mask_type_P is None
    whole = found.whole()
    expected = found.rows_PN.flatten()
    assert torch.equal(whole.rows_S, expected if found.positions_S is None else expected[positions])
    assert whole.rows_PN is found.rows_PN and whole.mask_type_P is found.mask_type_P
    assert whole.is_padding_PN is found.is_padding_PN and whole.positions_S is found.positions_S


@pytest.mark.parametrize(
    ("max_windows", "sizes"), [(1, [1] * 7), (3, [2, 2, 3]), (4, [3, 4]), (6, [3, 4]), (7, [7]), (99, [7])]
)
@pytest.mark.parametrize(("width", "shift"), [(28, 2), (26, 0)])
def test_chunks_are_even_and_leave_the_padding_out(
    max_windows: int, sizes: list[int], width: int, shift: int
) -> None:
    windows = KeptWindows.gather(grid_of(4, width, shift), None, 1)
    chunks = windows.chunks(max_windows)
    assert [len(chunk.rows_PN) for chunk in chunks] == sizes
    assert torch.equal(torch.cat([chunk.rows_PN for chunk in chunks]), windows.rows_PN)
    rows = windows.rows_PN.flatten()
    assert torch.equal(torch.cat([chunk.rows_S for chunk in chunks]), rows[rows < 4 * width])
    if width == 28:
        assert all(chunk.is_padding_PN is None and chunk.positions_S is None for chunk in chunks)
        types = torch.cat([chunk.mask_type_P for chunk in chunks if chunk.mask_type_P is not None])
        assert windows.mask_type_P is not None and torch.equal(types, windows.mask_type_P)
    else:
        assert windows.is_padding_PN is not None
        padding = torch.cat([chunk.is_padding_PN for chunk in chunks if chunk.is_padding_PN is not None])
        assert torch.equal(padding, windows.is_padding_PN)
        assert all(chunk.mask_type_P is None for chunk in chunks)
    assert windows.chunks(max_windows) is chunks


def test_what_keeps_every_window_is_kept_for_inference_alone() -> None:
    grid = grid_of(8, 12)
    KeptWindows.gather(grid, None, 2)
    with torch.no_grad():
        KeptWindows.gather(grid, KEPT, 2)
        assert not grid.all_windows
        first = KeptWindows.gather(grid, None, 2)
        assert KeptWindows.gather(grid, None, 2) is first
        assert KeptWindows.gather(grid, None, 3) is not first
    assert grid.all_windows.keys() == {2, 3}
    assert KeptWindows.gather(grid, None, 2) is not first


def test_tokens_become_windows_and_come_back() -> None:
    """Padding has the value that it is given; without positions all tokens are there."""
    rows_PN = torch.arange(6).view(2, 3)
    positions = torch.tensor([0, 1, 3, 5])
    chunk = WindowChunk.of(rows_PN, None, None, positions)
    assert chunk.rows_S.tolist() == [0, 1, 3, 5]
    tokens, padding = torch.rand(4, 2, dtype=torch.float64), torch.tensor([7.0, 8.0])
    windows = chunk.to_windows(tokens, padding)
    assert windows.shape == (2, 3, 2) and windows.dtype == torch.float64
    assert windows.flatten(0, 1)[[2, 4]].tolist() == [[7, 8], [7, 8]]
    assert torch.equal(windows.flatten(0, 1)[positions], tokens)
    assert torch.equal(chunk.to_tokens(windows), tokens)
    whole = WindowChunk.of(rows_PN, None, None, None)
    tokens = torch.rand(6, 2)
    assert torch.equal(whole.to_windows(tokens, padding), tokens.view(2, 3, 2))
    assert torch.equal(whole.to_tokens(tokens.view(2, 3, 2)), tokens)


@pytest.mark.parametrize(("size", "expected"), [(6 * 2**20, 1536), (2 * 16 * 64 * 4 + 1, 2), (5, 1)])
def test_a_chunk_holds_as_many_windows_as_fit(
    monkeypatch: pytest.MonkeyPatch, size: int, expected: int
) -> None:
    """Of 16 tokens of a hidden layer of 64 numbers of 4 bytes."""
    asked: list[int] = []
    chunks = KeptWindows.chunks

    def note(self: KeptWindows, max_windows: int) -> list[WindowChunk]:
        asked.append(max_windows)
        return chunks(self, max_windows)

    monkeypatch.setattr(block, "CHUNK_BYTES", size)
    monkeypatch.setattr(block, "is_fused", lambda device, dtype: not torch.is_grad_enabled())
    monkeypatch.setattr(KeptWindows, "chunks", note)
    swin = SwinBlock(16, 2, WINDOW, 4.0)
    windows = KeptWindows.gather(grid_of(8, 8), None, 1)
    x_RC = torch.randn(64, 16)
    swin(x_RC.clone(), windows)
    with torch.no_grad():
        swin(x_RC.clone(), windows)  # in training mode, though without gradients
        assert not asked
        expected_RC = swin(x_RC.clone(), windows)
        found = swin.eval()(x_RC.clone(), windows)
    assert asked == [expected]
    torch.testing.assert_close(found, expected_RC)


def test_a_block_is_as_wide_as_it_is_told() -> None:
    swin = SwinBlock(10, 2, WINDOW, 1.55)
    assert (swin.mlp.fc1.in_features, swin.mlp.fc1.out_features) == (10, 15)
    assert (swin.mlp.fc2.in_features, swin.mlp.fc2.out_features) == (15, 10)
    assert (swin.norm1.normalized_shape, swin.norm2.normalized_shape) == ((10,), (10,))
    assert (swin.drop_path_rate, swin.checkpoints) == (0.0, False)


def test_a_small_backbone_for_trials() -> None:
    """It has the depths of Swin-T, so vectors of the one are vectors of the other."""
    assert BACKBONES["swin_nano"] == SwinConfig(32, BACKBONES["swin_t"].depths, (1, 2, 4, 8), 4, 4, 4.0)
    assert SwinConfig(8, (2,), (1,)) == SwinConfig(8, (2,), (1,), 7, 4, 4.0)
    with torch.device("meta"):
        backbone = SparseSwin(SwinConfig(8, (1, 1, 1), (1, 1, 1), patch_size=3))
    assert [(info.num_channels, info.stride) for info in backbone.feature_info] == [(8, 3), (16, 6), (32, 12)]
