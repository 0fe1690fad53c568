"""Annotation files in COCO format: parsed, and their records of images and categories checked."""

import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from sparsevit.data.errors import DataError
from sparsevit.data.images import MAX_PIXELS

Record = dict[str, Any]
Sizes = Mapping[Any, tuple[int, int]]
"""Height, width by image id."""


def read_records(annotation_file: Path) -> dict[str, Any]:
    """Parse an annotation file; check its images and categories, and make their sizes and ids numbers.

    Raises:
        DataError: naming the record that is wrong; the file is for the caller to name.
    """
    dataset = _parse(annotation_file)
    for name in ("images", "categories", "annotations"):
        _check_records(dataset, name)
    _check_ids(dataset["images"], "image")
    _check_images(dataset["images"])
    _check_ids(dataset["categories"], "category")
    _check_categories(dataset["categories"])
    return dataset


def check_unique(values: Iterable[str], what: str) -> None:
    """Check that every value is there once."""
    for value, count in Counter(values).most_common(1):
        if count > 1:
            raise DataError(f"lists {what} {value} {count} times: each may be there once")


def number(value: Any) -> float:
    """A number, perhaps written as a string; NaN for anything else."""
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        return math.nan


def short(value: Any) -> str:
    """A value as it is quoted in an error."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}…"


def _parse(annotation_file: Path) -> dict[str, Any]:
    try:
        dataset = json.loads(annotation_file.read_bytes())  # bytes, so that it finds the encoding
    except (ValueError, RecursionError) as error:
        raise DataError(f"this is not valid JSON, or not all of it: {error}") from error
    if not isinstance(dataset, dict):
        raise DataError(
            f"this is not COCO format: at the top is a {type(dataset).__name__}, not an object with images, "
            "annotations and categories"
        )
    return dataset


def _check_records(dataset: Mapping[str, Any], name: str) -> None:
    records = dataset.get(name)
    if not isinstance(records, list) or not all(isinstance(record, dict) for record in records):
        raise DataError(f"this is not COCO format: {name!r} is not a list of objects")
    if not records and name != "annotations":
        raise DataError(f"it lists no {name}")


def _check_ids(records: Sequence[Record], kind: str) -> None:
    """Ids are all integers or all strings, and every one is there once."""
    for record in records:
        identifier = record.get("id")
        if isinstance(identifier, float) and identifier.is_integer():
            record["id"] = int(identifier)
        elif type(identifier) not in (int, str):
            raise DataError(
                f"the {kind} {short(record)} has the id {short(identifier)}; it must be an integer"
            )
    first_of_type = {type(record["id"]): record["id"] for record in reversed(records)}
    if len(first_of_type) > 1:
        raise DataError(
            f"ids of {kind} records are integers and strings, such as {first_of_type[int]!r} and "
            f"{first_of_type[str]!r}: make them one or the other"
        )
    check_unique((repr(record["id"]) for record in records), f"{kind} id")


def _check_images(images: Sequence[Record]) -> None:
    for image in images:
        named = f"image {image['id']!r}"
        for key in ("width", "height"):
            side = number(image.get(key))
            if not (side.is_integer() and side >= 1):
                raise DataError(
                    f"{named} has the {key} {short(image.get(key))}; width and height must be positive whole "
                    "numbers of pixels"
                )
            image[key] = int(side)
        if image["width"] * image["height"] > MAX_PIXELS:
            raise DataError(
                f"{named} has size {image['width']}×{image['height']}, more than {MAX_PIXELS:,} pixels: cut "
                "it into tiles, or scale it down, together with its annotations"
            )
        file_name = image.get("file_name")
        if not isinstance(file_name, str) or not file_name:
            raise DataError(
                f"{named} has the file_name {short(file_name)}; it must be a path in the image folder"
            )
        file_name = file_name.replace("\\", "/").removeprefix("./")  # as written on Windows
        if file_name.startswith("/") or ".." in file_name.split("/"):
            raise DataError(
                f"file_name {file_name!r} of {named} leaves the data root: name it relative to the images"
            )
        image["file_name"] = file_name
    check_unique((repr(image["file_name"]) for image in images), "the file_name")


def _check_categories(categories: Sequence[Record]) -> None:
    for category in categories:
        if category.get("name") is None:
            raise DataError(f"category {category['id']!r} has no name")
    check_unique((repr(str(category["name"])) for category in categories), "the category name")
