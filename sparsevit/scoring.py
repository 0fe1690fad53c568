"""Window importance: how much a window's activation stands out (SparseViT, section 3.2).

A score is a function of the residual stream that gives every token a number; a window's importance
is the L2 norm of its tokens' numbers.

Legend: B images; L tokens of a stage; C channels; M windows; N tokens per window; K kept windows.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from sparsevit.inference import compute_dtype, is_gpu_inference
from sparsevit.parts import apply_in_parts
from sparsevit.windows import WindowGrid

HASH_FACTORS = (0x9E3779B1, 0x85EBCA6B, 0xC2B2AE35)
"""Of a hash of a token's number, which compilers and CUDA graphs follow; two are MurmurHash3's."""
Score = Callable[[Tensor], Tensor]
"""Tokens [B, L, C] to one number per token, [B, L]."""


def mean_abs(x_BLC: Tensor) -> Tensor:
    """Mean of |x| over the channels: what the released code does, and the published figures rest on."""
    if is_gpu_inference(x_BLC.device, compute_dtype(x_BLC)):
        from sparsevit import gpu_kernels

        return gpu_kernels.score_rows(x_BLC, 1)
    return apply_in_parts(lambda x: x.abs().mean(dim=-1, dtype=torch.float32), x_BLC, dim=1)


def l2(x_BLC: Tensor) -> Tensor:
    """L2 norm over the channels, so that a window's is that of its whole activation (the paper's text)."""
    if is_gpu_inference(x_BLC.device, compute_dtype(x_BLC)):
        from sparsevit import gpu_kernels

        return gpu_kernels.score_rows(x_BLC, 2)
    return apply_in_parts(lambda x: x.float().square().sum(dim=-1).sqrt(), x_BLC, dim=1)


def random(x_BLC: Tensor) -> Tensor:
    """The same random numbers at every call: the ablation that a score must beat."""
    num_images, num_tokens, _ = x_BLC.shape
    number = torch.arange(num_images * num_tokens, device=x_BLC.device)
    for factor in HASH_FACTORS:
        number = (number ^ (number >> 15)) * factor & 0xFFFFFFFF
    return (number / 2**32).view(num_images, num_tokens)


SCORES: dict[str, Score] = {"mean_abs": mean_abs, "l2": l2, "random": random}


def find_score(score: str | Score) -> Score:
    """A score by name, or the user's own function.

    Raises:
        ValueError: for an unknown name, listing the known ones.
    """
    if callable(score):
        return score
    if score not in SCORES:
        raise ValueError(f"unknown score {score!r}; choose one of {', '.join(SCORES)}, or pass a function")
    return SCORES[score]


def score_tokens(x_BLC: Tensor, score: Score) -> Tensor:
    """Score every token: [B, L] in float32. No gradient flows through a score.

    Raises:
        ValueError: if a user's function returns another shape.
    """
    with torch.no_grad():
        scores_BL = score(x_BLC)
    if scores_BL.shape != x_BLC.shape[:2]:
        raise ValueError(
            f"a score gives one number per token, {list(x_BLC.shape[:2])}, but it returned "
            f"{list(scores_BL.shape)}"
        )
    return scores_BL.float()


def rank_windows(scores_BL: Tensor, grid: WindowGrid) -> Tensor:
    """Windows of every image from most to least important: [B, M].

    A window's score is the L2 norm of its tokens' scores; padding counts as zero. Ties keep
    the order of the grid.
    """
    tokens_MN = grid.tokens_MN
    if grid.is_padding_MN is not None:
        scores_BL = F.pad(scores_BL, (0, 1))
    windows_BM = scores_BL[:, tokens_MN].square().sum(dim=-1)
    if torch.compiler.is_exporting():  # ONNX has no stable sort, but its top-k keeps ties in order
        return windows_BM.topk(windows_BM.shape[1]).indices
    return windows_BM.argsort(dim=-1, descending=True, stable=True)


def select_windows(ranking_BM: Tensor, num_kept: int) -> Tensor:
    """The most important windows, in grid order: [B, K].

    A prefix of the ranking, so that fewer windows are a subset of more.
    """
    return ranking_BM[:, :num_kept].sort(dim=-1).values
