"""A Swin block that works on the windows it is given and leaves every other token alone.

Legend: B images; R rows of the token-major residual stream (B · H · W, and the sink where the grid
is padded); C channels; M windows of an image; K kept windows; N tokens per window; P = B · K.
"""

from dataclasses import dataclass

from torch import Tensor, nn
from torchvision.ops import stochastic_depth

from sparsevit.attention import WindowAttention
from sparsevit.windows import WindowGrid


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

    def per_window(self, values_M: Tensor) -> Tensor:
        """Look up a value of the grid's windows for the kept ones: [P, …]."""
        num_images, num_kept, _ = self.rows_BKN.shape
        if self.kept_BK is not None:
            return values_M[self.kept_BK.flatten()]
        return values_M.expand(num_images, *values_M.shape).reshape(
            num_images * num_kept, *values_M.shape[1:]
        )


class SwinBlock(nn.Module):
    """LN, window attention, LN, MLP, each with a residual, on the kept windows only."""

    def __init__(
        self, channels: int, num_heads: int, window_size: int, mlp_ratio: float, drop_path_rate: float
    ) -> None:
        super().__init__()
        self.drop_path_rate = drop_path_rate
        self.norm1 = nn.LayerNorm(channels)
        self.attn = WindowAttention(channels, num_heads, window_size)
        self.norm2 = nn.LayerNorm(channels)
        hidden = int(channels * mlp_ratio)
        self.mlp = nn.Sequential()
        self.mlp.add_module("fc1", nn.Linear(channels, hidden))
        self.mlp.add_module("act", nn.GELU())
        self.mlp.add_module("fc2", nn.Linear(hidden, channels))

    def forward(self, x_RC: Tensor, windows: KeptWindows) -> Tensor:
        """Update the rows of the kept windows in place and return the residual stream.

        In place is safe under autograd: nothing saves the stream itself for the backward pass.
        Padding is zero after LN1 and takes part in attention, as in every dense Swin.
        """
        num_images, num_kept, num_positions = windows.rows_BKN.shape
        rows_R = windows.rows_BKN.flatten()
        tokens = x_RC.index_select(0, rows_R).view(num_images * num_kept, num_positions, -1)
        normed = self.norm1(tokens)
        if windows.grid.is_padding_MN is not None:
            normed = normed.masked_fill(windows.per_window(windows.grid.is_padding_MN)[..., None], 0.0)
        logit_bias = self.attn.logit_bias(windows.grid.mask_TNN)
        if windows.grid.mask_TNN is not None:
            logit_bias = logit_bias[windows.per_window(windows.grid.mask_type_M)]
        tokens = tokens + self._drop_path(self.attn(normed, logit_bias), num_images)
        tokens = tokens + self._drop_path(self.mlp(self.norm2(tokens)), num_images)
        return x_RC.index_copy_(0, rows_R, tokens.flatten(0, 1).to(x_RC.dtype))

    def _drop_path(self, branch_PNC: Tensor, num_images: int) -> Tensor:
        """Stochastic depth: drop the branch for whole images."""
        if not self.training or self.drop_path_rate == 0.0:
            return branch_PNC
        per_image = branch_PNC.view(num_images, -1)
        kept: Tensor = stochastic_depth(per_image, self.drop_path_rate, mode="row")
        return kept.view_as(branch_PNC)
