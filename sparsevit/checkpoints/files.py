"""Weight files: read safely, written all or nothing."""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparsevit.checkpoints.torch_files import NotWeightsError, read_torch_file
from sparsevit.checkpoints.wrappers import unwrap

Weights = dict[str, Tensor]


class CheckpointError(ValueError):
    """A weight file cannot be used; the message names the file, what is wrong and what would do."""


@dataclass(frozen=True)
class Checkpoint:
    """Weights of a file by name, and what the file says beside them.

    Attributes:
        weights: unwrapped, under the names of the network itself.
        meta: what mmengine and mmcv note there: values, arrays, and stubs for objects of other classes.
    """

    path: Path
    weights: Weights
    meta: Mapping[str, Any]


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


def check_finite(weights: Mapping[str, Tensor], path: Path) -> None:
    """Refuse weights with values that are infinite or no numbers; needs no memory but for what it names.

    Raises:
        CheckpointError: naming the first such tensors, and how many of their values are meant.
    """
    faulty = []
    for name, value in weights.items():
        if value.is_floating_point() and value.numel():
            limits = torch.stack(torch.aminmax(value if value.itemsize > 1 else value.float()))
            if not limits.isfinite().all():
                count = value.numel() - int(value.float().isfinite().sum())
                faulty.append(f"{name} ({count} of {value.numel()} values)")
    if faulty:
        raise CheckpointError(
            f"{path} holds NaN or infinity: {', '.join(faulty[:3])}{' …' if len(faulty) > 3 else ''} (in "
            f"{len(faulty)} of {len(weights)} tensors). The training that wrote it diverged: take an earlier "
            "checkpoint"
        )


def read_weights(path: Path) -> Weights:
    """The weights of `read_checkpoint`."""
    return read_checkpoint(path).weights


def read_checkpoint(path: Path) -> Checkpoint:
    """Read a file of safetensors, of `torch.save`, a pickle of NumPy arrays, or a folder of the first two.

    What a file is, is seen from its content. Nothing in it is run: objects other than tensors and arrays are
    left out. Tensors are mapped from disk where the file allows it, so that loading needs no second copy in
    memory. A folder is one of Hugging Face's ``save_pretrained``, in one file or in shards.

    Weights that are wrapped in dictionaries are found (averaged ones are preferred), and the prefixes of
    `DistributedDataParallel`, fully sharded data parallelism, `torch.compile` and the like are cut off.

    Raises:
        CheckpointError: if there is no such file, or it is corrupt or holds no tensors; the message says what
            it is instead, and what would do.
    """
    files = _files_of_folder(path) if path.is_dir() else [path]
    contents = [_read_file(file) for file in files]
    content = (
        {key: value for each in contents for key, value in each.items()} if path.is_dir() else contents[0]
    )
    try:
        weights = unwrap(content)
    except NotWeightsError as error:
        raise CheckpointError(f"{path} {error}") from error
    meta = content.get("meta")
    return Checkpoint(path, weights, meta if isinstance(meta, Mapping) else {})


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
    if (folder / ".metadata").is_file():
        raise CheckpointError(
            f"{folder} is a distributed checkpoint, in pieces: join them by `python -m "
            f"torch.distributed.checkpoint.format_utils dcp_to_torch {folder} {folder}.pth`"
        )
    raise CheckpointError(
        f"the folder {folder} holds neither model.safetensors nor pytorch_model.bin, whole or in shards"
    )


def _read_file(path: Path) -> Any:
    try:
        with path.open("rb") as file:
            start = file.read(1024)
    except FileNotFoundError as error:
        raise CheckpointError(f"the checkpoint {path} does not exist") from error
    except OSError as error:
        raise CheckpointError(f"the checkpoint {path} cannot be read: {error.strerror}") from error
    wrong = _what_it_is(start)
    if wrong is not None:
        raise CheckpointError(f"{path} {wrong}")
    try:
        if start[5:9] == b"\0\0\0{":  # safetensors: the length of a header in eight bytes, and JSON
            from safetensors.torch import load_file  # measuring a device needs torch alone

            return load_file(path)
        return read_torch_file(path)
    except NotWeightsError as error:
        raise CheckpointError(f"{path} {error}") from error
    except Exception as error:  # a damaged file can fail anywhere, in any way
        raise CheckpointError(
            f"{path} is corrupt or no weight file ({type(error).__name__}: {str(error)[:200]}): download it "
            "again, or save a state dict, best as .safetensors"
        ) from error


def _what_it_is(start: bytes) -> str | None:
    """What a file is that is no weight file, from its first bytes, and what to do."""
    text = start.lstrip(b"\xef\xbb\xbf \t\r\n")
    if not start:
        return "is empty: it was not downloaded or written. Download or save it again"
    if text.startswith(b"version https://git-lfs"):
        return "is a pointer of Git LFS, not the file itself: run `git lfs pull` where it was cloned"
    if text.startswith(b"<"):
        return "is a web page, not a weight file: download it again, by the link of the file itself"
    if text.startswith((b'{"', b"{\n", b"[{")):
        beginning = " ".join(text[:60].decode(errors="replace").split())
        return f"is text ({beginning} …), not a weight file: download it again"
    if start.startswith((b"\x1f\x8b", b"7z\xbc\xaf", b"Rar!")) or start[257:262] == b"ustar":
        return "is a packed archive: unpack it, and name the weight file in it"
    return None


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
