"""Masks of 28×28 onto the photo.

Legend: I detections; H, W size of the photo.
"""

import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.models.detection.roi_heads import paste_masks_in_image


def paste_masks(masks: Tensor, boxes: Tensor, size: tuple[int, int], pasting: str) -> Tensor:
    """Place the masks of boxes on a photo: probabilities [I, 1, H, W], zero outside their boxes.

    Args:
        masks: [I, 1, 28, 28] probabilities.
        boxes: [I, 4], x1, y1, x2, y2 in pixels of the photo.
        pasting: ``float`` samples a mask at the pixels' centres; ``integer`` resizes it to the whole pixels
            of its box, as torchvision does.
    """
    if pasting == "integer":
        pasted: Tensor = paste_masks_in_image(masks, boxes, size)
        return pasted
    height, width = size
    canvas = masks.new_zeros(len(masks), 1, height, width)
    corners = torch.stack(
        (
            boxes[:, 0].floor().sub(1).clamp(0, width),
            boxes[:, 1].floor().sub(1).clamp(0, height),
            boxes[:, 2].ceil().add(1).clamp(0, width),
            boxes[:, 3].ceil().add(1).clamp(0, height),
        ),
        dim=1,
    )
    for index, (left, top, right, bottom) in enumerate(corners.long().tolist()):
        x = _relative(left, right, boxes[index, 0], boxes[index, 2])
        y = _relative(top, bottom, boxes[index, 1], boxes[index, 3])
        if len(x) and len(y):
            grid = torch.stack((x.expand(len(y), -1), y[:, None].expand(-1, len(x))), dim=-1)
            canvas[index, :, top:bottom, left:right] = F.grid_sample(
                masks[index, None], grid[None], align_corners=False
            )[0]
    return canvas


def _relative(start: int, stop: int, low: Tensor, high: Tensor) -> Tensor:
    """Centres of pixels relative to a box's side, -1 to 1 within it."""
    centres = torch.arange(start, stop, device=low.device, dtype=low.dtype) + 0.5
    return ((centres - low) / (high - low) * 2 - 1).nan_to_num(0.0, 0.0, 0.0)
