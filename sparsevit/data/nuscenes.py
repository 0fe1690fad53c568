"""3D detection data in nuScenes' tables (arXiv 1903.11027): one split, checked, decoded.

Legend: N cameras; H, W size of an image; I boxes.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from sparsevit.data.errors import DataError
from sparsevit.data.images import check_image, read_image
from sparsevit.data.nuscenes_checks import check_boxes, check_cameras
from sparsevit.data.nuscenes_tables import known_splits, locate_version, read_tables, scenes_of
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


class NuScenesSamples(DataSplit):
    """The keyframes of one split.

    An item is the images of its six cameras, [N, 3, H, W] uint8 in the order of `CAMERAS`, and a target
    (smaller ones are padded at the right and below; ``photo_sizes`` [N, 2] has their height and width):
    ``boxes`` [I, 9] in the ego frame (columns: `sparsevit.geometry.BOX_FIELDS`; NaN where a velocity is
    not known), ``rotations`` [I, 3, 3] of the boxes with all their tilt, ``labels`` [I] (place in
    `CLASSES`), ``intrinsics`` [N, 3, 3], ``camera_to_ego`` [N, 4, 4], ``ego_to_global`` [4, 4],
    ``sample_id``, the token.

    Boxes without a lidar or radar point are left out, as in the official evaluation; boxes without the
    counts of points are kept.

    Args:
        root: folder of the data set, with ``v1.0-…`` and ``samples`` in it.
        split: official (``train``, ``val``, ``mini_train``, ``mini_val``), one of the data set's own
            ``splits.json``, or several of a version, joined by ``+``.
        sample_ids: use only these keyframes, by token.

    Raises:
        DataError: if tables, cameras or files are missing, a calibration or a box cannot be one, or there
            is no box to learn from or to measure on.
    """

    def __init__(self, root: Path, split: str, *, sample_ids: Iterable[str] | None = None) -> None:
        super().__init__(root, split)
        self.version = locate_version(root, split)
        self.tables = read_tables(root.resolve(), self.version)
        self.class_names = CLASSES
        scenes = scenes_of(self.tables, split)
        found = {
            sample["token"]: sample
            for sample in self.tables.sample
            if self.tables.get("scene", sample["scene_token"])["name"] in scenes
        }
        if not found:
            raise DataError(f"the split {split!r} of {root} is empty: none of its scenes is in the tables")
        self.sample_ids = sorted(found if sample_ids is None else sample_ids)
        for token in self.sample_ids:
            check_cameras(self.tables, found[token], CAMERAS)
        check_boxes([annotation for annotation in self._annotations() if _label(annotation) is not None])
        self._check_that_boxes_count()

    @classmethod
    def known_splits(cls, root: Path) -> list[str]:
        return known_splits(root)

    def __getitem__(self, index: int) -> Sample:
        token = self.sample_ids[index]
        record = self.tables.get("sample", token)
        photos = [read_image(*self._photo(token, camera)) for camera in CAMERAS]
        sizes_N2 = torch.tensor([photo.shape[1:] for photo in photos])
        height, width = sizes_N2.amax(dim=0).tolist()
        images = torch.stack(
            [pad(photo, (0, width - photo.shape[2], 0, height - photo.shape[1])) for photo in photos]
        )
        ego_to_global = self._pose(reference_of(record))
        sensors = [self._camera(record["data"][camera]) for camera in CAMERAS]
        boxes, rotations, labels = self._boxes(record, ego_to_global)
        global_to_ego = torch.linalg.inv(ego_to_global)
        target = {
            "boxes": boxes.float(),
            "rotations": rotations.float(),
            "labels": labels,
            "photo_sizes": sizes_N2,
            "intrinsics": torch.stack([intrinsics for intrinsics, _ in sensors]).float(),
            "camera_to_ego": torch.stack([global_to_ego @ pose for _, pose in sensors]).float(),
            "ego_to_global": ego_to_global,
            "sample_id": token,
        }
        return (images, target) if self.transform is None else self.transform(images, target)

    def image_path(self, token: str, camera: str) -> Path:
        sample_data = self.tables.get("sample", token)["data"][camera]
        return self.root / str(self.tables.get("sample_data", sample_data)["filename"])

    def class_counts(self) -> Mapping[str, int]:
        used = Counter(label for each in self._annotations() if (label := _label(each)) is not None)
        return {name: used[label] for label, name in enumerate(CLASSES)}

    def image_sizes(self) -> Mapping[tuple[int, int], int]:
        return Counter(self._photo(token, camera)[1] for token in self.sample_ids for camera in CAMERAS)

    def digest(self) -> str:
        known = hashlib.sha256(self.version.encode())
        for token in self.sample_ids:
            record = self.tables.get("sample", token)
            annotations = [self.tables.get("sample_annotation", each) for each in record["anns"]]
            known.update(json.dumps([record["data"], annotations], sort_keys=True).encode())
        return known.hexdigest()

    def verify(self, *, decode: bool, on_sample: Callable[[], None] = lambda: None) -> None:
        self._check_that_boxes_count()
        for token in self.sample_ids:
            for camera in CAMERAS:
                check_image(*self._photo(token, camera))
                if decode:
                    read_image(*self._photo(token, camera))
            on_sample()

    def _photo(self, token: str, camera: str) -> tuple[Path, tuple[int, int], Path]:
        """A photo, its height and width, and the table that tells them."""
        record = self.tables.get("sample_data", self.tables.get("sample", token)["data"][camera])
        table = self.root / self.version / "sample_data.json"
        return self.image_path(token, camera), (record["height"], record["width"]), table

    def _annotations(self) -> list[dict[str, Any]]:
        """Records of all boxes of the keyframes in use."""
        return [
            self.tables.get("sample_annotation", annotation)
            for token in self.sample_ids
            for annotation in self.tables.get("sample", token)["anns"]
        ]

    def _check_that_boxes_count(self) -> None:
        annotations = self._annotations()
        if any(_label(annotation) is not None for annotation in annotations):
            return
        unknown = [name for each in annotations if _class_name(name := each["category_name"]) is None]
        raise DataError(
            f"no box to learn from or to measure on is in the split {self.split!r} of {self.root}: of the "
            f"{len(annotations)} annotations of the {len(self)} keyframes in use, {len(unknown)} are of "
            f"categories that nuScenes' detection does not have ({sorted(set(unknown))[:5]}), and the others "
            "have neither a lidar nor a radar point"
        )

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
        boxes, rotations, labels = [], [], []
        global_to_ego = torch.linalg.inv(ego_to_global)
        for annotation in record["anns"]:
            each = self.tables.get("sample_annotation", annotation)
            label = _label(each)
            if label is None:
                continue
            width, length, height = each["size"]
            pose = global_to_ego @ _matrix(each)
            velocity = global_to_ego[:3, :3] @ torch.from_numpy(self.tables.box_velocity(annotation))
            yaw = torch.atan2(pose[1, 0], pose[0, 0])
            boxes.append([*pose[:3, 3].tolist(), length, width, height, float(yaw), *velocity[:2].tolist()])
            rotations.append(pose[:3, :3])
            labels.append(label)
        return (
            torch.tensor(boxes, dtype=torch.float64).reshape(-1, 9),
            torch.stack(rotations) if rotations else torch.zeros(0, 3, 3),
            torch.tensor(labels, dtype=torch.int64),
        )


def reference_of(sample: dict[str, Any]) -> str:
    """The record, by token, at whose time the ego frame is taken: lidar, or a camera where there is none."""
    data = sample["data"]
    return str(data.get(REFERENCE) or data["CAM_FRONT"])


@cache
def _class_name(category: str) -> str | None:
    from nuscenes.eval.detection.utils import category_to_detection_name

    name: str | None = category_to_detection_name(category)
    return name


def _label(annotation: dict[str, Any]) -> int | None:
    """Place in `CLASSES` of a box that counts."""
    name = _class_name(annotation["category_name"])
    if name is None or annotation["num_lidar_pts"] + annotation["num_radar_pts"] == 0:
        return None
    return CLASSES.index(name)


def _matrix(record: dict[str, Any]) -> Tensor:
    """A record's ``rotation`` (quaternion w, x, y, z) and ``translation`` as a matrix [4, 4]."""
    from pyquaternion import Quaternion

    rotation = torch.from_numpy(Quaternion(record["rotation"]).rotation_matrix)
    return rigid(rotation, torch.tensor(record["translation"], dtype=torch.float64))
