"""Weight files: read safely, written all or nothing."""

import json
import os
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from zipfile import is_zipfile

import torch
from torch import Tensor

Weights = dict[str, Tensor]
_WRAPPERS = ("state_dict_ema", "model_ema", "model", "state_dict", "module")


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
    """Read ``.safetensors``, a pickle by ``torch.load(weights_only=True)``, or a folder of either.

    Tensors are mapped from disk where the file allows it, so that loading needs no second copy in
    memory. A folder is one of Hugging Face's ``save_pretrained``, in one file or in shards.
    Dictionaries that wrap the weights (averaged ones are preferred) are unwrapped, and the prefix
    ``module.`` is cut off.

    Raises:
        CheckpointError: if the file is missing, corrupt, needs code to load, or holds no tensors.
    """
    if path.is_dir():
        content: Any = {}
        for file in _files_of_folder(path):
            content |= _read_file(file)
    elif path.is_file():
        content = _read_file(path)
    else:
        raise CheckpointError(f"the checkpoint {path} does not exist")
    while isinstance(content, Mapping):
        inner = next((content[key] for key in _WRAPPERS if isinstance(content.get(key), Mapping)), None)
        if inner is None:
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


def _files_of_folder(folder: Path) -> list[Path]:
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (folder / name).is_file():
            return [folder / name]
        index = folder / f"{name}.index.json"
        if index.is_file():
            try:
                shards = sorted(set(json.loads(index.read_text())["weight_map"].values()))
            except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
                raise CheckpointError(f"{index} is not an index of shards: {error}") from error
            missing = [shard for shard in shards if not (folder / Path(shard).name).is_file()]
            if missing:
                raise CheckpointError(f"{index} names shards that are not there: {', '.join(missing)}")
            return [folder / Path(shard).name for shard in shards]
    raise CheckpointError(
        f"the folder {folder} holds neither model.safetensors nor pytorch_model.bin, whole or in shards"
    )


def _read_file(path: Path) -> Any:
    from safetensors.torch import load_file  # measuring a device needs torch alone

    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True, mmap=is_zipfile(path))
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path} is not loadable with weights_only=True, or is corrupt: save its state_dict alone, "
            f"best as .safetensors ({str(error).splitlines()[0]})"
        ) from error
    except Exception as error:
        raise CheckpointError(f"{path} is corrupt or no weight file: {error}") from error


def write_weights(path: Path, weights: Mapping[str, Tensor], *, dtype: torch.dtype | None = None) -> None:
    """Write ``.safetensors``, or a pickled state dict for any other suffix, all or nothing.

    Floating-point tensors are converted to `dtype` if it is given.
    """
    converted = {
        name: (value.to(dtype) if dtype is not None and value.is_floating_point() else value).contiguous()
        for name, value in weights.items()
    }
    from safetensors.torch import save_file

    partial = path.with_name(path.name + ".partial")
    partial.touch()
    mode = partial.stat().st_mode
    on_cpu = {name: value.cpu() for name, value in converted.items()}
    if path.suffix == ".safetensors":
        save_file(on_cpu, partial)
    else:
        torch.save(on_cpu, partial)
    partial.chmod(mode)  # safetensors lets only the owner read; an output folder may be shared
    os.replace(partial, path)
