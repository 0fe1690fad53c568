"""Window importance: how much a window's activation stands out (SparseViT, section 3.2).

Legend: B images; L tokens of a stage; C channels; M windows; N tokens per window; K kept windows.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from sparsevit.sparsity import count_kept_windows
from sparsevit.windows import WindowGrid


def score_tokens(x_BLC: Tensor) -> Tensor:
    """Mean of |x| over the channels: [B, L] in float32. No gradient flows through a score.

    The released code does this; the paper's text speaks of the L2 norm of the activation.
    """
    return x_BLC.detach().abs().mean(dim=-1, dtype=torch.float32)


def rank_windows(scores_BL: Tensor, grid: WindowGrid) -> Tensor:
    """Windows of every image from most to least important: [B, M].

    A window's score is the L2 norm of its tokens' scores; padding counts as zero. Ties keep
    the order of the grid.
    """
    tokens_MN = grid.tokens_MN
    if grid.is_padding_MN is not None:
        scores_BL = F.pad(scores_BL, (0, 1))
    squares_BMN = scores_BL[:, tokens_MN].square()
    return squares_BMN.sum(dim=-1).argsort(dim=-1, descending=True, stable=True)


def select_windows(ranking_BM: Tensor, ratio: float) -> Tensor:
    """The windows that stay at `ratio`, in grid order: [B, K] with the same K for every image.

    A prefix of the ranking, so that a larger ratio keeps a subset of what a smaller one keeps.
    """
    num_kept = count_kept_windows(ranking_BM.shape[1], ratio)
    return ranking_BM[:, :num_kept].sort(dim=-1).values
