"""Where data sets in COCO format keep annotations and images: as COCO itself, Roboflow, FiftyOne, CVAT."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sparsevit.data.errors import DataError

ANNOTATION_FILES = (
    "annotations/instances_{split}.json",
    "{split}/_annotations.coco.json",  # Roboflow
    "{split}/labels.json",  # FiftyOne
)
WHOLE_FILES = ("_annotations.coco.json", "labels.json")
"""Annotations at the root, of a data set that has no splits: they are named as a file."""
IMAGE_FOLDERS = (
    "{split}", "{split}/images", "{split}/data", "images/{split}", "{beside}", "{beside}/images",
    "{beside}/data", "images", "data", ".",
)  # fmt: skip
"""Below the root, in the order of preference; ``{beside}`` is the folder of the annotations."""


def known_splits(root: Path) -> list[str]:
    """The splits below a root that have annotations, sorted."""
    found = {name for name in WHOLE_FILES if (root / name).is_file()}
    for pattern in ANNOTATION_FILES:
        before, after = pattern.split("{split}")
        for path in root.glob(pattern.format(split="*")):
            found.add(path.relative_to(root).as_posix().removeprefix(before).removesuffix(after))
    return sorted(found)


def find_annotations(root: Path, split: str) -> tuple[Path, str]:
    """The annotation file of a split, and the name that the folder of its images may have.

    Raises:
        DataError: naming the files that were looked for and the splits that there are.
    """
    if not root.is_dir():
        raise DataError(f"data root {root} is not a folder: set data.root to a data set in COCO format")
    if split.endswith(".json"):
        candidates = [root / split]
    else:
        candidates = [root / pattern.format(split=split) for pattern in ANNOTATION_FILES]
    for path in candidates:
        if path.is_file():
            return path, path.stem.removeprefix("instances_") if split.endswith(".json") else split
    raise DataError(
        f"split {split!r}: {' or '.join(map(str, candidates))} does not exist; {root} has the splits "
        f"{known_splits(root)}, and a path that ends in .json names annotations elsewhere below it"
    )


def find_images(
    root: Path,
    annotation_file: Path,
    split_name: str,
    images: Sequence[Mapping[str, Any]],
    image_folder: str | None,
) -> Path:
    """The folder that holds the first of a split's images.

    Args:
        images: records of the annotations.
        image_folder: look nowhere else below the root.

    Raises:
        DataError: naming the places that were looked at.
    """
    if image_folder is None:
        names = {"split": split_name, "beside": annotation_file.parent}  # an absolute path stays itself
        folders = [root / pattern.format(**names) for pattern in IMAGE_FOLDERS]
    else:
        folders = [root / image_folder]
    file_name = images[0]["file_name"]
    for folder in folders:
        if (folder / file_name).is_file():
            return folder
    tried = ", ".join(dict.fromkeys(str(folder) for folder in folders))
    raise DataError(
        f"image {file_name!r}, the first in {annotation_file}, does not exist in {tried}: put the images "
        "there, or name their folder, relative to the data root, as the image folder"
    )
