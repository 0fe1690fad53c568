"""Tables of windows against loops over a grid's positions, and the plans of stages."""

import math
from itertools import product

import pytest
import torch

from sparsevit.windows import WindowGrid, plan_stage, window_grid

CPU = torch.device("cpu")
SIZES = [(8, 12), (9, 14), (3, 10), (4, 4), (13, 8)]
SHIFTS = [(0, 0), (2, 2), (0, 2), (2, 0), (1, 3)]


def positions_of(size: tuple[int, int], shift: tuple[int, int], window: int) -> list[list[tuple[int, int]]]:
    """The row and column of every position of every window; beyond the grid where it is padding."""
    rows, columns = (window * math.ceil(side / window) for side in size)
    return [
        [
            ((top + i + shift[0]) % rows, (left + j + shift[1]) % columns)
            for i, j in product(range(window), range(window))
        ]
        for top, left in product(range(0, rows, window), range(0, columns, window))
    ]


def assert_covers(grid: WindowGrid, size: tuple[int, int], shift: tuple[int, int], window: int) -> None:
    """Every position of the grid is in one window, and what is beyond it is the sink."""
    height, width = size
    positions = positions_of(size, shift, window)
    rows = [
        [r * width + c if r < height and c < width else height * width for r, c in each] for each in positions
    ]
    assert grid.tokens_MN.tolist() == rows
    assert (grid.num_windows, grid.num_tokens) == (len(rows), height * width)
    flat = [row for each in rows for row in each]
    assert sorted(flat)[: height * width] == list(range(height * width))
    if height % window == width % window == 0:
        assert grid.is_padding_MN is None and grid.positions_L is None
    else:
        assert grid.is_padding_MN is not None and grid.positions_L is not None
        assert torch.equal(grid.is_padding_MN, grid.tokens_MN == height * width)
        assert grid.positions_L.tolist() == [n for n, row in enumerate(flat) if row < height * width]


@pytest.mark.parametrize("shift", SHIFTS)
@pytest.mark.parametrize("size", SIZES)
def test_windows_cover_the_rolled_grid(size: tuple[int, int], shift: tuple[int, int]) -> None:
    assert_covers(window_grid(size, 4, shift, CPU), size, shift, 4)


@pytest.mark.parametrize("shift", SHIFTS)
@pytest.mark.parametrize("size", [(8, 12), (9, 14), (13, 8)])
def test_only_neighbours_attend_to_each_other(size: tuple[int, int], shift: tuple[int, int]) -> None:
    """The roll brings together what is further apart than a window is wide."""
    grid = window_grid(size, 4, shift, CPU)
    if shift == (0, 0):
        assert grid.mask_TNN is None
        return
    assert grid.mask_TNN is not None
    for window, positions in enumerate(positions_of(size, shift, 4)):
        expected = [[abs(r - q) >= 4 or abs(c - d) >= 4 for q, d in positions] for r, c in positions]
        assert grid.mask_TNN[grid.mask_type_M[window]].tolist() == expected


@pytest.mark.parametrize("window", [1, 3, 4])
def test_bias_rows_count_the_offsets_of_a_query_to_a_key(window: int) -> None:
    places = list(product(range(window), range(window)))
    rows = window_grid((8, 8), window, (0, 0), CPU).bias_row_NN
    span = 2 * window - 1
    for (query, (r, c)), (key, (q, d)) in product(enumerate(places), enumerate(places)):
        assert rows[query, key] == (r - q + window - 1) * span + c - d + window - 1


@pytest.mark.parametrize(
    ("size", "shift"), [((8, 12), (2, 2)), ((4, 12), (0, 2)), ((5, 3), (2, 0)), ((4, 4), (0, 0))]
)
def test_every_second_block_is_shifted_where_an_axis_has_more_than_a_window(
    size: tuple[int, int], shift: tuple[int, int]
) -> None:
    plan = plan_stage(size, 4, (0.0, 0.0, 0.5, 0.75), CPU)
    num_windows = math.ceil(size[0] / 4) * math.ceil(size[1] / 4)
    for index, (step, share) in enumerate(zip(plan, (None, None, 0.5, 0.25), strict=True)):
        assert_covers(step.grid, size, shift if index % 2 else (0, 0), 4)
        assert step.num_kept == (None if share is None else max(1, math.floor(share * num_windows)))


def test_odd_windows_are_shifted_by_the_smaller_half() -> None:
    assert_covers(plan_stage((9, 8), 3, (0.0, 0.0), CPU)[1].grid, (9, 8), (1, 1), 3)


@pytest.mark.parametrize("shift", [(0, 0), (2, 2)])
def test_tables_are_on_the_device_that_is_asked_for(shift: tuple[int, int]) -> None:
    """And right when tensors are made elsewhere, as under ``torch.device("meta")``."""
    with torch.device("meta"):
        grid = window_grid((15, 22), 4, shift, CPU)
        assert_covers(grid, (15, 22), shift, 4)
        expected = window_grid((15, 22), 4, shift, torch.device("meta"))
    assert (grid.mask_TNN is None) == (shift == (0, 0))
    for name, value in vars(grid).items():
        if isinstance(value, torch.Tensor):
            other = getattr(expected, name)
            assert (value.device.type, other.device.type) == ("cpu", "meta"), name
            assert (value.shape, value.dtype) == (other.shape, other.dtype), name
    assert grid.mask_type_M.dtype == torch.long
