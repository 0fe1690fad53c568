"""Window geometry: which tokens belong to which window, as index tables.

Legend: H, W token grid of a stage; L = H · W; M number of windows; N tokens per window; T
attention-mask types.

The tables are built once per grid and cached. A token is a row of the flattened grid; row
``H·W``, the sink, stands for every position of the zero padding that rounds the grid up to
whole windows.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sparsevit.sparsity import count_kept_windows

if TYPE_CHECKING:
    from sparsevit.block import KeptWindows


@dataclass(frozen=True, eq=False)
class WindowGrid:
    """One partition of an H × W grid into windows, cyclically shifted or not.

    Attributes:
        tokens_MN: row of the flattened grid for every window position; ``H·W`` where it is padding.
        is_padding_MN: the positions that are padding, or None if there are none.
        positions_L: the positions that are not, as numbers into M · N; None if all are.
        mask_type_M: row of `mask_TNN` that applies to a window.
        mask_TNN: True where a query may not attend to a key, because the cyclic shift brought
            together tokens that are not neighbours; None without shift.
        bias_row_NN: row of the relative position bias table for a query and a key.
        all_windows: what blocks that keep every window do, by the number of images; for inference.
    """

    tokens_MN: Tensor
    is_padding_MN: Tensor | None
    positions_L: Tensor | None
    mask_type_M: Tensor
    mask_TNN: Tensor | None
    bias_row_NN: Tensor
    num_tokens: int
    all_windows: dict[int, "KeptWindows"] = field(default_factory=dict, init=False, repr=False)

    @property
    def num_windows(self) -> int:
        return self.tokens_MN.shape[0]


@dataclass(frozen=True)
class BlockPlan:
    """What a block does at an input size and a sparsity: all that is known before any image.

    Attributes:
        num_kept: windows of an image that the block computes; all of them if None.
    """

    grid: WindowGrid
    num_kept: int | None


StagePlan = tuple[BlockPlan, ...]


def plan_stage(
    grid_size: tuple[int, int], window_size: int, ratios: Sequence[float], device: torch.device
) -> StagePlan:
    """Plan the blocks of a stage: every other one is shifted by half a window.

    Args:
        grid_size: tokens of the stage, H and W.
        ratios: one per block.
    """
    plan = []
    for index, ratio in enumerate(ratios):
        shift = effective_shift(grid_size, window_size, window_size // 2 if index % 2 else 0)
        grid = window_grid(grid_size, window_size, shift, device)
        plan.append(BlockPlan(grid, count_kept_windows(grid.num_windows, ratio) if ratio > 0 else None))
    return tuple(plan)


def effective_shift(grid_size: tuple[int, int], window_size: int, shift: int) -> tuple[int, int]:
    """Shift per axis; none on an axis that a single window covers (as in torchvision's Swin)."""
    height, width = (0 if size <= window_size else shift for size in grid_size)
    return height, width


@lru_cache(maxsize=256)
@torch.inference_mode(False)  # a cached table must serve training too
def window_grid(
    grid_size: tuple[int, int], window_size: int, shift: tuple[int, int], device: torch.device
) -> WindowGrid:
    """Build the index tables of a grid.

    The grid is padded at the bottom and right to multiples of `window_size`, rolled by
    `shift` towards the top left, then cut into windows in row-major order (Swin, section 3.2).
    """
    height, width = grid_size
    padded = [-(-size // window_size) * window_size for size in grid_size]
    rows = (torch.arange(padded[0], device="cpu") + shift[0]) % padded[0]
    columns = (torch.arange(padded[1], device="cpu") + shift[1]) % padded[1]
    tokens = rows[:, None] * width + columns[None, :]
    is_padding = (rows >= height)[:, None] | (columns >= width)[None, :]
    tokens = tokens.masked_fill(is_padding, height * width)
    tokens_MN = _partition(tokens, window_size)
    is_padding_MN = _partition(is_padding, window_size) if bool(is_padding.any()) else None
    mask_type_M, mask_TNN = _shift_masks((padded[0], padded[1]), window_size, shift)
    return WindowGrid(
        tokens_MN=tokens_MN.to(device),
        is_padding_MN=None if is_padding_MN is None else is_padding_MN.to(device),
        positions_L=None
        if is_padding_MN is None
        else (~is_padding_MN).flatten().nonzero().flatten().to(device),
        mask_type_M=mask_type_M.to(device),
        mask_TNN=None if mask_TNN is None else mask_TNN.to(device),
        bias_row_NN=relative_position_index(window_size).to(device),
        num_tokens=height * width,
    )


def relative_position_index(window_size: int) -> Tensor:
    """Row of the bias table for every pair of window positions: [N, N] (Swin, equation 4)."""
    axis = torch.arange(window_size, device="cpu")
    positions_N2 = torch.cartesian_prod(axis, axis)
    offsets_NN2 = positions_N2[:, None] - positions_N2[None, :] + window_size - 1
    return offsets_NN2[..., 0] * (2 * window_size - 1) + offsets_NN2[..., 1]


def _partition(grid: Tensor, window_size: int) -> Tensor:
    height, width = grid.shape
    blocks = grid.view(height // window_size, window_size, width // window_size, window_size)
    return blocks.transpose(1, 2).reshape(-1, window_size * window_size)


def _shift_masks(
    padded: tuple[int, int], window_size: int, shift: tuple[int, int]
) -> tuple[Tensor, Tensor | None]:
    if shift == (0, 0):
        num_windows = (padded[0] // window_size) * (padded[1] // window_size)
        return torch.zeros(num_windows, dtype=torch.long, device="cpu"), None
    regions = [_axis_regions(size, window_size, offset) for size, offset in zip(padded, shift, strict=True)]
    regions_MN = _partition(regions[0][:, None] * 3 + regions[1][None, :], window_size)
    patterns_TN, mask_type_M = torch.unique(regions_MN, dim=0, return_inverse=True)
    return mask_type_M, patterns_TN[:, :, None] != patterns_TN[:, None, :]


def _axis_regions(size: int, window_size: int, shift: int) -> Tensor:
    """Positions of the rolled axis by the neighbourhood they come from: 0, 1 or 2."""
    position = torch.arange(size, device="cpu")
    if shift == 0:
        return torch.zeros_like(position)
    return (position >= size - window_size).long() + (position >= size - shift).long()
