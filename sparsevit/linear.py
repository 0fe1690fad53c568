"""Linear layers joined with what follows them, for inference on a CPU.

oneDNN computes bias, GELU and the residual sum inside the matrix product, which saves as many
passes over memory, and multiplies faster by a weight that was packed for it beforehand. PyTorch
reaches it through the operators that its compiler uses; ``torch.compile``, which would take MKL in
fp32, is given them as operators of our own. Everywhere else (training, accelerators, export, other
dtypes) these functions are the plain layers.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.weak import WeakTensorKeyDictionary

from sparsevit.parts import is_compiled_inference, is_cpu_inference

FUSED_DTYPES = (torch.float32, torch.bfloat16)
_NUM_SAMPLES = 64


def linear(x: Tensor, layer: nn.Linear) -> Tensor:
    """``layer(x)``."""
    if not _serves(layer, x):
        return _plain(x, layer)
    return _product(x, layer, "none")


def linear_gelu(x: Tensor, layer: nn.Linear) -> Tensor:
    """``gelu(layer(x))``."""
    if not _serves(layer, x):
        return F.gelu(_plain(x, layer))
    return _product(x, layer, "gelu")


def linear_add(x: Tensor, layer: nn.Linear, residual: Tensor) -> Tensor:
    """``residual + layer(x)``."""
    if not _serves(layer, x):
        return residual + _plain(x, layer)
    if residual.dtype != x.dtype:
        return residual + _product(x, layer, "none")
    add = _traced_add if torch.compiler.is_compiling() else _fused_add
    out = add(
        x.reshape(-1, x.shape[-1]), residual.reshape(-1, residual.shape[-1]), layer.weight, layer.bias
    )
    return out.view(residual.shape)


def is_fused(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the joined operators serve an eager computation on a device in a dtype, here and now."""
    return is_cpu_inference(device) and dtype in FUSED_DTYPES and has_operators()


def is_fused_in_graph(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether they serve, as operators of our own, in the graph that is being compiled."""
    return is_compiled_inference(device) and dtype in FUSED_DTYPES and has_operators()


@torch.compiler.assume_constant_result
def has_operators() -> bool:
    """Whether this PyTorch has the operators, and they compute what they should."""
    return _try_operators()


@lru_cache(maxsize=1)
@torch.autocast("cpu", enabled=False)
def _try_operators() -> bool:
    has_onednn = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    if not has_onednn or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    generator = torch.Generator().manual_seed(0)
    x, weight, bias, residual = (
        torch.randn(size, generator=generator) for size in ((5, 8), (8, 8), (8,), (5, 8))
    )
    expected = F.linear(x, weight, bias)
    try:
        packed = torch.ops.mkldnn._reorder_linear_weight(weight)
        gelu = _operator()(x, packed, bias, "gelu", [], "none")
        added = _add_operator()(x, residual, packed, bias, "add")
    except (RuntimeError, TypeError, AttributeError):  # another release's signature
        return False
    return torch.allclose(gelu, F.gelu(expected), atol=1e-5) and torch.allclose(
        added, residual + expected, atol=1e-5
    )


@dataclass(frozen=True)
class _Packed:
    """A packed weight, and how to notice that the weight it was made of has changed.

    Attributes:
        live: some of the weight's values, as a view of its memory.
        sample: the same when it was packed.
    """

    weight: Tensor
    version: tuple[int, int]
    live: Tensor
    sample: Tensor


_packed_weights: dict[torch.dtype, WeakTensorKeyDictionary] = {}


def _packed(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """`weight` in the layout that oneDNN multiplies fastest by, kept until the weight changes.

    A change is seen by PyTorch's version counter, or, where code writes around it
    (``weight.data``), by a sample of the values.
    """
    if weight.is_inference():  # has no version counter
        return weight.to(dtype)
    cache: Any = _packed_weights.setdefault(dtype, WeakTensorKeyDictionary())
    known: _Packed | None = cache.get(weight)
    version = (weight.data_ptr(), weight._version)
    if known is None or known.version != version or not torch.equal(known.live, known.sample):
        packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach().to(dtype))
        live = weight.detach().view(-1)[:: max(1, weight.numel() // _NUM_SAMPLES)]
        known = _Packed(packed, version, live, live.clone())
        cache[weight] = known
    return known.weight


def _serves(layer: nn.Module, x: Tensor) -> bool:
    """Whether `layer` is a weight and a bias and nothing else: no hook, adapter or parametrization."""
    is_bare = type(layer) is nn.Linear and not layer._forward_hooks and not layer._forward_pre_hooks
    return is_bare and (is_fused(x.device, x.dtype) or is_fused_in_graph(x.device, x.dtype))


def _product(x: Tensor, layer: nn.Linear, activation: str) -> Tensor:
    product = _traced if torch.compiler.is_compiling() else _fused
    return product(x, layer.weight, layer.bias, activation)


def _fused(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    out: Tensor = _operator()(
        x, _packed(weight, x.dtype), _cast(bias, x.dtype), activation, [], "none"
    )
    return out


def _fused_add(x_SD: Tensor, residual_SC: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    out: Tensor = _add_operator()(
        x_SD, residual_SC, _packed(weight, x_SD.dtype), _cast(bias, x_SD.dtype), "add"
    )
    return out


_traced = torch.library.custom_op("sparsevit::linear", _fused, mutates_args=())
_traced_add = torch.library.custom_op("sparsevit::linear_add", _fused_add, mutates_args=())


@_traced.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    return x.new_empty(*x.shape[:-1], len(weight))


@_traced_add.register_fake
def _(x_SD: Tensor, residual_SC: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.empty_like(residual_SC)


def _plain(x: Tensor, layer: nn.Linear) -> Tensor:
    out: Tensor = layer(x)
    return out


def _cast(bias: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if bias is None else bias.to(dtype)


@lru_cache(maxsize=1)
def _operator() -> Any:
    return torch.ops.mkldnn._linear_pointwise.default


@lru_cache(maxsize=1)
def _add_operator() -> Any:
    return torch.ops.mkldnn._linear_pointwise.binary
