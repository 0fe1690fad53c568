"""Masks of COCO annotations, polygons or run-length encodings: brought to one form and checked.

pycocotools' C code checks nothing: it writes where a coordinate points and loops until counts add up.
So nothing reaches it that was not checked here.

Legend: P points; H, W height and width of an image.
"""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as coco_mask

from sparsevit.data.errors import DataError

MAX_OVERHANG = 1.0
"""How far beyond each border a coordinate may lie, in heights or widths of its image."""
_CHUNK = 10_000  # annotations whose coordinates are in memory at once
_MAX_CHARACTERS = 7  # of one run length: 35 bits, where C has 32
_NOT_NUMBERS = (TypeError, ValueError, OverflowError)
Sizes = Mapping[Any, tuple[int, int]]


def tidy_segmentation(segmentation: Any, size: tuple[int, int]) -> list[Any] | dict[str, Any]:
    """One of the forms that pycocotools knows: flat polygons of three points or more, or one RLE.

    Polygons may be given as pairs of points, a single one without its list, an RLE in a list. No mask
    is ``[]``, whatever it was. An RLE is checked, polygons are by `check_polygons`.

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
        return _tidy_rle(segmentation, size)
    if not isinstance(segmentation, list):
        raise DataError(f"the malformed segmentation {short(segmentation)}; it is a list of polygons, or RLE")
    if not isinstance(segmentation[0], list) or all(
        isinstance(point, list) and len(point) == 2 and not isinstance(point[0], list)
        for point in segmentation
    ):
        segmentation = [segmentation]
    polygons = [_flat(polygon) for polygon in segmentation]
    return [polygon for polygon in polygons if len(polygon) >= 6]


def check_polygons(annotations: Sequence[Mapping[str, Any]], sizes: Sizes) -> None:
    """Check that all points of all polygons are finite and lie in their image, or close to it.

    Args:
        sizes: height, width by image id.

    Raises:
        DataError: naming the first that does not.
    """
    with_polygons = [each for each in annotations if isinstance(each["segmentation"], list)]
    for chunk in (with_polygons[start : start + _CHUNK] for start in range(0, len(with_polygons), _CHUNK)):
        polygons = [polygon for annotation in chunk for polygon in annotation["segmentation"]]
        if not polygons:
            continue
        owners = np.repeat(np.arange(len(chunk)), [len(annotation["segmentation"]) for annotation in chunk])
        lengths = np.fromiter(map(len, polygons), dtype=np.int64, count=len(polygons))
        try:
            numbers = np.fromiter(
                itertools.chain.from_iterable(polygons), dtype=np.float64, count=int(lengths.sum())
            )
        except _NOT_NUMBERS:
            _name_what_is_no_number(chunk)
            raise
        starts = np.cumsum(lengths // 2) - lengths // 2
        points_P2 = numbers.reshape(-1, 2)
        lowest, highest = (extreme.reduceat(points_P2, starts) for extreme in (np.minimum, np.maximum))
        size = np.asarray([sizes[annotation["image_id"]][::-1] for annotation in chunk])[owners]
        is_near = (lowest >= -MAX_OVERHANG * size) & (highest <= (1 + MAX_OVERHANG) * size)  # NaN is not
        if not is_near.all():
            polygon = int(np.argmin(is_near.all(axis=1)))
            points = points_P2[starts[polygon] : starts[polygon] + lengths[polygon] // 2]
            width, height = size[polygon].tolist()
            _raise_far(chunk[int(owners[polygon])], points, height, width)


def to_rle(segmentation: list[Any] | dict[str, Any], size: tuple[int, int]) -> dict[str, Any]:
    """The compressed RLE of a checked mask that is not empty."""
    if isinstance(segmentation, list):
        merged: dict[str, Any] = coco_mask.merge(coco_mask.frPyObjects(segmentation, *size))
        return merged
    if isinstance(segmentation["counts"], list):
        compressed: dict[str, Any] = coco_mask.frPyObjects(segmentation, *size)
        return compressed
    return segmentation


def run_lengths(counts: str) -> NDArray[np.int64]:
    """Run lengths of a compressed RLE, as they are there: they may be negative.

    Each is written with 5 bits per character and a sixth that says whether more follow, from the third
    on as the difference to the one before the last (``rleToString`` in COCO's ``maskApi.c``).

    Raises:
        DataError: if it is no such string.
    """
    codes = np.frombuffer(counts.encode(errors="surrogatepass"), dtype=np.uint8).astype(np.int64) - 48
    last = np.flatnonzero((codes & 32) == 0)  # the last character of each run length
    lengths = np.diff(last, prepend=-1)
    if codes.min() < 0 or codes.max() > 63 or codes[-1] & 32 or lengths.max() > _MAX_CHARACTERS:
        raise DataError(f"an RLE mask with the broken counts {short(counts)}; write them by pycocotools")
    starts = last - lengths + 1
    shifts = 5 * (np.arange(len(codes)) - np.repeat(starts, lengths))
    runs: NDArray[np.int64] = np.add.reduceat((codes & 31) << shifts, starts)
    runs -= ((codes[last] & 16) > 0).astype(np.int64) << (5 * lengths)  # the sign bit
    runs[1::2] = runs[1::2].cumsum()
    runs[2::2] = runs[2::2].cumsum()
    return runs


def _tidy_rle(rle: dict[str, Any], size: tuple[int, int]) -> list[Any] | dict[str, Any]:
    counts = rle.get("counts")
    if not counts:
        return []
    if rle.get("size") != list(size):
        raise DataError(
            f"an RLE mask of size {short(rle.get('size'))}, but its image is {list(size)} (height, width)"
        )
    runs = run_lengths(counts) if isinstance(counts, str) else _whole_numbers(counts)
    num_pixels = size[0] * size[1]
    if runs.min() < 0 or runs.max() > num_pixels or (total := int(runs.sum())) != num_pixels:
        told = f"sum to {total}" if 0 <= runs.min() <= runs.max() <= num_pixels else "are out of bounds"
        raise DataError(
            f"an RLE mask whose counts {told} ({short(runs.tolist())}); they must be positive and sum to "
            f"height × width, {size[0]} × {size[1]} = {num_pixels}"
        )
    if not runs[1::2].any():
        return []
    return {"size": list(size), "counts": counts if isinstance(counts, str) else runs.tolist()}


def _whole_numbers(counts: Any) -> NDArray[np.int64]:
    try:
        numbers = np.asarray(counts, dtype=np.float64)  # exact far beyond the pixels of any image
    except _NOT_NUMBERS:
        numbers = np.asarray(np.nan)
    if numbers.ndim != 1 or not (np.abs(numbers) < 2**53).all() or (numbers != numbers.round()).any():
        raise DataError(f"an RLE mask with the counts {short(counts)}; they must be whole numbers")
    return numbers.astype(np.int64)


def _flat(polygon: Any) -> list[Any]:
    """A polygon as x, y, x, y, …"""
    if isinstance(polygon, list) and polygon and isinstance(polygon[0], list):
        if not all(isinstance(point, list) and len(point) == 2 for point in polygon):
            raise DataError(f"the malformed polygon {short(polygon)}; a point has two coordinates")
        return list(itertools.chain.from_iterable(polygon))
    if not isinstance(polygon, list) or len(polygon) % 2:
        raise DataError(f"the malformed segmentation {short(polygon)}; a polygon is a list of x, y pairs")
    return polygon


def _name_what_is_no_number(annotations: Sequence[Mapping[str, Any]]) -> None:
    for annotation in annotations:
        for value in itertools.chain.from_iterable(annotation["segmentation"]):
            try:
                float(value)
            except _NOT_NUMBERS:
                raise DataError(
                    f"annotation {annotation['id']!r} has a polygon with the coordinate {short(value)}, "
                    "which is not a number"
                ) from None


def _raise_far(
    annotation: Mapping[str, Any], points_P2: NDArray[np.float64], height: int, width: int
) -> None:
    size = np.asarray([width, height])
    is_near = (points_P2 >= -MAX_OVERHANG * size) & (points_P2 <= (1 + MAX_OVERHANG) * size)
    x, y = points_P2[int(np.argmin(is_near.all(axis=1)))].tolist()
    raise DataError(
        f"annotation {annotation['id']!r} has a polygon with the point ({x:g}, {y:g}), but its image is "
        f"{width}×{height}: x must lie in [{-MAX_OVERHANG * width:g}, {(1 + MAX_OVERHANG) * width:g}] and y "
        f"in [{-MAX_OVERHANG * height:g}, {(1 + MAX_OVERHANG) * height:g}], in pixels"
    )


def short(value: Any) -> str:
    """A value as it is quoted in an error."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}…"
