"""A Swin block that works on the windows it is given and leaves every other token alone.

Legend: B images; R rows of the token-major residual stream (B · H · W, and the sink where the grid
is padded); C channels; M windows of an image; K kept windows; N tokens per window; P = B · K; S tokens
that are computed.
"""

from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sparsevit.attention import WindowAttention
from sparsevit.inference import can_keep, compute_dtype, is_bare_norm, is_inference
from sparsevit.linear import JoinedLinear, is_fused, join
from sparsevit.wide import scatter_rows_
from sparsevit.windows import WindowGrid

CHUNK_BYTES = 6 * 2**20
"""Size of the widest intermediate (the hidden layer) of the windows that go through a block together."""


@dataclass(frozen=True, eq=False)
class KeptWindows:
    """The windows that a block computes, as rows of the residual stream.

    Attributes:
        rows_PN: row of the residual stream for every token of every kept window; the sink for padding.
        is_padding_PN: the positions that are padding, or None if there are none; also None by
            `select_on_gpu`, as the kernels know padding by its row.
        mask_type_P: which attention mask applies, or None if the grid has none.
        positions_S: the positions that are not padding, as numbers into P · N, where they are known
            before any image: if all windows are kept.
        num_images: B; every image keeps the same number of windows.
        grid: the partition that the windows belong to.
    """

    rows_PN: Tensor
    is_padding_PN: Tensor | None
    mask_type_P: Tensor | None
    positions_S: Tensor | None
    num_images: int
    grid: WindowGrid
    _chunks: dict[int, list["WindowChunk"]] = field(default_factory=dict, init=False, repr=False)

    @classmethod
    def gather(cls, grid: WindowGrid, kept_BK: Tensor | None, num_images: int) -> "KeptWindows":
        """Turn window numbers into rows; all windows of `num_images` images if `kept_BK` is None."""
        if kept_BK is not None or not is_inference():
            return cls._gather(grid, kept_BK, num_images)
        windows = grid.all_windows.get(num_images)
        if windows is None:
            windows = cls._gather(grid, None, num_images)
            if can_keep(grid.tokens_MN.device):
                grid.all_windows[num_images] = windows
        return windows

    @classmethod
    def select_on_gpu(
        cls, grid: WindowGrid, scores_BL: Tensor, num_kept: int, num_images: int
    ) -> "KeptWindows":
        """The most important windows by their tokens' scores, from most to least important."""
        from sparsevit import gpu_kernels

        scores_BM = gpu_kernels.score_windows(scores_BL, grid.tokens_MN)
        mask_type_M = None if grid.mask_TNN is None else grid.mask_type_M
        rows_PN, mask_type_P = gpu_kernels.select_rows(
            scores_BM, num_kept, grid.tokens_MN, mask_type_M, grid.num_tokens
        )
        return cls(rows_PN, None, mask_type_P, None, num_images, grid)

    @classmethod
    def _gather(cls, grid: WindowGrid, kept_BK: Tensor | None, num_images: int) -> "KeptWindows":
        def per_window(values_M: Tensor) -> Tensor:
            if kept_BK is not None:
                return values_M.index_select(0, kept_BK.flatten())
            return values_M.repeat(num_images, *(1 for _ in values_M.shape[1:]))

        num_tokens = grid.num_tokens
        rows_PN = per_window(grid.tokens_MN)
        images_B = torch.arange(num_images, device=rows_PN.device)
        offsets_B11 = images_B[:, None, None] * num_tokens
        rows_PN = (rows_PN.view(num_images, -1, rows_PN.shape[1]) + offsets_B11).flatten(0, 1)
        is_padding_PN = positions_S = None
        if grid.is_padding_MN is not None and grid.positions_L is not None:
            is_padding_PN = per_window(grid.is_padding_MN)
            rows_PN = rows_PN.masked_fill(is_padding_PN, num_images * num_tokens)
            if kept_BK is None:
                positions_S = (grid.positions_L + images_B[:, None] * grid.tokens_MN.numel()).flatten()
        return cls(
            rows_PN=rows_PN,
            is_padding_PN=is_padding_PN,
            mask_type_P=None if grid.mask_TNN is None else per_window(grid.mask_type_M),
            positions_S=positions_S,
            num_images=num_images,
            grid=grid,
        )

    def whole(self) -> "WindowChunk":
        """All of them at once, in shapes that do not depend on the images."""
        return WindowChunk.of(self.rows_PN, self.is_padding_PN, self.mask_type_P, self.positions_S)

    def chunks(self, max_windows: int) -> list["WindowChunk"]:
        """At most `max_windows` at a time, evenly, without the padding."""
        if max_windows not in self._chunks:
            num_windows = len(self.rows_PN)
            num_chunks = -(-num_windows // max_windows)
            bounds = [num_windows * index // num_chunks for index in range(num_chunks + 1)]
            self._chunks[max_windows] = list(map(self._chunk, map(slice, bounds[:-1], bounds[1:])))
        return self._chunks[max_windows]

    def _chunk(self, part: slice) -> "WindowChunk":
        is_padding_PN = positions_S = None
        if self.is_padding_PN is not None:
            is_padding_PN = self.is_padding_PN[part]
            positions_S = is_padding_PN.flatten().logical_not().nonzero().flatten()
        mask_type_P = None if self.mask_type_P is None else self.mask_type_P[part]
        return WindowChunk.of(self.rows_PN[part], is_padding_PN, mask_type_P, positions_S)


@dataclass(frozen=True)
class WindowChunk:
    """Windows that go through a block together, and which of their positions are computed.

    Only the products of queries, keys and values need whole windows: all else works on S tokens,
    which leave the padding out where `positions_S` names the others.

    Attributes:
        rows_S: row of the residual stream for every token that is computed.
    """

    rows_PN: Tensor
    is_padding_PN: Tensor | None
    mask_type_P: Tensor | None
    positions_S: Tensor | None
    rows_S: Tensor

    @classmethod
    def of(
        cls,
        rows_PN: Tensor,
        is_padding_PN: Tensor | None,
        mask_type_P: Tensor | None,
        positions_S: Tensor | None,
    ) -> "WindowChunk":
        rows_S = rows_PN.flatten()
        if positions_S is not None:
            rows_S = rows_S.index_select(0, positions_S)
        return cls(rows_PN, is_padding_PN, mask_type_P, positions_S, rows_S)

    def to_windows(self, x_SC: Tensor, padding_C: Tensor) -> Tensor:
        """[S, C] to [P, N, C], with a value for the padding that S leaves out."""
        num_windows, num_positions = self.rows_PN.shape
        if self.positions_S is not None:
            all_padding = padding_C.to(x_SC.dtype).repeat(num_windows * num_positions, 1)
            x_SC = scatter_rows_(all_padding, self.positions_S, x_SC)
        return x_SC.view(num_windows, num_positions, -1)

    def to_tokens(self, x_PNC: Tensor) -> Tensor:
        """[P, N, C] to [S, C]."""
        x = x_PNC.flatten(0, 1)
        return x if self.positions_S is None else x.index_select(0, self.positions_S)


class Mlp(nn.Module):
    """The layers of a feed-forward network, which the block computes joined with what surrounds them."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(channels, hidden)
        self.fc2 = nn.Linear(hidden, channels)


class Products(NamedTuple):
    """The linear layers of a block during one forward pass."""

    qkv: JoinedLinear
    proj: JoinedLinear
    fc1: JoinedLinear
    fc2: JoinedLinear


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

    def takes_kernels(self) -> bool:
        """Whether the kernels for GPUs compute what this block does."""
        from sparsevit import gpu_kernels

        attn = self.attn
        width = attn.qkv.in_features // attn.num_heads
        return (
            not self.training
            and is_bare_norm(self.norm1)
            and is_bare_norm(self.norm2)
            and gpu_kernels.fits_attention(attn.window_size, width)
        )

    def forward(self, x_RC: Tensor, windows: KeptWindows, is_on_gpu: bool = False) -> Tensor:
        """Update the rows of the kept windows in place and return the residual stream.

        In place is safe under autograd: nothing saves the stream itself for the backward pass.
        Padding is zero after LN1 and takes part in attention, as in every dense Swin. For inference
        on a CPU the windows go through in chunks whose intermediates stay in its cache.

        Args:
            is_on_gpu: take the kernels for GPUs, and windows by `KeptWindows.select_on_gpu`.
        """
        dtype = compute_dtype(x_RC)
        layers = (self.attn.qkv, self.attn.proj, self.mlp.fc1, self.mlp.fc2)
        products = Products(*(join(layer, x_RC.device, dtype) for layer in layers))
        if is_on_gpu:
            return self._forward_on_gpu(x_RC, windows, products, dtype)
        is_fast = is_fused(x_RC.device, dtype) and not self.training
        if is_fast:
            num_positions = windows.rows_PN.shape[1]
            bytes_per_window = num_positions * self.mlp.fc1.out_features * dtype.itemsize
            chunks = windows.chunks(max_windows=max(1, CHUNK_BYTES // bytes_per_window))
        else:
            chunks = [windows.whole()]
        with torch.autocast(x_RC.device.type, enabled=False) if is_fast else nullcontext():
            logit_bias = self.attn.logit_bias(windows.grid).to(dtype)
            for chunk in chunks:
                tokens = x_RC.index_select(0, chunk.rows_S)
                arguments = (tokens, chunk, products, logit_bias, windows.num_images, dtype)
                if self.checkpoints and torch.is_grad_enabled():
                    tokens = checkpoint(self._update, *arguments, use_reentrant=False)
                else:
                    tokens = self._update(*arguments)
                x_RC = scatter_rows_(x_RC, chunk.rows_S, tokens.to(x_RC.dtype))
        return x_RC

    def _forward_on_gpu(
        self, x_RC: Tensor, windows: KeptWindows, products: Products, dtype: torch.dtype
    ) -> Tensor:
        """All windows at once, the padding too; what comes before and after a product is one kernel."""
        from sparsevit import gpu_kernels

        rows_S = windows.rows_PN.flatten()
        sink = windows.num_images * windows.grid.num_tokens
        with torch.autocast(x_RC.device.type, enabled=False):
            attended_SC = self._attend_on_gpu(x_RC, windows, products.qkv, dtype)
            update_SC = products.proj(attended_SC)
            del attended_SC  # the hidden layer takes its memory
            normed_SC = gpu_kernels.add_rows_(x_RC, rows_S, update_SC, sink, self.norm2, dtype)
            del update_SC
            gpu_kernels.add_rows_(x_RC, rows_S, products.fc2(products.fc1.gelu(normed_SC)), sink)
        return x_RC

    def _attend_on_gpu(
        self, x_RC: Tensor, windows: KeptWindows, qkv: JoinedLinear, dtype: torch.dtype
    ) -> Tensor:
        """LN1 and attention without the last projection, [S, C] with S = P · N."""
        from sparsevit import gpu_kernels

        grid, attn = windows.grid, self.attn
        sink = windows.num_images * grid.num_tokens
        qkv_SC = qkv(gpu_kernels.normalize(x_RC, self.norm1, dtype, windows.rows_PN.flatten(), sink))
        bias_THNN = gpu_kernels.tile_bias(
            attn.relative_position_bias_table, attn.window_size, grid.mask_TNN, dtype
        )
        qkv_PNC = qkv_SC.view(*windows.rows_PN.shape, -1)
        return gpu_kernels.attend(qkv_PNC, bias_THNN, windows.mask_type_P, attn.num_heads).flatten(0, 1)

    def _update(
        self,
        tokens: Tensor,
        chunk: WindowChunk,
        products: Products,
        logit_bias: Tensor,
        num_images: int,
        dtype: torch.dtype,
    ) -> Tensor:
        """New tokens of the windows of a chunk: [S, C] to the same."""
        normed = self.norm1(tokens).to(dtype)
        if chunk.is_padding_PN is not None and chunk.positions_S is None:
            normed = normed.masked_fill(chunk.is_padding_PN.view(-1, 1), 0.0)
        qkv_of_padding = self.attn.qkv.bias  # padding is zero
        qkv_PNC = chunk.to_windows(products.qkv(normed), qkv_of_padding)
        attended = chunk.to_tokens(self.attn.attend(qkv_PNC, logit_bias, chunk.mask_type_P))
        tokens = self._add(tokens, attended, products.proj, num_images)
        normed = self.norm2(tokens).to(dtype)
        return self._add(tokens, products.fc1.gelu(normed), products.fc2, num_images)

    def _add(self, tokens_SC: Tensor, x: Tensor, layer: JoinedLinear, num_images: int) -> Tensor:
        """``tokens + layer(x)``; in training the branch is dropped for whole images (stochastic depth)."""
        if not self.training or self.drop_path_rate == 0.0:
            return layer.add(x, tokens_SC)
        branch = layer(x)
        from torchvision.ops import stochastic_depth  # training alone needs torchvision

        kept: Tensor = stochastic_depth(branch.view(num_images, -1), self.drop_path_rate, mode="row")
        return tokens_SC + kept.view_as(branch)
