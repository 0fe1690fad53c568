"""The weights inside what training code saves: under a key, averaged or not, with wrappers' prefixes."""

import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sparsevit.checkpoints.torch_files import NotWeightsError
from sparsevit.checkpoints.unpickling import Stub

_AVERAGED = ("state_dict_ema", "model_ema", "ema_model", "ema_state_dict", "params_ema", "ema")
_PLAIN = ("state_dict", "model_state_dict", "model", "module", "network", "net", "weights", "params")
_COUNTERS = {"n_averaged", "steps"}
"""Beside the weights in averaged models: of `torch.optim.swa_utils`, and of mmengine."""
_WRAPPERS = re.compile(r"(?:^|(?<=\.))(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
"""Prefixes of `torch.compile`, fully sharded data parallelism and activation checkpointing, anywhere."""


def unwrap(content: Any) -> dict[str, Tensor]:
    """The state dict inside a file's content, under the names of the network itself.

    Averaged weights are preferred to plain ones, which remain for what was not averaged. A prefix that all
    names have for another reason, such as Lightning's ``model.``, stays.

    Raises:
        NotWeightsError: if there are no tensors, several state dicts or two tensors of a name.
    """
    weights = _state_dict(content)
    if weights is None:
        raise _without_weights(content)
    # mmcv before 2 saves the averaged weights, and the plain ones as buffers beside them.
    plain = {"ema_" + name.replace(".", "_") for name in weights}
    return {name: value for name, value in weights.items() if name not in plain}


def _state_dict(content: Any) -> dict[str, Tensor] | None:
    """The tensors of `content`, or of what it wraps."""
    if not isinstance(content, Mapping):
        return None
    averaged = None if _is_of_mmengine(content) else _first(content, _AVERAGED)
    wrapped = _first(content, _PLAIN)
    if averaged is not None and (wrapped is None or not wrapped.keys().isdisjoint(averaged)):
        return {**(wrapped or {}), **averaged}
    if wrapped is not None:
        return wrapped
    tensors = _tensors(content)
    if tensors:
        return tensors
    inner = {str(key): found for key, value in content.items() if (found := _tensors(value))}
    if len(inner) > 1:
        raise NotWeightsError(f"holds several state dicts ({', '.join(inner)}): save one of them alone")
    return next(iter(inner.values()), None)


def _is_of_mmengine(content: Mapping[Any, Any]) -> bool:
    """Whether mmengine wrote it: its ``state_dict`` is averaged already, its ``ema_state_dict`` is not."""
    meta = content.get("meta")
    return "message_hub" in content or (isinstance(meta, Mapping) and "mmengine_version" in meta)


def _first(content: Mapping[Any, Any], keys: tuple[str, ...]) -> dict[str, Tensor] | None:
    return next((found for key in keys if (found := _state_dict(content.get(key)))), None)


def _tensors(content: Any) -> dict[str, Tensor]:
    """What has a name and numbers, under the network's names."""
    if not isinstance(content, Mapping):
        return {}
    named = {
        str(name): value for name, value in content.items() if isinstance(name, str) and _is_numeric(value)
    }
    if all(name.startswith("module.") or name in _COUNTERS for name in named):
        named = {name: value for name, value in named.items() if name not in _COUNTERS}
    tensors: dict[str, Tensor] = {}
    for name, value in named.items():
        clean = re.sub(r"^(module\.)+", "", _WRAPPERS.sub("", name))
        if clean in tensors:
            raise NotWeightsError(
                f"holds {clean} twice once the prefixes of wrappers are cut off, as {name} too: save the "
                "state_dict() of the network alone"
            )
        tensors[clean] = _tensor(value)
    return tensors


def _is_numeric(value: Any) -> bool:
    return isinstance(value, Tensor) or (isinstance(value, np.ndarray) and value.dtype.kind in "fiub")


def _tensor(value: Tensor | np.ndarray[Any, Any]) -> Tensor:
    """The value itself, or a tensor of an array's memory; it is copied if torch cannot use it as it is."""
    if isinstance(value, Tensor):
        return value.detach()
    return torch.from_numpy(np.require(value, value.dtype.newbyteorder("="), ("C", "W")))


def _without_weights(content: Any) -> NotWeightsError:
    if not isinstance(content, Mapping | Stub):
        return NotWeightsError(
            f"holds a {type(content).__name__}, not a state dict: save one, best as .safetensors"
        )
    stub = next(_stubs(content), None)
    if stub is None:
        return NotWeightsError("holds no tensors: save a state dict, best as .safetensors")
    return NotWeightsError(
        f"holds no tensors, but an object of {stub.origin}, which is not read, as it could run code: load "
        "it where you trust it, and save its whole state_dict(), best as .safetensors"
    )


def _stubs(content: Any) -> Iterator[Stub]:
    """The objects where weights are expected: `content` itself, or what stands under a key for weights."""
    if isinstance(content, Stub):
        yield content
    elif isinstance(content, Mapping):
        for key in (*_AVERAGED, *_PLAIN):
            yield from _stubs(content.get(key))
        yield from (value for value in content.values() if isinstance(value, Stub))
