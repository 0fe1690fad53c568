"""Copies as wide elements move every bit where the plain ones do."""

import pytest
import torch

from sparsevit.wide import WIDE_DTYPES, rearrange, scatter_rows_, widen

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
WIDTHS = [1, 3, 4, 8, 20, 32]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("heads", [1, 2])
def test_rearranges_as_a_permutation_does(dtype: torch.dtype, width: int, heads: int) -> None:
    x = torch.randn(3, 5, 3, heads, width).to(dtype)
    x[0, 0, 0, 0, 0] = torch.nan
    order = (2, 0, 3, 1, 4)
    found = rearrange(x, order)
    assert found.is_contiguous() and found.dtype == dtype
    assert torch.equal(found.view(torch.uint8), x.permute(order).contiguous().view(torch.uint8))


def test_rearranges_a_slice_of_a_tensor() -> None:
    x = torch.randn(4, 6, 33)[:, 1:, 1:]
    assert torch.equal(rearrange(x, (1, 0, 2)), x.permute(1, 0, 2))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", WIDTHS)
def test_scatters_as_index_copy_does(dtype: torch.dtype, width: int) -> None:
    x, values = torch.randn(9, width).to(dtype), torch.randn(4, width).to(dtype)
    rows = torch.tensor([7, 0, 3, 8])
    expected = x.index_copy(0, rows, values)
    with torch.inference_mode():
        x = x.clone()
        assert scatter_rows_(x, rows, values) is x
    assert torch.equal(x, expected)


def test_scatters_into_rows_that_begin_anywhere() -> None:
    flat, values, rows = torch.randn(41), torch.randn(2, 8), torch.tensor([4, 1])
    x = flat[1:].view(5, 8)
    expected = x.index_copy(0, rows, values)
    with torch.no_grad():
        scatter_rows_(x, rows, values)
    assert torch.equal(flat[1:].view(5, 8), expected)


def test_gradients_flow_through_a_scatter() -> None:
    values = torch.randn(2, 8, requires_grad=True)
    scattered = scatter_rows_(torch.zeros(5, 8), torch.tensor([4, 1]), values)
    (gradient,) = torch.autograd.grad(scattered.sum(), values)
    assert torch.equal(gradient, torch.ones(2, 8))


def test_takes_the_widest_element_that_fits() -> None:
    assert [widen(torch.empty(2, width)).dtype for width in (8, 4, 2, 3)] == [
        *WIDE_DTYPES[:1] * 2, WIDE_DTYPES[1], torch.float32,
    ]  # fmt: skip
