"""Masks of COCO annotations, polygons or run-length encodings: brought to one form and checked.

pycocotools' C code checks nothing: it writes where a coordinate points and loops until counts add up.
So nothing reaches it that was not checked here.

Legend: P points.
"""

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as coco_mask

from sparsevit.data.coco_numbers import chunks, flat_numbers
from sparsevit.data.coco_records import Record, Sizes, short
from sparsevit.data.coco_rles import tidy_rle
from sparsevit.data.errors import DataError

MAX_OVERHANG = 1.0
"""How far beyond each border a coordinate may lie, in heights or widths of its image."""


def tidy_segmentation(segmentation: Any, size: tuple[int, int]) -> list[Any] | Record:
    """One of the forms that pycocotools knows: flat polygons of three points or more, or one RLE.

    Polygons may be given as pairs of points, a single one without its list, an RLE in a list. No mask
    is ``[]``, whatever it was. The numbers are left to `check_polygons` and
    `sparsevit.data.coco_rles.check_rles`.

    Args:
        size: height, width of the image.

    Raises:
        DataError: if it is nothing of that kind.
    """
    if isinstance(segmentation, list) and len(segmentation) == 1 and isinstance(segmentation[0], dict):
        segmentation = segmentation[0]
    if not segmentation:
        return []
    if isinstance(segmentation, dict):
        return tidy_rle(segmentation, size)
    if not isinstance(segmentation, list):
        raise DataError(f"the malformed segmentation {short(segmentation)}; it is a list of polygons, or RLE")
    if not isinstance(segmentation[0], list) or all(
        isinstance(point, list) and len(point) == 2 and not isinstance(point[0], list)
        for point in segmentation
    ):
        segmentation = [segmentation]
    polygons = [_flat(polygon) for polygon in segmentation]
    return [polygon for polygon in polygons if len(polygon) >= 6]


def check_polygons(annotations: Sequence[Record], sizes: Sizes) -> None:
    """Check that all points of all polygons are finite and lie in their image, or close to it.

    Args:
        sizes: height, width by image id.

    Raises:
        DataError: naming the first that does not.
    """
    with_polygons = [each for each in annotations if isinstance(each["segmentation"], list)]
    for chunk in chunks(with_polygons):
        polygons = [polygon for annotation in chunk for polygon in annotation["segmentation"]]
        if not polygons:
            continue
        owners = np.repeat(np.arange(len(chunk)), [len(annotation["segmentation"]) for annotation in chunk])
        numbers, lengths = flat_numbers(chunk, polygons)
        starts = (np.cumsum(lengths) - lengths) // 2
        points_P2 = numbers.reshape(-1, 2)
        lowest, highest = (extreme.reduceat(points_P2, starts) for extreme in (np.minimum, np.maximum))
        size = np.asarray([sizes[annotation["image_id"]][::-1] for annotation in chunk])[owners]
        is_near = (lowest >= -MAX_OVERHANG * size) & (highest <= (1 + MAX_OVERHANG) * size)  # NaN is not
        if not is_near.all():
            polygon = int(np.argmin(is_near.all(axis=1)))
            points = points_P2[starts[polygon] : starts[polygon] + lengths[polygon] // 2]
            width, height = size[polygon].tolist()
            _raise_far(chunk[int(owners[polygon])], points, height, width)


def to_rle(segmentation: list[Any] | Record, size: tuple[int, int]) -> Record:
    """The compressed RLE of a checked mask that is not empty."""
    if isinstance(segmentation, list):
        merged: Record = coco_mask.merge(coco_mask.frPyObjects(segmentation, *size))
        return merged
    if isinstance(segmentation["counts"], list):
        compressed: Record = coco_mask.frPyObjects(segmentation, *size)
        return compressed
    return segmentation


def _flat(polygon: Any) -> list[Any]:
    """A polygon as x, y, x, y, …"""
    if isinstance(polygon, list) and polygon and isinstance(polygon[0], list):
        if not all(isinstance(point, list) and len(point) == 2 for point in polygon):
            raise DataError(f"the malformed polygon {short(polygon)}; a point has two coordinates")
        return list(itertools.chain.from_iterable(polygon))
    if not isinstance(polygon, list) or len(polygon) % 2:
        raise DataError(f"the malformed segmentation {short(polygon)}; a polygon is a list of x, y pairs")
    return polygon


def _raise_far(annotation: Record, points_P2: NDArray[np.float64], height: int, width: int) -> None:
    size = np.asarray([width, height])
    is_near = (points_P2 >= -MAX_OVERHANG * size) & (points_P2 <= (1 + MAX_OVERHANG) * size)
    x, y = points_P2[int(np.argmin(is_near.all(axis=1)))].tolist()
    raise DataError(
        f"annotation {annotation['id']!r} has a polygon with the point ({x:g}, {y:g}), but its image is "
        f"{width}×{height}: x must lie in [{-MAX_OVERHANG * width:g}, {(1 + MAX_OVERHANG) * width:g}] and y "
        f"in [{-MAX_OVERHANG * height:g}, {(1 + MAX_OVERHANG) * height:g}], in pixels"
    )
