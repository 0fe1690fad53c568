"""Small data sets in COCO format, for tests to spoil."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw

from sparsevit.data.coco import CocoInstances
from sparsevit.data.coco_metrics import to_results

SIZE = (64, 48)
"""Width, height of every picture."""
COLOUR = (230, 200, 40)


def plain(num_images: int = 4) -> dict[str, Any]:
    """Annotations of pictures with one or two upright rectangles of 18×22 pixels, in two classes."""
    annotations: list[dict[str, Any]] = []
    for image in range(1, num_images + 1):
        for x in (6, 34) if image % 2 else (10,):
            number = len(annotations) + 1
            annotations.append(
                {
                    "id": number, "image_id": image, "category_id": 1 + number % 2, "iscrowd": 0,
                    "bbox": [x, 8, 18, 22], "area": 396,
                    "segmentation": [[x, 8, x + 18, 8, x + 18, 30, x, 30]],
                }
            )  # fmt: skip
    return {
        "images": [
            {"id": number, "file_name": f"p{number}.png", "width": SIZE[0], "height": SIZE[1]}
            for number in range(1, num_images + 1)
        ],
        "annotations": annotations,
        "categories": [{"id": 1, "name": "square"}, {"id": 2, "name": "other"}],
    }


def picture(dataset: dict[str, Any], image_id: int) -> Image.Image:
    """The picture that the plain annotations describe."""
    drawn = Image.new("RGB", SIZE, (40, 60, 80))
    for annotation in dataset["annotations"]:
        if annotation["image_id"] == image_id:
            x, y, width, height = annotation["bbox"]
            corners = (x, y, x + width - 1, y + height - 1)
            ImageDraw.Draw(drawn).rectangle(corners, fill=COLOUR)
    return drawn


def write_pictures(folder: Path, dataset: dict[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for image in dataset["images"]:
        picture(dataset, image["id"]).save(folder / image["file_name"])


def write_plain(root: Path, change: Callable[[dict[str, Any]], object] = lambda dataset: None) -> Path:
    """A data set with the split ``val``, its annotations changed; returns `root`."""
    dataset = plain()
    write_pictures(root / "val", dataset)
    change(dataset)
    (root / "annotations").mkdir(exist_ok=True)
    (root / "annotations" / "instances_val.json").write_text(json.dumps(dataset))
    return root


def perfect_results(dataset: CocoInstances) -> list[dict[str, Any]]:
    """The ground truth as detections."""
    results = []
    for _, target in (dataset[index] for index in range(len(dataset))):
        detections = {
            "boxes": target["boxes"].as_subclass(torch.Tensor),
            "labels": target["labels"],
            "scores": torch.ones(len(target["labels"])),
        }
        if dataset.needs_masks:
            detections["masks"] = target["masks"].as_subclass(torch.Tensor)[:, None].float()
        results += to_results(detections, target["image_id"], dataset.category_ids)
    return results
