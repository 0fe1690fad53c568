"""How mmdet tested a model: read from the configuration that its checkpoints carry as text, and written.

The text is Python that assigns literals and ``dict(...)``; it is parsed, never run. Thresholds and numbers
that a file does not say are those of mmdet's own configurations of Mask R-CNN; sizes of photos are never
guessed.
"""

import ast
import math
from collections.abc import Mapping
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from sparsevit.checkpoints.files import CheckpointError
from sparsevit.data.sample import IMAGE_MEAN, IMAGE_STD
from sparsevit.tasks.mask_rcnn.config import Conventions, MaskRCNNConfig
from sparsevit.tasks.mask_rcnn.mmdet_pipeline import at, kind, photo_input

OWN_SETTINGS = "sparsevit"
"""The key of `meta` in which our own exports keep what the model was set to."""
STRIDES = (4, 8, 16, 32, 64)
MEAN, STD = ([255 * share for share in shares] for shares in (IMAGE_MEAN, IMAGE_STD))
_NO_SIZE = (
    "the file does not say at which size it was tested, so that photos become inputs as task.input says "
    "(mmdet's own configurations: longest_side 1333, shortest_side 800, divisor 32; SparseViT's release: "
    "fixed_size [672, 672])"
)
_UNKNOWN = object()
_EXTRACTORS = ("bbox_roi_extractor", "mask_roi_extractor")


def read_settings(
    meta: Mapping[str, Any], config: MaskRCNNConfig, path: Path
) -> tuple[MaskRCNNConfig, tuple[str, ...]]:
    """The configuration with everything that a checkpoint was trained and tested with, and what to say of it.

    Args:
        meta: of the checkpoint.
        config: what the user set; its widths, its training, and what the file does not say of sizes are kept.

    Raises:
        CheckpointError: if it was trained or tested with something that is not here.
    """
    try:
        if OWN_SETTINGS in meta:
            own = MaskRCNNConfig(**meta[OWN_SETTINGS])
            training = ("image_size", "scale_range", "num_rois_per_image")
            mine = {name: getattr(config, name) for name in training}
            return replace(own, input=own.photo_input, **mine), ()
        text = meta.get("cfg", meta.get("config", ""))
        return _settings(parse_config(text) if isinstance(text, str) else {}, config, path)
    except CheckpointError:
        raise
    except (TypeError, ValueError, AttributeError, KeyError, IndexError, ZeroDivisionError) as error:
        raise CheckpointError(
            f"{path} carries settings that cannot be used ({type(error).__name__}: {error}). "
            "init_heads=random takes its backbone alone"
        ) from error


def parse_config(text: str) -> dict[str, Any]:
    """The assignments of literals in a configuration; what is no literal is left out."""
    try:
        body = ast.parse(text).body
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        return {}
    found = {
        target.id: _literal(node.value)
        for node in body
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    return {name: value for name, value in found.items() if value is not _UNKNOWN}


def as_config(config: MaskRCNNConfig) -> str:
    """The text that `read_settings` understands: what mmdet has to be set to for the same predictions."""
    conventions, photo = config.conventions, config.photo_input
    strides = conventions.anchor_strides
    layer = {
        "type": "RoIAlign",
        "sampling_ratio": conventions.roi_sampling_ratio,
        "aligned": conventions.roi_aligned,
    }
    model = {
        "type": "MaskRCNN",
        "data_preprocessor": {
            "type": "DetDataPreprocessor", "mean": MEAN, "std": STD, "bgr_to_rgb": True,
            "pad_size_divisor": photo.divisor,
        },
        "rpn_head": {
            "anchor_generator": {
                "type": "AnchorGenerator", "scales": [config.smallest_anchor / strides[0]],
                "ratios": list(conventions.anchor_ratios), "strides": list(strides),
            },
            "bbox_coder": {"target_stds": [1 / weight for weight in conventions.proposal_weights]},
        },
        "roi_head": {
            "bbox_head": {"bbox_coder": {"target_stds": [1 / weight for weight in conventions.box_weights]}},
            **{
                name: {"roi_layer": layer, "featmap_strides": list(strides[:-1])} for name in _EXTRACTORS
            },
        },
        "test_cfg": {
            "rpn": {
                "nms_pre": config.num_proposals_per_level or config.num_proposals,
                "max_per_img": config.num_proposals, "min_bbox_size": 0,
                "nms": {"type": "nms", "iou_threshold": config.proposal_overlap},
            },
            "rcnn": {
                "score_thr": config.score_threshold, "max_per_img": config.num_detections,
                "mask_thr_binary": config.mask_threshold,
                "nms": {"type": "nms", "iou_threshold": config.detection_overlap},
            },
        },
    }  # fmt: skip
    height, width = photo.fixed_size or (photo.shortest_side, photo.longest_side)
    resize = {"type": "Resize", "scale": (width, height), "keep_ratio": photo.fixed_size is None}
    pipeline = [{"type": "LoadImageFromFile"}, resize, {"type": "PackDetInputs"}]
    return f"model = {model!r}\ntest_pipeline = {pipeline!r}\n"


def _settings(
    settings: Mapping[str, Any], config: MaskRCNNConfig, path: Path
) -> tuple[MaskRCNNConfig, tuple[str, ...]]:
    model = settings.get("model", {})
    test = at(model, "test_cfg") or settings.get("test_cfg") or {}
    proposals, detections = at(test, "rpn") or {}, at(test, "rcnn") or {}
    _require_usual(model, test, path)
    photo = photo_input(settings, path)
    notes = () if photo is not None else (_NO_SIZE,)
    tested = replace(
        config,
        input=photo or replace(config.photo_input, resize="uint8"),
        smallest_anchor=_smallest_anchor(model, path),
        num_proposals=_first(proposals, "max_per_img", "max_num", usual=1000),
        num_proposals_per_level=_all_or(_first(proposals, "nms_pre", usual=1000)),
        num_detections=_first(detections, "max_per_img", usual=100),
        proposal_overlap=_overlap(proposals, 0.7),
        detection_overlap=_overlap(detections, 0.5),
        score_threshold=_first(detections, "score_thr", usual=0.05),
        mask_threshold=_first(detections, "mask_thr_binary", usual=0.5),
        conventions=_conventions(model),
    )
    return tested, notes


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
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        return _UNKNOWN


def _require_usual(model: Any, test: Any, path: Path) -> None:
    """What cannot be set here is as mmdet's Mask R-CNN has it."""
    anchors, box_head = ("rpn_head", "anchor_generator"), ("roi_head", "bbox_head")
    strides = list(at(model, *anchors, "strides") or STRIDES)
    layers = [at(model, "roi_head", name, "roi_layer") for name in _EXTRACTORS]
    expected: list[tuple[str, Any, Any]] = [
        ("test_cfg.rpn.nms.type", kind(at(test, "rpn", "nms")), "nms"),
        ("test_cfg.rcnn.nms.type", kind(at(test, "rcnn", "nms")), "nms"),
        ("test_cfg.rcnn.nms.class_agnostic", at(test, "rcnn", "nms", "class_agnostic"), False),
        ("test_cfg.rpn.min_bbox_size", at(test, "rpn", "min_bbox_size"), 0),
        ("test_cfg.rpn.nms_across_levels", at(test, "rpn", "nms_across_levels"), False),
        ("anchor_generator.center_offset", at(model, *anchors, "center_offset"), 0),
        ("rpn_head.bbox_coder.type", kind(at(model, "rpn_head", "bbox_coder")), "DeltaXYWHBBoxCoder"),
        ("bbox_head.bbox_coder.type", kind(at(model, *box_head, "bbox_coder")), "DeltaXYWHBBoxCoder"),
        ("rpn_head.bbox_coder.target_means", at(model, "rpn_head", "bbox_coder", "target_means"), [0] * 4),
        ("bbox_head.bbox_coder.target_means", at(model, *box_head, "bbox_coder", "target_means"), [0] * 4),
        ("bbox_head.cls_predictor_cfg.type", kind(at(model, *box_head, "cls_predictor_cfg")), "Linear"),
        ("bbox_head.reg_predictor_cfg.type", kind(at(model, *box_head, "reg_predictor_cfg")), "Linear"),
        ("bbox_head.loss_cls.use_sigmoid", at(model, *box_head, "loss_cls", "use_sigmoid"), False),
    ]
    for name, layer in zip(_EXTRACTORS, layers, strict=True):
        extractor = at(model, "roi_head", name)
        expected += [
            (f"{name}.finest_scale", at(extractor, "finest_scale"), 56),
            (f"{name}.featmap_strides", at(extractor, "featmap_strides"), strides[:-1]),
            (f"{name}.roi_layer.type", kind(layer), "RoIAlign"),
        ]
    if layers[0] and layers[1]:
        of_boxes, of_masks = (
            {key: value for key, value in layer.items() if key not in ("type", "output_size", "out_size")}
            for layer in layers
        )
        expected.append(("mask_roi_extractor.roi_layer", of_masks, of_boxes))
    preprocessing = at(model, "data_preprocessor")
    if preprocessing:
        expected += [
            ("data_preprocessor.mean", preprocessing.get("mean", "none"), MEAN),
            ("data_preprocessor.std", preprocessing.get("std", "none"), STD),
            ("data_preprocessor.bgr_to_rgb", preprocessing.get("bgr_to_rgb", False), True),
        ]
    differing = [
        f"{name}={found!r} instead of {usual!r}"
        for name, found, usual in expected
        if found is not None and not _is_equal(found, usual)
    ]
    if differing:
        raise CheckpointError(
            f"{path} was tested with {', '.join(differing)}, which this Mask R-CNN does not do: its "
            "predictions would differ from mmdet's. init_heads=random takes its backbone alone"
        )


def _is_equal(found: Any, usual: Any) -> bool:
    if isinstance(usual, list):
        is_list = isinstance(found, list) and len(found) == len(usual)
        return is_list and all(map(_is_equal, found, usual))
    return math.isclose(found, usual, rel_tol=1e-4) if isinstance(usual, float) else bool(found == usual)


def _conventions(model: Any) -> Conventions:
    anchors = at(model, "rpn_head", "anchor_generator") or {}
    layer = at(model, "roi_head", "bbox_roi_extractor", "roi_layer") or {}
    proposal_std = at(model, "rpn_head", "bbox_coder", "target_stds") or [1.0] * 4
    box_std = at(model, "roi_head", "bbox_head", "bbox_coder", "target_stds") or [0.1, 0.1, 0.2, 0.2]
    return Conventions(
        roi_aligned=layer.get("aligned", True),
        roi_sampling_ratio=max(0, _first(layer, "sampling_ratio", "sample_num", usual=0)),
        rounded_anchors=False,
        anchor_strides=tuple(anchors.get("strides", STRIDES)),
        anchor_ratios=tuple(anchors.get("ratios", (0.5, 1.0, 2.0))),
        proposal_weights=tuple(1 / deviation for deviation in proposal_std),
        box_weights=tuple(1 / deviation for deviation in box_std),
        mask_pasting="float",
    )


def _smallest_anchor(model: Any, path: Path) -> int:
    anchors = at(model, "rpn_head", "anchor_generator") or {}
    scales, strides = anchors.get("scales", [8]), anchors.get("strides", list(STRIDES))
    is_doubling = all(2 * fine == coarse for fine, coarse in pairwise(strides))
    if len(scales) != 1 or not is_doubling or scales[0] * strides[0] != int(scales[0] * strides[0]):
        raise CheckpointError(
            f"{path} has anchors of the scales {scales} at the strides {strides}; here is one of whole "
            "pixels per level, twice as large as at the level before. init_heads=random takes its backbone "
            "alone"
        )
    return int(scales[0] * strides[0])


def _first(section: Mapping[str, Any], *keys: str, usual: Any) -> Any:
    """The value of the first key that is there and says something."""
    return next((section[key] for key in keys if section.get(key) is not None), usual)


def _all_or(number: int) -> int:
    """A number of proposals; mmdet writes -1 for all of them."""
    return number if number > 0 else 2**31 - 1


def _overlap(stage: Mapping[str, Any], usual: float) -> float:
    nms = at(stage, "nms") or {}
    return float(_first({**stage, **nms}, "iou_threshold", "iou_thr", "nms_thr", usual=usual))
