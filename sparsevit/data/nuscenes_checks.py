"""What nuScenes' records must be so that cameras and boxes can be computed with."""

import math
from collections.abc import Iterable, Sequence
from typing import Any

from sparsevit.data.errors import DataError

MAX_SKEW = 1e-3
"""How far a quaternion may be from length one."""


def check_cameras(tables: Any, sample: dict[str, Any], cameras: Sequence[str]) -> None:
    """Check that a keyframe has a photo of every camera, with a size, a calibration and a pose.

    Raises:
        DataError: naming the record that is missing or wrong.
    """
    missing = [camera for camera in cameras if camera not in sample["data"]]
    if missing:
        raise DataError(f"sample {sample['token']} has no image of {', '.join(missing)}")
    for camera in cameras:
        record = tables.get("sample_data", sample["data"][camera])
        size = record.get("width"), record.get("height")
        if not all(isinstance(side, int) and side > 0 for side in size):
            raise DataError(
                f"sample_data {record['token']} of {camera} has the width {size[0]} and the height "
                f"{size[1]}; they must be positive numbers of pixels"
            )
        sensor = tables.get("calibrated_sensor", record["calibrated_sensor_token"])
        _check_pose(sensor, "calibrated_sensor", camera)
        _check_pose(tables.get("ego_pose", record["ego_pose_token"]), "ego_pose", camera)
        _check_intrinsics(sensor, camera)


def check_boxes(annotations: Iterable[dict[str, Any]]) -> None:
    """Check that annotations have a place, an orientation and a size.

    Raises:
        DataError: naming the first that has not.
    """
    for annotation in annotations:
        _check_pose(annotation, "sample_annotation", annotation["category_name"])
        size: Any = annotation.get("size")
        if not _is_vector(size, 3) or min(size) <= 0:
            raise DataError(
                f"sample_annotation {annotation['token']} of {annotation['category_name']} has the size "
                f"{size}; it must be width, length, height in metres, above 0"
            )


def _check_pose(record: dict[str, Any], table: str, what: str) -> None:
    rotation: Any = record.get("rotation")
    translation: Any = record.get("translation")
    length = math.hypot(*rotation) if _is_vector(rotation, 4) else math.nan
    if not abs(length - 1) <= MAX_SKEW:
        raise DataError(
            f"{table} {record['token']} of {what} has the rotation {rotation}, which is not a quaternion of "
            f"length 1 (it is {length:.4g})"
        )
    if not _is_vector(translation, 3):
        raise DataError(
            f"{table} {record['token']} of {what} has the translation {translation}; it must be three finite "
            "numbers, in metres"
        )


def _check_intrinsics(sensor: dict[str, Any], camera: str) -> None:
    rows: Any = sensor.get("camera_intrinsic")
    is_matrix = isinstance(rows, list) and len(rows) == 3 and all(_is_vector(row, 3) for row in rows)
    if not is_matrix or not (rows[0][0] > 0 and rows[1][1] > 0):
        raise DataError(
            f"calibrated_sensor {sensor['token']} of {camera} has the intrinsics {rows}, which are not a 3×3 "
            "matrix with positive focal lengths"
        )


def _is_vector(value: Any, length: int) -> bool:
    """Whether a value is a list of so many finite numbers."""
    try:
        return len(value) == length and all(map(math.isfinite, value))
    except TypeError:
        return False
