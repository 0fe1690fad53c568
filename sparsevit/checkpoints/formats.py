"""Names and layouts under which other libraries keep the weights of a Swin backbone.

A format says where each of our tensors is in its files, so one table serves reading and writing.
Our names: ``patch_embed.proj``, ``stages.i.blocks.j.attn.qkv``, ``downsamples.i.norm``, ``norms.i`` …
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

BIAS_TABLE = "attn.relative_position_bias_table"


@dataclass(frozen=True)
class SwinFormat:
    """Where a library keeps each part of a Swin.

    Templates may use ``{stage}``, ``{block}``, ``{next}`` (stage + 1), ``{odd}`` (2 · stage + 1) and
    ``{even}`` (2 · stage + 2).

    Attributes:
        parts: a module of a block, and ``patch_embed.proj``, ``patch_embed.norm``, to its name there.
            Three names split a tensor along its first axis (query, key, value).
        block: prefix of a block.
        merging: prefix of the patch merging after a stage.
        stage_norm: the norm of a stage's output, where the format has one per stage.
        last_norm: the norm of the last stage's output, where a classifier has that one alone.
        unfold_merging: whether merged channels are ordered as ``nn.Unfold`` orders them.
        index_buffer: the recomputable position index that the library keeps in its files, and its shape.
    """

    name: str
    block: str
    merging: str
    stage_norm: str | None = None
    last_norm: str | None = None
    parts: Mapping[str, str | tuple[str, ...]] = field(default_factory=dict)
    unfold_merging: bool = False
    index_buffer: Literal["none", "flat", "square"] = "none"
