"""Annotation files in COCO format: read, checked, and brought to what the official evaluation needs."""

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pycocotools import mask as coco_mask

from sparsevit.data.coco_masks import MAX_OVERHANG, check_polygons, tidy_segmentation, to_rle
from sparsevit.data.coco_records import Record, Sizes, check_unique, number, read_records, short
from sparsevit.data.coco_rles import check_rles
from sparsevit.data.errors import DataError

NO_MASK = "no mask, neither an RLE nor a polygon of three points or more, and masks are needed"
CROWD = "iscrowd 1, so they are ignored"


@dataclass(frozen=True)
class Annotations:
    """Checked annotations, as pycocotools takes them, and how many were left out for having no area."""

    dataset: dict[str, Any]
    num_dropped: int


def read_annotations(annotation_file: Path, *, needs_masks: bool) -> Annotations:
    """Read and check an annotation file; fill in what can be told from the rest.

    Ids of annotations are renumbered from 1: pycocotools takes a match with id 0 for none. Missing areas
    and boxes are those of the masks.

    Args:
        needs_masks: leave out what has no mask; without, a box alone will do, and no mask is kept.

    Raises:
        DataError: naming the file, the record, the value and the bound, if the file is broken, contradicts
            itself, or has nothing to learn from.
    """
    try:
        dataset = read_records(annotation_file)
        images, categories, annotations = (dataset[name] for name in ("images", "categories", "annotations"))
        sizes = {image["id"]: (image["height"], image["width"]) for image in images}
        _check_annotations(annotations, sizes, {category["id"] for category in categories})
        _fill_boxes_and_areas(annotations, sizes)
        kept = _usable(annotations, sizes, needs_masks=needs_masks)
    except DataError as error:
        raise DataError(f"{annotation_file}: {error}") from error
    for identifier, annotation in enumerate(kept, start=1):
        annotation["id"] = identifier
        if not needs_masks:
            del annotation["segmentation"]
    # Some versions of pycocotools copy "info" without a look whether it is there.
    info = dataset.get("info") or {}
    return Annotations(dataset | {"annotations": kept, "info": info}, len(annotations) - len(kept))


def _check_annotations(annotations: Sequence[Record], sizes: Sizes, category_ids: set[Any]) -> None:
    """Check references, and bring crowd flags, boxes, areas and masks to one form; a box may be missing."""
    for place, annotation in enumerate(annotations, start=1):
        if annotation.get("id") is None:
            annotation["id"] = f"number {place} of the list"
    check_unique((repr(annotation["id"]) for annotation in annotations), "annotation id")
    for annotation in annotations:
        try:
            _check_reference(annotation, "image_id", sizes)
            _check_reference(annotation, "category_id", category_ids)
            size = sizes[annotation["image_id"]]
            annotation["iscrowd"] = _crowd_flag(annotation.get("iscrowd"))
            annotation["bbox"] = _box(annotation.get("bbox"))
            annotation["area"] = _area(annotation.get("area"), size)
            annotation["segmentation"] = tidy_segmentation(annotation.get("segmentation"), size)
        except DataError as error:
            raise DataError(f"annotation {annotation['id']!r} has {error}") from error
    check_polygons(annotations, sizes)
    check_rles(annotations, sizes)


def _check_reference(annotation: Record, key: str, known: Collection[Any]) -> None:
    value = annotation.get(key)
    if not isinstance(value, int | float | str) or value not in known:
        raise DataError(f"the unknown {key} {short(value)}; known are {sorted(known)[:20]}")


def _crowd_flag(flag: Any) -> int:
    if flag is None:
        return 0
    if number(flag) not in (0, 1):
        raise DataError(f"iscrowd {short(flag)}; it is 0 or 1")
    return int(number(flag))


def _box(box: Any) -> list[float] | None:
    if box is None or box == []:
        return None
    if not isinstance(box, list) or len(box) != 4:
        raise DataError(f"bbox {short(box)}; it must be four finite numbers x, y, width, height")
    return [number(side) for side in box]


def _area(area: Any, size: tuple[int, int]) -> float | None:
    if area is None or area != area:  # NaN is what tables have in empty cells
        return None
    limit = (1 + 2 * MAX_OVERHANG) ** 2 * size[0] * size[1]
    if not 0 <= number(area) <= limit:
        raise DataError(
            f"the area {short(area)}; it must be that of the mask, in pixels (for its image 0 to {limit:g}), "
            "and may be left out"
        )
    return number(area)


def _fill_boxes_and_areas(annotations: Sequence[Record], sizes: Sizes) -> None:
    """Take missing boxes and areas from the masks, and check where the boxes lie."""
    for annotation in annotations:
        size = sizes[annotation["image_id"]]
        if annotation["bbox"] is None or annotation["area"] is None:
            mask = annotation["segmentation"]
            rle = to_rle(mask, size) if mask else None
            if annotation["bbox"] is None:
                annotation["bbox"] = [0.0] * 4 if rle is None else coco_mask.toBbox(rle).tolist()
            if annotation["area"] is None:
                width, height = annotation["bbox"][2:]
                annotation["area"] = width * height if rle is None else float(coco_mask.area(rle))
        x, y, width, height = annotation["bbox"]
        if not (
            -MAX_OVERHANG * size[1] <= x <= (1 + MAX_OVERHANG) * size[1] - width
            and -MAX_OVERHANG * size[0] <= y <= (1 + MAX_OVERHANG) * size[0] - height
        ):
            raise DataError(
                f"annotation {annotation['id']!r} has bbox {annotation['bbox']}, but its image is {size[1]}×"
                f"{size[0]}: it must be four finite numbers x, y, width, height, in pixels, that reach no "
                "further beyond a border than the image is long"
            )


def _usable(annotations: Sequence[Record], sizes: Sizes, *, needs_masks: bool) -> list[Record]:
    """The annotations that have an area; crowd regions, which are not targets, are among them.

    Raises:
        DataError: if there is no target, nothing to learn from or to measure on.
    """
    kept, obstacles = [], Counter[str]()
    for annotation in annotations:
        obstacle = _obstacle(annotation, sizes[annotation["image_id"]], needs_masks=needs_masks)
        if obstacle is None:
            kept.append(annotation)
        obstacles[obstacle or (CROWD if annotation["iscrowd"] else "")] += 1
    if obstacles[""] == 0:
        reasons = "".join(f"; {count} have {obstacle}" for obstacle, count in obstacles.items() if count)
        raise DataError(
            f"there is no object to learn from or to measure on among {len(annotations)} annotations{reasons}"
            + (". docs/own-detector.md has the way for boxes alone" if obstacles[NO_MASK] else "")
        )
    return kept


def _obstacle(annotation: Record, size: tuple[int, int], *, needs_masks: bool) -> str | None:
    """What an annotation lacks to be of use."""
    x, y, width, height = annotation["bbox"]
    if needs_masks and not annotation["segmentation"]:
        return NO_MASK
    if min(width, height) <= 0 or not (-width < x < size[1] and -height < y < size[0]):
        return "no box of a positive size within their image"
    if annotation["area"] == 0:
        return "the area 0"
    return None
