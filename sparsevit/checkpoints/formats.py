"""Names and layouts under which libraries keep the weights of a Swin backbone.

A format says where each of our tensors is in its files, so that one table serves reading and
writing. Our own names: ``patch_embed.proj``, ``stages.i.blocks.j.attn.qkv``, ``downsamples.i.norm``,
``norms.i``, each with ``.weight`` and perhaps ``.bias``.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Literal

import torch
from torch import Tensor

BIAS_TABLE = "attn.relative_position_bias_table"
RECOMPUTED = re.compile(r"(^|\.)(relative_position_index|attn_mask|relative_coords_table)$")
_OURS = re.compile(
    r"(?P<patch>patch_embed\.\w+)|stages\.(?P<block_stage>\d+)\.blocks\.(?P<block>\d+)\.(?P<part>.+)"
    r"|downsamples\.(?P<merging_stage>\d+)\.(?P<merging>\w+)|norms\.(?P<norm_stage>\d+)"
)
_UNFOLDED = (0, 2, 1, 3)  # nn.Unfold reads the 2 × 2 corners row by row, every Swin but mmdet's by column


@dataclass(frozen=True)
class SwinFormat:
    """Where a library keeps each part of a Swin.

    Templates may use ``{stage}``, ``{block}``, ``{next}`` (stage + 1), ``{odd}`` (2 · stage + 1) and
    ``{even}`` (2 · stage + 2).

    Attributes:
        block: prefix of a block.
        merging: prefix of the patch merging after a stage.
        stage_norm: the norm of a stage's output, if the library has one for every stage.
        last_norm: the norm of the last stage's output, if a classifier has that one alone.
        parts: our module names to theirs, where they differ; three names hold a tensor that is
            split along its first axis (query, key, value).
        unfolds: whether patch merging orders its channels as ``nn.Unfold`` does.
        index: shape of the recomputable ``relative_position_index`` that the library wants to find.
    """

    name: str
    block: str
    merging: str
    stage_norm: str | None = None
    last_norm: str | None = None
    parts: Mapping[str, str | tuple[str, ...]] = field(default_factory=lambda: MappingProxyType({}))
    unfolds: bool = False
    index: Literal["flat", "square"] | None = None

    def names(self, ours: str, num_stages: int) -> tuple[str, ...]:
        """Where our tensor is; several names if it is split; none if the library does not have it."""
        module, _, leaf = ours.rpartition(".")
        if leaf not in ("weight", "bias"):
            module, leaf = ours, ""
        matched = _OURS.fullmatch(module)
        if matched is None:
            raise ValueError(f"{ours!r} is no tensor of a backbone")
        stage = next((int(v) for k, v in matched.groupdict().items() if k.endswith("stage") and v), 0)
        indices = {"stage": stage, "next": stage + 1, "odd": 2 * stage + 1, "even": 2 * stage + 2}
        prefix, part = "", ""
        if matched["patch"]:
            part = matched["patch"]
        elif matched["part"]:
            prefix, part = self.block.format(block=matched["block"], **indices) + ".", matched["part"]
        elif matched["merging"]:
            prefix, part = self.merging.format(**indices) + ".", matched["merging"]
        elif self.stage_norm is not None:
            part = self.stage_norm.format(**indices)
        elif self.last_norm is not None and stage == num_stages - 1:
            part = self.last_norm
        else:
            return ()
        theirs = self.parts.get(part, part)
        suffix = f".{leaf}" if leaf else ""
        return tuple(f"{prefix}{name}{suffix}" for name in ((theirs,) if isinstance(theirs, str) else theirs))


_HUGGINGFACE_DISK: dict[str, str | tuple[str, ...]] = {
    "patch_embed.proj": "embeddings.patch_embeddings.projection",
    "patch_embed.norm": "embeddings.norm",
    "norm1": "layernorm_before",
    "norm2": "layernorm_after",
    "attn.qkv": ("attention.self.query", "attention.self.key", "attention.self.value"),
    "attn.proj": "attention.output.dense",
    BIAS_TABLE: "attention.self.relative_position_bias_table",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
}
_HUGGINGFACE_MEMORY: dict[str, str | tuple[str, ...]] = {
    **_HUGGINGFACE_DISK,
    "attn.qkv": ("attention.q_proj", "attention.k_proj", "attention.v_proj"),
    "attn.proj": "attention.o_proj",
    BIAS_TABLE: "attention.relative_position_bias.relative_position_bias_table",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}


def _with_either_norm(name: str, stage_norm: str, last_norm: str, **fields: object) -> tuple[SwinFormat, ...]:
    """A library whose backbones have a norm per stage and whose classifiers have one."""
    return (
        SwinFormat(name, stage_norm=stage_norm, **fields),  # type: ignore[arg-type]
        SwinFormat(name, last_norm=last_norm, **fields),  # type: ignore[arg-type]
    )


FORMATS: tuple[SwinFormat, ...] = (
    SwinFormat("sparsevit", "stages.{stage}.blocks.{block}", "downsamples.{stage}", "norms.{stage}"),
    SwinFormat(
        "torchvision",
        "features.{odd}.{block}",
        "features.{even}",
        last_norm="norm",
        parts={
            "patch_embed.proj": "features.0.0",
            "patch_embed.norm": "features.0.2",
            "mlp.fc1": "mlp.0",
            "mlp.fc2": "mlp.3",
        },
        index="flat",
    ),
    SwinFormat("timm", "layers.{stage}.blocks.{block}", "layers.{next}.downsample", last_norm="norm"),
    SwinFormat("timm", "layers_{stage}.blocks.{block}", "layers_{next}.downsample"),  # features_only
    *_with_either_norm(
        "microsoft",
        "norm{stage}",
        "norm",
        block="layers.{stage}.blocks.{block}",
        merging="layers.{stage}.downsample",
        index="square",
    ),
    *(
        found
        for parts in (_HUGGINGFACE_DISK, _HUGGINGFACE_MEMORY)
        # Version 5 keeps the network under "swin." in memory, the norms beside it.
        for inside in ("", "swin.")
        for found in _with_either_norm(
            "huggingface",
            "hidden_states_norms.stage{next}",
            f"{inside}layernorm",
            block=inside + "encoder.layers.{stage}.blocks.{block}",
            merging=inside + "encoder.layers.{stage}.downsample",
            parts={
                key: f"{inside}{each}" if key.startswith("patch") else each for key, each in parts.items()
            },
        )
    ),
    SwinFormat(
        "mmdet",
        "stages.{stage}.blocks.{block}",
        "stages.{stage}.downsample",
        "norm{stage}",
        parts={
            "patch_embed.proj": "patch_embed.projection",
            "attn.qkv": "attn.w_msa.qkv",
            "attn.proj": "attn.w_msa.proj",
            BIAS_TABLE: "attn.w_msa.relative_position_bias_table",
            "mlp.fc1": "ffn.layers.0.0",
            "mlp.fc2": "ffn.layers.1",
        },
        unfolds=True,
        index="square",
    ),
)


def unfold_order(merged: Tensor) -> Tensor:
    """Merged channels, on the last axis, from the order of every Swin to that of ``nn.Unfold``."""
    corners = merged.reshape(*merged.shape[:-1], 4, -1)[..., _UNFOLDED, :]
    return corners.transpose(-1, -2).reshape(merged.shape)


def concatenated_order(unfolded: Tensor) -> Tensor:
    """The inverse of `unfold_order`."""
    corners = unfolded.reshape(*unfolded.shape[:-1], -1, 4).transpose(-1, -2)
    return corners[..., _UNFOLDED, :].reshape(unfolded.shape)


def resize_bias_table(table: Tensor, num_positions: int) -> Tensor:
    """Resample a table of relative positions, [(2w − 1)², heads], for another window size, bicubically."""
    old, new = round(table.shape[0] ** 0.5), round(num_positions**0.5)
    grid = table.float().T.reshape(1, -1, old, old)
    resized = torch.nn.functional.interpolate(grid, size=(new, new), mode="bicubic", align_corners=False)
    return resized.reshape(-1, num_positions).T.contiguous().to(table.dtype)
