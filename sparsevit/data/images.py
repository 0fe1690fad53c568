"""Image files: opened and decoded with errors that name the file."""

from pathlib import Path

import torch
from PIL import Image
from torchvision.transforms.v2.functional import pil_to_tensor

from sparsevit.data.errors import DataError


def read_image(path: Path) -> torch.Tensor:
    """Decode an image as RGB: [3, H, W] uint8.

    Raises:
        DataError: naming the file if it is missing, truncated or no image.
    """
    with open_image(path) as image:
        if image.mode.startswith("I") or image.mode == "F":
            raise DataError(f"{path} has the pixel mode {image.mode}; a photo has 8 bits per channel")
    return _decode(path, "RGB")


def read_labels(path: Path) -> torch.Tensor:
    """Decode a label image: [H, W] int32, one number per pixel.

    Raises:
        DataError: naming the file if it is missing, truncated, no image, or has colours.
    """
    with open_image(path) as image:
        if image.mode not in ("L", "P", "I;16", "I"):
            raise DataError(f"{path} has the pixel mode {image.mode}; a label image has one number per pixel")
    return _decode(path, None)[0].int()


def open_image(path: Path) -> Image.Image:
    """Open an image and read its header alone.

    Raises:
        DataError: naming the file if it is missing or no image.
    """
    try:
        return Image.open(path)
    except FileNotFoundError as error:
        raise DataError(f"image {path} does not exist") from error
    except OSError as error:
        raise DataError(f"{path} is not a readable image: {error}") from error


def _decode(path: Path, mode: str | None) -> torch.Tensor:
    with open_image(path) as image:
        try:
            pixels: torch.Tensor = pil_to_tensor(image if mode is None else image.convert(mode))
            return pixels
        except (OSError, SyntaxError, ValueError) as error:
            raise DataError(f"{path} cannot be decoded: {error}") from error
