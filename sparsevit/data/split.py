"""What every data set has: splits of samples that are known by an identifier."""

import copy
import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Self

import torch
from torch.utils.data import Dataset

from sparsevit.data.errors import DataError
from sparsevit.data.sample import Sample, Transform


class DataSplit(Dataset[Sample], ABC):
    """One split of a data set on disk. A new format is a subclass, named by the task that reads it.

    Attributes:
        class_names: what the labels mean, in their order.
        sample_ids: the samples in use, in a fixed order: integers or strings, so that JSON keeps them.
        transform: applied to every sample that is read, if any.
        num_dropped: annotations that were left out because they are degenerate.
    """

    def __init__(self, root: Path, split: str) -> None:
        self.root = root
        self.split = split
        self.class_names: tuple[str, ...] = ()
        self.sample_ids: list[Any] = []
        self.transform: Transform | None = None
        self.num_dropped = 0

    @classmethod
    @abstractmethod
    def known_splits(cls, root: Path) -> list[str]:
        """The splits below a root, sorted; none if the root holds no such data set."""

    @abstractmethod
    def __getitem__(self, index: int) -> Sample:
        """Decode one sample, then apply the transform, if any."""

    @abstractmethod
    def digest(self) -> str:
        """A hash that changes with the annotations of the split."""

    @abstractmethod
    def verify(self, *, decode: bool, on_sample: Callable[[], None] = lambda: None) -> None:
        """Look at the files of every sample, or decode them in full.

        Raises:
            DataError: naming the first file that is missing, unreadable or contradicts another.
        """

    def class_counts(self) -> Mapping[str, int]:
        """How many annotations of every class the samples in use have; empty where that is not known."""
        return {}

    def image_sizes(self) -> Mapping[tuple[int, int], int]:
        """How many images in use have a height and width; empty where that is not known."""
        return {}

    def __len__(self) -> int:
        return len(self.sample_ids)

    def subset(self, sample_ids: Iterable[Any]) -> Self:
        """The same split, restricted to some of its samples."""
        chosen = copy.copy(self)
        chosen.sample_ids = sorted(sample_ids)
        chosen.transform = None
        return chosen

    def hold_out(self, num_samples: int, seed: int) -> tuple[Self, Self]:
        """Split off `num_samples` at random: the rest, and the held-out ones.

        Raises:
            DataError: if fewer than one sample would be left.
        """
        if not 0 < num_samples < len(self):
            raise DataError(
                f"cannot hold out {num_samples} images for the search from the {len(self)} of "
                f"{self.split!r}: lower data.num_search, or name a split with data.search"
            )
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed)).tolist()
        held_out = [self.sample_ids[index] for index in order[:num_samples]]
        rest = [self.sample_ids[index] for index in order[num_samples:]]
        return self.subset(rest), self.subset(held_out)


def open_split(data: type[DataSplit], root: Path, split: str, image_folder: str | None) -> DataSplit:
    """A split of a data set, its images in a folder of the user's if one is given.

    Raises:
        DataError: if the split cannot be used, or a format finds its images by itself.
    """
    if image_folder is None:
        return data(root, split)
    if "image_folder" not in inspect.signature(data).parameters:
        raise DataError(
            f"the image folder {image_folder!r} was given, but {data.__name__} finds its images by itself"
        )
    return data(root, split, image_folder=image_folder)  # type: ignore[call-arg]
