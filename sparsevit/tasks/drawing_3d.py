"""Boxes in 3D drawn into the cameras and from above.

Legend: N cameras; h, w size of what the network sees; I boxes.
"""

import torch
from PIL import Image, ImageDraw
from torch import Tensor
from torchvision.transforms.v2.functional import pil_to_tensor, to_pil_image
from torchvision.utils import make_grid

from sparsevit.geometry import box_corners, project, transform
from sparsevit.tasks.drawing import COLOURS
from sparsevit.tasks.lift_splat import Cameras

EDGES = ((0, 1), (1, 2), (2, 3), (3, 0), (4, 5), (5, 6), (6, 7), (7, 4), (0, 4), (1, 5), (2, 6), (3, 7))
GROUND_SIZE = 320
NEAR = 0.2


def draw_cameras(images: Tensor, boxes: Tensor, labels: Tensor, cameras: Cameras) -> Tensor:
    """The six inputs with the edges of the boxes, three in a row: [3, 2h, 3w] uint8.

    Args:
        images: [N, 3, h, w] uint8.
        boxes: [I, 9] in the ego frame.
        cameras: of one sample, without the first axis.
    """
    corners = box_corners(boxes.float())
    pictures = []
    for number, image in enumerate(images):
        picture = to_pil_image(image)
        pen = ImageDraw.Draw(picture)
        ego_to_camera = torch.linalg.inv(cameras.camera_to_ego[number])
        to_input = cameras.image_to_input[number] @ cameras.intrinsics[number]
        for box, label in zip(corners, labels.tolist(), strict=True):
            if float(transform(ego_to_camera, box)[:, 2].min()) < NEAR:
                continue
            pixels, _ = project(box, ego_to_camera, to_input)
            for start, end in EDGES:
                line = [*pixels[start].tolist(), *pixels[end].tolist()]
                pen.line(line, fill=COLOURS[label % len(COLOURS)], width=max(1, image.shape[-1] // 256))
        pictures.append(pil_to_tensor(picture))
    grid: Tensor = make_grid(pictures, nrow=3, padding=4)
    return grid


def draw_ground(boxes: Tensor, labels: Tensor, extent: float) -> Tensor:
    """The boxes from above, the vehicle in the middle looking up: [3, S, S] uint8."""
    picture = Image.new("RGB", (GROUND_SIZE, GROUND_SIZE), (250, 250, 250))
    pen = ImageDraw.Draw(picture)
    scale = GROUND_SIZE / (2 * extent)
    middle = GROUND_SIZE / 2
    pen.polygon([(middle - 4, middle + 6), (middle + 4, middle + 6), (middle, middle - 6)], fill=(0, 0, 0))
    for box, label in zip(box_corners(boxes.float()), labels.tolist(), strict=True):
        outline = [
            (middle - scale * float(box[corner, 1]), middle - scale * float(box[corner, 0]))
            for corner in (0, 1, 5, 4)
        ]
        pen.polygon(outline, outline=COLOURS[label % len(COLOURS)])
        pen.line([outline[0], outline[1]], fill=(0, 0, 0))
    drawn: Tensor = pil_to_tensor(picture)
    return drawn
