"""A small data set in COCO format, drawn by this module: shapes on textured backgrounds.

It gives the embedded scale something to learn within minutes: three classes over a wide
range of sizes, occlusion, polygon and RLE masks, crowd regions, images without objects. The
pixels are a function of the seed.

Legend: S image side; masks are [S, S] booleans.
"""

import itertools
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from pycocotools import mask as coco_mask

from sparsevit.data.generated import write_generated

CLASSES = ("disc", "square", "triangle")
PATTERNS = ("rings", "checks", "stripes")
"""Texture of every class: shape and texture tell the classes apart, as they do in photos."""
Points = list[tuple[float, float]]
Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class ShapesConfig:
    """What to draw; every split has its own stream of random numbers."""

    image_size: int = 256
    num_images: Mapping[str, int] = field(
        default_factory=lambda: {"train": 1200, "search": 60, "report": 120}
    )
    max_objects: int = 4
    empty_share: float = 0.04
    crowd_share: float = 0.05
    seed: int = 0


def write_shapes(root: Path, config: ShapesConfig, on_image: Callable[[], None] = lambda: None) -> None:
    """Write all splits below `root` as ``<split>/*.jpg`` and ``annotations/instances_<split>.json``."""

    def write_split(folder: Path, split: str, rng: np.random.Generator) -> None:
        (folder / split).mkdir()
        (folder / "annotations").mkdir(exist_ok=True)
        dataset = _draw_split(folder / split, config.num_images[split], config, rng, on_image)
        (folder / "annotations" / f"instances_{split}.json").write_text(json.dumps(dataset))

    write_generated(root, __name__, config, write_split)


def _draw_split(
    folder: Path,
    num_images: int,
    config: ShapesConfig,
    rng: np.random.Generator,
    on_image: Callable[[], None],
) -> dict[str, Any]:
    size = config.image_size
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for image_id in range(1, num_images + 1):
        pixels, objects = draw_image(config, rng)
        file_name = f"{image_id:06d}.jpg"
        Image.fromarray(pixels).save(folder / file_name, quality=95)
        images.append({"id": image_id, "file_name": file_name, "width": size, "height": size})
        for annotation in objects:
            annotations.append({"id": len(annotations) + 1, "image_id": image_id, **annotation})
        on_image()
    categories = [{"id": index, "name": name} for index, name in enumerate(CLASSES, start=1)]
    return {"images": images, "annotations": annotations, "categories": categories}


def draw_image(
    config: ShapesConfig, rng: np.random.Generator
) -> tuple[NDArray[np.uint8], list[dict[str, Any]]]:
    """Draw one image: pixels [S, S, 3] and its COCO annotations, without ids."""
    size = config.image_size
    canvas = _texture((size, size), rng, pattern="noise")
    layers: list[tuple[Mask, int, Points | None]] = []  # visible mask, category, outline
    if rng.random() < config.empty_share:
        return _to_uint8(canvas, rng), []
    crowd: dict[str, Any] | None = None
    if rng.random() < config.crowd_share:
        crowd = _draw_crowd(canvas, rng)
    for _ in range(int(rng.integers(1, config.max_objects + 1))):
        category = int(rng.integers(len(CLASSES)))
        outline = _outline(category, size, rng, radius=float(rng.uniform(0.06, 0.22)) * size)
        mask = _rasterize(outline, size)
        _paint(canvas, mask, PATTERNS[category], rng)
        layers = [(visible & ~mask, kind, None if (visible & mask).any() else points)
                  for visible, kind, points in layers]  # fmt: skip
        layers.append((mask, category, outline))
    annotations = [
        _annotation(visible, kind, points) for visible, kind, points in layers if visible.sum() >= 25
    ]
    if crowd is not None:
        annotations.append(crowd)
    return _to_uint8(canvas, rng), annotations


def _draw_crowd(canvas: NDArray[np.float32], rng: np.random.Generator) -> dict[str, Any]:
    """Scatter many small shapes of one class over a patch: one annotation for all of them."""
    size = canvas.shape[0]
    category = int(rng.integers(len(CLASSES)))
    centre = rng.uniform(0.2, 0.8, 2) * size
    covered = np.zeros((size, size), dtype=bool)
    for _ in range(12):
        offset = rng.normal(0.0, 0.07 * size, 2)
        mask = _rasterize(_outline(category, size, rng, radius=0.02 * size, centre=centre + offset), size)
        _paint(canvas, mask, PATTERNS[category], rng)
        covered |= mask
    if not covered.any():
        covered[int(centre[1]), int(centre[0])] = True
    return {**_annotation(covered, category, None), "iscrowd": 1}


def _outline(
    category: int,
    size: int,
    rng: np.random.Generator,
    radius: float,
    centre: NDArray[np.float64] | None = None,
) -> Points:
    if centre is None:
        centre = rng.uniform(0.08, 0.92, 2) * size
    num_corners = {"disc": 40, "square": 4, "triangle": 3}[CLASSES[category]]
    # Upright, give or take ten degrees: the first corner of a square lies on its diagonal.
    upright = -np.pi / 2 if num_corners == 3 else np.pi / num_corners
    angles = upright + rng.uniform(-0.17, 0.17) + np.arange(num_corners) * 2 * np.pi / num_corners
    corners = centre + radius * np.stack((np.cos(angles), np.sin(angles)), axis=1)
    corners = np.clip(corners, 0, size - 1)
    return [(round(float(x), 1), round(float(y), 1)) for x, y in corners]


def _rasterize(outline: Points, size: int) -> Mask:
    image = Image.new("1", (size, size))
    ImageDraw.Draw(image).polygon(outline, fill=1)
    return np.asarray(image, dtype=bool).copy()


def _paint(canvas: NDArray[np.float32], mask: Mask, pattern: str, rng: np.random.Generator) -> None:
    """Fill `mask` with a texture of its own, drawn no larger than the mask's bounding box."""
    if not mask.any():
        return
    rows, columns = (np.flatnonzero(mask.any(axis=axis)) for axis in (1, 0))
    box = slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)
    region = canvas[box]
    region[mask[box]] = _texture(region.shape[:2], rng, pattern)[mask[box]]


def _texture(shape: tuple[int, ...], rng: np.random.Generator, pattern: str) -> NDArray[np.float32]:
    """A random colour modulated by a pattern: [*shape, 3] in [0, 1].

    ``noise`` is smooth and of low contrast; ``rings``, ``checks`` and ``stripes`` are drawn at a
    random scale, angle and contrast.
    """
    height, width = shape
    y = np.arange(height, dtype=np.float32)[:, None]
    x = np.arange(width, dtype=np.float32)[None, :]
    angle, phase = rng.uniform(-0.3, 0.3), np.float32(rng.uniform(0, 2 * np.pi))
    wave = np.float32(2 * np.pi / rng.uniform(7, 14))
    along = wave * (x * np.float32(np.cos(angle)) + y * np.float32(np.sin(angle)))
    across = wave * (y * np.float32(np.cos(angle)) - x * np.float32(np.sin(angle)))
    if pattern == "noise":
        coarse = Image.fromarray(rng.uniform(-1, 1, (8, 8)).astype(np.float32))
        values = 0.5 * np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC))
    elif pattern == "rings":
        values = np.sin(wave * np.hypot(y - height / 2, x - width / 2) + phase)
    elif pattern == "checks":
        values = np.sign(np.sin(along) * np.sin(across))
    else:
        values = np.sin(across + phase) + 0 * x
    colour = rng.uniform(0.15, 0.85, 3).astype(np.float32)
    gain = (rng.uniform(0.15, 0.35) * rng.uniform(0.4, 1.0, 3)).astype(np.float32)
    return np.clip(colour + gain * values.astype(np.float32)[..., None], 0.0, 1.0)


def _to_uint8(canvas: NDArray[np.float32], rng: np.random.Generator) -> NDArray[np.uint8]:
    noisy = canvas + 0.02 * rng.standard_normal(canvas.shape, dtype=np.float32)
    return (np.clip(noisy, 0.0, 1.0) * np.float32(255)).astype(np.uint8)


def _annotation(mask: Mask, category: int, outline: Points | None) -> dict[str, Any]:
    """A polygon where the whole outline is visible, uncompressed RLE elsewhere (as COCO writes it)."""
    encoded = coco_mask.encode(np.asfortranarray(mask, dtype=np.uint8))
    segmentation: Any = {"size": list(mask.shape), "counts": _run_lengths(mask)}
    if outline is not None:
        segmentation = [[coordinate for point in outline for coordinate in point]]
        encoded = coco_mask.merge(coco_mask.frPyObjects(segmentation, *mask.shape))
    return {
        "category_id": category + 1,
        "segmentation": segmentation,
        "bbox": [float(value) for value in coco_mask.toBbox(encoded)],
        "area": float(coco_mask.area(encoded)),
        "iscrowd": 0,
    }


def _run_lengths(mask: Mask) -> list[int]:
    """Column-major run lengths that begin with a run of zeros."""
    flat = np.concatenate(([0], mask.flatten(order="F").astype(np.int8), [-1]))
    changes = np.flatnonzero(np.diff(flat[:-1])).tolist()
    bounds = [0, *changes, mask.size]
    return [end - start for start, end in itertools.pairwise(bounds)]
