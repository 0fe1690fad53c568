"""Large tensors taken part by part, for inference on a CPU.

An intermediate of many megabytes costs more than the arithmetic on it: the system hands out fresh
pages for it every time, and it leaves the cache before it is read again. Everywhere else (training,
accelerators, tracing) the whole tensor goes through at once.
"""

from collections.abc import Callable

from torch import Tensor

from sparsevit.inference import is_cpu_inference

PART_BYTES = 2**20
"""Size of the input of a part."""


def apply_in_parts(function: Callable[[Tensor], Tensor], x: Tensor, *, dim: int, multiple: int = 1) -> Tensor:
    """``function(x)`` for a function that treats slices of `x` alike and independently.

    Args:
        function: makes one row, along dimension 1, of every `multiple` rows of `x` along `dim`, and
            of what is left at the end.
    """
    if not is_cpu_inference(x.device):
        return function(x)
    num_rows = x.shape[dim]
    num_parts = max(1, x.nbytes // PART_BYTES)
    step = -(-num_rows // (num_parts * multiple)) * multiple
    if step >= num_rows:
        return function(x)
    first = function(x.narrow(dim, 0, step))
    shape = list(first.shape)
    shape[1] = -(-num_rows // multiple)
    out = first.new_empty(shape)
    out[:, : first.shape[1]] = first
    for start in range(step, num_rows, step):
        part = function(x.narrow(dim, start, min(step, num_rows - start)))
        out[:, start // multiple : start // multiple + part.shape[1]] = part
    return out
