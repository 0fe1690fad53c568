"""Backbone weights by name, from torchvision, Microsoft (also timm) and this project."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from sparsevit.backbone import SparseSwin
from sparsevit.checkpoints.files import Weights, mismatch_error, read_weights

PREFIXES = ("backbone.body.", "backbone.", "")
_RECOMPUTED = re.compile(r"relative_position_index$|attn_mask$|relative_coords_table$")
_HEADS = re.compile(r"^(head|fpn|rpn|roi_heads|neck|classifier)\b")


@dataclass(frozen=True)
class LoadReport:
    """What happened to the names of a file.

    Attributes:
        format: how the file was recognised.
        missing: backbone tensors that kept their initial value: norms of stages that a classifier lacks.
        left_over: names in the file that no backbone has, such as heads.
    """

    format: str
    missing: tuple[str, ...]
    left_over: tuple[str, ...]


def load_backbone_weights(backbone: SparseSwin, path: str | Path) -> LoadReport:
    """Load a checkpoint into `backbone`, whatever library wrote it.

    Raises:
        CheckpointError: if the file is unusable, or of another architecture: names or shapes that
            do not match are listed.
    """
    path = Path(path)
    weights = read_weights(path)
    own = backbone.state_dict()
    format_name, renamed, left_over = recognise(weights, len(backbone.depths))
    unknown = sorted(name for name in renamed if name not in own)
    wrong_shape = [
        f"{name}: {tuple(value.shape)} in the file, {tuple(own[name].shape)} here"
        for name, value in sorted(renamed.items())
        if name in own and value.shape != own[name].shape
    ]
    missing = sorted(name for name in own if name not in renamed)
    essential = [name for name in missing if not name.startswith("norms.")]
    if unknown or wrong_shape or essential:
        raise mismatch_error(
            f"{path} is not a checkpoint of this backbone",
            unexpected=unknown,
            missing=essential,
            wrong_shape=wrong_shape,
        )
    backbone.load_state_dict(renamed, strict=False)
    return LoadReport(format_name, tuple(missing), tuple(left_over))


def recognise(weights: Mapping[str, Tensor], num_stages: int) -> tuple[str, Weights, list[str]]:
    """Format, weights under our names, and names that are no backbone's."""
    prefix = next(
        prefix
        for prefix in PREFIXES
        if prefix == ""
        or any(name.startswith((f"{prefix}patch_embed.", f"{prefix}features.0.")) for name in weights)
    )
    inside = {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
    left_over = [name for name in weights if not name.startswith(prefix)]
    if any(name.startswith("features.0.") for name in inside):
        format_name, rename = "torchvision", _from_torchvision
    elif any(name.startswith("layers.") for name in inside):
        format_name, rename = "microsoft", _from_microsoft
    else:
        format_name, rename = "sparsevit", _unchanged
    renamed: Weights = {}
    for name, value in inside.items():
        if _RECOMPUTED.search(name):
            continue
        if _HEADS.match(name):
            left_over.append(prefix + name)
            continue
        renamed[rename(name, num_stages)] = value
    return format_name, renamed, left_over


def _unchanged(name: str, num_stages: int) -> str:
    return name


def _from_torchvision(name: str, num_stages: int) -> str:
    """``features.(2i+1).j`` is block j of stage i, ``features.(2i+2)`` the merging after it."""
    name = re.sub(r"^norm\.", f"norms.{num_stages - 1}.", name)
    name = name.replace("features.0.0.", "patch_embed.proj.").replace("features.0.2.", "patch_embed.norm.")
    name = re.sub(r"\.mlp\.0\.", ".mlp.fc1.", name)
    name = re.sub(r"\.mlp\.3\.", ".mlp.fc2.", name)
    matched = re.match(r"features\.(\d+)\.(.*)", name)
    if matched is None:
        return name
    index, rest = int(matched[1]), matched[2]
    return f"stages.{index // 2}.blocks.{rest}" if index % 2 else f"downsamples.{index // 2 - 1}.{rest}"


def _from_microsoft(name: str, num_stages: int) -> str:
    """``layers.i.blocks.j`` and ``layers.i.downsample``; detection adds ``norm0`` to ``norm3``."""
    name = re.sub(r"^norm\.", f"norms.{num_stages - 1}.", name)
    name = re.sub(r"^norm(\d)\.", r"norms.\1.", name)
    name = re.sub(r"^layers\.(\d+)\.downsample\.", r"downsamples.\1.", name)
    return re.sub(r"^layers\.(\d+)\.", r"stages.\1.", name)
