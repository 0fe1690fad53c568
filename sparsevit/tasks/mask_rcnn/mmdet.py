"""Mask R-CNN of mmdet 2 and 3, of Swin-Transformer-Object-Detection and of the SparseViT release, in and out.

All three have mmdet's names for everything but the backbone, which is recognised by itself.
"""

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sparsevit.checkpoints.backbone import named_weights
from sparsevit.checkpoints.files import Checkpoint, CheckpointError, Weights
from sparsevit.checkpoints.foreign import Imported
from sparsevit.tasks.mask_rcnn.config import MaskRCNNConfig
from sparsevit.tasks.mask_rcnn.mmdet_config import OWN_SETTINGS, as_config, read_settings
from sparsevit.tasks.mask_rcnn.model import SparseMaskRCNN

_BOX, _MASK = "roi_head.bbox_head", "roi_head.mask_head"
_NAMES = (
    ("neck.lateral_convs.{}.conv", "backbone.fpn.inner_blocks.{}.0"),
    ("neck.fpn_convs.{}.conv", "backbone.fpn.layer_blocks.{}.0"),
    ("rpn_head.rpn_conv", "rpn.head.conv.0.0"),
    ("rpn_head.rpn_cls", "rpn.head.cls_logits"),
    ("rpn_head.rpn_reg", "rpn.head.bbox_pred"),
    (f"{_BOX}.shared_fcs.0", "roi_heads.box_head.fc6"),
    (f"{_BOX}.shared_fcs.1", "roi_heads.box_head.fc7"),
    (f"{_BOX}.fc_cls", "roi_heads.box_predictor.cls_score"),
    (f"{_BOX}.fc_reg", "roi_heads.box_predictor.bbox_pred"),
    (f"{_MASK}.convs.{{}}.conv", "roi_heads.mask_head.{}.0"),
    (f"{_MASK}.upsample", "roi_heads.mask_predictor.conv5_mask"),
    (f"{_MASK}.conv_logits", "roi_heads.mask_predictor.mask_fcn_logits"),
)
"""mmdet's modules and ours; braces stand for a number."""


_BOUND = (
    "num_classes", "fpn_channels", "box_channels", "mask_channels", "smallest_anchor", "conventions",
)  # fmt: skip
"""Settings that the weights are only right with."""


class MMDetMaskRCNN:
    """mmdet's format. Its background is the last class, ours the first; boxes and masks have none there."""

    name = "mmdet"

    def recognises(self, names: Collection[str]) -> bool:
        return any(name.startswith(("rpn_head.", "roi_head.")) for name in names)

    def convert(
        self, checkpoint: Checkpoint, config: MaskRCNNConfig, class_names: Sequence[str] | None
    ) -> Imported:
        path, weights = checkpoint.path, checkpoint.weights
        _require_plain(path, weights, checkpoint.meta)
        num_classes = weights[f"{_BOX}.fc_cls.weight"].shape[0] - 1
        rows, notes = _rows(path, _class_names(checkpoint.meta), num_classes, class_names)
        converted = {_ours(name): value for name, value in weights.items()}
        _reorder(converted, rows, num_classes, path)
        settings, told = read_settings(checkpoint.meta, config, path)
        tested = replace(
            settings,
            num_classes=len(rows),
            fpn_channels=converted["backbone.fpn.inner_blocks.0.0.weight"].shape[0],
            box_channels=converted["roi_heads.box_head.fc6.weight"].shape[0],
            mask_channels=converted["roi_heads.mask_head.0.0.weight"].shape[0],
        )
        bound = replace(config, **{name: getattr(tested, name) for name in _BOUND})
        return Imported(path, converted, self.name, bound, tested, notes + told)


def export_mmdet(model: SparseMaskRCNN, path: Path, class_names: Sequence[str]) -> None:
    """Write the model as a checkpoint of mmdet 3, with the class names where mmdet looks for them.

    The weights are those of the dense network: mmdet runs it without a sparsity vector. What the model was
    set to stands beside them, so that it comes back as it was.
    """
    own = model.state_dict()
    weights: Weights = {}
    for name, value in own.items():
        if not name.startswith("backbone.body."):
            theirs, kept = _theirs(name), value
            if theirs.startswith(f"{_BOX}.fc_cls"):
                kept = torch.cat((value[1:], value[:1]))
            elif theirs.startswith(f"{_BOX}.fc_reg"):
                kept = value[4:]
            elif theirs.startswith(f"{_MASK}.conv_logits"):
                kept = value[1:]
            weights[theirs] = kept.detach().cpu().clone()
    backbone, _ = named_weights(model.backbone.body, "mmdet")
    weights |= {f"backbone.{name}": value.cpu() for name, value in backbone.items()}
    meta = {
        "dataset_meta": {"classes": tuple(class_names)},
        "cfg": as_config(model.config),
        OWN_SETTINGS: asdict(model.config),
    }
    partial = path.with_name(path.name + ".partial")
    torch.save({"meta": meta, "state_dict": weights}, partial)
    partial.replace(path)


def _require_plain(path: Path, weights: Weights, meta: Any) -> None:
    """The file holds a plain Mask R-CNN with the usual heads, of mmdet 2 or later."""
    if str(meta.get("mmdet_version", "")).startswith("1."):
        raise CheckpointError(
            f"{path} was written by mmdet {meta['mmdet_version']}: before 2.0 classes and boxes had another "
            "order. mmdet's own tools/model_converters/upgrade_model_version.py brings it up to date"
        )
    cascade = next((name for name in weights if re.match(r"roi_head\.(bbox|mask)_head\.\d+\.", name)), None)
    if cascade is not None:
        raise CheckpointError(
            f"{path} is a Cascade R-CNN, with several box heads in a row ({cascade}); here is a Mask R-CNN "
            "with one. init_heads=random takes its backbone alone"
        )
    modules = [
        "neck.lateral_convs.0.conv", "neck.fpn_convs.0.conv", "rpn_head.rpn_conv", "rpn_head.rpn_cls",
        "rpn_head.rpn_reg", f"{_BOX}.shared_fcs.0", f"{_BOX}.shared_fcs.1", f"{_BOX}.fc_cls",
        f"{_BOX}.fc_reg", f"{_MASK}.convs.0.conv", f"{_MASK}.upsample", f"{_MASK}.conv_logits",
        *(f"backbone.norm{stage}" for stage in range(4)),
    ]  # fmt: skip
    leaves = [f"{module}.{leaf}" for module in modules for leaf in ("weight", "bias")]
    missing = [name for name in leaves if name not in weights or weights[name].ndim == 0]
    if missing:
        raise CheckpointError(
            f"{path} has mmdet's names, but is no Mask R-CNN with a feature pyramid and its usual heads: "
            f"{', '.join(missing[:6])}{' …' if len(missing) > 6 else ''} are missing. init_heads=random "
            "takes its backbone alone"
        )


def _class_names(meta: Any) -> list[str] | None:
    """The classes that a file names: ``meta.CLASSES`` in mmdet 2, ``meta.dataset_meta.classes`` in 3."""
    data = meta.get("dataset_meta")
    of_data = (data.get("classes"), data.get("CLASSES")) if isinstance(data, Mapping) else ()
    for found in (meta.get("CLASSES"), *of_data):
        if isinstance(found, str):
            return [found]
        if isinstance(found, list | tuple | np.ndarray):
            return [str(name) for name in found]
    return None


def _rows(
    path: Path, theirs: list[str] | None, num_classes: int, ours: Sequence[str] | None
) -> tuple[list[int], tuple[str, ...]]:
    """Which class of the file each of our classes is, and what to say of it."""
    if theirs is None:
        if ours is not None and len(ours) != num_classes:
            raise CheckpointError(
                f"{path} was trained on {num_classes} classes, which it does not name, but here are "
                f"{len(ours)}. init_classifier=random loads all but the layers that depend on them"
            )
        return list(range(num_classes)), (
            f"the file does not name its {num_classes} classes; they are taken to be in the order of the "
            "data's",
        )
    if len(theirs) != num_classes:
        raise CheckpointError(
            f"{path} names {len(theirs)} classes, but its classifier has {num_classes + 1} rows instead of "
            f"{len(theirs) + 1}: it is none with a softmax over the classes and the background. "
            "init_heads=random takes its backbone alone"
        )
    ours = theirs if ours is None else ours
    places = _places(theirs)
    missing = [name for name in ours if name not in places and _plain(name) not in places]
    if missing:
        raise CheckpointError(
            f"{path} was trained on {len(theirs)} classes, among which are no {', '.join(missing[:5])}"
            f"{' …' if len(missing) > 5 else ''} ({len(missing)} of the data's {len(ours)}); it has "
            f"{', '.join(theirs[:5])}{' …' if len(theirs) > 5 else ''}. init_classifier=random loads all but "
            "the layers that depend on them"
        )
    rows = [places[name] if name in places else places[_plain(name)] for name in ours]
    if len(rows) < num_classes:
        return rows, (
            f"{num_classes - len(rows)} of its {num_classes} classes are not in the data and are left out, "
            "so that the scores of the others are a little higher than where it was trained",
        )
    return rows, ()


def _places(names: list[str]) -> dict[str, int]:
    """Where a class stands, by its name, and by its plain name where no other class has the same."""
    plain = [_plain(name) for name in names]
    places = {name: index for index, name in enumerate(plain) if plain.count(name) == 1}
    return places | {name: index for index, name in enumerate(names)}


def _plain(name: str) -> str:
    return re.sub(r"[\s_-]+", " ", name).strip().casefold()


def _reorder(weights: Weights, rows: list[int], num_classes: int, path: Path) -> None:
    """Put the rows of the classes into our order, in place, with the background's first."""
    chosen = torch.tensor(rows)
    for leaf in ("weight", "bias"):
        name = f"roi_heads.box_predictor.cls_score.{leaf}"
        weights[name] = weights[name][torch.cat((torch.tensor([num_classes]), chosen))]
        name = f"roi_heads.box_predictor.bbox_pred.{leaf}"
        offsets = _per_class(weights[name], num_classes, 4, path)
        weights[name] = _with_background(offsets[chosen]).flatten(0, 1)
        name = f"roi_heads.mask_predictor.mask_fcn_logits.{leaf}"
        weights[name] = _with_background(_per_class(weights[name], num_classes, 1, path)[chosen]).flatten(
            0, 1
        )


def _per_class(rows: Tensor, num_classes: int, each: int, path: Path) -> Tensor:
    """Rows [classes, each, …]; those that all classes share are repeated."""
    if rows.shape[0] == each:
        return rows[None].expand(num_classes, *rows.shape)
    if rows.shape[0] != num_classes * each:
        raise CheckpointError(
            f"{path} has {num_classes} classes, but {rows.shape[0]} rows for their boxes or masks instead of "
            f"{num_classes * each}"
        )
    return rows.reshape(num_classes, each, *rows.shape[1:])


def _with_background(rows: Tensor) -> Tensor:
    return torch.cat((torch.zeros_like(rows[:1]), rows))


def _ours(name: str) -> str:
    """Our name of one of theirs; the backbone's are left as they are."""
    return next((ours for theirs, mine in _NAMES if (ours := _renamed(name, theirs, mine))), name)


def _theirs(name: str) -> str:
    return next(theirs for its, mine in _NAMES if (theirs := _renamed(name, mine, its)))


def _renamed(name: str, source: str, target: str) -> str | None:
    module, _, leaf = name.rpartition(".")
    found = re.fullmatch(re.escape(source).replace(r"\{\}", r"(\d+)"), module)
    return None if found is None else f"{target.format(*found.groups())}.{leaf}"
