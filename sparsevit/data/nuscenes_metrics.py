"""nuScenes' detection metrics by its devkit, from detections in the official submission format."""

import contextlib
import io
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparsevit.data.nuscenes import CLASSES, reference_of

MAX_BOXES = 500
ERRORS = {
    "trans_err": "mate", "scale_err": "mase", "orient_err": "maoe", "vel_err": "mave", "attr_err": "maae",
}  # fmt: skip
"""The devkit's names of the mean true-positive errors, and the paper's."""
MODALITIES = {
    "use_camera": True, "use_lidar": False, "use_radar": False, "use_map": False, "use_external": False,
}  # fmt: skip
_MOVING_SPEED = 0.2  # m/s
_ATTRIBUTES = {  # of a moving, and of a resting object
    "car": ("vehicle.moving", "vehicle.parked"),
    "truck": ("vehicle.moving", "vehicle.parked"),
    "construction_vehicle": ("vehicle.moving", "vehicle.parked"),
    "bus": ("vehicle.moving", "vehicle.stopped"),
    "trailer": ("vehicle.moving", "vehicle.parked"),
    "motorcycle": ("cycle.with_rider", "cycle.without_rider"),
    "bicycle": ("cycle.with_rider", "cycle.without_rider"),
    "pedestrian": ("pedestrian.moving", "pedestrian.standing"),
    "barrier": ("", ""),
    "traffic_cone": ("", ""),
}


def to_results(
    boxes: Tensor, scores: Tensor, labels: Tensor, sample_token: str, ego_to_global: Tensor
) -> list[dict[str, Any]]:
    """Detections of one sample in the submission format.

    Args:
        boxes: [I, 9] in the ego frame.
        ego_to_global: [4, 4].
    """
    from pyquaternion import Quaternion

    pose = ego_to_global.double().cpu()
    turn = Quaternion(matrix=pose[:3, :3].numpy(), rtol=1e-4, atol=1e-4)
    boxes = boxes.double().cpu()
    centres = boxes[:, :3] @ pose[:3, :3].T + pose[:3, 3]
    velocities = torch.nn.functional.pad(boxes[:, 7:9], (0, 1)) @ pose[:3, :3].T
    results = []
    strongest = scores.argsort(descending=True)[:MAX_BOXES].tolist()
    for index in strongest:
        length, width, height, yaw = boxes[index, 3:7].tolist()
        name = CLASSES[int(labels[index])]
        velocity = velocities[index, :2].tolist()
        is_moving = math.hypot(*velocity) > _MOVING_SPEED
        results.append(
            {
                "sample_token": sample_token,
                "translation": centres[index].tolist(),
                "size": [width, length, height],
                "rotation": (turn * Quaternion(axis=(0, 0, 1), radians=yaw)).elements.tolist(),
                "velocity": velocity,
                "detection_name": name,
                "detection_score": float(scores[index]),
                "attribute_name": _ATTRIBUTES[name][0 if is_moving else 1],
            }
        )
    return results


def write_submission(path: Path, results: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    """Results by sample token as a file that the devkit and the evaluation server take."""
    path.write_text(json.dumps({"meta": MODALITIES, "results": results}))


def detection_metrics(
    tables: Any, sample_tokens: Sequence[str], results: Mapping[str, Sequence[Mapping[str, Any]]]
) -> dict[str, float]:
    """mAP, NDS, the five mean true-positive errors, and the AP of every class, by the devkit.

    Args:
        tables: the devkit's.
        results: by sample token; one entry for each of `sample_tokens`, perhaps empty.
    """
    from nuscenes.eval.common.config import config_factory
    from nuscenes.eval.common.data_classes import EvalBoxes
    from nuscenes.eval.common.loaders import filter_eval_boxes, load_gt_of_sample_tokens
    from nuscenes.eval.detection.data_classes import DetectionBox
    from nuscenes.eval.detection.evaluate import DetectionEval

    config = config_factory("detection_cvpr_2019")
    predicted = EvalBoxes.deserialize({token: list(results[token]) for token in sample_tokens}, DetectionBox)
    with contextlib.redirect_stderr(io.StringIO()):  # the devkit draws progress bars
        truth = load_gt_of_sample_tokens(tables, list(sample_tokens), DetectionBox)
    evaluation = DetectionEval.__new__(DetectionEval)  # its constructor wants files and a whole split
    evaluation.nusc, evaluation.cfg, evaluation.verbose = tables, config, False
    evaluation.pred_boxes, evaluation.gt_boxes = (
        filter_eval_boxes(tables, _with_distances(tables, boxes), config.class_range) if boxes.all else boxes
        for boxes in (predicted, truth)  # the devkit cannot filter what is empty
    )
    metrics, _ = evaluation.evaluate()
    summary = metrics.serialize()
    return {
        "map": float(summary["mean_ap"]),
        "nds": float(summary["nd_score"]),
        **{name: float(summary["tp_errors"][key]) for key, name in ERRORS.items()},
        **{f"ap/{name}": float(value) for name, value in summary["mean_dist_aps"].items()},
    }


def _with_distances(tables: Any, boxes: Any) -> Any:
    """The devkit's boxes with their places as seen from the vehicle; the devkit's own way needs a lidar."""
    for token in boxes.sample_tokens:
        record = tables.get("sample_data", reference_of(tables.get("sample", token)))
        vehicle = tables.get("ego_pose", record["ego_pose_token"])["translation"]
        for box in boxes[token]:
            box.ego_translation = tuple(
                there - here for there, here in zip(box.translation, vehicle, strict=True)
            )
    return boxes
