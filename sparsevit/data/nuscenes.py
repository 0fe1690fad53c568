"""3D detection data in the tables of nuScenes (arXiv 1903.11027): read, check, decode.

The tables are read by nuscenes-devkit (extra ``[nuscenes]``).

Legend: N cameras; H, W size of an image; I boxes.
"""

import hashlib
import json
from collections.abc import Callable, Iterable
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sparsevit.data.errors import DataError
from sparsevit.data.images import open_image, read_image
from sparsevit.data.sample import Sample
from sparsevit.data.split import DataSplit
from sparsevit.geometry import rigid

CAMERAS = (
    "CAM_FRONT_LEFT", "CAM_FRONT", "CAM_FRONT_RIGHT", "CAM_BACK_LEFT", "CAM_BACK", "CAM_BACK_RIGHT",
)  # fmt: skip
REFERENCE = "LIDAR_TOP"
"""The sensor at whose time the ego frame of a sample is taken."""
CLASSES = (
    "car", "truck", "construction_vehicle", "bus", "trailer", "barrier", "motorcycle", "bicycle",
    "pedestrian", "traffic_cone",
)  # fmt: skip
TABLES = (
    "attribute", "calibrated_sensor", "category", "ego_pose", "instance", "log", "map", "sample",
    "sample_annotation", "sample_data", "scene", "sensor", "visibility",
)  # fmt: skip
MAX_SKEW = 1e-3
"""How far a rotation matrix may be from orthogonal, or a quaternion from length one."""


class NuScenesSamples(DataSplit):
    """The keyframes of one split.

    An item is the images of its six cameras, [N, 3, H, W] uint8 in the order of `CAMERAS`, and a target:
    ``boxes`` [I, 9] in the ego frame (columns: `sparsevit.geometry.BOX_FIELDS`; NaN where a velocity is
    not known), ``rotations`` [I, 3, 3] of the boxes with all their tilt, ``labels`` [I] (place in
    `CLASSES`), ``intrinsics`` [N, 3, 3], ``camera_to_ego`` [N, 4, 4], ``ego_to_global`` [4, 4],
    ``sample_id``, the token.

    Boxes without a lidar or radar point are left out, as in the official evaluation.

    Args:
        root: folder of the data set, with ``v1.0-…`` and ``samples`` in it.
        split: official (``train``, ``val``, ``mini_train``, ``mini_val``), one of the data set's own
            ``splits.json``, or several of a version, joined by ``+``.
        sample_ids: use only these keyframes, by token.

    Raises:
        DataError: if tables, cameras or files are missing, or a calibration cannot be one.
    """

    def __init__(self, root: Path, split: str, *, sample_ids: Iterable[str] | None = None) -> None:
        super().__init__(root, split)
        self.version = locate_version(root, split)
        self.tables = read_tables(root.resolve(), self.version)
        self.class_names = CLASSES
        scenes = _scenes_of(self.tables, split)
        found = {
            sample["token"]: sample
            for sample in self.tables.sample
            if self.tables.get("scene", sample["scene_token"])["name"] in scenes
        }
        if not found:
            raise DataError(f"the split {split!r} of {root} is empty: none of its scenes is in the tables")
        self.sample_ids = sorted(found if sample_ids is None else sample_ids)
        for token in self.sample_ids:
            _check_sample(self.tables, found[token])

    @classmethod
    def known_splits(cls, root: Path) -> list[str]:
        return sorted(split for version in _versions(root) for split in _splits_of(root, version))

    def __getitem__(self, index: int) -> Sample:
        token = self.sample_ids[index]
        record = self.tables.get("sample", token)
        images = torch.stack([read_image(self.image_path(token, camera)) for camera in CAMERAS])
        ego_to_global = self._pose(record["data"].get(REFERENCE, record["data"]["CAM_FRONT"]))
        sensors = [self._camera(record["data"][camera]) for camera in CAMERAS]
        boxes, rotations, labels = self._boxes(record, ego_to_global)
        global_to_ego = torch.linalg.inv(ego_to_global)
        target = {
            "boxes": boxes.float(),
            "rotations": rotations.float(),
            "labels": labels,
            "intrinsics": torch.stack([intrinsics for intrinsics, _ in sensors]).float(),
            "camera_to_ego": torch.stack([global_to_ego @ pose for _, pose in sensors]).float(),
            "ego_to_global": ego_to_global,
            "sample_id": token,
        }
        return (images, target) if self.transform is None else self.transform(images, target)

    def image_path(self, token: str, camera: str) -> Path:
        sample_data = self.tables.get("sample", token)["data"][camera]
        return self.root / str(self.tables.get("sample_data", sample_data)["filename"])

    def digest(self) -> str:
        known = hashlib.sha256(self.version.encode())
        for token in self.sample_ids:
            record = self.tables.get("sample", token)
            annotations = [self.tables.get("sample_annotation", each) for each in record["anns"]]
            known.update(json.dumps([record["data"], annotations], sort_keys=True).encode())
        return known.hexdigest()

    def verify(self, *, decode: bool, on_sample: Callable[[], None] = lambda: None) -> None:
        for token in self.sample_ids:
            for camera in CAMERAS:
                path = self.image_path(token, camera)
                record = self.tables.get("sample_data", self.tables.get("sample", token)["data"][camera])
                with open_image(path) as image:
                    if image.size != (record["width"], record["height"]):
                        raise DataError(
                            f"{path} is {image.size[0]}×{image.size[1]} pixels, but the tables say "
                            f"{record['width']}×{record['height']}"
                        )
                if decode:
                    read_image(path)
            on_sample()

    def _pose(self, sample_data: str) -> Tensor:
        """The vehicle at the time of a record: ego to global, [4, 4] in double precision."""
        record = self.tables.get("sample_data", sample_data)
        return _matrix(self.tables.get("ego_pose", record["ego_pose_token"]))

    def _camera(self, sample_data: str) -> tuple[Tensor, Tensor]:
        """Intrinsics [3, 3] of a camera, and camera to global, [4, 4], at its own time."""
        record = self.tables.get("sample_data", sample_data)
        sensor = self.tables.get("calibrated_sensor", record["calibrated_sensor_token"])
        intrinsics = torch.tensor(sensor["camera_intrinsic"], dtype=torch.float64)
        return intrinsics, self._pose(sample_data) @ _matrix(sensor)

    def _boxes(self, record: dict[str, Any], ego_to_global: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        from nuscenes.eval.detection.utils import category_to_detection_name

        boxes, rotations, labels = [], [], []
        global_to_ego = torch.linalg.inv(ego_to_global)
        for annotation in record["anns"]:
            each = self.tables.get("sample_annotation", annotation)
            name = category_to_detection_name(each["category_name"])
            if name is None or each["num_lidar_pts"] + each["num_radar_pts"] == 0:
                continue
            width, length, height = each["size"]
            pose = global_to_ego @ _matrix(each)
            velocity = global_to_ego[:3, :3] @ torch.from_numpy(self.tables.box_velocity(annotation))
            yaw = torch.atan2(pose[1, 0], pose[0, 0])
            boxes.append([*pose[:3, 3].tolist(), length, width, height, float(yaw), *velocity[:2].tolist()])
            rotations.append(pose[:3, :3])
            labels.append(CLASSES.index(name))
        return (
            torch.tensor(boxes, dtype=torch.float64).reshape(-1, 9),
            torch.stack(rotations) if rotations else torch.zeros(0, 3, 3),
            torch.tensor(labels, dtype=torch.int64),
        )


def locate_version(root: Path, split: str) -> str:
    """The folder of tables that has a split.

    Raises:
        DataError: if the root or its tables are missing, or no version has the split.
    """
    if not root.is_dir():
        raise DataError(f"data root {root} is not a folder: set data.root to a data set in nuScenes' tables")
    versions = _versions(root)
    if not versions:
        raise DataError(f"{root} holds no tables: they are in a folder v1.0-mini, v1.0-trainval or v1.0-test")
    for version in versions:
        if set(split.split("+")) <= set(_splits_of(root, version)):
            missing = [name for name in TABLES if not (root / version / f"{name}.json").is_file()]
            if missing:
                raise DataError(f"{root / version} lacks the tables {', '.join(missing)}")
            return version
    known = NuScenesSamples.known_splits(root)
    raise DataError(f"{root} ({', '.join(versions)}) has no split {split!r}; it has {known}")


@lru_cache(maxsize=4)
def read_tables(root: Path, version: str) -> Any:
    """The devkit's tables, read once.

    Raises:
        DataError: if the devkit is missing or cannot read them.
    """
    try:
        from nuscenes import NuScenes
    except ImportError as error:
        raise DataError(
            f"nuScenes' tables are read by nuscenes-devkit, which is not installed ({error}): pip install "
            "-e '.[nuscenes]'"
        ) from error
    try:
        return NuScenes(version, str(root), verbose=False)
    except (KeyError, json.JSONDecodeError, AssertionError, OSError) as error:
        raise DataError(
            f"{root / version} does not hold consistent tables: {type(error).__name__} {error}"
        ) from error


def _versions(root: Path) -> list[str]:
    return sorted(path.name for path in root.glob("v1.0-*") if path.is_dir())


def _splits_of(root: Path, version: str) -> list[str]:
    """The official splits of a version, and the data set's own."""
    official = {"v1.0-mini": ["mini_train", "mini_val"], "v1.0-trainval": ["train", "val"]}
    own = root / version / "splits.json"
    try:
        return official.get(version, []) + (sorted(json.loads(own.read_text())) if own.is_file() else [])
    except json.JSONDecodeError as error:
        raise DataError(f"{own} is not valid JSON: {error}") from error


def _scenes_of(tables: Any, split: str) -> set[str]:
    from nuscenes.utils.splits import get_scenes_of_split

    return {scene for part in split.split("+") for scene in get_scenes_of_split(part, tables)}


def _check_sample(tables: Any, sample: dict[str, Any]) -> None:
    """All cameras are there, and their calibration can be one."""
    missing = [camera for camera in CAMERAS if camera not in sample["data"]]
    if missing:
        raise DataError(f"sample {sample['token']} has no image of {', '.join(missing)}")
    for camera in CAMERAS:
        record = tables.get("sample_data", sample["data"][camera])
        sensor = tables.get("calibrated_sensor", record["calibrated_sensor_token"])
        for kind, pose in (
            ("calibrated_sensor", sensor),
            ("ego_pose", tables.get("ego_pose", record["ego_pose_token"])),
        ):
            length = float(np.linalg.norm(pose["rotation"]))
            if len(pose["rotation"]) != 4 or not abs(length - 1) <= MAX_SKEW:
                raise DataError(
                    f"{kind} {pose['token']} of {camera} has the rotation {pose['rotation']}, which is not a "
                    f"quaternion of length 1 (it is {length:.4g})"
                )
        intrinsics = np.asarray(sensor["camera_intrinsic"], dtype=float)
        if intrinsics.shape != (3, 3) or not (intrinsics[0, 0] > 0 and intrinsics[1, 1] > 0):
            raise DataError(
                f"calibrated_sensor {sensor['token']} of {camera} has the intrinsics "
                f"{sensor['camera_intrinsic']}, which are not a 3×3 matrix with positive focal lengths"
            )


def _matrix(record: dict[str, Any]) -> Tensor:
    """A record's ``rotation`` (quaternion w, x, y, z) and ``translation`` as a matrix [4, 4]."""
    from pyquaternion import Quaternion

    rotation = torch.from_numpy(Quaternion(record["rotation"]).rotation_matrix)
    return rigid(rotation, torch.tensor(record["translation"], dtype=torch.float64))
