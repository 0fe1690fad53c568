"""Backbone weights in and out: other libraries' files, recognised by the names in them."""

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from sparsevit.backbone import BACKBONES, SparseSwin
from sparsevit.checkpoints.files import (
    CheckpointError,
    Weights,
    check_finite,
    mismatch_error,
    read_weights,
    write_weights,
)
from sparsevit.checkpoints.formats import (
    BIAS_TABLE,
    FORMATS,
    RECOMPUTED,
    SwinFormat,
    concatenated_order,
    resize_bias_table,
    unfold_order,
)
from sparsevit.windows import relative_position_index

_HEADS = re.compile(
    r"(head|classifier|decoder|fpn|neck|rpn|rpn_head|roi_head|roi_heads|aux_head|pooler|swin\.layernorm)\b"
    r"|(.*\.)?mask_token$"  # of masked image modelling
)


@dataclass(frozen=True)
class LoadReport:
    """What happened to the names of a file.

    Attributes:
        format: how the file was recognised.
        prefix: what stood before the backbone's names.
        missing: our tensors that kept their values: norms of stages that a classifier lacks.
        resized: our bias tables that were resampled from another window size.
        left_over: names in the file that no backbone has, such as heads and recomputable buffers.
    """

    format: str
    prefix: str
    missing: tuple[str, ...]
    resized: tuple[str, ...]
    left_over: tuple[str, ...]


@dataclass(frozen=True)
class _Match:
    """A reading of a file: one format under one prefix, and where it finds each of our tensors."""

    format: SwinFormat
    prefix: str
    found: Mapping[str, tuple[str, ...]]
    absent: Mapping[str, tuple[str, ...]]


def load_backbone_weights(backbone: SparseSwin, path: str | Path, *, prefix: str | None = None) -> LoadReport:
    """Load a checkpoint into `backbone`, whatever library wrote it.

    Known are this project, torchvision, timm, Microsoft (classification and detection), Hugging Face
    (also a ``save_pretrained`` folder) and mmdet, mmseg and the SparseViT release. The bias tables of
    another window size are resampled bicubically. On an error the backbone keeps its weights.

    Args:
        prefix: of the backbone's names, where a file holds several backbones.

    Raises:
        CheckpointError: if the file is unusable, ambiguous or of another architecture: names or
            shapes that do not match are listed.
    """
    path = Path(path)
    plan = plan_backbone(backbone, read_weights(path), path, prefix=prefix)
    plan.load()
    return plan.report


@dataclass(frozen=True)
class BackbonePlan:
    """A file that fits the backbone, not loaded yet."""

    report: LoadReport
    _match: _Match
    _weights: Mapping[str, Tensor]
    _own: Mapping[str, Tensor]

    def load(self) -> None:
        """Copy the values into the backbone."""
        with torch.no_grad():
            for name, value in _converted(self._match, self._weights, self._own):
                self._own[name].copy_(value)


def plan_backbone(
    backbone: SparseSwin, weights: Mapping[str, Tensor], path: Path, *, prefix: str | None = None
) -> BackbonePlan:
    """Find out what `load_backbone_weights` would do with tensors that were read already.

    Args:
        path: of the file, for the errors.
    """
    own = backbone.state_dict()
    match = _recognise(weights, own, len(backbone.depths), prefix, path)
    report, unexpected, missing, wrong_shape = _compare(match, weights, own)
    if unexpected or missing or wrong_shape:
        raise mismatch_error(
            f"{path} is not a checkpoint of this backbone{_fitting(weights, prefix, path)} (read as "
            f"{match.format.name}, prefix {match.prefix!r})",
            unexpected=unexpected,
            missing=missing,
            wrong_shape=wrong_shape,
        )
    check_finite({name: weights[name] for names in match.found.values() for name in names}, path)
    return BackbonePlan(report, match, weights, own)


def export_backbone_weights(backbone: SparseSwin, path: str | Path, format: str) -> tuple[str, ...]:
    """Write the weights as another library names and orders them; `load_backbone_weights` reads them back.

    Args:
        path: ``.safetensors``, or ``.pth`` for a pickled state dict. For ``huggingface`` a folder,
            which ``SwinBackbone.from_pretrained`` loads.
        format: ``torchvision``, ``timm``, ``huggingface``, ``mmdet``, ``microsoft`` or ``sparsevit``.

    Returns:
        Our tensors that the library has no place for: a classifier lacks the norms of all stages
        but the last.

    Raises:
        ValueError: for an unknown format, listing the known ones.
    """
    path = Path(path)
    weights, left_out = named_weights(backbone, format)
    if format == "huggingface":
        last = f"norms.{len(backbone.depths) - 1}"
        for leaf in ("weight", "bias"):  # SwinBackbone has it, and does not use it
            weights[f"swin.layernorm.{leaf}"] = backbone.state_dict()[f"{last}.{leaf}"].clone()
        _write_huggingface(path, weights, backbone)
    else:
        write_weights(path, weights)
    return left_out


def named_weights(backbone: SparseSwin, format: str) -> tuple[Weights, tuple[str, ...]]:
    """The weights as another library names and orders them, and our tensors that it has no place for.

    Raises:
        ValueError: for an unknown format, listing the known ones.
    """
    known = {each.name: each for each in reversed(FORMATS)}
    if format not in known:
        raise ValueError(f"unknown format {format!r}; choose one of {', '.join(sorted(known))}")
    target = known[format]
    left_out = []
    weights: Weights = {}
    for name, value in backbone.state_dict().items():
        theirs = target.names(name, len(backbone.depths))
        if not theirs:
            left_out.append(name)
            continue
        if target.unfolds and name.startswith("downsamples."):
            value = unfold_order(value)
        weights |= {each: part.clone() for each, part in zip(theirs, value.chunk(len(theirs)), strict=True)}
        if name.endswith(BIAS_TABLE) and target.index is not None:
            index = relative_position_index(backbone.config.window_size)
            buffer = theirs[0].removesuffix("_bias_table") + "_index"
            weights[buffer] = (index.flatten() if target.index == "flat" else index).clone()
    return weights, tuple(left_out)


def _recognise(
    weights: Mapping[str, Tensor], own: Mapping[str, Tensor], num_stages: int, prefix: str | None, path: Path
) -> _Match:
    """The reading of the file that finds most of our tensors."""
    matches = [
        _match(each, found_prefix, weights, own, num_stages)
        for each in FORMATS
        for found_prefix in (_prefixes(each, weights) if prefix is None else (prefix,))
    ]
    most = max((len(match.found) for match in matches), default=0)
    if most == 0:
        raise mismatch_error(
            f"{path} holds no Swin backbone" + ("" if prefix is None else f" under the prefix {prefix!r}"),
            unexpected=list(weights),
            missing=[],
            wrong_shape=[],
        )
    best = {frozenset(match.found.values()): match for match in reversed(matches) if len(match.found) == most}
    if len(best) > 1:
        prefixes = sorted({match.prefix for match in best.values()})
        raise CheckpointError(
            f"{path} holds several backbones, under {', '.join(map(repr, prefixes))}: save the one you want "
            "alone, or choose it by load_backbone_weights(…, prefix=…)"
        )
    return next(iter(best.values()))


def _prefixes(format: SwinFormat, weights: Mapping[str, Tensor]) -> Iterator[str]:
    """What stands before the patch embedding's name, wherever it occurs."""
    (anchor,) = format.names("patch_embed.proj.weight", 1)
    for name in weights:
        if name == anchor or name.endswith("." + anchor):
            yield name.removesuffix(anchor)


def _match(
    format: SwinFormat, prefix: str, weights: Mapping[str, Tensor], own: Mapping[str, Tensor], num_stages: int
) -> _Match:
    found, absent = {}, {}
    for name in own:
        theirs = tuple(prefix + each for each in format.names(name, num_stages))
        if theirs and all(each in weights for each in theirs):
            found[name] = theirs
        else:
            absent[name] = theirs
    return _Match(format, prefix, found, absent)


def _converted(
    match: _Match, weights: Mapping[str, Tensor], own: Mapping[str, Tensor]
) -> Iterator[tuple[str, Tensor]]:
    """Our names and the values for them, one at a time, so that none needs memory for long."""
    for name, theirs in match.found.items():
        value = _gather(match.format, name, weights, theirs)
        if name.endswith(BIAS_TABLE) and value.shape[0] != own[name].shape[0] and _is_square(value.shape[0]):
            value = resize_bias_table(value, own[name].shape[0])
        yield name, value


def _gather(format: SwinFormat, name: str, weights: Mapping[str, Tensor], theirs: tuple[str, ...]) -> Tensor:
    value = weights[theirs[0]] if len(theirs) == 1 else torch.cat([weights[each] for each in theirs])
    if format.unfolds and name.startswith("downsamples.") and value.shape[-1] % 4 == 0:
        return concatenated_order(value)
    return value


def _compare(
    match: _Match, weights: Mapping[str, Tensor], own: Mapping[str, Tensor]
) -> tuple[LoadReport, list[str], list[str], list[str]]:
    """What loading would do; and what keeps it from that: names too many, too few, and other shapes."""
    resized, wrong_shape = [], []
    for name, value in _converted(match, weights, own):
        if value.shape != own[name].shape:
            wrong_shape.append(f"{name}: {tuple(value.shape)} in the file, {tuple(own[name].shape)} here")
        elif name.endswith(BIAS_TABLE) and weights[match.found[name][0]].shape != value.shape:
            resized.append(name)
    consumed = {theirs for names in match.found.values() for theirs in names}
    rest = [name for name in weights if name not in consumed]
    unexpected = [
        name
        for name in rest
        if name.startswith(match.prefix)
        and not RECOMPUTED.search(name)
        and not _HEADS.match(name.removeprefix(match.prefix))
    ]
    absent = [name for name in own if name not in match.found]
    missing = [" + ".join(match.absent[name]) for name in absent if not name.startswith("norms.")]
    report = LoadReport(match.format.name, match.prefix, tuple(absent), tuple(resized), tuple(rest))
    return report, unexpected, missing, wrong_shape


def _fitting(weights: Mapping[str, Tensor], prefix: str | None, path: Path) -> str:
    """Names of our backbones that the file fits as it is, to say so."""
    fitting = []
    for name, config in BACKBONES.items():
        with torch.device("meta"):
            own = SparseSwin(config).state_dict()
        match = _recognise(weights, own, len(config.depths), prefix, path)
        report, *faults = _compare(match, weights, own)
        if not any(faults) and not report.resized:
            fitting.append(name)
    return f", but of {' or '.join(fitting)}" if fitting else ""


def _is_square(number: int) -> bool:
    return math.isqrt(number) ** 2 == number


def _write_huggingface(folder: Path, weights: Weights, backbone: SparseSwin) -> None:
    """What ``save_pretrained`` writes: the weights, and a configuration that builds the network."""
    folder.mkdir(parents=True, exist_ok=True)
    config = backbone.config
    content = {
        "model_type": "swin",
        "architectures": ["SwinBackbone"],
        "embed_dim": config.embed_dim,
        "depths": list(config.depths),
        "num_heads": list(config.num_heads),
        "window_size": config.window_size,
        "patch_size": config.patch_size,
        "mlp_ratio": config.mlp_ratio,
        "out_features": [f"stage{stage + 1}" for stage in range(len(config.depths))],
    }
    write_weights(folder / "model.safetensors", weights)
    (folder / "config.json").write_text(json.dumps(content, indent=2))
