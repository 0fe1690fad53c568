"""A sparse Swin written with loops over images, windows and positions: slow, and easy to check.

It shares nothing with the fast path but the weights. Selection and scores follow SparseViT
(section 3.2): mean of |x| over channels at the first pruned block of a stage, L2 norm over the
window, the same map for all blocks of the stage.
"""

import math
from fractions import Fraction

import torch
from torch import Tensor
from torch.nn import functional as F

from sparsevit import SparseSwin
from sparsevit.backbone import PatchMerging, SparseStage
from sparsevit.block import SwinBlock


def loop_forward(
    backbone: SparseSwin, images: Tensor, ratios: tuple[float, ...], *, is_cleared: bool = False
) -> tuple[list[Tensor], list[set[tuple[int, int, int]]]]:
    """Features per stage, and for every block of the network the kept (image, row, column) windows.

    Args:
        is_cleared: whether a block clears the tokens of the windows that it prunes.
    """
    x = backbone.patch_embed(images)
    genes = list(ratios)
    features, kept_per_block = [], []
    for stage_index, stage in enumerate(backbone.stages):
        assert isinstance(stage, SparseStage)
        scores: list[dict[tuple[int, int], float]] | None = None
        for block_index, block in enumerate(stage.blocks):
            assert isinstance(block, SwinBlock)
            ratio = genes[block_index // 2]
            if ratio > 0 and scores is None:
                scores = [_token_scores(image) for image in x]
            out = torch.zeros_like(x) if is_cleared and ratio > 0 else x.clone()
            kept = _block(block, x, out, scores, ratio, is_shifted=block_index % 2 == 1)
            x = out
            kept_per_block.append(kept)
        genes = genes[(len(stage.blocks) + 1) // 2 :]
        features.append(backbone.norms[stage_index](x).permute(0, 3, 1, 2))
        if stage_index < len(backbone.downsamples):
            x = _merge(backbone, stage_index, x)
    return features, kept_per_block


def _token_scores(image: Tensor) -> dict[tuple[int, int], float]:
    height, width, _ = image.shape
    return {(r, c): float(image[r, c].abs().mean()) for r in range(height) for c in range(width)}


def _block(
    block: SwinBlock,
    x: Tensor,
    out: Tensor,
    scores: list[dict[tuple[int, int], float]] | None,
    ratio: float,
    *,
    is_shifted: bool,
) -> set[tuple[int, int, int]]:
    """Write the new tokens of the kept windows to `out`, and return which windows these are."""
    size = block.attn.window_size
    num_images, height, width, _ = x.shape
    rows, columns = math.ceil(height / size), math.ceil(width / size)
    shift_r = size // 2 if is_shifted and height > size else 0
    shift_c = size // 2 if is_shifted and width > size else 0
    kept: set[tuple[int, int, int]] = set()
    for b in range(num_images):
        windows = {}
        for wr in range(rows):
            for wc in range(columns):
                windows[wr, wc] = [
                    (
                        (wr * size + i + shift_r) % (rows * size),
                        (wc * size + j + shift_c) % (columns * size),
                    )
                    for i in range(size)
                    for j in range(size)
                ]
        chosen = list(windows)
        if ratio > 0:
            assert scores is not None
            image_scores = scores[b]
            norms = {
                window: math.sqrt(sum(image_scores.get(p, 0.0) ** 2 for p in positions))
                for window, positions in windows.items()
            }
            num_kept = max(1, math.floor(len(windows) * (1 - Fraction(str(ratio)))))
            chosen = sorted(chosen, key=lambda window: -norms[window])[:num_kept]
        for wr, wc in chosen:
            kept.add((b, wr, wc))
            positions = windows[wr, wc]
            attended = _attend(block, x[b], positions, (wr, wc), (rows, columns), (shift_r, shift_c))
            for n, (r, c) in enumerate(positions):
                if r < height and c < width:
                    token = x[b, r, c] + attended[n]
                    out[b, r, c] = token + block.mlp.fc2(F.gelu(block.mlp.fc1(block.norm2(token))))
    return kept


def _attend(
    block: SwinBlock,
    image: Tensor,
    positions: list[tuple[int, int]],
    window: tuple[int, int],
    grid: tuple[int, int],
    shift: tuple[int, int],
) -> Tensor:
    attn, size = block.attn, block.attn.window_size
    height, width, channels = image.shape
    tokens = torch.stack(
        [
            block.norm1(image[r, c]) if r < height and c < width else image.new_zeros(channels)
            for r, c in positions
        ]
    )
    query, key, value = attn.qkv(tokens).chunk(3, dim=-1)
    head_size = channels // attn.num_heads
    outputs = []
    for head in range(attn.num_heads):
        part = slice(head * head_size, (head + 1) * head_size)
        logits = query[:, part] @ key[:, part].T / math.sqrt(head_size)
        bias = torch.zeros_like(logits)
        for a in range(size * size):
            for b in range(size * size):
                dr = a // size - b // size + size - 1
                dc = a % size - b % size + size - 1
                bias[a, b] = attn.relative_position_bias_table[dr * (2 * size - 1) + dc, head]
                if _region(a, window, grid, shift, size) != _region(b, window, grid, shift, size):
                    bias[a, b] -= 100.0
        outputs.append(F.softmax(logits + bias, dim=-1) @ value[:, part])
    projected: Tensor = attn.proj(torch.cat(outputs, dim=-1))
    return projected


def _region(
    position: int, window: tuple[int, int], grid: tuple[int, int], shift: tuple[int, int], size: int
) -> tuple[bool, bool]:
    """Whether a position of a window at the far edge was wrapped around, per axis."""
    wrapped = []
    for axis, offset in enumerate((position // size, position % size)):
        is_last = window[axis] == grid[axis] - 1
        wrapped.append(shift[axis] > 0 and is_last and offset >= size - shift[axis])
    return wrapped[0], wrapped[1]


def _merge(backbone: SparseSwin, index: int, x: Tensor) -> Tensor:
    merging = backbone.downsamples[index]
    assert isinstance(merging, PatchMerging)
    num_images, height, width, channels = x.shape
    out = x.new_zeros(num_images, math.ceil(height / 2), math.ceil(width / 2), 2 * channels)
    for b in range(num_images):
        for r in range(out.shape[1]):
            for c in range(out.shape[2]):
                corners = [
                    x[b, 2 * r + dr, 2 * c + dc]
                    if 2 * r + dr < height and 2 * c + dc < width
                    else x.new_zeros(channels)
                    for dr, dc in ((0, 0), (1, 0), (0, 1), (1, 1))
                ]
                out[b, r, c] = merging.reduction(merging.norm(torch.cat(corners)))
    return out
