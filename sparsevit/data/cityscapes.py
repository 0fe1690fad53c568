"""Semantic segmentation data in the layout of Cityscapes (arXiv 1604.01685): read, check, decode.

Legend: H, W height and width of an image.
"""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torchvision import tv_tensors

from sparsevit.data.errors import DataError
from sparsevit.data.images import check_image, open_image, read_image, read_labels
from sparsevit.data.sample import IGNORED, Sample
from sparsevit.data.split import DataSplit

NUM_LABEL_IDS = 34
IMAGE_SUFFIX = "_leftImg8bit.png"
LABEL_SUFFIX = "_gtFine_labelIds.png"


@dataclass(frozen=True)
class CityscapesClass:
    """One of the 19 classes that are trained and evaluated: their place in `CLASSES` is the train id."""

    name: str
    label_id: int
    colour: tuple[int, int, int]


CLASSES = (
    CityscapesClass("road", 7, (128, 64, 128)),
    CityscapesClass("sidewalk", 8, (244, 35, 232)),
    CityscapesClass("building", 11, (70, 70, 70)),
    CityscapesClass("wall", 12, (102, 102, 156)),
    CityscapesClass("fence", 13, (190, 153, 153)),
    CityscapesClass("pole", 17, (153, 153, 153)),
    CityscapesClass("traffic light", 19, (250, 170, 30)),
    CityscapesClass("traffic sign", 20, (220, 220, 0)),
    CityscapesClass("vegetation", 21, (107, 142, 35)),
    CityscapesClass("terrain", 22, (152, 251, 152)),
    CityscapesClass("sky", 23, (70, 130, 180)),
    CityscapesClass("person", 24, (220, 20, 60)),
    CityscapesClass("rider", 25, (255, 0, 0)),
    CityscapesClass("car", 26, (0, 0, 142)),
    CityscapesClass("truck", 27, (0, 0, 70)),
    CityscapesClass("bus", 28, (0, 60, 100)),
    CityscapesClass("train", 31, (0, 80, 100)),
    CityscapesClass("motorcycle", 32, (0, 0, 230)),
    CityscapesClass("bicycle", 33, (119, 11, 32)),
)
LABEL_IDS = {each.name: each.label_id for each in CLASSES}


class CityscapesFrames(DataSplit):
    """One split of a data set in the layout of Cityscapes.

    ``leftImg8bit/<split>/<city>/<frame>_leftImg8bit.png`` goes with
    ``gtFine/<split>/<city>/<frame>_gtFine_labelIds.png``; a sample's identifier is ``<city>/<frame>``.
    An item is an image, [3, H, W] uint8, and a target: ``labels`` [H, W] uint8, the train id of every
    pixel or `IGNORED`, and ``sample_id``.

    Args:
        root: folder of the data set.
        split: ``train``, ``val``, or any other folder in ``leftImg8bit`` and ``gtFine``.
        sample_ids: use only these frames.

    Raises:
        DataError: if the split is missing or empty, or a frame has no labels, or labels no frame.
    """

    def __init__(self, root: Path, split: str, *, sample_ids: Iterable[str] | None = None) -> None:
        super().__init__(root, split)
        self.class_names = tuple(each.name for each in CLASSES)
        self.sample_ids = sorted(_find_frames(root, split) if sample_ids is None else sample_ids)

    @classmethod
    def known_splits(cls, root: Path) -> list[str]:
        return sorted(path.name for path in (root / "leftImg8bit").glob("*") if path.is_dir())

    def __getitem__(self, index: int) -> Sample:
        sample_id = self.sample_ids[index]
        labels = tv_tensors.Mask(to_train_ids(self._read_label_ids(sample_id)))
        size = labels.shape[0], labels.shape[1]
        image = tv_tensors.Image(read_image(self.image_path(sample_id), size, self.label_path(sample_id)))
        target = {"labels": labels, "sample_id": sample_id}
        return (image, target) if self.transform is None else self.transform(image, target)

    def image_path(self, sample_id: str) -> Path:
        return self.root / "leftImg8bit" / self.split / f"{sample_id}{IMAGE_SUFFIX}"

    def label_path(self, sample_id: str) -> Path:
        return self.root / "gtFine" / self.split / f"{sample_id}{LABEL_SUFFIX}"

    def class_counts(self) -> Mapping[str, int]:
        """Frames that have a class."""
        used = Counter(
            label_id
            for sample_id in self.sample_ids
            for label_id in torch.unique(self._read_label_ids(sample_id)).tolist()
        )
        return {each.name: used[each.label_id] for each in CLASSES}

    def image_sizes(self) -> Mapping[tuple[int, int], int]:
        sizes: Counter[tuple[int, int]] = Counter()
        for sample_id in self.sample_ids:
            with open_image(self.label_path(sample_id)) as labels:
                sizes[labels.size[1], labels.size[0]] += 1
        return sizes

    def digest(self) -> str:
        known = hashlib.sha256()
        for sample_id in self.sample_ids:
            known.update(sample_id.encode())
            known.update(self.label_path(sample_id).read_bytes())
        return known.hexdigest()

    def verify(self, *, decode: bool, on_sample: Callable[[], None] = lambda: None) -> None:
        used: set[int] = set()
        for sample_id in self.sample_ids:
            photo, label_image = self.image_path(sample_id), self.label_path(sample_id)
            with open_image(label_image) as labels:
                size = labels.size[::-1]
            check_image(photo, size, label_image)
            # A wrong id in one file would end a training midway, so all are read.
            used.update(torch.unique(self._read_label_ids(sample_id)).tolist())
            if decode:
                read_image(photo, size, label_image)
            on_sample()
        if used.isdisjoint(LABEL_IDS.values()):
            raise DataError(
                f"every pixel of the {len(self)} label images in use of {self.root / 'gtFine' / self.split} "
                f"is ignored: they have the label ids {sorted(used)}, of which none is trained or evaluated; "
                "write Cityscapes' labelIds"
            )

    def _read_label_ids(self, sample_id: str) -> Tensor:
        """Label ids as the file has them, all of the table."""
        path = self.label_path(sample_id)
        label_ids = read_labels(path)
        unknown = [value for value in torch.unique(label_ids).tolist() if not 0 <= value < NUM_LABEL_IDS]
        if unknown:
            raise DataError(
                f"{path} has the label ids {unknown[:5]}, but Cityscapes' end at {NUM_LABEL_IDS - 1}: write "
                "labelIds, not train ids, colours or instance ids"
            )
        return label_ids


def to_train_ids(label_ids: Tensor) -> Tensor:
    """Label ids as in the files to train ids, `IGNORED` for classes that are not evaluated."""
    table = torch.full((NUM_LABEL_IDS,), IGNORED, dtype=torch.uint8)
    for train_id, each in enumerate(CLASSES):
        table[each.label_id] = train_id
    return table[label_ids.long()]


def _find_frames(root: Path, split: str) -> list[str]:
    """Identifiers of all frames of a split."""
    if not root.is_dir():
        raise DataError(
            f"data root {root} is not a folder: set data.root to a data set in the layout of Cityscapes"
        )
    folders = root / "leftImg8bit" / split, root / "gtFine" / split
    for folder in folders:
        if not folder.is_dir():
            known = CityscapesFrames.known_splits(root)
            raise DataError(f"{folder} does not exist; {root} has the splits {known}")
    photos, labels = (
        {str(path.relative_to(folder)).removesuffix(suffix) for path in folder.glob(f"*/*{suffix}")}
        for folder, suffix in zip(folders, (IMAGE_SUFFIX, LABEL_SUFFIX), strict=True)
    )
    for name in sorted(photos ^ labels):
        photo, label = folders[0] / f"{name}{IMAGE_SUFFIX}", folders[1] / f"{name}{LABEL_SUFFIX}"
        present, absent = (photo, label) if name in photos else (label, photo)
        raise DataError(f"{present} has no counterpart {absent}: every photo needs its labelIds")
    if not photos:
        raise DataError(f"the split {split!r} is empty: {folders[0]} holds no <city>/<frame>{IMAGE_SUFFIX}")
    return sorted(photos)
