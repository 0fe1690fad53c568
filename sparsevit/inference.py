"""Where and how a computation runs, here and now: what decides whether a faster way to it may be taken."""

from contextlib import AbstractContextManager, nullcontext
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

HALF_DTYPES = (torch.float16, torch.bfloat16)
MIN_CAPABILITY = (8, 0)
"""The first GPUs that multiply bfloat16."""


def is_inference() -> bool:
    """Whether a computation is eager and without gradients."""
    return (
        not torch.is_grad_enabled() and not torch.compiler.is_compiling() and not torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
    )


def is_cpu_inference(device: torch.device) -> bool:
    """Whether a computation on a device is eager, on the CPU and without gradients."""
    return device.type == "cpu" and is_inference()


def is_compiled_inference(device: torch.device) -> bool:
    """Whether ``torch.compile`` is tracing a computation on the CPU without gradients."""
    return (
        device.type == "cpu"
        and not torch.is_grad_enabled()
        and torch.compiler.is_compiling()
        and not torch.compiler.is_exporting()
    )


def is_gpu_inference(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a computation on a device in a dtype may take the kernels of `gpu_kernels`.

    It may in half precision and without gradients, in eager mode and where ``torch.compile`` traces it.
    """
    return (
        device.type == "cuda"
        and dtype in HALF_DTYPES
        and not torch.is_grad_enabled()
        and not torch.compiler.is_exporting()
        and not torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
        and _takes_kernels(device)
    )


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _takes_kernels(device: torch.device) -> bool:
    is_nvidia = torch.version.cuda is not None
    return (
        is_nvidia
        and torch.cuda.get_device_capability(device) >= MIN_CAPABILITY
        and find_spec("triton") is not None
    )


def on_device(device: torch.device) -> AbstractContextManager[Any]:
    """Makes a GPU the current one, where Triton launches kernels; a compiler takes care of that itself."""
    if device.type != "cuda" or torch.compiler.is_compiling():
        return nullcontext()
    return torch.cuda.device(device)


def can_keep(device: torch.device) -> bool:
    """Whether a tensor made on a device can serve later passes: not while a CUDA graph is captured."""
    return device.type != "cuda" or not torch.cuda.is_current_stream_capturing()


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype of matrix products with `x`."""
    device = x.device.type
    dtype: torch.dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    return dtype
