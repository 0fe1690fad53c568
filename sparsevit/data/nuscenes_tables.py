"""nuScenes' tables (arXiv 1903.11027): read by nuscenes-devkit (extra ``[nuscenes]``), checked here."""

import json
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from sparsevit.data.errors import DataError

TABLES = (
    "attribute", "calibrated_sensor", "category", "ego_pose", "instance", "log", "map", "sample",
    "sample_annotation", "sample_data", "scene", "sensor", "visibility",
)  # fmt: skip
REFERENCES = {
    "calibrated_sensor": {"sensor_token": "sensor"},
    "instance": {"category_token": "category"},
    "sample": {"scene_token": "scene"},
    "sample_annotation": {
        "sample_token": "sample", "instance_token": "instance", "attribute_tokens": "attribute",
        "prev": "sample_annotation", "next": "sample_annotation",
    },
    "sample_data": {
        "sample_token": "sample", "ego_pose_token": "ego_pose",
        "calibrated_sensor_token": "calibrated_sensor",
    },
    "map": {"log_tokens": "log"},
}  # fmt: skip
"""Fields with tokens that are followed here or by the devkit, and the tables they point to."""
OPTIONAL = frozenset(("attribute_tokens", "prev", "next"))


def known_splits(root: Path) -> list[str]:
    """The splits of all versions below a root, sorted."""
    return sorted(split for version in _versions(root) for split in _splits_of(root, version))


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
    raise DataError(f"{root} ({', '.join(versions)}) has no split {split!r}; it has {known_splits(root)}")


def scenes_of(tables: Any, split: str) -> set[str]:
    """Names of the scenes of a split, or of several, joined by ``+``."""
    from nuscenes.utils.splits import get_scenes_of_split

    return {scene for part in split.split("+") for scene in get_scenes_of_split(part, tables)}


@lru_cache(maxsize=4)
def read_tables(root: Path, version: str) -> Any:
    """The devkit's tables, read once, with what people's annotations lack filled in (`_complete`).

    Raises:
        DataError: if the devkit is missing or cannot read them, or a token leads nowhere.
    """
    try:
        from nuscenes import NuScenes
    except ImportError as error:
        raise DataError(
            f"nuScenes' tables are read by nuscenes-devkit, which is not installed ({error}): pip install "
            "-e '.[nuscenes]'"
        ) from error
    folder = root / version
    try:
        tables = NuScenes(version, str(root), verbose=False)
    except (LookupError, TypeError, AttributeError, ValueError, AssertionError, OSError) as error:
        # The devkit says a token at best, not where it stands.
        _check_tokens({table: _read(folder / f"{table}.json") for table in TABLES}, folder)
        raise DataError(
            f"{folder} does not hold consistent tables: {type(error).__name__} {error}"
        ) from error
    _check_tokens({table: getattr(tables, table) for table in TABLES}, folder)
    for annotation in tables.sample_annotation:
        _complete(annotation)
    return tables


def _complete(annotation: dict[str, Any]) -> None:
    """Bring an annotation to what the devkit's evaluation demands.

    The counts of lidar and radar points may be missing. One of them alone counts for both; where both
    are, it is not known whether the object was seen, and -1 keeps it, as the devkit has it for boxes
    without a count. Of several attributes the first stands.
    """
    counts = [annotation.get(key) for key in ("num_lidar_pts", "num_radar_pts")]
    lidar, radar = (0 if count is None else count for count in counts)
    annotation["num_lidar_pts"] = -1 if counts == [None, None] else lidar
    annotation["num_radar_pts"] = radar
    annotation["attribute_tokens"] = (annotation.get("attribute_tokens") or [])[:1]
    for neighbour in ("prev", "next"):
        annotation[neighbour] = annotation.get(neighbour) or ""


def _check_tokens(tables: Mapping[str, Any], folder: Path) -> None:
    """All tokens that are followed lead to a record."""
    for table, records in tables.items():
        if not isinstance(records, list):
            raise DataError(f"{folder / table}.json holds a {type(records).__name__}, not a list of records")
        for record in records:
            if not isinstance(record, dict) or not isinstance(record.get("token"), str):
                raise DataError(f"{folder / table}.json has a record without a token: {str(record)[:80]}")
    known = {table: {record["token"] for record in records} for table, records in tables.items()}
    for table, fields in REFERENCES.items():
        for field, target in fields.items():
            tokens = known[target]
            for record in tables[table]:
                value = record.get(field)
                if field in OPTIONAL and not value:
                    continue
                for token in value if isinstance(value, list) else [value]:
                    if token not in tokens:
                        raise DataError(
                            f"{folder / table}.json: record {record['token']} has the {field} {token!r}, but "
                            f"{target}.json has no such record: the tables are not of one data set, or cut"
                        )


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{path} is not valid JSON, or not all of it: {error}") from error


def _versions(root: Path) -> list[str]:
    return sorted(path.name for path in root.glob("v1.0-*") if path.is_dir())


def _splits_of(root: Path, version: str) -> list[str]:
    """The official splits of a version, and the data set's own."""
    official = {"v1.0-mini": ["mini_train", "mini_val"], "v1.0-trainval": ["train", "val"]}
    own = root / version / "splits.json"
    if not own.is_file():
        return official.get(version, [])
    try:
        splits = json.loads(own.read_text())
    except ValueError as error:
        raise DataError(f"{own} is not valid JSON: {error}") from error
    if not isinstance(splits, dict) or not all(isinstance(scenes, list) for scenes in splits.values()):
        raise DataError(f"{own} must be an object that lists the names of scenes by split")
    return official.get(version, []) + sorted(splits)
