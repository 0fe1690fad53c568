"""Six-camera scenes in the tables of nuScenes, drawn by this module: coloured cuboids on a plane.

They give the embedded scale of 3D detection something to learn within minutes: all ten classes, each
with its size and its colours, seen by six cameras with correct perspective and occlusion. The
pixels are a function of the seed.

Legend: H, W size of a photo; frames of reference as in `sparsevit.geometry`.
"""

import hashlib
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from sparsevit.data.generated import write_generated
from sparsevit.data.nuscenes import CAMERAS, CLASSES, REFERENCE
from sparsevit.data.nuscenes_tables import TABLES
from sparsevit.geometry import box_corners

VERSION = "v1.0-drives"
PREFIX = "drives_"  # of splits: the devkit keeps the plain names for itself
CAMERA_YAWS = dict(zip(CAMERAS, (55.0, 0.0, -55.0, 110.0, 180.0, -110.0), strict=True))
FIELD_OF_VIEW = 70.0
CAMERA_HEIGHT = 1.6
NEAR = 0.2
MIN_VISIBLE_PIXELS = 4
FACES = ((0, 1, 2, 3), (4, 5, 6, 7), (0, 1, 5, 4), (3, 2, 6, 7), (0, 3, 7, 4), (1, 2, 6, 5))
"""Corners of a cuboid's faces: front, back, top, bottom, left, right."""
FACE_LIGHT = (1.0, 0.55, 1.15, 0.3, 0.8, 0.7)
Polygon = NDArray[np.float64]


@dataclass(frozen=True)
class _Kind:
    """How a class looks: category, attribute, length, width, height in metres, colour."""

    category: str
    attribute: str
    size: tuple[float, float, float]
    colour: tuple[int, int, int]


KINDS = {
    "car": _Kind("vehicle.car", "vehicle.parked", (4.4, 1.9, 1.6), (200, 40, 40)),
    "truck": _Kind("vehicle.truck", "vehicle.parked", (7.0, 2.5, 2.9), (40, 70, 200)),
    "construction_vehicle": _Kind("vehicle.construction", "vehicle.parked", (6.0, 2.8, 3.2), (235, 180, 20)),
    "bus": _Kind("vehicle.bus.rigid", "vehicle.stopped", (10.5, 2.9, 3.4), (240, 240, 240)),
    "trailer": _Kind("vehicle.trailer", "vehicle.parked", (9.0, 2.6, 3.6), (30, 140, 90)),
    "barrier": _Kind("movable_object.barrier", "", (0.6, 2.4, 1.0), (240, 120, 20)),
    "motorcycle": _Kind("vehicle.motorcycle", "cycle.without_rider", (2.1, 0.9, 1.5), (30, 30, 40)),
    "bicycle": _Kind("vehicle.bicycle", "cycle.without_rider", (1.7, 0.6, 1.3), (60, 210, 220)),
    "pedestrian": _Kind("human.pedestrian.adult", "pedestrian.standing", (0.7, 0.7, 1.75), (180, 60, 190)),
    "traffic_cone": _Kind("movable_object.trafficcone", "", (0.5, 0.5, 1.0), (250, 90, 120)),
}
assert tuple(KINDS) == CLASSES


@dataclass(frozen=True)
class DrivesConfig:
    """What to draw; every split has its own stream of random numbers. `image_size` is height, width."""

    image_size: tuple[int, int] = (112, 256)
    num_images: Mapping[str, int] = field(default_factory=lambda: {"train": 500, "search": 24, "val": 48})
    max_distance: float = 14.0
    seed: int = 0


@dataclass
class _Tables:
    """The tables of nuScenes as they grow; a token is a hash of what it names."""

    records: dict[str, list[dict[str, Any]]] = field(default_factory=lambda: {name: [] for name in TABLES})

    def add(self, table: str, name: str, /, **values: Any) -> str:
        token = hashlib.md5(f"{table}/{name}".encode(), usedforsecurity=False).hexdigest()
        self.records[table].append({"token": token, **values})
        return token


def write_drives(root: Path, config: DrivesConfig, on_image: Callable[[], None] = lambda: None) -> None:
    """Write all splits below `root`, unless they are there already. A sample is six images, one call."""
    tables = _Tables()
    splits: dict[str, list[str]] = {}
    rig = _Rig(tables, config.image_size)

    def write_split(folder: Path, split: str, rng: np.random.Generator) -> None:
        (folder / VERSION).mkdir(exist_ok=True)
        for camera in CAMERAS:
            (folder / "samples" / camera).mkdir(parents=True, exist_ok=True)
        names = [f"{split}-{number:04d}" for number in range(config.num_images[split])]
        splits[PREFIX + split] = names
        for name in names:
            _write_scene(folder, name, rig, config, rng)
            on_image()
        (folder / "maps").mkdir(exist_ok=True)
        Image.new("L", (8, 8)).save(folder / "maps" / "blank.png")
        for table, records in tables.records.items():
            (folder / VERSION / f"{table}.json").write_text(json.dumps(records))
        (folder / VERSION / "splits.json").write_text(json.dumps(splits))

    write_generated(root, __name__, config, write_split)


class _Rig:
    """The sensors of the vehicle and everything that all scenes have in common."""

    def __init__(self, tables: _Tables, image_size: tuple[int, int]) -> None:
        self.tables = tables
        self.height, self.width = image_size
        focal = self.width / 2 / math.tan(math.radians(FIELD_OF_VIEW / 2))
        # The horizon is above the middle: the ground is what there is to see.
        self.intrinsics = [
            [focal, 0.0, (self.width - 1) / 2], [0.0, focal, 0.36 * self.height], [0.0, 0.0, 1.0],
        ]  # fmt: skip
        self.log = tables.add("log", "log", logfile="", vehicle="", date_captured="", location="nowhere")
        tables.add("map", "map", log_tokens=[self.log], category="", filename="maps/blank.png")
        self.visibility = tables.add("visibility", "all", level="v80-100", description="")
        self.categories, self.attributes = {}, {"": ""}
        for name, kind in KINDS.items():
            self.categories[name] = tables.add("category", name, name=kind.category, description="")
            if kind.attribute not in self.attributes:
                self.attributes[kind.attribute] = tables.add(
                    "attribute", kind.attribute, name=kind.attribute, description=""
                )
        self.sensors = {
            channel: tables.add("sensor", channel, channel=channel, modality=modality)
            for channel, modality in (*((camera, "camera") for camera in CAMERAS), (REFERENCE, "lidar"))
        }
        self.calibrations = {
            channel: tables.add(
                "calibrated_sensor",
                channel,
                sensor_token=sensor,
                translation=[0.0, 0.0, CAMERA_HEIGHT],
                rotation=_camera_quaternion(CAMERA_YAWS[channel])
                if channel in CAMERAS
                else [1.0, 0.0, 0.0, 0.0],
                camera_intrinsic=self.intrinsics if channel in CAMERAS else [],
            )
            for channel, sensor in self.sensors.items()
        }

    def to_camera(self, points_P3: NDArray[np.float64], camera: str) -> NDArray[np.float64]:
        """Points in the ego frame in the frame of a camera."""
        yaw = math.radians(CAMERA_YAWS[camera])
        x, y, z = (points_P3 - [0.0, 0.0, CAMERA_HEIGHT]).T
        forward, left = math.cos(yaw) * x + math.sin(yaw) * y, -math.sin(yaw) * x + math.cos(yaw) * y
        return np.stack((-left, -z, forward), axis=1)

    def to_pixels(self, in_camera_P3: NDArray[np.float64]) -> Polygon:
        pixels = in_camera_P3 @ np.asarray(self.intrinsics).T
        result: Polygon = pixels[:, :2] / pixels[:, 2:]
        return result


def _write_scene(folder: Path, name: str, rig: _Rig, config: DrivesConfig, rng: np.random.Generator) -> None:
    """One scene of one keyframe: photos, and its records."""
    tables = rig.tables
    boxes, labels = _draw_boxes(config.max_distance, rng)
    photos, visible = _draw_photos(rig, boxes, labels, rng)
    heading = float(rng.uniform(-math.pi, math.pi))
    place = [*rng.uniform(300, 1500, 2).tolist(), 0.0]
    turn = [math.cos(heading / 2), 0.0, 0.0, math.sin(heading / 2)]
    timestamp = 1_500_000_000_000_000 + 500_000 * len(tables.records["sample"])
    pose = tables.add("ego_pose", name, timestamp=timestamp, rotation=turn, translation=place)
    scene = tables.add("scene", name, log_token=rig.log, nbr_samples=1, name=name, description="drawn")
    sample = tables.add("sample", name, timestamp=timestamp, prev="", next="", scene_token=scene)
    tables.records["scene"][-1] |= {"first_sample_token": sample, "last_sample_token": sample}
    for channel, calibration in rig.calibrations.items():
        is_camera = channel in CAMERAS
        file_name = f"samples/{channel}/{name}.{'jpg' if is_camera else 'pcd.bin'}"
        if is_camera:
            photos[channel].save(folder / file_name, quality=95)
        tables.add(
            "sample_data", f"{name}/{channel}",
            sample_token=sample, ego_pose_token=pose, calibrated_sensor_token=calibration,
            timestamp=timestamp, fileformat="jpg" if is_camera else "pcd", is_key_frame=True,
            height=rig.height if is_camera else 0, width=rig.width if is_camera else 0,
            filename=file_name, prev="", next="",
        )  # fmt: skip
    cosine, sine = math.cos(heading), math.sin(heading)
    for number, (box, label) in enumerate(zip(boxes, labels, strict=True)):
        x, y, z, length, width, height, yaw = box
        kind = KINDS[label]
        instance = tables.add(
            "instance", f"{name}/{number}", category_token=rig.categories[label], nbr_annotations=1
        )
        annotation = tables.add(
            "sample_annotation", f"{name}/{number}",
            sample_token=sample, instance_token=instance, visibility_token=rig.visibility,
            attribute_tokens=[rig.attributes[kind.attribute]] if kind.attribute else [],
            translation=[place[0] + cosine * x - sine * y, place[1] + sine * x + cosine * y, z],
            size=[width, length, height],
            rotation=[math.cos((yaw + heading) / 2), 0.0, 0.0, math.sin((yaw + heading) / 2)],
            prev="", next="", num_lidar_pts=int(visible[number]), num_radar_pts=0,
        )  # fmt: skip
        tables.records["instance"][-1] |= {
            "first_annotation_token": annotation, "last_annotation_token": annotation,
        }  # fmt: skip


def _draw_boxes(max_distance: float, rng: np.random.Generator) -> tuple[NDArray[np.float64], list[str]]:
    """Cuboids on the ground that do not touch: [I, 7] in the ego frame, and their classes."""
    boxes: list[list[float]] = []
    labels: list[str] = []
    for _ in range(int(rng.integers(8, 14))):
        label = CLASSES[int(rng.integers(len(CLASSES)))]
        size = [extent * float(rng.uniform(0.9, 1.1)) for extent in KINDS[label].size]
        reach = math.hypot(size[0], size[1]) / 2
        for _attempt in range(20):
            distance = float(rng.uniform(3.0 + reach, max_distance))
            angle = float(rng.uniform(-math.pi, math.pi))
            x, y = distance * math.cos(angle), distance * math.sin(angle)
            if all(
                math.hypot(x - other[0], y - other[1]) > reach + math.hypot(other[3], other[4]) / 2
                for other in boxes
            ):
                boxes.append([x, y, size[2] / 2, *size, float(rng.uniform(-math.pi, math.pi))])
                labels.append(label)
                break
    return np.asarray(boxes).reshape(-1, 7), labels


def _draw_photos(
    rig: _Rig, boxes: NDArray[np.float64], labels: list[str], rng: np.random.Generator
) -> tuple[dict[str, Image.Image], NDArray[np.int64]]:
    """The six photos, and how many pixels of each box are seen in all of them."""
    visible = np.zeros(len(boxes), dtype=np.int64)
    padded = np.pad(boxes, ((0, 0), (0, 2)))
    corners = box_corners(torch.from_numpy(padded)).numpy()
    base = rng.uniform(85, 120) + rng.normal(0, 4, 3)
    sky = np.asarray([rng.uniform(110, 170), rng.uniform(150, 200), rng.uniform(200, 240)])
    colours = [np.clip(np.asarray(KINDS[label].colour) + rng.normal(0, 18, 3), 5, 250) for label in labels]
    far_first = np.argsort(-np.hypot(boxes[:, 0], boxes[:, 1]))
    photos = {}
    for camera in CAMERAS:
        picture = _background(rig, base, sky, rng)
        owner = Image.new("I", (rig.width, rig.height))
        pens = ImageDraw.Draw(picture), ImageDraw.Draw(owner)
        for number in far_first:
            in_camera = rig.to_camera(corners[number], camera)
            if in_camera[:, 2].max() <= NEAR:
                continue
            for face, light in _facing(in_camera):
                polygon = _clip_near(in_camera[list(face)])
                if len(polygon) < 3:
                    continue
                outline = [tuple(point) for point in rig.to_pixels(polygon).tolist()]
                colour = tuple(int(min(255, channel * light)) for channel in colours[number])
                edge = tuple(int(0.45 * channel) for channel in colour)
                pens[0].polygon(outline, fill=colour, outline=edge)
                pens[1].polygon(outline, fill=int(number) + 1)
        counts = np.bincount(np.asarray(owner).ravel(), minlength=len(boxes) + 1)[1:]
        visible += np.where(counts >= MIN_VISIBLE_PIXELS, counts, 0)
        noisy = np.asarray(picture, dtype=np.float32) + rng.normal(0, 4, (rig.height, rig.width, 3))
        photos[camera] = Image.fromarray(np.clip(noisy, 0, 255).astype(np.uint8))
    return photos, visible


def _background(
    rig: _Rig, ground: NDArray[np.float64], sky: NDArray[np.float64], rng: np.random.Generator
) -> Image.Image:
    """Sky above the horizon; below it ground, mottled and lighter with distance."""
    horizon = rig.intrinsics[1][2]
    rows = np.arange(rig.height)[:, None, None]
    above = sky + (235 - sky) * (rows / max(1.0, horizon)) * 0.6
    below = ground + 45 * np.exp(-(rows - horizon) / (0.12 * rig.height))
    coarse = rng.normal(0, 1, (rig.height // 6, rig.width // 6)).astype(np.float32)
    mottling = np.asarray(Image.fromarray(coarse).resize((rig.width, rig.height)))[..., None]
    pixels = np.where(rows < horizon, above, below) + 5 * mottling
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def _facing(in_camera_83: NDArray[np.float64]) -> list[tuple[tuple[int, int, int, int], float]]:
    """The faces that look towards the camera, and how light they are."""
    centre = in_camera_83.mean(axis=0)
    found = []
    for face, light in zip(FACES, FACE_LIGHT, strict=True):
        middle = in_camera_83[list(face)].mean(axis=0)
        if (middle - centre) @ middle < 0:
            found.append((face, light))
    return found


def _clip_near(polygon_P3: NDArray[np.float64]) -> NDArray[np.float64]:
    """The part of a polygon in front of the near plane (Sutherland and Hodgman)."""
    kept = []
    for start, end in zip(polygon_P3, np.roll(polygon_P3, -1, axis=0), strict=True):
        if start[2] > NEAR:
            kept.append(start)
        if (start[2] > NEAR) != (end[2] > NEAR):
            kept.append(start + (end - start) * (NEAR - start[2]) / (end[2] - start[2]))
    return np.asarray(kept).reshape(-1, 3)


def _camera_quaternion(yaw_degrees: float) -> list[float]:
    """Camera to ego for a level camera that looks along a yaw: w, x, y, z."""
    half = math.radians(yaw_degrees) / 2
    turn = (math.cos(half), 0.0, 0.0, math.sin(half))
    axes = (0.5, -0.5, 0.5, -0.5)  # z forward, x right, y down
    w1, x1, y1, z1 = turn
    w2, x2, y2, z2 = axes
    return [
        w1 * w2 - x1 * x2 - y1 * y2 - z1 * z2,
        w1 * x2 + x1 * w2 + y1 * z2 - z1 * y2,
        w1 * y2 - x1 * z2 + y1 * w2 + z1 * x2,
        w1 * z2 + x1 * y2 - y1 * x2 + z1 * w2,
    ]
