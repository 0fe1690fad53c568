"""Instances in COCO format, with masks or as boxes alone: one split, decoded.

Legend: I instances of an image; H, W its height and width.
"""

import contextlib
import hashlib
import io
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from pycocotools.coco import COCO
from torchvision import tv_tensors

from sparsevit.data.coco_annotations import read_annotations
from sparsevit.data.coco_layout import find_annotations, find_images, known_splits
from sparsevit.data.errors import DataError
from sparsevit.data.images import check_image, read_image
from sparsevit.data.sample import Sample
from sparsevit.data.split import DataSplit

logger = logging.getLogger(__name__)


class CocoInstances(DataSplit):
    """One split of a data set in COCO format.

    An item is an image, [3, H, W] uint8, and a target for torchvision's Mask R-CNN: ``boxes``
    [I, 4] (x1, y1, x2, y2), ``labels`` [I] from 1, ``masks`` [I, H, W], ``image_id``. Crowd
    regions are not targets; the evaluation knows them from `coco`.

    Args:
        root: folder of the data set.
        split: ``train2017`` stands for ``annotations/instances_train2017.json``, for
            ``train2017/_annotations.coco.json`` (Roboflow) or ``train2017/labels.json`` (FiftyOne); a path
            ending in ``.json`` (relative to `root`) names the annotations themselves.
        sample_ids: use only these images.
        image_folder: where the images are, relative to `root`. Without, they are found in the folder of the
            split, beside the annotations, in ``images`` or ``data`` in or above these, or in `root`.

    Raises:
        DataError: if annotations or images are missing, the annotations are broken or contradict
            themselves, or there is nothing to learn from or to measure on.
    """

    needs_masks: ClassVar[bool] = True

    def __init__(
        self,
        root: Path,
        split: str,
        *,
        sample_ids: Iterable[Any] | None = None,
        image_folder: str | None = None,
    ) -> None:
        super().__init__(root, split)
        self.annotation_file, split_name = find_annotations(root, split)
        annotations = read_annotations(self.annotation_file, needs_masks=self.needs_masks)
        self.num_dropped = annotations.num_dropped
        self.coco = COCO()
        self.coco.dataset = annotations.dataset
        with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints
            self.coco.createIndex()
        self.image_folder = find_images(
            root, self.annotation_file, split_name, annotations.dataset["images"], image_folder
        )
        self.category_ids = sorted(self.coco.cats)
        self.class_names = tuple(str(self.coco.cats[category]["name"]) for category in self.category_ids)
        self.labels = {category: label for label, category in enumerate(self.category_ids, start=1)}
        self.sample_ids = sorted(self.coco.imgs if sample_ids is None else sample_ids)

    @classmethod
    def known_splits(cls, root: Path) -> list[str]:
        return known_splits(root)

    def __getitem__(self, index: int) -> Sample:
        image_id = self.sample_ids[index]
        height, width = size = self._size(image_id)
        image = tv_tensors.Image(read_image(self.image_path(image_id), size, self.annotation_file))
        annotations = self._targets(image_id)
        boxes = torch.tensor([annotation["bbox"] for annotation in annotations], dtype=torch.float32)
        boxes = boxes.reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        target = {
            "boxes": tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=(height, width)),
            "labels": torch.tensor([self.labels[a["category_id"]] for a in annotations], dtype=torch.int64),
            "image_id": image_id,
        }
        if self.needs_masks:
            masks = np.zeros((len(annotations), height, width), dtype=np.uint8)
            for mask, annotation in zip(masks, annotations, strict=True):
                mask[:] = self.coco.annToMask(annotation)
            target["masks"] = tv_tensors.Mask(torch.from_numpy(masks))
        return (image, target) if self.transform is None else self.transform(image, target)

    def image_path(self, image_id: int | str) -> Path:
        path: Path = self.image_folder / self.coco.imgs[image_id]["file_name"]
        return path

    def class_counts(self) -> Mapping[str, int]:
        targets = (self._targets(image_id) for image_id in self.sample_ids)
        used = Counter(annotation["category_id"] for each in targets for annotation in each)
        by_class = zip(self.class_names, self.category_ids, strict=True)
        return {name: used[category] for name, category in by_class}

    def image_sizes(self) -> Mapping[tuple[int, int], int]:
        return Counter(self._size(image_id) for image_id in self.sample_ids)

    def digest(self) -> str:
        with self.annotation_file.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    def verify(self, *, decode: bool, on_sample: Callable[[], None] = lambda: None) -> None:
        if not any(self._targets(image_id) for image_id in self.sample_ids):
            raise DataError(
                f"none of the {len(self)} images in use of {self.annotation_file} has an annotation that "
                "counts: use more images"
            )
        num_turned = 0
        for image_id in self.sample_ids:
            path, size = self.image_path(image_id), self._size(image_id)
            num_turned += check_image(path, size, self.annotation_file)
            if decode:
                read_image(path, size, self.annotation_file)
            on_sample()
        if num_turned:
            logger.info(
                "%s: %d of %d images are turned as their EXIF orientation says",
                self.annotation_file, num_turned, len(self),
            )  # fmt: skip

    def _targets(self, image_id: int | str) -> list[dict[str, Any]]:
        """The annotations of an image that are no crowd regions."""
        return [annotation for annotation in self.coco.imgToAnns[image_id] if not annotation["iscrowd"]]

    def _size(self, image_id: int | str) -> tuple[int, int]:
        """Height and width of an image, as it was annotated."""
        record = self.coco.imgs[image_id]
        return record["height"], record["width"]


class CocoBoxes(CocoInstances):
    """A `CocoInstances` that needs no masks: its targets have boxes and labels alone."""

    needs_masks = False
