"""Image files: opened, turned upright and decoded, with errors that name the file."""

import struct
import warnings
from pathlib import Path

import torch
from PIL import ExifTags, Image
from torchvision.transforms.v2.functional import pil_to_tensor

from sparsevit.data.errors import DataError

PHOTO_MODES = frozenset(("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "HSV"))
"""Pillow's pixel modes that have 8 bits per channel, or less, and convert to RGB."""
LABEL_MODES = frozenset(("L", "P", "I;16", "I"))
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What makes the stored pixels upright, by EXIF orientation."""
MAX_PIXELS = 178_956_970
"""Pillow's own bound, unless another library has lifted it (nuscenes-devkit does, for its maps).

From half of it on Pillow warns, which would tell the user nothing."""
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


def read_image(path: Path, size: tuple[int, int], size_from: Path | str) -> torch.Tensor:
    """Decode a photo, or the first picture of an animation, as RGB: [3, H, W] uint8.

    A photo with an EXIF orientation is turned as that says, as labelling tools, OpenCV and Detectron2 do,
    unless only its stored pixels have the size that was annotated.

    Args:
        size: height, width that the annotations are made for.
        size_from: what tells this size, for the error.

    Raises:
        DataError: naming the file if it is missing, truncated, no photo, too large or of another size.
    """
    with open_image(path) as image:
        turn = _turn(image, path, size, size_from)
        try:
            # Pillow warns of palettes whose transparency it drops; by way of RGBA it does not.
            pixels = (image.convert("RGBA") if image.mode in ("P", "PA") else image).convert("RGB")
        except _BROKEN as error:
            raise DataError(f"{path} cannot be decoded: {error}") from error
    decoded: torch.Tensor = pil_to_tensor(pixels if turn is None else pixels.transpose(turn))
    return decoded


def check_image(path: Path, size: tuple[int, int], size_from: Path | str) -> bool:
    """Compare the header of a photo with what `read_image` needs; return whether the photo is turned."""
    with open_image(path) as image:
        return _turn(image, path, size, size_from) is not None


def read_labels(path: Path) -> torch.Tensor:
    """Decode a label image: [H, W] int32, one number per pixel.

    Raises:
        DataError: naming the file if it is missing, truncated, no image, or has colours.
    """
    with open_image(path) as image:
        if image.mode not in LABEL_MODES:
            raise DataError(f"{path} has the pixel mode {image.mode}; a label image has one number per pixel")
        try:
            labels: torch.Tensor = pil_to_tensor(image)[0].int()
        except _BROKEN as error:
            raise DataError(f"{path} cannot be decoded: {error}") from error
    return labels


def open_image(path: Path) -> Image.Image:
    """Open an image and read its header alone.

    Raises:
        DataError: naming the file if it is missing, no image, or too large.
    """
    try:
        image = Image.open(path)
        num_pixels = image.width * image.height
    except FileNotFoundError as error:
        raise DataError(f"image {path} does not exist") from error
    except Image.DecompressionBombError as error:
        raise _too_large(path, str(error)) from error
    except OSError as error:
        raise DataError(f"{path} is not a readable image: {error}") from error
    if num_pixels > MAX_PIXELS:
        image.close()
        raise _too_large(path, f"{num_pixels} pixels")
    return image


def _too_large(path: Path, how_large: str) -> DataError:
    return DataError(
        f"{path} has more than {MAX_PIXELS:,} pixels ({how_large}): cut it into tiles, or scale it down, "
        "together with its annotations"
    )


_BROKEN = (OSError, SyntaxError, ValueError, EOFError, IndexError, struct.error)
"""What Pillow's decoders raise on broken files."""


def _turn(
    image: Image.Image, path: Path, size: tuple[int, int], size_from: Path | str
) -> Image.Transpose | None:
    """What makes an opened photo one of `size`: a turn by its EXIF orientation, or nothing."""
    if image.mode not in PHOTO_MODES:
        raise DataError(
            f"{path} has the pixel mode {image.mode}; a photo has 8 bits per channel: convert it to RGB"
        )
    is_as_stored = image.size == size[::-1]
    # A PNG is decoded to look for EXIF behind its pixels: only where there is no other explanation.
    if is_as_stored and image.format == "PNG" and "exif" not in image.info:
        return None
    orientation = _orientation(image)
    turned = image.size[::-1] if orientation >= 5 else image.size
    if orientation in TURNS and turned == size[::-1]:
        return TURNS[orientation]
    if not is_as_stored:
        raise DataError(
            f"{path} is {image.width}×{image.height} pixels, but {size_from} says {size[1]}×{size[0]}: "
            "annotations belong to the size that they were drawn on"
        )
    return None


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(ExifTags.Base.Orientation, 1))
    except (*_BROKEN, TypeError):  # viewers, too, show a photo whose EXIF is broken as it is stored
        return 1
