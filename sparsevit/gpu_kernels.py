"""Triton kernels for inference on GPUs in half precision: what cuBLAS does not do, in one pass each.

Sums and norms are computed in float32. Everything here works in place of PyTorch operators that would
read and write the residual stream several times more.

Legend: B images; H, W token grid; L = H · W; R rows of the residual stream, B · L, and the sink where the
grid is padded; C channels; M windows of an image; K kept windows; N tokens per window; P = B · K; S = P · N;
T attention-mask types; D channels of a head.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor, nn

ELEMENTS = 4096
"""What a program of a kernel that goes over rows takes at once."""
MAX_TILE_BYTES = 96 * 2**10
"""Of shared memory: what every GPU since Ampere gives a program, or a little more."""
MASKED_LOGIT = tl.constexpr(-100.0)
MAX_SCORE = tl.constexpr(3.0e38)  # so that an infinite score comes after one that is not a number
LOG2_E = tl.constexpr(1.4426950408889634)


def fits_patches(proj: nn.Conv2d) -> bool:
    """Whether `embed_patches` finds room for a convolution in the shared memory of any GPU."""
    block_k = triton.next_power_of_2(proj.weight[0].numel())
    tile = block_k * (64 + triton.next_power_of_2(proj.out_channels))
    return proj.bias is not None and bool(2 * tile <= MAX_TILE_BYTES)


def embed_patches(
    images: Tensor, proj: nn.Conv2d, norm: nn.LayerNorm, dtype: torch.dtype, out_dtype: torch.dtype
) -> Tensor:
    """Cut, embed and normalise: [B, 3, h, w] to [B, H, W, C] in `out_dtype`; products in `dtype`."""
    images = images.contiguous()
    patch = proj.kernel_size[0]
    num_images, num_colors, image_height, image_width = images.shape
    height, width = image_height // patch, image_width // patch
    channels = proj.out_channels
    out = torch.empty(num_images, height, width, channels, dtype=out_dtype, device=images.device)
    num_tokens = num_images * height * width
    block_c = triton.next_power_of_2(channels)
    _embed_patches[(triton.cdiv(num_tokens, 64),)](
        images, proj.weight.to(dtype).contiguous(), proj.bias, norm.weight, norm.bias, out,
        num_tokens, image_height, image_width, height, width, norm.eps,
        COLORS=num_colors, PATCH=patch, C=channels,
        BLOCK_C=block_c, BLOCK_K=max(16, triton.next_power_of_2(num_colors * patch**2)), BLOCK_S=64,
        num_warps=4 if block_c <= 128 else 8,
    )  # fmt: skip
    return out


def normalize(
    x: Tensor, norm: nn.LayerNorm, dtype: torch.dtype, rows_S: Tensor | None = None, sink: int = -1
) -> Tensor:
    """``norm(x)`` of [..., C], or of some rows of [R, C] alone: [S, C].

    Args:
        sink: the row that stands for padding; it gives zero.
    """
    channels = x.shape[-1]
    num_rows = x.numel() // channels
    if rows_S is None:
        out, count = torch.empty(x.shape, dtype=dtype, device=x.device), num_rows
    else:
        out, count = torch.empty(len(rows_S), channels, dtype=dtype, device=x.device), len(rows_S)
    block_c, block_s, num_warps = _row_blocks(channels)
    _normalize[(triton.cdiv(count, block_s),)](
        x, rows_S, norm.weight, norm.bias, out, sink, count, norm.eps,
        HAS_ROWS=rows_S is not None, C=channels, BLOCK_C=block_c, BLOCK_S=block_s, num_warps=num_warps,
    )  # fmt: skip
    return out


def merge_corners(x_BHWC: Tensor, norm: nn.LayerNorm, dtype: torch.dtype) -> Tensor:
    """Join 2 × 2 tokens and normalise: [B, H, W, C] to [B, ⌈H/2⌉, ⌈W/2⌉, 4 · C]."""
    num_images, height, width, channels = x_BHWC.shape
    half_height, half_width = -(-height // 2), -(-width // 2)
    out = torch.empty(num_images, half_height, half_width, 4 * channels, dtype=dtype, device=x_BHWC.device)
    count = num_images * half_height * half_width
    block_c, block_s, num_warps = _row_blocks(4 * channels)
    _merge_corners[(triton.cdiv(count, block_s),)](
        x_BHWC, norm.weight, norm.bias, out, count, height, width, half_height, half_width, norm.eps,
        C=channels, BLOCK_C=block_c, BLOCK_S=block_s, num_warps=num_warps,
    )  # fmt: skip
    return out


def add_rows_(
    x_RC: Tensor,
    rows_S: Tensor,
    update_SC: Tensor,
    sink: int,
    norm: nn.LayerNorm | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Add to rows in place; return them after `norm` in a dtype, [S, C], or nothing, [0], without it.

    Args:
        sink: the row that stands for padding; it is left alone. R if there is none.
    """
    count, channels = update_SC.shape
    normed = torch.empty(update_SC.shape if norm is not None else (0,), dtype=dtype, device=x_RC.device)
    block_c, block_s, num_warps = _row_blocks(channels)
    _add_rows[(triton.cdiv(count, block_s),)](
        x_RC, rows_S, update_SC,
        None if norm is None else norm.weight, None if norm is None else norm.bias, normed,
        count, sink, 0.0 if norm is None else norm.eps,
        HAS_NORM=norm is not None, C=channels, BLOCK_C=block_c, BLOCK_S=block_s, num_warps=num_warps,
    )  # fmt: skip
    return normed


def score_rows(x_BLC: Tensor, order: int) -> Tensor:
    """Mean of ``|x|`` over the channels (`order` 1) or their L2 norm (2): [B, L] in float32."""
    num_images, num_tokens, channels = x_BLC.shape
    x_BLC = x_BLC.contiguous()
    out = torch.empty(num_images, num_tokens, dtype=torch.float32, device=x_BLC.device)
    block_c, block_s, num_warps = _row_blocks(channels)
    _score_rows[(triton.cdiv(out.numel(), block_s),)](
        x_BLC,
        out,
        out.numel(),
        ORDER=order,
        C=channels,
        BLOCK_C=block_c,
        BLOCK_S=block_s,
        num_warps=num_warps,
    )
    return out


def fits_attention(window_size: int, width: int) -> bool:
    """Whether `attend` finds room for the keys and values of a window in the shared memory of any GPU.

    Args:
        width: D.
    """
    tile = triton.next_power_of_2(window_size**2) * triton.next_power_of_2(width)
    return bool(3 * tile <= MAX_TILE_BYTES)


def attend(qkv_PNC: Tensor, bias_THNN: Tensor, mask_type_P: Tensor | None, num_heads: int) -> Tensor:
    """Attention between the projections: [P, N, 3 · C] to [P, N, C].

    Args:
        bias_THNN: by `tile_bias`.
        mask_type_P: which of the T biases holds for a window; the first if None.
    """
    num_windows, num_positions, tripled = qkv_PNC.shape
    width = tripled // 3 // num_heads
    out = qkv_PNC.new_empty(num_windows, num_positions, tripled // 3)
    block_n = bias_THNN.shape[-1]
    block_q = min(64, block_n, max(16, 4 * ELEMENTS // block_n))
    _attend[(num_windows * num_heads, triton.cdiv(num_positions, block_q))](
        qkv_PNC, bias_THNN, mask_type_P, out, width**-0.5,
        HAS_MASK=mask_type_P is not None, H=num_heads, N=num_positions, D=width,
        BLOCK_D=max(16, triton.next_power_of_2(width)), BLOCK_N=block_n, BLOCK_Q=block_q,
        num_warps=4 if block_n <= 64 else 8,
    )  # fmt: skip
    return out


def tile_bias(table: Tensor, window_size: int, mask_TNN: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Position bias and mask of the logits, padded to whole tiles: [T, heads, ≥ N, ≥ N]."""
    num_heads = table.shape[1]
    block_n = max(16, triton.next_power_of_2(window_size**2))
    num_types = 1 if mask_TNN is None else len(mask_TNN)
    out = torch.empty(num_types, num_heads, block_n, block_n, dtype=dtype, device=table.device)
    _tile_bias[(num_types * num_heads, block_n // 8)](
        table.contiguous(), mask_TNN, out,
        HAS_MASK=mask_TNN is not None, H=num_heads, WINDOW=window_size, BLOCK_N=block_n, BLOCK_Q=8,
    )  # fmt: skip
    return out


def score_windows(scores_BL: Tensor, tokens_MN: Tensor) -> Tensor:
    """Sum of the squares of the tokens' scores, for every window: [B, M]; padding counts as zero."""
    num_images, num_tokens = scores_BL.shape
    scores_BL = scores_BL.contiguous()
    num_windows, num_positions = tokens_MN.shape
    out = scores_BL.new_empty(num_images, num_windows)
    block_n = triton.next_power_of_2(num_positions)
    block_m = max(1, ELEMENTS // 4 // block_n)
    _score_windows[(num_images, triton.cdiv(num_windows, block_m))](
        scores_BL, tokens_MN, out, num_tokens, num_windows,
        N=num_positions, BLOCK_N=block_n, BLOCK_M=block_m,
    )  # fmt: skip
    return out


def select_rows(
    scores_BM: Tensor, num_kept: int, tokens_MN: Tensor, mask_type_M: Tensor | None, num_tokens: int
) -> tuple[Tensor, Tensor | None]:
    """Rows of the residual stream of the most important windows, [P, N], and their mask types, [P].

    The windows of an image come from most to least important; ties keep the order of the grid, and what
    is not a number comes first.
    """
    num_images, num_windows = scores_BM.shape
    num_positions = tokens_MN.shape[1]
    rows_PN = tokens_MN.new_empty(num_images * num_kept, num_positions)
    mask_type_P = None if mask_type_M is None else mask_type_M.new_empty(num_images * num_kept)
    _select_rows[(num_images, triton.cdiv(num_windows, 16))](
        scores_BM, tokens_MN, mask_type_M, rows_PN, mask_type_P, num_tokens, num_windows, num_kept,
        HAS_MASK=mask_type_M is not None, N=num_positions, BLOCK_N=triton.next_power_of_2(num_positions),
        BLOCK_M=16, BLOCK_J=min(256, triton.next_power_of_2(num_windows)),
    )  # fmt: skip
    return rows_PN, mask_type_P


def _row_blocks(channels: int) -> tuple[int, int, int]:
    """Channels and rows of a program, and its warps."""
    block_c = triton.next_power_of_2(channels)
    return block_c, max(1, ELEMENTS // block_c), 4 if block_c <= 2048 else 8


@triton.jit
def _layer_norm(x, is_channel, weight_ptr, bias_ptr, eps, c, C: tl.constexpr):
    mean = tl.sum(x, axis=1) / C
    centered = tl.where(is_channel, x - mean[:, None], 0.0)
    variance = tl.sum(centered * centered, axis=1) / C
    weight = tl.load(weight_ptr + c, mask=c < C, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + c, mask=c < C, other=0.0).to(tl.float32)
    return centered * tl.rsqrt(variance + eps)[:, None] * weight[None, :] + bias[None, :]


@triton.jit
def _embed_patches(
    images_ptr, kernel_ptr, bias_ptr, norm_weight_ptr, norm_bias_ptr, out_ptr,
    num_tokens, image_height, image_width, height, width, eps,
    COLORS: tl.constexpr, PATCH: tl.constexpr, C: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    s = tl.program_id(0) * BLOCK_S + tl.arange(0, BLOCK_S)
    c = tl.arange(0, BLOCK_C)
    k = tl.arange(0, BLOCK_K)
    K: tl.constexpr = COLORS * PATCH * PATCH
    column = s % width
    row = s // width % height
    image = s // width // height
    plane = image.to(tl.int64) * COLORS
    pixel_s = (plane * image_height + row * PATCH) * image_width + column * PATCH
    pixel_k = (k // (PATCH * PATCH) * image_height + k // PATCH % PATCH) * image_width + k % PATCH
    is_pixel = (s < num_tokens)[:, None] & (k < K)[None, :]
    pixels = tl.load(images_ptr + pixel_s[:, None] + pixel_k[None, :], mask=is_pixel, other=0.0)
    kernel = tl.load(
        kernel_ptr + k[:, None] + c[None, :] * K, mask=(k < K)[:, None] & (c < C)[None, :], other=0.0
    )
    x = tl.dot(pixels.to(kernel.dtype), kernel)
    x += tl.load(bias_ptr + c, mask=c < C, other=0.0).to(tl.float32)[None, :]
    x = x.to(kernel.dtype).to(tl.float32)
    is_channel = (c < C)[None, :]
    y = _layer_norm(x, is_channel, norm_weight_ptr, norm_bias_ptr, eps, c, C)
    out = out_ptr + s.to(tl.int64)[:, None] * C + c[None, :]
    tl.store(out, y.to(out_ptr.dtype.element_ty), mask=(s < num_tokens)[:, None] & is_channel)


@triton.jit
def _normalize(
    x_ptr, rows_ptr, weight_ptr, bias_ptr, out_ptr, sink, count, eps,
    HAS_ROWS: tl.constexpr, C: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    s = tl.program_id(0) * BLOCK_S + tl.arange(0, BLOCK_S)
    c = tl.arange(0, BLOCK_C)
    is_row = s < count
    row = s.to(tl.int64)
    if HAS_ROWS:
        row = tl.load(rows_ptr + s, mask=is_row, other=sink)
    is_real = (is_row & (row != sink))[:, None]
    is_channel = (c < C)[None, :]
    x = tl.load(x_ptr + row[:, None] * C + c[None, :], mask=is_real & is_channel, other=0.0).to(tl.float32)
    y = tl.where(is_real, _layer_norm(x, is_channel, weight_ptr, bias_ptr, eps, c, C), 0.0)
    out = out_ptr + s.to(tl.int64)[:, None] * C + c[None, :]
    tl.store(out, y.to(out_ptr.dtype.element_ty), mask=is_row[:, None] & is_channel)


@triton.jit
def _merge_corners(
    x_ptr, weight_ptr, bias_ptr, out_ptr, count, height, width, half_height, half_width, eps,
    C: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    s = tl.program_id(0) * BLOCK_S + tl.arange(0, BLOCK_S)
    c = tl.arange(0, BLOCK_C)
    image = (s // half_width // half_height).to(tl.int64)
    corner = c // C
    row = s // half_width % half_height * 2
    row = row[:, None] + (corner % 2)[None, :]
    column = (s % half_width * 2)[:, None] + (corner // 2)[None, :]
    is_channel = (c < 4 * C)[None, :]
    is_real = (s < count)[:, None] & is_channel & (row < height) & (column < width)
    token = (image[:, None] * height + row) * width + column
    x = tl.load(x_ptr + token * C + (c % C)[None, :], mask=is_real, other=0.0).to(tl.float32)
    y = _layer_norm(x, is_channel, weight_ptr, bias_ptr, eps, c, 4 * C)
    out = out_ptr + s.to(tl.int64)[:, None] * (4 * C) + c[None, :]
    tl.store(out, y.to(out_ptr.dtype.element_ty), mask=(s < count)[:, None] & is_channel)


@triton.jit
def _add_rows(
    x_ptr, rows_ptr, update_ptr, weight_ptr, bias_ptr, normed_ptr, count, sink, eps,
    HAS_NORM: tl.constexpr, C: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    s = tl.program_id(0) * BLOCK_S + tl.arange(0, BLOCK_S)
    c = tl.arange(0, BLOCK_C)
    is_row = s < count
    row = tl.load(rows_ptr + s, mask=is_row, other=sink)
    is_channel = (c < C)[None, :]
    is_real = (is_row & (row != sink))[:, None] & is_channel
    place = x_ptr + row[:, None] * C + c[None, :]
    offset = s.to(tl.int64)[:, None] * C + c[None, :]
    x = tl.load(place, mask=is_real, other=0.0).to(tl.float32)
    x += tl.load(update_ptr + offset, mask=is_real, other=0.0).to(tl.float32)
    rounded = x.to(x_ptr.dtype.element_ty)
    tl.store(place, rounded, mask=is_real)
    if HAS_NORM:
        y = _layer_norm(rounded.to(tl.float32), is_channel, weight_ptr, bias_ptr, eps, c, C)
        tl.store(normed_ptr + offset, y.to(normed_ptr.dtype.element_ty), mask=is_row[:, None] & is_channel)


@triton.jit
def _score_rows(
    x_ptr, out_ptr, count,
    ORDER: tl.constexpr, C: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    s = tl.program_id(0) * BLOCK_S + tl.arange(0, BLOCK_S)
    c = tl.arange(0, BLOCK_C)
    is_element = (s < count)[:, None] & (c < C)[None, :]
    x = tl.load(x_ptr + s.to(tl.int64)[:, None] * C + c[None, :], mask=is_element, other=0.0).to(tl.float32)
    score = tl.sum(tl.abs(x), axis=1) / C if ORDER == 1 else tl.sqrt(tl.sum(x * x, axis=1))
    tl.store(out_ptr + s, score, mask=s < count)


@triton.jit
def _attend(
    qkv_ptr, bias_ptr, mask_type_ptr, out_ptr, scale,
    HAS_MASK: tl.constexpr, H: tl.constexpr, N: tl.constexpr, D: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_Q: tl.constexpr,
):  # fmt: skip
    window = tl.program_id(0) // H
    head = tl.program_id(0) % H
    q = tl.program_id(1) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    n = tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    is_query = (q < N)[:, None] & (d < D)[None, :]
    is_key = (n < N)[:, None] & (d < D)[None, :]
    C: tl.constexpr = H * D
    first = qkv_ptr + window.to(tl.int64) * (N * 3 * C) + head * D
    query = tl.load(first + q[:, None] * (3 * C) + d[None, :], mask=is_query, other=0.0)
    key = tl.load(first + C + n[:, None] * (3 * C) + d[None, :], mask=is_key, other=0.0)
    value = tl.load(first + 2 * C + n[:, None] * (3 * C) + d[None, :], mask=is_key, other=0.0)
    bias_row = head
    if HAS_MASK:
        bias_row += tl.load(mask_type_ptr + window).to(tl.int32) * H
    bias = tl.load(bias_ptr + (bias_row * BLOCK_N + q[:, None]) * BLOCK_N + n[None, :])
    logits = tl.dot(query, tl.trans(key)) * (scale * LOG2_E) + bias.to(tl.float32) * LOG2_E
    exponentials = tl.exp2(logits - tl.max(logits, axis=1)[:, None])
    attended = tl.dot(exponentials.to(value.dtype), value) / tl.sum(exponentials, axis=1)[:, None]
    out = out_ptr + window.to(tl.int64) * (N * C) + head * D + q[:, None] * C + d[None, :]
    tl.store(out, attended.to(out_ptr.dtype.element_ty), mask=is_query)


@triton.jit
def _tile_bias(
    table_ptr, mask_ptr, out_ptr,
    HAS_MASK: tl.constexpr, H: tl.constexpr, WINDOW: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_Q: tl.constexpr,
):  # fmt: skip
    N: tl.constexpr = WINDOW * WINDOW
    mask_type = tl.program_id(0) // H
    head = tl.program_id(0) % H
    q = tl.program_id(1) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    n = tl.arange(0, BLOCK_N)
    is_pair = (q < N)[:, None] & (n < N)[None, :]
    below = q[:, None] // WINDOW - n[None, :] // WINDOW + WINDOW - 1
    right = q[:, None] % WINDOW - n[None, :] % WINDOW + WINDOW - 1
    row = below * (2 * WINDOW - 1) + right
    bias = tl.load(table_ptr + row * H + head, mask=is_pair, other=0.0).to(tl.float32)
    if HAS_MASK:
        pair = q[:, None] * N + n[None, :]
        is_masked = tl.load(mask_ptr + mask_type * N * N + pair, mask=is_pair, other=0)
        bias += tl.where(is_masked != 0, MASKED_LOGIT, 0.0)
    bias = tl.where((n < N)[None, :], bias, float("-inf"))
    out = out_ptr + (tl.program_id(0) * BLOCK_N + q[:, None]) * BLOCK_N + n[None, :]
    tl.store(out, bias.to(out_ptr.dtype.element_ty))


@triton.jit
def _score_windows(
    scores_ptr, tokens_ptr, out_ptr, num_tokens, num_windows,
    N: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    image = tl.program_id(0)
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.arange(0, BLOCK_N)
    is_position = (m < num_windows)[:, None] & (n < N)[None, :]
    token = tl.load(tokens_ptr + m[:, None] * N + n[None, :], mask=is_position, other=num_tokens)
    score = tl.load(scores_ptr + image * num_tokens + token, mask=token < num_tokens, other=0.0)
    tl.store(out_ptr + image * num_windows + m, tl.sum(score * score, axis=1), mask=m < num_windows)


@triton.jit
def _select_rows(
    scores_ptr, tokens_ptr, mask_type_ptr, rows_ptr, out_mask_type_ptr, num_tokens, num_windows, num_kept,
    HAS_MASK: tl.constexpr, N: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_J: tl.constexpr,
):  # fmt: skip
    image = tl.program_id(0)
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    scores_ptr += image * num_windows
    score = tl.load(scores_ptr + m, mask=m < num_windows, other=0.0)
    score = tl.where(score == score, tl.minimum(score, MAX_SCORE), float("inf"))
    rank = tl.zeros([BLOCK_M], tl.int32)  # how many windows are before
    for start in range(0, num_windows, BLOCK_J):
        j = start + tl.arange(0, BLOCK_J)
        other = tl.load(scores_ptr + j, mask=j < num_windows, other=-1.0)
        other = tl.where(other == other, tl.minimum(other, MAX_SCORE), float("inf"))
        is_tie = (other[None, :] == score[:, None]) & (j[None, :] < m[:, None])
        is_before = (other[None, :] > score[:, None]) | is_tie
        rank += tl.sum(is_before.to(tl.int32), axis=1)
    is_kept = (m < num_windows) & (rank < num_kept)
    slot = image * num_kept + rank
    n = tl.arange(0, BLOCK_N)
    is_position = is_kept[:, None] & (n < N)[None, :]
    token = tl.load(tokens_ptr + m[:, None] * N + n[None, :], mask=is_position, other=0)
    sink = tl.num_programs(0).to(tl.int64) * num_tokens
    row = tl.where(token < num_tokens, image * num_tokens + token, sink)
    tl.store(rows_ptr + slot[:, None].to(tl.int64) * N + n[None, :], row, mask=is_position)
    if HAS_MASK:
        mask_type = tl.load(mask_type_ptr + m, mask=is_kept, other=0)
        tl.store(out_mask_type_ptr + slot, mask_type, mask=is_kept)
