"""How mmdet tested a model: read from the configuration that its checkpoints carry as text.

The text is Python that assigns literals and ``dict(...)``; it is parsed, never run. What a file does not say
is as in mmdet's own configurations of Mask R-CNN.
"""

import ast
import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from sparsevit.checkpoints.files import CheckpointError
from sparsevit.data.sample import IMAGE_MEAN, IMAGE_STD
from sparsevit.tasks.mask_rcnn.config import Conventions, MaskRCNNConfig, PhotoInput

OWN_SETTINGS = "sparsevit"
"""The key of `meta` in which our own exports keep what the model was set to."""
_UNKNOWN = object()


def read_settings(meta: Mapping[str, Any], config: MaskRCNNConfig, path: Path) -> MaskRCNNConfig:
    """The configuration with everything that a checkpoint was trained and tested with.

    Args:
        meta: of the checkpoint.
        config: what the user set; its widths and its training are kept.

    Raises:
        CheckpointError: if it was trained or tested with something that is not here.
    """
    try:
        if OWN_SETTINGS in meta:
            return MaskRCNNConfig(**meta[OWN_SETTINGS])
        text = meta.get("cfg", meta.get("config", ""))
        return _settings(parse_config(text) if isinstance(text, str) else {}, config, path)
    except CheckpointError:
        raise
    except (TypeError, ValueError, AttributeError, KeyError, IndexError, ZeroDivisionError) as error:
        raise CheckpointError(
            f"{path} carries settings that cannot be used ({type(error).__name__}: {error}). "
            "init_heads=random takes its backbone alone"
        ) from error


def _settings(settings: Mapping[str, Any], config: MaskRCNNConfig, path: Path) -> MaskRCNNConfig:
    model = settings.get("model", {})
    test = _at(model, "test_cfg") or settings.get("test_cfg") or {}
    proposals, detections = _at(test, "rpn") or {}, _at(test, "rcnn") or {}
    steps = list(_steps(_test_pipeline(settings)))
    _require_usual(model, test, steps, path)
    photo_input = _photo_input(model, steps, path)
    return replace(
        config,
        image_size=photo_input.crop_size,
        input=photo_input,
        smallest_anchor=_smallest_anchor(model, path),
        num_proposals=proposals.get("max_per_img", proposals.get("max_num", 1000)),
        num_proposals_per_level=proposals.get("nms_pre", 1000),
        num_detections=detections.get("max_per_img", 100),
        proposal_overlap=_overlap(proposals, 0.7),
        detection_overlap=_overlap(detections, 0.5),
        score_threshold=detections.get("score_thr", 0.05),
        mask_threshold=detections.get("mask_thr_binary", 0.5),
        conventions=_conventions(model),
    )


def parse_config(text: str) -> dict[str, Any]:
    """The assignments of literals in a configuration; what is no literal is left out."""
    try:
        body = ast.parse(text).body
    except (SyntaxError, ValueError):
        return {}
    found = {
        target.id: _literal(node.value)
        for node in body
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    return {name: value for name, value in found.items() if value is not _UNKNOWN}


def _literal(node: ast.expr) -> Any:
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "dict":
        pairs = [(keyword.arg, _literal(keyword.value)) for keyword in node.keywords]
        return {name: value for name, value in pairs if name is not None and value is not _UNKNOWN}
    if isinstance(node, ast.Dict):
        items = zip(node.keys, node.values, strict=True)
        named = [(key.value, _literal(value)) for key, value in items if isinstance(key, ast.Constant)]
        return {str(name): value for name, value in named if value is not _UNKNOWN}
    if isinstance(node, ast.List | ast.Tuple):
        return [value for value in map(_literal, node.elts) if value is not _UNKNOWN]
    try:
        return ast.literal_eval(node)
    except (ValueError, TypeError, SyntaxError, RecursionError):
        return _UNKNOWN


def _at(node: Any, *keys: str) -> Any:
    """What stands at a path of keys; None where one is missing. Of a list, its first entry."""
    for key in keys:
        if isinstance(node, list):
            node = node[0] if node else None
        node = node.get(key) if isinstance(node, Mapping) else None
    return node


def _require_usual(model: Any, test: Any, steps: list[dict[str, Any]], path: Path) -> None:
    """What cannot be set here is as mmdet's Mask R-CNN has it."""
    preprocessing = _at(model, "data_preprocessor") or {}
    normalising = next((step for step in steps if step.get("type") == "Normalize"), {})  # in mmdet 2
    mean, std = ([255 * share for share in shares] for shares in (IMAGE_MEAN, IMAGE_STD))
    extractor, anchors = ("roi_head", "bbox_roi_extractor"), ("rpn_head", "anchor_generator")
    differing = [
        f"{name}={found!r} instead of {usual!r}"
        for name, found, usual in (
            ("test_cfg.rpn.nms.type", _at(test, "rpn", "nms", "type"), "nms"),
            ("test_cfg.rcnn.nms.type", _at(test, "rcnn", "nms", "type"), "nms"),
            ("test_cfg.rpn.min_bbox_size", _at(test, "rpn", "min_bbox_size"), 0),
            ("test_cfg.rpn.nms_across_levels", _at(test, "rpn", "nms_across_levels"), False),
            ("data_preprocessor.mean", preprocessing.get("mean"), mean),
            ("data_preprocessor.std", preprocessing.get("std"), std),
            ("data_preprocessor.bgr_to_rgb", preprocessing.get("bgr_to_rgb"), True),
            ("Normalize.mean", normalising.get("mean"), mean),
            ("Normalize.std", normalising.get("std"), std),
            ("Normalize.to_rgb", normalising.get("to_rgb"), True),
            ("bbox_roi_extractor.finest_scale", _at(model, *extractor, "finest_scale"), 56),
            ("bbox_roi_extractor.roi_layer.type", _roi_layer(model).get("type"), "RoIAlign"),
            ("anchor_generator.center_offset", _at(model, *anchors, "center_offset"), 0),
        )
        if found is not None and not _is_equal(found, usual)
    ]
    if differing:
        raise CheckpointError(
            f"{path} was tested with {', '.join(differing)}, which this Mask R-CNN does not do: its "
            "predictions would differ from mmdet's. init_heads=random takes its backbone alone"
        )


def _is_equal(found: Any, usual: Any) -> bool:
    if isinstance(usual, list):
        return len(found) == len(usual) and all(map(_is_equal, found, usual))
    return math.isclose(found, usual, rel_tol=1e-4) if isinstance(usual, float) else bool(found == usual)


def _roi_layer(model: Any) -> dict[str, Any]:
    return _at(model, "roi_head", "bbox_roi_extractor", "roi_layer") or {}


def _conventions(model: Any) -> Conventions:
    anchors = _at(model, "rpn_head", "anchor_generator") or {}
    layer = _roi_layer(model)
    proposal_std = _at(model, "rpn_head", "bbox_coder", "target_stds") or [1.0] * 4
    box_std = _at(model, "roi_head", "bbox_head", "bbox_coder", "target_stds") or [0.1, 0.1, 0.2, 0.2]
    return Conventions(
        roi_aligned=layer.get("aligned", True),
        roi_sampling_ratio=max(0, layer.get("sampling_ratio", 0)),
        rounded_anchors=False,
        anchor_strides=tuple(anchors.get("strides", (4, 8, 16, 32, 64))),
        anchor_ratios=tuple(anchors.get("ratios", (0.5, 1.0, 2.0))),
        proposal_weights=tuple(1 / deviation for deviation in proposal_std),
        box_weights=tuple(1 / deviation for deviation in box_std),
        mask_pasting="float",
    )


def _smallest_anchor(model: Any, path: Path) -> int:
    anchors = _at(model, "rpn_head", "anchor_generator") or {}
    scales, strides = anchors.get("scales", [8]), anchors.get("strides", [4, 8, 16, 32, 64])
    if len(scales) != 1 or any(2 * fine != coarse for fine, coarse in pairwise(strides)):
        raise CheckpointError(
            f"{path} has anchors of the scales {scales} at the strides {strides}; here is one per level, "
            "twice as large as at the level before. init_heads=random takes its backbone alone"
        )
    return int(scales[0] * strides[0])


def _overlap(stage: Mapping[str, Any], usual: float) -> float:
    found = _at(stage, "nms", "iou_threshold") or _at(stage, "nms", "iou_thr") or stage.get("nms_thr")
    return float(found or usual)


def _test_pipeline(settings: Mapping[str, Any]) -> Any:
    """What photos went through in testing."""
    return (
        settings.get("test_pipeline")
        or _at(settings, "test_dataloader", "dataset", "pipeline")
        or _at(settings, "data", "test", "pipeline")
    )


def _photo_input(model: Any, steps: list[dict[str, Any]], path: Path) -> PhotoInput:
    resize = next((step for step in steps if step.get("type") == "Resize"), {})
    outer = next((step for step in steps if "img_scale" in step), {})  # mmdet 2 says it in MultiScaleFlipAug
    scale = resize.get("scale") or resize.get("img_scale") or outer.get("img_scale") or [1333, 800]
    scale = scale[0] if isinstance(scale, list) and isinstance(scale[0], list) else scale
    if not isinstance(scale, list) or len(scale) != 2 or not all(isinstance(side, int) for side in scale):
        raise CheckpointError(
            f"{path} was tested on photos resized by {scale!r}; here they are resized to fit a longest and a "
            "shortest side, or to a width and height. init_heads=random takes its backbone alone"
        )
    pads = [step for step in steps if step.get("type") == "Pad" and step.get("size_divisor")]
    return PhotoInput(
        longest_side=max(scale),
        shortest_side=min(scale),
        fixed_size=None if resize.get("keep_ratio", True) else (scale[1], scale[0]),
        divisor=_at(model, "data_preprocessor", "pad_size_divisor")
        or (pads[0]["size_divisor"] if pads else 32),
        resize="uint8",
    )


def _steps(pipeline: Any) -> Iterator[dict[str, Any]]:
    """The steps of a pipeline, also those inside others."""
    for step in pipeline if isinstance(pipeline, list) else []:
        if isinstance(step, dict):
            yield step
            yield from _steps(step.get("transforms"))
