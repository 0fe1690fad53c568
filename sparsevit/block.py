"""A Swin block that works on the windows it is given and leaves every other token alone.

Legend: B images; R rows of the token-major residual stream (B · H · W, and the sink where the grid
is padded); C channels; M windows of an image; K kept windows; N tokens per window; P = B · K.
"""

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torchvision.ops import stochastic_depth

from sparsevit.attention import WindowAttention
from sparsevit.linear import is_fused, linear, linear_add, linear_gelu
from sparsevit.windows import WindowGrid

CHUNK_BYTES = 8 * 2**20
"""Size of the widest intermediate (the hidden layer) of the windows that go through a block together."""


@dataclass(frozen=True)
class KeptWindows:
    """The windows that a block computes, as rows of the residual stream.

    Attributes:
        rows_BKN: row of the residual stream for every token of every kept window.
        kept_BK: the kept windows of every image, or None when all are.
        grid: the partition that the windows belong to.
    """

    rows_BKN: Tensor
    kept_BK: Tensor | None
    grid: WindowGrid

    @classmethod
    def gather(cls, grid: WindowGrid, kept_BK: Tensor | None, num_images: int) -> "KeptWindows":
        """Turn window numbers into rows; all windows of `num_images` images if `kept_BK` is None."""
        num_tokens = grid.num_tokens
        tokens = grid.tokens_MN[None] if kept_BK is None else grid.tokens_MN[kept_BK]
        offsets_B = tokens.new_tensor(range(num_images)) * num_tokens
        rows_BKN = tokens + offsets_B[:, None, None]
        if grid.is_padding_MN is not None:
            rows_BKN = rows_BKN.masked_fill(tokens == num_tokens, num_images * num_tokens)
        return cls(rows_BKN=rows_BKN, kept_BK=kept_BK, grid=grid)

    def chunks(self, max_windows: int) -> Iterator["WindowChunk"]:
        """The kept windows of all images, at most `max_windows` at a time, evenly."""
        rows_PN = self.rows_BKN.flatten(0, 1)
        is_padding_PN = self._per_window(self.grid.is_padding_MN)
        mask_type_P = None if self.grid.mask_TNN is None else self._per_window(self.grid.mask_type_M)
        num_chunks = -(-len(rows_PN) // max_windows)
        if num_chunks == 1:
            yield WindowChunk(rows_PN, is_padding_PN, mask_type_P)
            return
        bounds = [len(rows_PN) * index // num_chunks for index in range(num_chunks + 1)]
        for part in map(slice, bounds[:-1], bounds[1:]):
            yield WindowChunk(
                rows_PN[part],
                None if is_padding_PN is None else is_padding_PN[part],
                None if mask_type_P is None else mask_type_P[part],
            )

    def _per_window(self, values_M: Tensor | None) -> Tensor | None:
        """Look up a value of the grid's windows for the kept ones: [P, …]."""
        if values_M is None:
            return None
        if self.kept_BK is not None:
            return values_M[self.kept_BK.flatten()]
        num_images = self.rows_BKN.shape[0]
        return values_M.repeat(num_images, *(1 for _ in values_M.shape[1:]))


@dataclass(frozen=True)
class WindowChunk:
    """Windows that go through a block together."""

    rows_PN: Tensor
    is_padding_PN: Tensor | None
    mask_type_P: Tensor | None


class Mlp(nn.Module):
    """The feed-forward network."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(channels, hidden)
        self.fc2 = nn.Linear(hidden, channels)

    def forward(self, x: Tensor) -> Tensor:
        return linear(linear_gelu(x, self.fc1), self.fc2)


class SwinBlock(nn.Module):
    """LN, window attention, LN, MLP, each with a residual, on the kept windows only.

    Args:
        drop_path_rate: stochastic depth in training.
        checkpoints: in training, compute the intermediates again in the backward pass.
    """

    def __init__(
        self,
        channels: int,
        num_heads: int,
        window_size: int,
        mlp_ratio: float,
        drop_path_rate: float = 0.0,
        *,
        checkpoints: bool = False,
    ) -> None:
        super().__init__()
        self.drop_path_rate = drop_path_rate
        self.checkpoints = checkpoints
        self.norm1 = nn.LayerNorm(channels)
        self.attn = WindowAttention(channels, num_heads, window_size)
        self.norm2 = nn.LayerNorm(channels)
        self.mlp = Mlp(channels, int(channels * mlp_ratio))

    def forward(self, x_RC: Tensor, windows: KeptWindows) -> Tensor:
        """Update the rows of the kept windows in place and return the residual stream.

        In place is safe under autograd: nothing saves the stream itself for the backward pass.
        Padding is zero after LN1 and takes part in attention, as in every dense Swin. For inference
        on a CPU the windows go through in chunks whose intermediates stay in its cache.
        """
        num_images, num_kept, num_positions = windows.rows_BKN.shape
        dtype = _compute_dtype(x_RC)
        is_fast = is_fused(x_RC.device, dtype)
        max_windows = num_images * num_kept
        if is_fast:
            bytes_per_window = num_positions * self.mlp.fc1.out_features * dtype.itemsize
            max_windows = max(1, CHUNK_BYTES // bytes_per_window)
        with torch.autocast(x_RC.device.type, enabled=False) if is_fast else nullcontext():
            logit_bias = self.attn.logit_bias(windows.grid)
            for chunk in windows.chunks(max_windows):
                rows_R = chunk.rows_PN.flatten()
                tokens = x_RC.index_select(0, rows_R).view(*chunk.rows_PN.shape, -1)
                if self.checkpoints and torch.is_grad_enabled():
                    tokens = checkpoint(
                        self._update, tokens, chunk, logit_bias, num_images, dtype, use_reentrant=False
                    )
                else:
                    tokens = self._update(tokens, chunk, logit_bias, num_images, dtype)
                x_RC = x_RC.index_copy_(0, rows_R, tokens.flatten(0, 1).to(x_RC.dtype))
        return x_RC

    def _update(
        self, tokens: Tensor, chunk: WindowChunk, logit_bias: Tensor, num_images: int, dtype: torch.dtype
    ) -> Tensor:
        """New tokens of the windows of a chunk: [P, N, C] to the same."""
        normed = self.norm1(tokens).to(dtype)
        if chunk.is_padding_PN is not None:
            normed = normed.masked_fill(chunk.is_padding_PN[..., None], 0.0)
        bias = logit_bias if chunk.mask_type_P is None else logit_bias.index_select(0, chunk.mask_type_P)
        tokens = self._add(tokens, self.attn.attend(normed, bias), self.attn.proj, num_images)
        normed = self.norm2(tokens).to(dtype)
        return self._add(tokens, linear_gelu(normed, self.mlp.fc1), self.mlp.fc2, num_images)

    def _add(self, tokens_PNC: Tensor, x: Tensor, layer: nn.Linear, num_images: int) -> Tensor:
        """``tokens + layer(x)``; in training the branch is dropped for whole images (stochastic depth)."""
        if not self.training or self.drop_path_rate == 0.0:
            return linear_add(x, layer, tokens_PNC)
        branch: Tensor = layer(x)
        kept: Tensor = stochastic_depth(branch.view(num_images, -1), self.drop_path_rate, mode="row")
        return tokens_PNC + kept.view_as(branch)


def _compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype of matrix products with `x`."""
    device = x.device.type
    dtype: torch.dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    return dtype
