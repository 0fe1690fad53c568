"""Mask2Former as its authors' code (Detectron2) writes it, in the names of transformers, which ours are.

The map of names is that of transformers' script for its own conversion of these files. The backbone keeps its
names, which are Microsoft's, and so does ``criterion.empty_weight``.
"""

import re
from collections.abc import Collection, Sequence
from typing import Any

from sparsevit.checkpoints.files import Checkpoint, Weights
from sparsevit.checkpoints.foreign import Imported

_FIRST_VERSION = re.compile(r"^sem_seg_head\.(?!predictor\.|pixel_decoder\.)")
"""Before its version 2 the pixel decoder's parts stood in the head itself."""
_ENCODER = r"^sem_seg_head\.pixel_decoder\.transformer\.encoder\.layers\.(\d+)\."
_PIXEL_DECODER = r"^sem_seg_head\.pixel_decoder\."
_PREDICTOR = r"^sem_seg_head\.predictor\."
_NAMES = (
    (_ENCODER + r"self_attn\.", r"pixel_decoder.encoder.layers.\1.self_attn."),
    (_ENCODER + r"norm1\.", r"pixel_decoder.encoder.layers.\1.self_attn_layer_norm."),
    (_ENCODER + r"linear([12])\.", r"pixel_decoder.encoder.layers.\1.fc\2."),
    (_ENCODER + r"norm2\.", r"pixel_decoder.encoder.layers.\1.final_layer_norm."),
    (_PIXEL_DECODER + r"transformer\.level_embed$", r"pixel_decoder.level_embed"),
    (_PIXEL_DECODER + r"input_proj\.", r"pixel_decoder.input_projections."),
    (_PIXEL_DECODER + r"mask_features\.", r"pixel_decoder.mask_projection."),
    (_PIXEL_DECODER + r"(adapter_1|layer_1)\.norm\.", r"pixel_decoder.\1.1."),
    (_PIXEL_DECODER + r"(adapter_1|layer_1)\.", r"pixel_decoder.\1.0."),
    (
        _PREDICTOR + r"transformer_(self|cross)_attention_layers\.(\d+)\.(?:self|multihead)_attn\.",
        r"transformer.decoder.layers.\2.\1_attn.",
    ),
    (
        _PREDICTOR + r"transformer_(self|cross)_attention_layers\.(\d+)\.norm\.",
        r"transformer.decoder.layers.\2.\1_attn_layer_norm.",
    ),
    (_PREDICTOR + r"transformer_ffn_layers\.(\d+)\.linear([12])\.", r"transformer.decoder.layers.\1.fc\2."),
    (
        _PREDICTOR + r"transformer_ffn_layers\.(\d+)\.norm\.",
        r"transformer.decoder.layers.\1.final_layer_norm.",
    ),
    (_PREDICTOR + r"decoder_norm\.", r"transformer.decoder.layernorm."),
    (_PREDICTOR + r"mask_embed\.layers\.(\d+)\.", r"transformer.decoder.mask_predictor.mask_embedder.\1.0."),
    (_PREDICTOR + r"query_embed\.", r"transformer.queries_embedder."),
    (_PREDICTOR + r"(?:query_feat|static_query)\.", r"transformer.queries_features."),  # renamed in version 2
    (_PREDICTOR + r"level_embed\.", r"transformer.level_embed."),
    (_PREDICTOR + r"class_embed\.", r"class_predictor."),
)
"""Theirs, and what ours have instead; the first that is found counts."""
_JOINED = re.compile(r"(.*\.self_attn)\.in_proj_(weight|bias)")
"""Query, key and value of the decoder's self-attention: three layers here. Cross-attention keeps one."""


class Detectron2Mask2Former:
    """These files as a format. The backbone and what is not known keep their names."""

    name = "detectron2"

    def recognises(self, names: Collection[str]) -> bool:
        marks = _PREDICTOR + r"transformer_(self|cross)_attention_layers\."
        return any(re.match(marks, name) for name in names)

    def convert(self, checkpoint: Checkpoint, config: Any, class_names: Sequence[str] | None) -> Imported:
        converted: Weights = {}
        for name, value in checkpoint.weights.items():
            ours = _our_name(name)
            joined = _JOINED.fullmatch(ours)
            if joined is None:
                converted[ours] = value
                continue
            layer, leaf = joined.groups()
            for part, rows in zip("qkv", value.chunk(3), strict=True):
                converted[f"{layer}.{part}_proj.{leaf}"] = rows
        return Imported(checkpoint.path, converted, self.name, config, config)


def _our_name(name: str) -> str:
    current = _FIRST_VERSION.sub("sem_seg_head.pixel_decoder.", name)
    renamed = (re.subn(theirs, ours, current) for theirs, ours in _NAMES)
    return next((new for new, count in renamed if count), name)
