"""Predictions and ground truth drawn over images, by torchvision.

Legend: H, W size of an image; I instances.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torchvision.utils import draw_bounding_boxes, draw_segmentation_masks

Colour = tuple[int, int, int]


def draw_label_map(image: Tensor, labels: Tensor, colours: Sequence[Colour]) -> Tensor:
    """An image under the colours of its classes: [3, H, W] uint8.

    Args:
        image: [3, H, W] uint8.
        labels: [H, W]; numbers beyond the colours are left as they are.
    """
    masks = labels.as_subclass(Tensor)[None] == torch.arange(len(colours)).view(-1, 1, 1)
    drawn: Tensor = draw_segmentation_masks(image.as_subclass(Tensor), masks, alpha=0.6, colors=list(colours))
    return drawn


def draw_instances(
    image: Tensor, boxes: Tensor, labels: Tensor, masks: Tensor | None, class_names: Sequence[str]
) -> Tensor:
    """An image with boxes, class names and, if there are any, masks: [3, H, W] uint8.

    Args:
        image: [3, H, W] uint8.
        boxes: [I, 4], x1, y1, x2, y2.
        labels: [I], from 1.
        masks: [I, H, W].
    """
    drawn = image.as_subclass(Tensor)
    if len(boxes) == 0:
        return drawn
    palette = [COLOURS[(label - 1) % len(COLOURS)] for label in labels.tolist()]
    if masks is not None:
        drawn = draw_segmentation_masks(drawn, masks.bool().as_subclass(Tensor), alpha=0.5, colors=palette)
    names = [class_names[label - 1] for label in labels.tolist()]
    framed: Tensor = draw_bounding_boxes(drawn, boxes.as_subclass(Tensor), labels=names, colors=palette)
    return framed


COLOURS: tuple[Colour, ...] = (
    (230, 60, 60), (60, 160, 240), (250, 190, 40), (70, 190, 90), (170, 90, 210), (250, 130, 50),
    (90, 210, 210), (230, 90, 170),
)  # fmt: skip
