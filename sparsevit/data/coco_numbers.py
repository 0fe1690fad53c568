"""The numbers inside of many masks at once: a loop over each would double the time of reading."""

import itertools
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from sparsevit.data.coco_records import Record, short
from sparsevit.data.errors import DataError

_CHUNK = 10_000  # annotations whose numbers are in memory at once
_NOT_NUMBERS = (TypeError, ValueError, OverflowError)


def chunks(annotations: Sequence[Record]) -> Iterator[Sequence[Record]]:
    """Annotations, so many at a time that their numbers fit into memory."""
    for start in range(0, len(annotations), _CHUNK):
        yield annotations[start : start + _CHUNK]


def flat_numbers(
    annotations: Sequence[Record], lists: Sequence[Sequence[object]]
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Lists of numbers in the masks of annotations, one after the other, and their lengths.

    Raises:
        DataError: naming the first annotation that has something else there.
    """
    lengths = np.fromiter(map(len, lists), dtype=np.int64, count=len(lists))
    try:
        numbers = np.fromiter(
            itertools.chain.from_iterable(lists), dtype=np.float64, count=int(lengths.sum())
        )
    except _NOT_NUMBERS:
        _name_what_is_no_number(annotations)
        raise
    return numbers, lengths


def _name_what_is_no_number(annotations: Sequence[Record]) -> None:
    for annotation in annotations:
        mask = annotation["segmentation"]
        for value in itertools.chain.from_iterable(mask if isinstance(mask, list) else [mask["counts"]]):
            try:
                float(value)
            except _NOT_NUMBERS:
                raise DataError(
                    f"annotation {annotation['id']!r} has a mask with {short(value)} in it, which is not a "
                    "number that fits an image"
                ) from None
