"""Drawn pictures that have what COCO's photos have: JPEG in colour and grey, odd sizes, crowds, gaps."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw
from pycocotools import mask as run_lengths

SIZES = ((640, 427), (360, 640), (500, 333), (97, 64))
"""Width and height; the last is smaller than any input."""
CATEGORIES = (1, 2, 13, 44, 90)
NUM_OBJECTS = 14


def write_drawn_photos(root: Path, split: str = "val2017") -> Path:
    """Write one picture per size with its annotations; returns `root`."""
    rng = np.random.default_rng(0)
    folder = root / split
    folder.mkdir(parents=True)
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for number, (width, height) in enumerate(SIZES):
        picture = Image.fromarray(rng.integers(0, 255, (height // 8, width // 8, 3), dtype=np.uint8))
        picture = picture.resize((width, height), Image.Resampling.BICUBIC)
        image_id = 139 + 1000 * number
        for index in range(NUM_OBJECTS):
            parts = [_polygon(rng, width, height) for _ in range(1 + index % 2)]  # every second in two parts
            colour = tuple(int(value) for value in rng.integers(0, 255, 3))
            for part in parts:
                ImageDraw.Draw(picture).polygon(part, fill=colour)
            annotations.append(_annotation(annotations, image_id, parts, (width, height), index))
        if number == 1:
            picture = picture.convert("L")  # as some of COCO's photos are
        name = f"{image_id:012d}.jpg"
        picture.save(folder / name, quality=90)
        images.append({"id": image_id, "file_name": name, "width": width, "height": height})
    content = {
        "images": images,
        "annotations": annotations,
        "categories": [{"id": each, "name": f"thing {each}"} for each in CATEGORIES],
    }
    (root / "annotations").mkdir(exist_ok=True)
    (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))
    return root


def _polygon(rng: np.random.Generator, width: int, height: int) -> list[tuple[float, float]]:
    """A polygon around a random centre, which may reach beyond the edge as people's do not."""
    x, y = rng.uniform(0.15, 0.85, 2) * (width, height)
    radius = rng.uniform(0.06, 0.14) * min(width, height)
    angles = np.sort(rng.uniform(0, 2 * np.pi, 7))
    return [
        (round(float(x + radius * np.cos(angle)), 2), round(float(y + radius * np.sin(angle)), 2))
        for angle in angles
    ]


def _annotation(
    others: list[dict[str, Any]],
    image_id: int,
    parts: list[list[tuple[float, float]]],
    size: tuple[int, int],
    index: int,
) -> dict[str, Any]:
    """Of one object; the last of every picture is a crowd, in run lengths as COCO's are."""
    width, height = size
    flat = [[value for point in part for value in point] for part in parts]
    coded = run_lengths.merge(run_lengths.frPyObjects(flat, height, width))
    is_crowd = index == NUM_OBJECTS - 1
    return {
        "id": 900_100_000_000 + 7 * len(others),
        "image_id": image_id,
        "category_id": CATEGORIES[index % len(CATEGORIES)],
        "iscrowd": int(is_crowd),
        "bbox": [float(value) for value in run_lengths.toBbox(coded)],
        "area": float(run_lengths.area(coded)),
        "segmentation": _counts(run_lengths.decode(coded)) if is_crowd else flat,
    }


def _counts(mask: np.ndarray[Any, np.dtype[np.uint8]]) -> dict[str, Any]:
    """Uncompressed run lengths, column by column, beginning with zeros."""
    flat = mask.flatten(order="F")
    ends = np.flatnonzero(np.diff(flat)) + 1
    runs = np.diff([0, *ends, len(flat)]).tolist()
    return {"size": list(mask.shape), "counts": runs if flat[0] == 0 else [0, *runs]}
