"""What mmdet 3 does after the network, in the obvious slow way: one anchor, box, class and pixel at a time.

Restated from its documented behaviour (RPNHead, Shared2FCBBoxHead, FCNMaskHead, in testing).
"""

import math

import numpy as np
from numpy.typing import NDArray

Box = tuple[float, float, float, float]
Floats = NDArray[np.float64]


def anchor(level: int, ratio: float, row: int, column: int, *, scale: int = 8, finest: int = 4) -> Box:
    """An anchor of a level: a square of `scale` strides, stretched, about a cell's corner; not rounded."""
    stride = finest * 2**level
    height, width = (scale * stride * each for each in (math.sqrt(ratio), 1 / math.sqrt(ratio)))
    x, y = column * stride, row * stride
    return x - width / 2, y - height / 2, x + width / 2, y + height / 2


def decode(box: Box, offsets: Floats, stds: Box, size: tuple[int, int]) -> Box:
    """The box that offsets from another mean, clipped to an image of (height, width)."""
    x0, y0, x1, y1 = box
    dx, dy, dw, dh = (float(offset) * std for offset, std in zip(offsets, stds, strict=True))
    limit = abs(math.log(16 / 1000))
    width, height = (x1 - x0) * math.exp(min(dw, limit)), (y1 - y0) * math.exp(min(dh, limit))
    x, y = (x0 + x1) / 2 + dx * (x1 - x0), (y0 + y1) / 2 + dy * (y1 - y0)
    corners = x - width / 2, y - height / 2, x + width / 2, y + height / 2
    x0, x1 = (min(max(value, 0.0), float(size[1])) for value in corners[::2])
    y0, y1 = (min(max(value, 0.0), float(size[0])) for value in corners[1::2])
    return x0, y0, x1, y1


def overlap(one: Box, other: Box) -> float:
    """Intersection over union."""
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    if width <= 0 or height <= 0:
        return 0.0
    areas = ((box[2] - box[0]) * (box[3] - box[1]) for box in (one, other))
    return width * height / (sum(areas) - width * height)


def suppress(boxes: list[Box], scores: list[float], groups: list[int], threshold: float) -> list[int]:
    """Indices that are left, strongest first: none overlaps a stronger one of its group by more."""
    left: list[int] = []
    for index in sorted(range(len(boxes)), key=lambda each: -scores[each]):
        rivals = (other for other in left if groups[other] == groups[index])
        if all(overlap(boxes[index], boxes[other]) <= threshold for other in rivals):
            left.append(index)
    return left


def proposals(
    logits: list[Floats],
    offsets: list[Floats],
    size: tuple[int, int],
    *,
    per_level: int,
    in_all: int,
    threshold: float,
) -> list[Box]:
    """Regions of an image.

    Args:
        logits: [ratios, rows, columns] of every level.
        offsets: [ratios, 4, rows, columns] of every level.
    """
    boxes: list[Box] = []
    scores: list[float] = []
    levels: list[int] = []
    for level, (logit, offset) in enumerate(zip(logits, offsets, strict=True)):
        places = sorted(np.ndindex(logit.shape), key=lambda place: -logit[place])[:per_level]
        for place in places:
            ratio, row, column = place
            start = anchor(level, (0.5, 1.0, 2.0)[ratio], row, column)
            box = decode(start, offset[ratio, :, row, column], (1.0, 1.0, 1.0, 1.0), size)
            if box[2] > box[0] and box[3] > box[1]:
                boxes.append(box)
                scores.append(1 / (1 + math.exp(-logit[place])))
                levels.append(level)
    return [boxes[index] for index in suppress(boxes, scores, levels, threshold)[:in_all]]


def level_of(box: Box, num_levels: int = 4) -> int:
    """The level of the pyramid that a region is pooled from."""
    side = math.sqrt((box[2] - box[0]) * (box[3] - box[1]))
    return min(max(math.floor(math.log2(side / 56 + 1e-6)), 0), num_levels - 1)


def pool(feature: Floats, box: Box, stride: int, cells: int) -> Floats:
    """RoIAlign, aligned, as many samples per cell as it covers: [C, cells, cells] of [C, h, w]."""
    x0, y0, x1, y1 = (value / stride - 0.5 for value in box)
    width, height = (x1 - x0) / cells, (y1 - y0) / cells
    across, down = max(1, math.ceil(width)), max(1, math.ceil(height))
    pooled = np.zeros((feature.shape[0], cells, cells))
    for row in range(cells):
        for column in range(cells):
            for i in range(down):
                for j in range(across):
                    y = y0 + (row + (i + 0.5) / down) * height
                    x = x0 + (column + (j + 0.5) / across) * width
                    pooled[:, row, column] += sample(feature, y, x)
    return pooled / (across * down)


def sample(feature: Floats, y: float, x: float) -> Floats:
    """A value between pixels, bilinear; zero a pixel or more outside."""
    rows, columns = feature.shape[1:]
    if not (-1 <= y <= rows and -1 <= x <= columns):
        return np.zeros(feature.shape[0])
    y, x = max(y, 0.0), max(x, 0.0)
    top, left = min(int(y), rows - 1), min(int(x), columns - 1)
    bottom, right = min(top + 1, rows - 1), min(left + 1, columns - 1)
    down = 0.0 if top == rows - 1 else y - top
    along = 0.0 if left == columns - 1 else x - left
    upper = feature[:, top, left] * (1 - along) + feature[:, top, right] * along
    lower = feature[:, bottom, left] * (1 - along) + feature[:, bottom, right] * along
    value: Floats = upper * (1 - down) + lower * down
    return value


def detections(
    regions: list[Box],
    logits: Floats,
    offsets: Floats,
    size: tuple[int, int],
    scale: tuple[float, float],
    *,
    min_score: float,
    threshold: float,
    in_all: int,
) -> list[tuple[Box, float, int]]:
    """Boxes on the photo, scores and classes from 0.

    Args:
        logits: [regions, classes + 1], the background last.
        offsets: [regions, classes, 4].
        size: height and width of the resized photo.
        scale: of the resize, along x and y.
    """
    boxes: list[Box] = []
    scores: list[float] = []
    classes: list[int] = []
    for region, logit, offset in zip(regions, logits, offsets, strict=True):
        shares = np.exp(logit - logit.max())
        shares /= shares.sum()
        for index in range(len(logit) - 1):
            if shares[index] > min_score:
                x0, y0, x1, y1 = decode(region, offset[index], (0.1, 0.1, 0.2, 0.2), size)
                boxes.append((x0 / scale[0], y0 / scale[1], x1 / scale[0], y1 / scale[1]))
                scores.append(float(shares[index]))
                classes.append(index)
    left = suppress(boxes, scores, classes, threshold)[:in_all]
    return [(boxes[index], scores[index], classes[index]) for index in left]


def paste(mask: Floats, box: Box, size: tuple[int, int]) -> Floats:
    """A square of probabilities on a photo of (height, width): sampled at the pixels' centres."""
    x0, y0, x1, y1 = box
    pasted = np.zeros(size)
    for row in range(size[0]):
        for column in range(size[1]):
            y = (row + 0.5 - y0) / (y1 - y0) * mask.shape[0] - 0.5
            x = (column + 0.5 - x0) / (x1 - x0) * mask.shape[1] - 0.5
            pasted[row, column] = sample_with_zeros(mask, y, x)
    return pasted


def sample_with_zeros(mask: Floats, y: float, x: float) -> float:
    """A value between pixels, bilinear, all of what is outside zero."""
    top, left = math.floor(y), math.floor(x)
    total = 0.0
    for row, weight in ((top, top + 1 - y), (top + 1, y - top)):
        for column, other in ((left, left + 1 - x), (left + 1, x - left)):
            if 0 <= row < mask.shape[0] and 0 <= column < mask.shape[1]:
                total += weight * other * float(mask[row, column])
    return total
