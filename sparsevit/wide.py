"""Copies of tensors as wide elements, for inference on a CPU.

PyTorch rearranges a tensor element by element; as elements of 16 bytes, eight bfloat16 numbers take
one step. Such views have no gradient.
"""

import torch
from torch import Tensor

from sparsevit.inference import is_cpu_inference

WIDE_DTYPES = (torch.complex128, torch.complex64)
"""Elements of 16 and 8 bytes; copying one does not look at its bits."""


def widen(x: Tensor) -> Tensor:
    """`x` [..., D], contiguous, as a view of the widest elements that fill its last dimension."""
    for dtype in WIDE_DTYPES:
        factor = dtype.itemsize // x.dtype.itemsize
        if factor > 1 and x.shape[-1] % factor == 0 and x.storage_offset() % factor == 0:
            return x.view(dtype)
    return x


def rearrange(x: Tensor, order: tuple[int, ...]) -> Tensor:
    """A contiguous copy of ``x.permute(order)``; the last dimension stays the last."""
    wide = widen(x.contiguous()).permute(order)
    return wide.clone(memory_format=torch.contiguous_format).view(x.dtype)


def scatter_rows_(x_RC: Tensor, rows_S: Tensor, values_SC: Tensor) -> Tensor:
    """``x_RC.index_copy_(0, rows_S, values_SC)``: write rows in place and return `x_RC`.

    Outside inference on a CPU it is just that.
    """
    if is_cpu_inference(x_RC.device) and x_RC.is_contiguous() and values_SC.is_contiguous():
        wide_RC, wide_SC = widen(x_RC), widen(values_SC)
        if wide_RC.dtype == wide_SC.dtype:
            wide_RC.index_copy_(0, rows_S, wide_SC)
            return x_RC
    return x_RC.index_copy_(0, rows_S, values_SC)
