"""Instance segmentation data in COCO format: read, check, decode.

Legend: I instances of an image; H, W its height and width.
"""

import contextlib
import hashlib
import io
import json
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from torchvision import tv_tensors

from sparsevit.data.errors import DataError
from sparsevit.data.images import open_image, read_image
from sparsevit.data.sample import Sample
from sparsevit.data.split import DataSplit


class CocoInstances(DataSplit):
    """One split of a data set in COCO format.

    An item is an image, [3, H, W] uint8, and a target for torchvision's Mask R-CNN: ``boxes``
    [I, 4] (x1, y1, x2, y2), ``labels`` [I] from 1, ``masks`` [I, H, W], ``image_id``. Crowd
    regions are not targets; the evaluation knows them from `coco`.

    Args:
        root: folder of the data set.
        split: ``train2017`` stands for ``annotations/instances_train2017.json`` and the images in
            ``train2017/``; a path ending in ``.json`` (relative to `root`) names the annotations
            themselves, with images in the folder of the same split name, or else in `root`.
        sample_ids: use only these images.

    Raises:
        DataError: if the annotations are missing, broken, or contradict themselves.
    """

    def __init__(self, root: Path, split: str, *, sample_ids: Iterable[int] | None = None) -> None:
        super().__init__(root, split)
        self.annotation_file, self.image_folder = locate_split(root, split)
        dataset = read_annotations(self.annotation_file, self.image_folder)
        self.num_dropped = _drop_degenerate(dataset)
        self.coco = COCO()
        self.coco.dataset = dataset
        with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints
            self.coco.createIndex()
        self.category_ids = sorted(self.coco.cats)
        self.class_names = tuple(str(self.coco.cats[category]["name"]) for category in self.category_ids)
        self.labels = {category: label for label, category in enumerate(self.category_ids, start=1)}
        self.sample_ids = sorted(self.coco.imgs if sample_ids is None else sample_ids)

    @classmethod
    def known_splits(cls, root: Path) -> list[str]:
        files = root.glob("annotations/instances_*.json")
        return sorted(path.stem.removeprefix("instances_") for path in files)

    def __getitem__(self, index: int) -> Sample:
        image_id = self.sample_ids[index]
        image = tv_tensors.Image(read_image(self.image_path(image_id)))
        annotations = [
            annotation for annotation in self.coco.imgToAnns[image_id] if not annotation.get("iscrowd", 0)
        ]
        height, width = image.shape[-2:]
        masks = np.zeros((len(annotations), height, width), dtype=np.uint8)
        for mask, annotation in zip(masks, annotations, strict=True):
            mask[:] = self.coco.annToMask(annotation)
        boxes = torch.tensor([annotation["bbox"] for annotation in annotations], dtype=torch.float32)
        boxes = boxes.reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        target = {
            "boxes": tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=(height, width)),
            "labels": torch.tensor([self.labels[a["category_id"]] for a in annotations], dtype=torch.int64),
            "masks": tv_tensors.Mask(torch.from_numpy(masks)),
            "image_id": image_id,
        }
        return (image, target) if self.transform is None else self.transform(image, target)

    def image_path(self, image_id: int) -> Path:
        path: Path = self.image_folder / self.coco.imgs[image_id]["file_name"]
        return path

    def digest(self) -> str:
        with self.annotation_file.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    def verify(self, *, decode: bool, on_sample: Callable[[], None] = lambda: None) -> None:
        for image_id in self.sample_ids:
            path = self.image_path(image_id)
            record = self.coco.imgs[image_id]
            with open_image(path) as image:
                if image.size != (record["width"], record["height"]):
                    raise DataError(
                        f"{path} is {image.size[0]}×{image.size[1]} pixels, but {self.annotation_file} says "
                        f"{record['width']}×{record['height']}"
                    )
            if decode:
                read_image(path)
            on_sample()


def locate_split(root: Path, split: str) -> tuple[Path, Path]:
    """Annotation file and image folder of a split (see `CocoInstances`)."""
    if not root.is_dir():
        raise DataError(f"data root {root} is not a folder: set data.root to a data set in COCO format")
    if split.endswith(".json"):
        annotation_file = root / split
        name = annotation_file.stem.removeprefix("instances_")
    else:
        annotation_file = root / "annotations" / f"instances_{split}.json"
        name = split
    if not annotation_file.is_file():
        known = CocoInstances.known_splits(root)
        raise DataError(f"{annotation_file} does not exist; {root} has the splits {known}")
    return annotation_file, root / name if (root / name).is_dir() else root


def read_annotations(annotation_file: Path, image_folder: Path) -> dict[str, Any]:
    """Parse and check a COCO annotation file."""
    try:
        dataset = json.loads(annotation_file.read_text())
        images, categories = dataset["images"], dataset["categories"]
        annotations = dataset["annotations"]
        _unique_ids(images, "image", annotation_file)
        _unique_ids(annotations, "annotation", annotation_file)
        sizes = {image["id"]: (image["height"], image["width"]) for image in images}
        category_ids = _unique_ids(categories, "category", annotation_file)
        names = Counter(str(category["name"]) for category in categories)
        if max(names.values(), default=0) > 1:
            raise DataError(
                f"{annotation_file} has several categories of the name {names.most_common(1)[0][0]!r}"
            )
        for image in images:
            _check_image_record(image, image_folder, annotation_file)
        for annotation in annotations:
            _check_annotation(annotation, sizes, category_ids, annotation_file)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DataError(f"{annotation_file} is not valid JSON: {error}") from error
    except (KeyError, TypeError) as error:
        raise DataError(f"{annotation_file} is not in COCO format: {type(error).__name__} {error}") from error
    if not images:
        raise DataError(f"{annotation_file} lists no images")
    if not categories:
        raise DataError(f"{annotation_file} lists no categories")
    return dict(dataset)


def _unique_ids(records: Sequence[dict[str, Any]], kind: str, annotation_file: Path) -> set[int]:
    counts = Counter(record["id"] for record in records)
    repeated = [identifier for identifier, count in counts.items() if count > 1]
    if repeated:
        raise DataError(f"{annotation_file} lists {kind} id {repeated[0]} {counts[repeated[0]]} times")
    return set(counts)


def _check_image_record(image: dict[str, Any], image_folder: Path, annotation_file: Path) -> None:
    file_name = image["file_name"]
    folder = image_folder.resolve()
    if not (folder / file_name).resolve().is_relative_to(folder):
        raise DataError(
            f"{annotation_file}: file_name {file_name!r} of image {image['id']} leaves the data root {folder}"
        )
    if min(image["width"], image["height"]) < 1:
        raise DataError(
            f"{annotation_file}: image {image['id']} has size {image['width']}×{image['height']}; "
            "width and height must be positive"
        )


def _check_annotation(
    annotation: dict[str, Any],
    sizes: dict[int, tuple[int, int]],
    category_ids: set[int],
    annotation_file: Path,
) -> None:
    for key, known in (("image_id", sizes.keys()), ("category_id", category_ids)):
        if annotation[key] not in known:
            raise DataError(
                f"{annotation_file}: annotation {annotation['id']} has the unknown {key} {annotation[key]}"
                + (f"; known are {sorted(known)[:20]}" if key == "category_id" else "")
            )
    segmentation = annotation["segmentation"]
    polygons = segmentation if isinstance(segmentation, list) else []
    if isinstance(segmentation, dict):
        size = sizes[annotation["image_id"]]
        if tuple(segmentation["size"]) != size or "counts" not in segmentation:
            raise DataError(
                f"{annotation_file}: annotation {annotation['id']} has an RLE mask of size "
                f"{segmentation['size']}, but its image is {list(size)} (height, width)"
            )
    elif not isinstance(segmentation, list) or any(len(p) % 2 for p in polygons):
        raise DataError(
            f"{annotation_file}: annotation {annotation['id']} has a malformed segmentation; a polygon is a "
            "flat list of x, y pairs"
        )
    if len(annotation["bbox"]) != 4 or not np.isfinite(annotation["bbox"]).all():
        raise DataError(
            f"{annotation_file}: annotation {annotation['id']} has bbox {annotation['bbox']}; "
            "it must be four finite numbers x, y, width, height"
        )


def _drop_degenerate(dataset: dict[str, Any]) -> int:
    """Remove boxes and masks of no area in place; return how many were removed.

    Fills in ``iscrowd`` and ``area`` where they are missing: the official evaluation needs them.
    """
    sizes = {image["id"]: (image["height"], image["width"]) for image in dataset["images"]}
    for annotation in dataset["annotations"]:
        annotation.setdefault("iscrowd", 0)
        if "area" not in annotation:
            annotation["area"] = _mask_area(annotation["segmentation"], *sizes[annotation["image_id"]])
    kept = [annotation for annotation in dataset["annotations"] if _has_area(annotation)]
    num_dropped = len(dataset["annotations"]) - len(kept)
    dataset["annotations"] = kept
    return num_dropped


def _mask_area(segmentation: Any, height: int, width: int) -> float:
    polygons = [p for p in segmentation if len(p) >= 6] if isinstance(segmentation, list) else segmentation
    if not polygons:
        return 0.0
    if isinstance(polygons, dict) and not isinstance(polygons["counts"], list):
        return float(coco_mask.area(polygons))
    encoded = coco_mask.frPyObjects(polygons, height, width)
    return float(coco_mask.area(coco_mask.merge(encoded) if isinstance(encoded, list) else encoded))


def _has_area(annotation: dict[str, Any]) -> bool:
    segmentation = annotation["segmentation"]
    if isinstance(segmentation, list):
        segmentation[:] = [polygon for polygon in segmentation if len(polygon) >= 6]
    has_mask = bool(segmentation["counts"]) if isinstance(segmentation, dict) else bool(segmentation)
    return has_mask and min(annotation["bbox"][2:]) > 0 and annotation.get("area", 1) > 0
