"""Window attention with relative position bias (Swin, section 3.2).

Legend: P windows of the whole batch; N tokens per window; C channels; H heads of D channels; T
attention-mask types.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparsevit.linear import is_fused, is_fused_in_graph
from sparsevit.wide import rearrange
from sparsevit.windows import WindowGrid

MASKED_LOGIT = -100.0
"""What Swin adds to the logit of a pair of tokens that the cyclic shift brought together."""
MIN_SUM = 1e-30
"""Sums of exponentials between this and its inverse are far from the ends of bfloat16 (1e-38, 3e38)."""


class WindowAttention(nn.Module):
    """Multi-head self-attention inside every window, blind to which windows it is given.

    Its projections are computed by the block, joined with what surrounds them.
    """

    def __init__(self, channels: int, num_heads: int, window_size: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.window_size = window_size
        self.qkv = nn.Linear(channels, 3 * channels)
        self.proj = nn.Linear(channels, channels)
        self.relative_position_bias_table = nn.Parameter(torch.zeros((2 * window_size - 1) ** 2, num_heads))
        nn.init.trunc_normal_(self.relative_position_bias_table, std=0.02)

    def logit_bias(self, grid: WindowGrid) -> Tensor:
        """What is added to the logits, for every mask type: [T, heads, N, N], T = 1 without mask."""
        num_positions = grid.bias_row_NN.shape[0]
        bias = self.relative_position_bias_table.index_select(0, grid.bias_row_NN.flatten())
        bias = bias.T.contiguous().view(1, self.num_heads, num_positions, num_positions)
        if grid.mask_TNN is None:
            return bias
        return bias + grid.mask_TNN[:, None].to(bias.dtype) * MASKED_LOGIT

    def attend(self, qkv_PNC: Tensor, logit_bias: Tensor, mask_type_P: Tensor | None = None) -> Tensor:
        """Attention between the projections: queries, keys and values, [P, N, 3 · C], to [P, N, C].

        Args:
            logit_bias: broadcasts to [P, heads, N, N]; [T, heads, N, N] with `mask_type_P`.
            mask_type_P: which of the T biases holds for a window.
        """
        num_windows, num_positions, _ = qkv_PNC.shape
        qkv = qkv_PNC.view(num_windows, num_positions, 3, self.num_heads, -1)
        logit_bias = logit_bias.to(qkv.dtype)
        if qkv.dtype == torch.bfloat16 and is_fused(qkv.device, qkv.dtype):
            return _attend_in_bfloat16(qkv, logit_bias, mask_type_P)
        if qkv.dtype == torch.bfloat16 and is_fused_in_graph(qkv.device, qkv.dtype):
            attended: Tensor = _traced_attend(qkv, logit_bias, mask_type_P)
            return attended
        if mask_type_P is not None:
            logit_bias = logit_bias.index_select(0, mask_type_P)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        if torch.compiler.is_exporting():  # ONNX loses the fused kernel's layout
            logits = query * query.shape[-1] ** -0.5 @ key.transpose(-1, -2) + logit_bias
            attended = torch.softmax(logits, dim=-1) @ value
        else:
            attended = F.scaled_dot_product_attention(query, key, value, attn_mask=logit_bias)
        return attended.transpose(1, 2).reshape(num_windows, num_positions, -1)


def _attend_in_bfloat16(qkv_PN3HD: Tensor, logit_bias: Tensor, mask_type_P: Tensor | None) -> Tensor:
    """Attention as two batched products, which take less time than PyTorch's fused CPU kernel.

    The softmax is divided by its sum last, on the smaller side, and leaves out subtracting the
    maximum: exponentials stay far inside the range of bfloat16 for all logits that a trained
    network produces. The sums tell when they do not; then it is an ordinary softmax.
    """
    num_windows, num_positions, _, num_heads, width = qkv_PN3HD.shape
    batch = num_windows * num_heads
    qkv_3PHND = rearrange(qkv_PN3HD, (2, 0, 3, 1, 4))
    query, key, value = qkv_3PHND.view(3, batch, num_positions, width)

    def logits() -> Tensor:
        if mask_type_P is None:
            bias = logit_bias.expand(num_windows, -1, -1, -1).clone(memory_format=torch.contiguous_format)
        else:
            bias = logit_bias.index_select(0, mask_type_P)
        bias = bias.view(batch, num_positions, num_positions)
        return bias.baddbmm_(query, key.transpose(1, 2), alpha=width**-0.5)

    exponentials = logits().exp_()
    sums = exponentials.sum(dim=-1, keepdim=True)
    smallest, largest = torch.aminmax(sums)
    if smallest.item() > MIN_SUM and largest.item() < 1 / MIN_SUM:
        attended = torch.bmm(exponentials, value).div_(sums)
    else:
        attended = torch.bmm(torch.softmax(logits(), dim=-1), value)
    attended_PHND = attended.view(num_windows, num_heads, num_positions, width)
    return rearrange(attended_PHND, (0, 2, 1, 3)).view(num_windows, num_positions, -1)


_traced_attend = torch.library.custom_op("sparsevit::attend", _attend_in_bfloat16, mutates_args=())


@_traced_attend.register_fake
def _(qkv_PN3HD: Tensor, logit_bias: Tensor, mask_type_P: Tensor | None) -> Tensor:
    num_windows, num_positions, _, num_heads, width = qkv_PN3HD.shape
    return qkv_PN3HD.new_empty(num_windows, num_positions, num_heads * width)
