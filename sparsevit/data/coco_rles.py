"""Run-length encodings of masks, as COCO has them: column by column, background first; checked."""

import math
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sparsevit.data.coco_numbers import chunks, flat_numbers
from sparsevit.data.coco_records import Record, Sizes, short
from sparsevit.data.errors import DataError

# Characters of a compressed RLE: P to o where more of a run follow, 0 to O at its end. 7 have 35 bits.
_COMPRESSED = re.compile("(?:[P-o]{0,6}[0-O])+")


def tidy_rle(rle: Record, size: tuple[int, int]) -> list[Any] | Record:
    """An RLE with its keys alone, or ``[]`` for one without counts.

    Args:
        size: height, width of the image.

    Raises:
        DataError: if it is none, or of another size; the counts are left to `check_rles`.
    """
    counts = rle.get("counts")
    if not counts:
        return []
    if rle.get("size") != list(size):
        raise DataError(
            f"an RLE mask of size {short(rle.get('size'))}, but its image is {list(size)} (height, width)"
        )
    if not (isinstance(counts, list) or (isinstance(counts, str) and _COMPRESSED.fullmatch(counts))):
        raise DataError(f"an RLE mask with the broken counts {short(counts)}; write them by pycocotools")
    return {"size": list(size), "counts": counts}


def check_rles(annotations: Sequence[Record], sizes: Sizes) -> None:
    """Check that the runs of all RLEs fill their images; one without a foreground becomes ``[]``.

    Args:
        sizes: height, width by image id.

    Raises:
        DataError: naming the first whose runs do not.
    """
    with_rle = [each for each in annotations if isinstance(each["segmentation"], dict)]
    compressed, plain = (
        [each for each in with_rle if isinstance(each["segmentation"]["counts"], kind)]
        for kind in (str, list)
    )
    for chunk in chunks(compressed):
        _check_runs(chunk, *run_lengths([each["segmentation"]["counts"] for each in chunk]), sizes)
    for chunk in chunks(plain):
        counts = [each["segmentation"]["counts"] for each in chunk]
        _check_runs(chunk, *flat_numbers(chunk, counts), sizes)
        for each, runs in zip(chunk, counts, strict=True):
            if each["segmentation"]:
                each["segmentation"]["counts"] = [int(run) for run in runs]


def run_lengths(texts: Sequence[str]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Run lengths of compressed RLEs, one after the other, and how many each has.

    Each run is written with 5 bits per character and a sixth that says whether more follow, from the
    fourth on as the difference to the one before the last (``rleToString`` in COCO's ``maskApi.c``).
    They come out as they are there; they may be negative.
    """
    codes = np.frombuffer("".join(texts).encode(), dtype=np.uint8).astype(np.int64) - 48
    last = np.flatnonzero((codes & 32) == 0)  # the last character of each run
    num_characters = np.diff(last, prepend=-1)
    first = last - num_characters + 1
    shifts = 5 * (np.arange(len(codes)) - np.repeat(first, num_characters))
    steps = np.add.reduceat((codes & 31) << shifts, first)
    steps -= ((codes[last] & 16) > 0).astype(np.int64) << (5 * num_characters)  # the sign bit
    ends = np.searchsorted(last, np.cumsum([len(text) for text in texts]))
    num_runs = np.diff(ends, prepend=0)
    starts = ends - num_runs
    places = np.arange(len(steps)) - np.repeat(starts, num_runs)
    runs: NDArray[np.int64] = np.where(places == 0, steps, 0)
    for chain in ((places % 2 == 1), (places % 2 == 0) & (places > 0)):
        sums = np.cumsum(np.where(chain, steps, 0))
        before = np.where(starts > 0, sums[starts - 1], 0)
        runs += np.where(chain, sums - np.repeat(before, num_runs), 0)
    return runs, num_runs


def _check_runs(
    annotations: Sequence[Record],
    runs: NDArray[np.int64] | NDArray[np.float64],
    num_runs: NDArray[np.int64],
    sizes: Sizes,
) -> None:
    ends = np.cumsum(num_runs)
    starts = ends - num_runs
    num_pixels = np.asarray([math.prod(sizes[annotation["image_id"]]) for annotation in annotations])
    is_right = (
        (np.minimum.reduceat(runs, starts) >= 0)
        & (np.add.reduceat(runs, starts) == num_pixels)
        & np.logical_and.reduceat(runs == np.floor(runs), starts)
    )
    if not is_right.all():
        index = int(np.argmin(is_right))
        wrong = runs[starts[index] : ends[index]]
        height, width = sizes[annotations[index]["image_id"]]
        raise DataError(
            f"annotation {annotations[index]['id']!r} has an RLE mask with the counts "
            f"{short(wrong.tolist())} that sum to {wrong.sum():g}; they must be whole numbers, none below 0, "
            f"that sum to height × width, {height} × {width} = {height * width}"
        )
    is_foreground = (np.arange(len(runs)) - np.repeat(starts, num_runs)) % 2 == 1
    areas = np.add.reduceat(np.where(is_foreground, runs, 0), starts)
    for index in np.flatnonzero(areas == 0):
        annotations[index]["segmentation"] = []
