"""nuScenes' tables: geometry against the devkit, what is refused, and the official metrics."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from nuscenes.utils.geometry_utils import view_points
from PIL import Image

from sparsevit.data.camera_views import camera_augmentation, camera_inputs
from sparsevit.data.drives import VERSION, DrivesConfig, write_drives
from sparsevit.data.errors import DataError
from sparsevit.data.nuscenes import CAMERAS, CLASSES, NuScenesSamples, read_tables
from sparsevit.data.nuscenes_metrics import detection_metrics, to_results, write_submission
from sparsevit.geometry import box_corners, project

REAL = Path(__file__).parents[3] / "shared" / "data" / "nuscenes_small"
SMALL = DrivesConfig(image_size=(64, 128), num_images={"train": 6, "val": 3})


@pytest.fixture(scope="module")
def drives(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data") / "drives"
    write_drives(root, SMALL)
    return root


@pytest.fixture
def spoilt(drives: Path, tmp_path: Path) -> Callable[[str, Callable[[list[dict[str, Any]]], object]], Path]:
    """A copy of the data set with one table changed."""

    def spoil(table: str, change: Callable[[list[dict[str, Any]]], object]) -> Path:
        root = tmp_path / "spoilt"
        shutil.copytree(drives, root)
        path = root / VERSION / f"{table}.json"
        records = json.loads(path.read_text())
        change(records)
        path.write_text(json.dumps(records))
        return root

    return spoil


def roots(drives: Path) -> list[tuple[Path, str]]:
    real = [(REAL, "mini_train"), (REAL, "mini_val")] if REAL.is_dir() else []
    return [(drives, "drives_train"), *real]


def test_boxes_project_where_the_devkit_projects_them(drives: Path) -> None:
    """Every corner of every ground-truth box in every camera, to a hundredth of a pixel."""
    num_corners = 0
    for root, split in roots(drives):
        dataset = NuScenesSamples(root, split)
        for index, token in enumerate(dataset.sample_ids):
            _, target = dataset[index]
            corners = box_corners(target["boxes"].double(), target["rotations"].double())
            record = dataset.tables.get("sample", token)
            kept = [
                annotation
                for annotation in record["anns"]
                if sum(dataset.tables.get("sample_annotation", annotation)[k] for k in POINTS) > 0
                and _is_detected(dataset, annotation)
            ]
            for number, camera in enumerate(CAMERAS):
                _, boxes, intrinsics = dataset.tables.get_sample_data(
                    record["data"][camera], box_vis_level=0, selected_anntokens=kept
                )
                theirs = {box.token: box for box in boxes}
                for ours, annotation in zip(corners, kept, strict=True):
                    if annotation not in theirs:  # the devkit leaves out what the camera does not see
                        continue
                    expected = view_points(theirs[annotation].corners(), intrinsics, normalize=True)[:2].T
                    ego_to_camera = torch.linalg.inv(target["camera_to_ego"][number].double())
                    found, depth = project(ours, ego_to_camera, target["intrinsics"][number].double())
                    if float(depth.min()) < 0.5:
                        continue
                    distances = torch.cdist(torch.from_numpy(expected), found)
                    assert float(distances.min(dim=1).values.max()) < 0.01
                    num_corners += 8
    assert num_corners > (400 if REAL.is_dir() else 250)


POINTS = ("num_lidar_pts", "num_radar_pts")


def _is_detected(dataset: NuScenesSamples, annotation: str) -> bool:
    from nuscenes.eval.detection.utils import category_to_detection_name

    name = dataset.tables.get("sample_annotation", annotation)["category_name"]
    return category_to_detection_name(name) is not None


def test_item(drives: Path) -> None:
    dataset = NuScenesSamples(drives, "drives_train")
    assert dataset.known_splits(drives) == ["drives_train", "drives_val"]
    assert dataset.class_names == CLASSES
    images, target = dataset[0]
    assert images.shape == (6, 3, 64, 128)
    assert target["boxes"].shape == (len(target["labels"]), 9)
    assert target["boxes"][:, 7:].isnan().all()  # one keyframe tells no velocity
    assert {dataset[index][1]["sample_id"] for index in range(6)} == set(dataset.sample_ids)


def test_drives_are_a_function_of_the_seed(drives: Path, tmp_path: Path) -> None:
    write_drives(tmp_path / "again", SMALL)
    files = sorted(path for path in drives.rglob("*") if path.is_file())
    assert len(files) == 6 * 9 + 13 + 3
    for path in files:
        assert path.read_bytes() == (tmp_path / "again" / path.relative_to(drives)).read_bytes()


def test_drawn_pixels_lie_inside_the_projected_boxes(drives: Path) -> None:
    """The centre of a box that nothing hides has the colour of its class, not that of the ground."""
    dataset = NuScenesSamples(drives, "drives_train")
    num_coloured = num_seen = 0
    for index in range(len(dataset)):
        images, target = dataset[index]
        nearest = int(target["boxes"][:, :2].norm(dim=1).argmin())
        for number in range(6):
            ego_to_camera = torch.linalg.inv(target["camera_to_ego"][number])
            centre = target["boxes"][nearest : nearest + 1, :3]
            pixel, depth = project(centre, ego_to_camera, target["intrinsics"][number])
            x, y = pixel[0].round().int().tolist()
            if float(depth[0]) > 1 and 0 <= x < 128 and 0 <= y < 64:
                colour = images[number, :, y, x].float()
                num_seen += 1
                num_coloured += bool(colour.max() - colour.min() > 25) or bool(colour.mean() > 180)
    assert num_seen >= 4
    assert num_coloured / num_seen > 0.7


def test_boxes_without_points_are_left_out(
    spoilt: Callable[[str, Callable[[list[dict[str, Any]]], object]], Path], drives: Path
) -> None:
    def hide(records: list[dict[str, Any]]) -> None:
        for record in records:
            record["num_lidar_pts"] = 0

    root = spoilt("sample_annotation", hide)
    assert len(NuScenesSamples(root, "drives_train")[0][1]["boxes"]) == 0
    assert len(NuScenesSamples(drives, "drives_train")[0][1]["boxes"]) > 0


@pytest.mark.parametrize(
    ("table", "change", "message"),
    [
        (
            "calibrated_sensor",
            lambda records: [record.update(rotation=[2.0, 0, 0, 0]) for record in records],
            r"has the rotation \[2.0, 0, 0, 0\], which is not a quaternion of length 1 \(it is 2\)",
        ),
        (
            "calibrated_sensor",
            lambda records: [record.update(camera_intrinsic=[]) for record in records],
            "which are not a 3×3 matrix with positive focal lengths",
        ),
        (
            "ego_pose",
            lambda records: [record.update(rotation=[0.0, 0, 0, 0]) for record in records],
            "ego_pose .* not a quaternion of length 1",
        ),
        (
            "sample_data",
            lambda records: records.remove(next(r for r in records if "CAM_BACK/" in r["filename"])),
            "has no image of CAM_BACK$",
        ),
        (
            "scene",
            lambda records: [record.update(name="x") for record in records],
            "is empty: none of its scenes",
        ),
    ],
)
def test_contradictory_tables(
    spoilt: Callable[[str, Callable[[list[dict[str, Any]]], object]], Path],
    table: str,
    change: Callable[[list[dict[str, Any]]], object],
    message: str,
) -> None:
    root = spoilt(table, change)
    with pytest.raises(DataError, match=message):
        NuScenesSamples(root, "drives_train")


def test_missing_roots_versions_tables_and_splits(drives: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nowhere is not a folder"):
        NuScenesSamples(tmp_path / "nowhere", "train")
    with pytest.raises(DataError, match="holds no tables: they are in a folder v1.0-mini, v1.0-trainval"):
        NuScenesSamples(tmp_path, "train")
    with pytest.raises(DataError, match=r"\(v1.0-drives\) has no split 'train'; it has \['drives_train'"):
        NuScenesSamples(drives, "train")
    (tmp_path / "v1.0-mini").mkdir()
    with pytest.raises(DataError, match="v1.0-mini lacks the tables attribute, calibrated_sensor"):
        NuScenesSamples(tmp_path, "mini_val")


def test_missing_and_wrong_images(drives: Path, tmp_path: Path) -> None:
    root = tmp_path / "copy"
    shutil.copytree(drives, root)
    dataset = NuScenesSamples(root, "drives_val")
    path = dataset.image_path(dataset.sample_ids[1], "CAM_BACK")
    Image.new("RGB", (10, 10)).save(path)
    with pytest.raises(DataError, match=r"is 10×10 pixels, but the tables say 128×64"):
        dataset.verify(decode=False)
    path.unlink()
    with pytest.raises(DataError, match="CAM_BACK.* does not exist"):
        dataset.verify(decode=False)


def test_views_and_their_matrices_agree() -> None:
    """A bright spot is found where the matrix says, after any augmentation."""
    torch.manual_seed(0)
    photos = torch.zeros(6, 3, 90, 160, dtype=torch.uint8)
    photos[:, :, 60:64, 100:104] = 255
    target = {"boxes": torch.zeros(0, 9)}
    augment = camera_augmentation(
        (64, 160), resize_range=(-0.1, 0.3), degrees=5.0, bev_degrees=22.5, bev_scale_range=(0.95, 1.05)
    )
    num_found = 0
    for transform_sample in (camera_inputs((64, 160)), *[augment] * 5):
        images, seen = transform_sample(photos, dict(target))
        assert images.shape == (6, 3, 64, 160)
        for image, matrix in zip(images, seen["image_to_input"], strict=True):
            x, y, _ = (matrix @ torch.tensor([101.5, 61.5, 1.0])).tolist()
            if not (4 < x < 155 and 4 < y < 59):
                continue
            weights = image[0].double()
            rows, columns = torch.meshgrid(torch.arange(64.0), torch.arange(160.0), indexing="ij")
            found = (
                float((columns * weights).sum() / weights.sum()),
                float((rows * weights).sum() / weights.sum()),
            )
            assert found == pytest.approx((x, y), abs=0.35)
            num_found += 1
    assert num_found > 15


def perfect(dataset: NuScenesSamples) -> dict[str, list[dict[str, Any]]]:
    results = {}
    for index in range(len(dataset)):
        _, target = dataset[index]
        results[target["sample_id"]] = to_results(
            target["boxes"].nan_to_num(), torch.ones(len(target["labels"])), target["labels"],
            target["sample_id"], target["ego_to_global"],
        )  # fmt: skip
    return results


def test_perfect_detections_score_one(drives: Path) -> None:
    dataset = NuScenesSamples(drives, "drives_train")
    scores = detection_metrics(dataset.tables, dataset.sample_ids, perfect(dataset))
    present = {CLASSES[label] for index in range(6) for label in dataset[index][1]["labels"].tolist()}
    assert len(present) > 7
    for name in CLASSES:
        assert scores[f"ap/{name}"] == pytest.approx(float(name in present), abs=1e-6)
    assert scores["map"] == pytest.approx(len(present) / 10)
    nothing = detection_metrics(
        dataset.tables, dataset.sample_ids, {token: [] for token in dataset.sample_ids}
    )
    assert nothing["map"] == 0.0
    assert all(math.isfinite(value) for value in (*scores.values(), *nothing.values()))


@pytest.mark.skipif(not REAL.is_dir(), reason="the real keyframes are not here")
def test_perfect_detections_of_the_real_keyframes() -> None:
    """Five classes have boxes in the range of the evaluation; upright boxes are exact enough."""
    present = set()
    for split in ("mini_train", "mini_val"):
        dataset = NuScenesSamples(REAL, split)
        dataset.verify(decode=True)
        scores = detection_metrics(dataset.tables, dataset.sample_ids, perfect(dataset))
        found = {name for name in CLASSES if scores[f"ap/{name}"] > 0.99}
        assert scores["map"] == pytest.approx(len(found) / 10, abs=0.01)
        assert all(math.isfinite(value) for value in scores.values())
        present |= found
    assert present == {"barrier", "car", "pedestrian", "traffic_cone", "truck"}


def test_submission_is_what_the_devkit_evaluates(drives: Path, tmp_path: Path) -> None:
    """The file, through the devkit's own constructor and command, gives the same figures."""
    from nuscenes.eval.common.config import config_factory
    from nuscenes.eval.detection.evaluate import DetectionEval

    dataset = NuScenesSamples(drives, "drives_val")
    results = perfect(dataset)
    for found in results.values():
        for each in found[::2]:
            each["translation"][0] += 1.3
            each["detection_score"] = 0.5
    path = tmp_path / "results.json"
    write_submission(path, results)
    evaluation = DetectionEval(
        read_tables(drives.resolve(), VERSION), config_factory("detection_cvpr_2019"), str(path),
        "drives_val",
        str(tmp_path / "out"), verbose=False,
    )  # fmt: skip
    metrics, _ = evaluation.evaluate()
    ours = detection_metrics(dataset.tables, dataset.sample_ids, results)
    assert ours["map"] == pytest.approx(metrics.mean_ap)
    assert ours["nds"] == pytest.approx(metrics.nd_score)
    assert 0 < ours["map"] < 0.95
    assert np.isfinite(list(ours.values())).all()
