"""Where and how a computation runs, here and now: what decides whether a faster way to it may be taken."""

import warnings
from contextlib import AbstractContextManager, nullcontext
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

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


_works: dict[torch.device, bool] = {}


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _takes_kernels(device: torch.device) -> bool:
    if device not in _works:
        if torch.cuda.is_current_stream_capturing():  # nothing can be tried while a graph is captured
            return torch.version.cuda is not None and find_spec("triton") is not None
        _works[device] = _try_kernels(device)
    return _works[device]


def _try_kernels(device: torch.device) -> bool:
    """Triton needs more than its package: a GPU that it knows, a driver, a C compiler."""
    if torch.version.cuda is None or torch.cuda.get_device_capability(device) < MIN_CAPABILITY:
        return False
    try:
        from sparsevit import gpu_kernels

        with torch.no_grad(), on_device(device):
            found = gpu_kernels.score_rows(torch.ones(1, 2, 16, device=device), 1)
        return bool((found == 1).all())
    except Exception as error:  # noqa: BLE001  (whatever it is, there is another way)
        warnings.warn(f"inference on {device} goes without the kernels for GPUs: {error}", stacklevel=2)
        return False


def is_bare(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether a module computes just what its kind does, so that another way to it may be taken."""
    return type(module) is kind and not module._forward_hooks and not module._forward_pre_hooks


def is_bare_norm(module: nn.Module) -> bool:
    """Whether a module is a plain LayerNorm over channels, with weight and bias."""
    return is_bare(module, nn.LayerNorm) and module.weight is not None and module.bias is not None


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
