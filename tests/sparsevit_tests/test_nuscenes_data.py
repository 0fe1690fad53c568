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
from pyquaternion import Quaternion

from sparsevit.data.camera_views import camera_augmentation, camera_inputs
from sparsevit.data.drives import VERSION, DrivesConfig, write_drives
from sparsevit.data.errors import DataError
from sparsevit.data.nuscenes import CAMERAS, CLASSES, NuScenesSamples
from sparsevit.data.nuscenes_metrics import detection_metrics, to_results, write_submission
from sparsevit.data.nuscenes_tables import read_tables
from sparsevit.geometry import box_corners, project

REAL = Path(__file__).parents[3] / "shared" / "data" / "nuscenes_small"
Spoil = Callable[[str, Callable[[list[dict[str, Any]]], object]], Path]
Absent = Callable[[dict[str, Any], str], object]
SMALL = DrivesConfig(image_size=(64, 128), num_images={"train": 6, "val": 3})


@pytest.fixture(scope="module")
def drives(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data") / "drives"
    write_drives(root, SMALL)
    return root


@pytest.fixture
def spoilt(drives: Path, tmp_path: Path) -> Spoil:
    """A copy of the data set with one table changed."""

    def spoil(table: str, change: Callable[[list[dict[str, Any]]], object]) -> Path:
        root = tmp_path / f"spoilt-{table}"
        shutil.copytree(drives, root)
        path = root / VERSION / f"{table}.json"
        records = json.loads(path.read_text())
        change(records)
        path.write_text(json.dumps(records))
        return root

    return spoil


@pytest.fixture(scope="module")
def tilted(drives: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The drives as a real vehicle has them: on a slope, cameras not level, each photo a moment later."""
    root = tmp_path_factory.mktemp("tilted") / "drives"
    shutil.copytree(drives, root)
    tables = {
        name: json.loads((root / VERSION / f"{name}.json").read_text())
        for name in ("ego_pose", "calibrated_sensor", "sample_data")
    }
    rng = np.random.default_rng(0)

    def tilt(rotation: list[float]) -> list[float]:
        axis = [float(value) for value in rng.normal(size=3)]
        tilted = Quaternion(rotation) * Quaternion(axis=axis, degrees=float(rng.uniform(1, 4)))
        return [float(value) for value in tilted.q]

    for record in (*tables["ego_pose"], *tables["calibrated_sensor"]):
        record["rotation"] = tilt(record["rotation"])
    poses = {record["token"]: record for record in tables["ego_pose"]}
    for number, record in enumerate(tables["sample_data"]):
        pose = poses[record["ego_pose_token"]]
        place = [value + float(rng.uniform(-0.3, 0.3)) for value in pose["translation"]]
        later = {**pose, "token": f"later{number}", "translation": place, "rotation": tilt(pose["rotation"])}
        tables["ego_pose"].append(later)
        record["ego_pose_token"] = later["token"]
    for name, records in tables.items():
        (root / VERSION / f"{name}.json").write_text(json.dumps(records))
    return root


def roots(drives: Path, tilted: Path) -> list[tuple[Path, str]]:
    real = [(REAL, "mini_train"), (REAL, "mini_val")] if REAL.is_dir() else []
    return [(drives, "drives_train"), (tilted, "drives_train"), *real]


def test_boxes_project_where_the_devkit_projects_them(drives: Path, tilted: Path) -> None:
    """Every corner of every ground-truth box in every camera, to a hundredth of a pixel."""
    num_corners = 0
    for root, split in roots(drives, tilted):
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
    assert num_corners > 500


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


@pytest.mark.parametrize(
    ("lidar", "radar", "is_kept"),
    [(0, 0, False), (0, 3, True), (4, None, True), (0, None, False), (None, 2, True), (None, None, True)],
)
@pytest.mark.parametrize("absent", [lambda record, key: record.pop(key), lambda record, key: None])
def test_boxes_without_points_are_left_out(
    spoilt: Spoil, drives: Path, lidar: int | None, radar: int | None, is_kept: bool, absent: Absent
) -> None:
    """A count that is missing or null says nothing; without both, the box is kept, here and by the devkit."""

    def change(records: list[dict[str, Any]]) -> None:
        for record in records[::2]:
            record |= {"num_lidar_pts": lidar, "num_radar_pts": radar}
            for key in POINTS:
                if record[key] is None:
                    absent(record, key)
        for record in records[1::2]:
            record |= {"num_lidar_pts": 1}

    dataset = NuScenesSamples(spoilt("sample_annotation", change), "drives_train")
    records = [record for record in dataset.tables.sample_annotation if record in dataset._annotations()]
    num_boxes = sum(len(dataset[index][1]["boxes"]) for index in range(len(dataset)))
    num_expected = len(records) if is_kept else sum(record["num_lidar_pts"] == 1 for record in records)
    assert 0 < num_boxes == num_expected == sum(dataset.class_counts().values())
    assert detection_metrics(dataset.tables, dataset.sample_ids, perfect(dataset))["map"] > 0.7


def test_splits_without_a_box_that_counts(spoilt: Spoil) -> None:
    """No points, or foreign categories; in the whole split or in the keyframes in use."""

    def hide(records: list[dict[str, Any]]) -> None:
        for record in records:
            record["num_lidar_pts"] = 0

    message = (
        "no box to learn from or to measure on is in the split 'drives_train' of .*: of the 65 annotations"
    )
    with pytest.raises(DataError, match=rf"{message} of the 6 keyframes in use, 0 are of categories"):
        NuScenesSamples(spoilt("sample_annotation", hide), "drives_train")
    root = spoilt("category", lambda records: [record.update(name="animal") for record in records])
    with pytest.raises(DataError, match=rf"{message} .*, 65 are of categories .* \(\['animal'\]\)"):
        NuScenesSamples(root, "drives_train")


def test_keyframes_in_use_need_a_box(spoilt: Spoil, drives: Path) -> None:
    chosen = NuScenesSamples(drives, "drives_train").sample_ids[0]

    def hide(records: list[dict[str, Any]]) -> None:
        for record in records:
            record["num_lidar_pts"] *= record["sample_token"] != chosen

    dataset = NuScenesSamples(spoilt("sample_annotation", hide), "drives_train")
    dataset.verify(decode=False)
    with pytest.raises(DataError, match="annotations of the 1 keyframes in use, 0 are of categories"):
        dataset.subset([chosen]).verify(decode=False)


def test_annotations_with_two_attributes_or_none(spoilt: Spoil, drives: Path) -> None:
    """The devkit's evaluation admits one; the first stands."""
    attributes = json.loads((drives / VERSION / "attribute.json").read_text())
    tokens = {record["name"]: record["token"] for record in attributes}

    def change(records: list[dict[str, Any]]) -> None:
        for record in records:
            if record["attribute_tokens"]:
                record["attribute_tokens"].append(tokens["vehicle.stopped"])
            else:
                del record["attribute_tokens"]

    expected, dataset = (
        NuScenesSamples(root, "drives_train") for root in (drives, spoilt("sample_annotation", change))
    )
    ours = detection_metrics(dataset.tables, dataset.sample_ids, perfect(dataset))
    assert ours == detection_metrics(expected.tables, expected.sample_ids, perfect(expected))


def test_cameras_alone(spoilt: Spoil, drives: Path) -> None:
    """Without a lidar the ego frame is that of the front camera, in reading as in the evaluation."""

    def drop(records: list[dict[str, Any]]) -> None:
        records[:] = [record for record in records if "LIDAR" not in record["filename"]]

    expected, dataset = (
        NuScenesSamples(root, "drives_train") for root in (drives, spoilt("sample_data", drop))
    )
    ours = detection_metrics(dataset.tables, dataset.sample_ids, perfect(dataset))
    assert ours == detection_metrics(expected.tables, expected.sample_ids, perfect(expected))
    assert ours["map"] > 0.7


def test_cameras_of_two_sizes(spoilt: Spoil, drives: Path) -> None:
    """The smaller photos are padded in the item; what the network sees is cut from the photo alone."""

    def widen(records: list[dict[str, Any]]) -> None:
        for record in records:
            if "/CAM_FRONT/" in record["filename"]:
                record |= {"width": 192, "height": 80}

    root = spoilt("sample_data", widen)
    for path in (root / "samples" / "CAM_FRONT").iterdir():
        Image.open(path).resize((192, 80)).save(path)
    dataset = NuScenesSamples(root, "drives_train")
    dataset.verify(decode=True)
    photos, target = dataset[0]
    expected_photos, expected = NuScenesSamples(drives, "drives_train")[0]
    assert photos.shape == (6, 3, 80, 192)
    assert target["photo_sizes"].tolist() == [[64, 128], [80, 192], *[[64, 128]] * 4]
    assert (photos[0, :, :64, :128] == expected_photos[0]).all()
    assert photos[0, :, 64:].sum() == photos[0, :, :, 128:].sum() == 0
    seen, wide = camera_inputs((32, 64))(photos, target)
    expected_seen, narrow = camera_inputs((32, 64))(expected_photos, expected)
    others = [0, 2, 3, 4, 5]
    assert (seen[others] == expected_seen[others]).all()
    assert (wide["image_to_input"][others] == narrow["image_to_input"][others]).all()
    assert wide["image_to_input"][1, 0, 0] == pytest.approx(64 / 192)
    augment = camera_augmentation(
        (32, 64), resize_range=(0, 0.1), degrees=3, bev_degrees=5, bev_scale_range=(1, 1)
    )
    assert augment(photos, target)[0].shape == (6, 3, 32, 64)


DANGLING = [
    ("calibrated_sensor", "sensor_token", "sensor"),
    ("instance", "category_token", "category"),
    ("sample", "scene_token", "scene"),
    ("sample_annotation", "sample_token", "sample"),
    ("sample_annotation", "instance_token", "instance"),
    ("sample_annotation", "attribute_tokens", "attribute"),
    ("sample_annotation", "prev", "sample_annotation"),
    ("sample_annotation", "next", "sample_annotation"),
    ("sample_data", "sample_token", "sample"),
    ("sample_data", "ego_pose_token", "ego_pose"),
    ("sample_data", "calibrated_sensor_token", "calibrated_sensor"),
    ("map", "log_tokens", "log"),
]


@pytest.mark.parametrize(("table", "field", "target"), DANGLING)
def test_tokens_that_lead_nowhere(spoilt: Spoil, table: str, field: str, target: str) -> None:
    def change(records: list[dict[str, Any]]) -> None:
        records[-1][field] = ["nowhere"] if field.endswith("tokens") else "nowhere"

    message = rf"{table}.json: record \w+ has the {field} 'nowhere', but {target}.json has no such record"
    with pytest.raises(DataError, match=message):
        NuScenesSamples(spoilt(table, change), "drives_train")


@pytest.mark.parametrize("table", ["sample_data", "visibility"])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is not valid JSON, or not all of it"),
        ('[{"token": "a"}, {"tok', "is not valid JSON, or not all of it"),
        ("{}", "holds a dict, not a list of records"),
        ("null", "holds a NoneType, not a list of records"),
        ("[1]", "has a record without a token: 1"),
        ('[{"token": null}]', "has a record without a token: {'token': None}"),
    ],
)
def test_tables_that_are_none(drives: Path, tmp_path: Path, table: str, content: str, message: str) -> None:
    root = tmp_path / "spoilt"
    shutil.copytree(drives, root)
    (root / VERSION / f"{table}.json").write_text(content)
    with pytest.raises(DataError, match=f"{VERSION}/{table}.json {message}"):
        NuScenesSamples(root, "drives_train")


@pytest.mark.parametrize("content", ["[", "[1]", '{"drives_train": "val-0001"}'])
def test_splits_that_are_none(drives: Path, tmp_path: Path, content: str) -> None:
    root = tmp_path / "spoilt"
    shutil.copytree(drives, root)
    (root / VERSION / "splits.json").write_text(content)
    with pytest.raises(DataError, match=r"splits.json (is not valid JSON|must be an object that lists)"):
        NuScenesSamples(root, "drives_train")


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
            "ego_pose",
            lambda records: [record.update(translation=[0, None, 0]) for record in records],
            r"ego_pose .* has the translation \[0, None, 0\]; it must be three finite numbers",
        ),
        (
            "sample_annotation",
            lambda records: records[0].update(size=[1.0, 0.0, 2.0]),
            r"sample_annotation \w+ of .* has the size \[1.0, 0.0, 2.0\]; it must be width, length, height",
        ),
        (
            "sample_annotation",
            lambda records: records[0].update(translation=[float("nan"), 0.0, 2.0]),
            r"sample_annotation \w+ of .* has the translation \[nan, 0.0, 2.0\]",
        ),
        (
            "sample_annotation",
            lambda records: records[0].pop("rotation"),
            r"sample_annotation \w+ of .* has the rotation None, which is not a quaternion",
        ),
        (
            "sample_data",
            lambda records: [record.update(width=None) for record in records],
            "sample_data .* of CAM_FRONT_LEFT has the width None and the height 64",
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
    spoilt: Spoil,
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
    with pytest.raises(DataError, match=r"is 10×10 pixels, but .*sample_data.json says 128×64"):
        dataset.verify(decode=False)
    path.unlink()
    with pytest.raises(DataError, match="CAM_BACK.* does not exist"):
        dataset.verify(decode=False)


def test_views_and_their_matrices_agree() -> None:
    """A bright spot is found where the matrix says, after any augmentation."""
    torch.manual_seed(0)
    photos = torch.zeros(6, 3, 90, 160, dtype=torch.uint8)
    photos[:, :, 60:64, 100:104] = 255
    target = {"boxes": torch.zeros(0, 9), "photo_sizes": torch.tensor([[90, 160]] * 6)}
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


def test_perfect_detections_of_a_tilted_vehicle(drives: Path, tilted: Path) -> None:
    """Detections are upright boxes in the ego frame of the keyframe: what the tilt costs is no more."""
    level, dataset = (NuScenesSamples(root, "drives_train") for root in (drives, tilted))
    expected = detection_metrics(level.tables, level.sample_ids, perfect(level))
    found = detection_metrics(dataset.tables, dataset.sample_ids, perfect(dataset))
    assert found["map"] == pytest.approx(expected["map"], abs=0.01)
    assert found["nds"] == pytest.approx(expected["nds"], abs=0.02)


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
