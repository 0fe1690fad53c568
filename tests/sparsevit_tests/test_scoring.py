"""Scores of tokens, and the ranking of windows by them, against loops and closed forms."""

import math
from itertools import product

import pytest
import torch
from torch import Tensor, nn

from sparsevit.scoring import SCORES, rank_windows, score_tokens, select_windows
from sparsevit.windows import WindowGrid, window_grid

CPU = torch.device("cpu")


def grid_of(size: tuple[int, int], shift: int = 0) -> WindowGrid:
    return window_grid(size, 4, (shift, shift), CPU)


@pytest.mark.parametrize(("name", "expected"), [("mean_abs", (3.5, 0.0, 1.0)), ("l2", (5.0, 0.0, 2**0.5))])
def test_scores_by_hand(name: str, expected: tuple[float, ...]) -> None:
    tokens = torch.tensor([[[3.0, -4.0], [0.0, 0.0], [1.0, -1.0]]])
    assert score_tokens(tokens, SCORES[name])[0].tolist() == pytest.approx(expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_scores_of_half_precision_are_summed_in_single(dtype: torch.dtype) -> None:
    """512 ones after a 256: bfloat16 cannot count beyond 256; and 300² is beyond float16."""
    tokens = torch.ones(1, 1, 513, dtype=dtype)
    tokens[..., 0] = 256
    assert score_tokens(tokens, SCORES["mean_abs"]).item() == pytest.approx(768 / 513, rel=1e-6)
    large = torch.full((1, 1, 4), 300.0, dtype=torch.float16).to(dtype)
    assert score_tokens(large, SCORES["l2"]).item() == pytest.approx(600, rel=1e-6)
    assert score_tokens(large, lambda x: x[..., 0]).dtype == torch.float32


@pytest.mark.parametrize("name", ["mean_abs", "l2"])
def test_scores_of_many_tokens_are_those_of_each(name: str) -> None:
    """More than a megabyte goes part by part."""
    tokens = torch.randn(2, 70_001, 8, generator=torch.Generator().manual_seed(0))
    exact = tokens.double()
    expected = exact.abs().mean(dim=-1) if name == "mean_abs" else exact.norm(dim=-1)
    with torch.inference_mode():
        torch.testing.assert_close(SCORES[name](tokens), expected.float())


def test_random_scores_are_a_hash_of_the_token_s_number() -> None:
    """In Python's integers, which do not overflow."""
    scores = SCORES["random"](torch.zeros(2, 50, 3)).flatten().tolist()
    for number, score in enumerate(scores):
        mixed = number
        for factor in (0x9E3779B1, 0x85EBCA6B, 0xC2B2AE35):
            mixed = (mixed ^ mixed // 2**15) * factor % 2**32
        assert score == pytest.approx(mixed / 2**32, abs=1e-7)


def test_random_scores_are_where_their_tokens_are() -> None:
    scores = score_tokens(torch.zeros(2, 5, 3, device="meta"), SCORES["random"])
    assert (scores.device.type, scores.shape, scores.dtype) == ("meta", (2, 5), torch.float32)


def test_score_of_another_number_of_images() -> None:
    with pytest.raises(ValueError, match=r"per token, \[2, 5\], but it returned \[1, 5\]"):
        score_tokens(torch.zeros(2, 5, 8), lambda x: x[:1, :, 0])


@pytest.mark.parametrize("shift", [0, 2])
@pytest.mark.parametrize("size", [(8, 12), (9, 14), (5, 21)])
def test_windows_are_ranked_by_the_norm_of_their_tokens_scores(size: tuple[int, int], shift: int) -> None:
    """Position by position on the rolled grid; padding counts as nothing."""
    height, width = size
    rows, columns = math.ceil(height / 4), math.ceil(width / 4)
    scores = torch.rand(2, height * width, generator=torch.Generator().manual_seed(0))
    scores[:, -1] = 3.0  # what padding must not be mistaken for
    ranking = rank_windows(scores, grid_of(size, shift))
    for image in range(2):
        squares = []
        for top, left in product(range(rows), range(columns)):
            square = 0.0
            for i, j in product(range(4), range(4)):
                row, column = (4 * top + i + shift) % (4 * rows), (4 * left + j + shift) % (4 * columns)
                if row < height and column < width:
                    square += float(scores[image, row * width + column]) ** 2
            squares.append(square)
        expected = sorted(range(len(squares)), key=lambda window: -squares[window])
        assert ranking[image].tolist() == expected


def test_ties_keep_the_order_of_the_grid() -> None:
    """40 windows of three kinds, none of which a neighbour resembles."""
    grid = grid_of((20, 32))
    scores = torch.zeros(1, 20 * 32)
    scores[0, grid.tokens_MN] = torch.tensor([window % 3.0 for window in range(40)])[:, None]
    expected = [window for kind in (2, 1, 0) for window in range(40) if window % 3 == kind]
    assert rank_windows(scores, grid)[0].tolist() == expected


def test_an_exported_ranking_is_the_same_without_a_sort() -> None:
    """ONNX has no stable one. Ties are not compared: they keep their order there, but not in PyTorch."""
    grid = grid_of((18, 30))

    class Ranking(nn.Module):
        def forward(self, scores: Tensor) -> Tensor:
            return rank_windows(scores, grid)

    scores = torch.rand(2, 18 * 30, generator=torch.Generator().manual_seed(0))
    program = torch.export.export(Ranking(), (scores,))
    assert not any("sort" in str(node.target) for node in program.graph.nodes)
    assert torch.equal(program.module()(scores), rank_windows(scores, grid))


def test_the_first_of_a_ranking_are_kept_in_the_order_of_the_grid() -> None:
    ranking = torch.tensor([[3, 1, 4, 0, 2], [2, 0, 1, 4, 3]])
    assert select_windows(ranking, 3).tolist() == [[1, 3, 4], [0, 1, 2]]
    assert select_windows(ranking, 1).tolist() == [[3], [2]]
