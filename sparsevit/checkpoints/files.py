"""Weight files: read safely, written all or nothing."""

import os
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

Weights = dict[str, Tensor]


class CheckpointError(ValueError):
    """A weight file cannot be used; the message names the file, what is wrong and what would do."""


def mismatch_error(
    summary: str, *, unexpected: list[str], missing: list[str], wrong_shape: list[str]
) -> CheckpointError:
    """The error for weights that do not fit, with the first names of every kind."""
    kinds = (("Unexpected", unexpected), ("Missing", missing), ("Of another shape", wrong_shape))
    listed = (
        f"{kind}: {', '.join(names[:5])}{' …' if len(names) > 5 else ''} ({len(names)})."
        for kind, names in kinds
        if names
    )
    return CheckpointError(f"{summary}. {' '.join(listed)}")


def read_weights(path: Path) -> Weights:
    """Read ``.safetensors``, or a pickle by ``torch.load(weights_only=True)``.

    Dictionaries that wrap the weights under ``model``, ``state_dict`` or ``module`` are unwrapped,
    and the prefix ``module.`` is cut off.

    Raises:
        CheckpointError: if the file is missing, corrupt, needs code to load, or holds no tensors.
    """
    if not path.is_file():
        raise CheckpointError(f"the checkpoint {path} does not exist")
    try:
        content: Any = (
            load_file(path)
            if path.suffix == ".safetensors"
            else torch.load(path, map_location="cpu", weights_only=True)
        )
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path} is not loadable with weights_only=True, or is corrupt: save its state_dict alone, "
            f"best as .safetensors ({str(error).splitlines()[0]})"
        ) from error
    except Exception as error:
        raise CheckpointError(f"{path} is corrupt or no weight file: {error}") from error
    while isinstance(content, Mapping):
        inner = next((content[key] for key in ("model", "state_dict", "module") if key in content), None)
        if not isinstance(inner, Mapping):
            break
        content = inner
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{path} holds a {type(content).__name__}, not a state dict")
    weights = {
        str(name).removeprefix("module."): value
        for name, value in content.items()
        if isinstance(value, Tensor)
    }
    if not weights:
        raise CheckpointError(f"{path} holds no tensors")
    return weights


def write_weights(path: Path, weights: Mapping[str, Tensor], *, dtype: torch.dtype | None = None) -> None:
    """Write ``.safetensors``; floating-point tensors are converted to `dtype` if it is given."""
    converted = {
        name: (value.to(dtype) if dtype is not None and value.is_floating_point() else value).contiguous()
        for name, value in weights.items()
    }
    partial = path.with_name(path.name + ".partial")
    partial.touch()
    mode = partial.stat().st_mode
    save_file({name: value.cpu() for name, value in converted.items()}, partial)
    partial.chmod(mode)  # safetensors lets only the owner read; an output folder may be shared
    os.replace(partial, path)
