"""Linear layers joined with what follows them, for inference on a CPU.

oneDNN computes bias, GELU and the residual sum inside the matrix product, which saves as many
passes over memory, and multiplies faster by a weight that was packed for it beforehand. PyTorch
reaches it through the operators that its compiler uses; ``torch.compile``, which would take MKL in
fp32, is given them as operators of our own. Everywhere else (training, accelerators, export, other
dtypes) a layer is the plain one.
"""

from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.weak import WeakTensorKeyDictionary

from sparsevit.inference import is_bare, is_compiled_inference, is_cpu_inference, is_gpu_inference

FUSED_DTYPES = (torch.float32, torch.bfloat16)
_NUM_SAMPLES = 64


class JoinedLinear(Protocol):
    """A linear layer during one forward pass, and the products with what follows it."""

    def __call__(self, x: Tensor) -> Tensor:
        """``layer(x)``."""

    def gelu(self, x: Tensor) -> Tensor:
        """``gelu(layer(x))``."""

    def add(self, x: Tensor, residual: Tensor) -> Tensor:
        """``residual + layer(x)``."""


def join(layer: nn.Linear, device: torch.device, dtype: torch.dtype) -> JoinedLinear:
    """The fastest way there is, here and now, to compute `layer` of inputs on a device in a dtype.

    It holds until the weights change: take it anew at every forward pass.
    """
    if not is_bare(layer, nn.Linear):
        return _Plain(layer, torch.is_autocast_enabled(device.type))
    if is_fused(device, dtype):
        return _Packed(_packed(layer.weight, dtype), _cast(layer.bias, dtype))
    if is_fused_in_graph(device, dtype):
        return _Traced(layer)
    if is_gpu_inference(device, dtype):
        return _OnGpu(layer.weight.to(dtype), _cast(layer.bias, dtype))
    return _Plain(layer, torch.is_autocast_enabled(device.type))


def linear(x: Tensor, layer: nn.Linear) -> Tensor:
    """``layer(x)``, the fastest way there is."""
    return join(layer, x.device, x.dtype)(x)


@dataclass(eq=False)
class _Plain:
    layer: nn.Linear
    is_autocast: bool

    def __call__(self, x: Tensor) -> Tensor:
        out: Tensor
        if self.is_autocast and not torch.is_autocast_enabled(x.device.type):
            with torch.autocast(x.device.type, x.dtype):  # which the caller has left
                out = self.layer(x)
        else:
            out = self.layer(x)
        return out

    def gelu(self, x: Tensor) -> Tensor:
        return F.gelu(self(x))

    def add(self, x: Tensor, residual: Tensor) -> Tensor:
        return residual + self(x)


@dataclass(eq=False)
class _Packed:
    weight: Tensor
    bias: Tensor | None

    def __call__(self, x: Tensor) -> Tensor:
        return _multiply(x, self.weight, self.bias, "none")

    def gelu(self, x: Tensor) -> Tensor:
        return _multiply(x, self.weight, self.bias, "gelu")

    def add(self, x: Tensor, residual: Tensor) -> Tensor:
        if residual.dtype != x.dtype:
            return residual + self(x)
        return _multiply_add(x, residual, self.weight, self.bias)


@dataclass(eq=False)
class _Traced:
    layer: nn.Linear

    def __call__(self, x: Tensor) -> Tensor:
        out: Tensor = _traced(x, self.layer.weight, self.layer.bias, "none")
        return out

    def gelu(self, x: Tensor) -> Tensor:
        out: Tensor = _traced(x, self.layer.weight, self.layer.bias, "gelu")
        return out

    def add(self, x: Tensor, residual: Tensor) -> Tensor:
        if residual.dtype != x.dtype:
            return residual + self(x)
        out: Tensor = _traced_add(x, residual, self.layer.weight, self.layer.bias)
        return out


@dataclass(eq=False)
class _OnGpu:
    """In half precision, where GELU by tanh differs from GELU by less than its argument was rounded."""

    weight: Tensor
    bias: Tensor | None

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)

    def gelu(self, x: Tensor) -> Tensor:
        if self.bias is None:
            return F.gelu(self(x))
        rows = x.reshape(-1, x.shape[-1])
        out: Tensor = torch._addmm_activation(self.bias, rows, self.weight.t(), use_gelu=True)
        return out.view(*x.shape[:-1], -1)

    def add(self, x: Tensor, residual: Tensor) -> Tensor:
        return residual + self(x)


@torch.library.custom_op("sparsevit::linear", mutates_args=())
def _traced(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    return _multiply(x, _packed(weight, x.dtype), _cast(bias, x.dtype), activation)


@_traced.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    return x.new_empty(*x.shape[:-1], len(weight))


@torch.library.custom_op("sparsevit::linear_add", mutates_args=())
def _traced_add(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return _multiply_add(x, residual, _packed(weight, x.dtype), _cast(bias, x.dtype))


@_traced_add.register_fake
def _(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.empty_like(residual)


def is_fused(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the joined operators serve an eager computation on a device in a dtype, here and now."""
    return is_cpu_inference(device) and dtype in FUSED_DTYPES and has_operators(dtype)


def is_fused_in_graph(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether they serve, as operators of our own, in the graph that is being compiled."""
    return is_compiled_inference(device) and dtype in FUSED_DTYPES and has_operators(dtype)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def has_operators(dtype: torch.dtype) -> bool:
    """Whether this PyTorch has the operators in a dtype on this CPU, and they compute what they should.

    In bfloat16 oneDNN wants a CPU with AVX-512 or AVX-NE-CONVERT.
    """
    with torch.autocast("cpu", enabled=False):
        return _try_operators(dtype)


@cache
def _try_operators(dtype: torch.dtype) -> bool:
    has_onednn = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    if not has_onednn or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    generator = torch.Generator().manual_seed(0)
    x, weight, bias, residual = (
        torch.randn(size, generator=generator).to(dtype) for size in ((5, 8), (8, 8), (8,), (5, 8))
    )
    expected = F.linear(x.float(), weight.float(), bias.float())
    try:
        packed = torch.ops.mkldnn._reorder_linear_weight(weight)
        gelu = _multiply(x, packed, bias, "gelu")
        added = _multiply_add(x, residual, packed, bias)
    except (RuntimeError, TypeError, AttributeError):  # another release's signature, or an older CPU
        return False
    tolerance = 1e-5 if dtype == torch.float32 else 0.1
    return torch.allclose(gelu.float(), F.gelu(expected), atol=tolerance) and torch.allclose(
        added.float(), residual.float() + expected, atol=tolerance
    )


@dataclass(frozen=True)
class _PackedWeight:
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
    known: _PackedWeight | None = cache.get(weight)
    version = (weight.data_ptr(), weight._version)
    if known is None or known.version != version or not torch.equal(known.live, known.sample):
        packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach().to(dtype))
        live = weight.detach().view(-1)[:: max(1, weight.numel() // _NUM_SAMPLES)]
        known = _PackedWeight(packed, version, live, live.clone())
        cache[weight] = known
    return known.weight


def _multiply(x: Tensor, packed: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    out: Tensor = torch.ops.mkldnn._linear_pointwise.default(x, packed, bias, activation, [], "none")
    return out


def _multiply_add(x: Tensor, residual: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
    rows = residual.reshape(-1, residual.shape[-1])
    out: Tensor = torch.ops.mkldnn._linear_pointwise.binary(
        x.reshape(-1, x.shape[-1]), rows, packed, bias, "add"
    )
    return out.view(residual.shape)


def _cast(bias: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if bias is None else bias.to(dtype)
