"""Photos as cameras and tools store them: turned, of odd pixels, too large, broken."""

import logging
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image, ImageOps, ImageSequence

from sparsevit.data.coco import CocoInstances
from sparsevit.data.errors import DataError
from sparsevit.data.images import MAX_PIXELS, check_image, read_image, read_labels
from tests.sparsevit_tests.coco_format import SIZE, picture, plain, write_plain

SOURCE = "annotations.json"


def exif(orientation: int) -> Image.Exif:
    made = Image.Exif()
    made[ExifTags.Base.Orientation] = orientation
    return made


@pytest.fixture
def photo() -> Image.Image:
    """No symmetry: [4, 6] of random colours."""
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (4, 6, 3), dtype=np.uint8))


def pixels(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_photos_are_turned_to_the_size_that_was_annotated(
    tmp_path: Path, photo: Image.Image, orientation: int
) -> None:
    """Where both sizes fit, EXIF is followed; where only the stored one does, pixels stay as they are."""
    path = tmp_path / "photo.png"
    photo.save(path, exif=exif(orientation))
    upright = ImageOps.exif_transpose(Image.open(path))
    height, width = upright.height, upright.width
    assert torch.equal(read_image(path, (height, width), SOURCE), pixels(upright))
    assert check_image(path, (height, width), SOURCE) == (orientation > 1)
    if orientation >= 5:
        assert torch.equal(read_image(path, (width, height), SOURCE), pixels(photo))
        assert not check_image(path, (width, height), SOURCE)
    for look in (read_image, check_image):
        with pytest.raises(DataError, match=r"photo.png is 6×4 pixels, but annotations.json says 5×4"):
            look(path, (4, 5), SOURCE)


@pytest.mark.parametrize("orientation", [0, 9, 65535])
def test_orientations_that_are_none(tmp_path: Path, photo: Image.Image, orientation: int) -> None:
    path = tmp_path / "photo.png"
    photo.save(path, exif=exif(orientation))
    assert torch.equal(read_image(path, (4, 6), SOURCE), pixels(photo))


def test_broken_exif_is_none(tmp_path: Path, photo: Image.Image) -> None:
    photo.save(tmp_path / "plain.jpg")
    expected = read_image(tmp_path / "plain.jpg", (4, 6), SOURCE)
    for number, block in enumerate((b"Exif\x00\x00", b"Exif\x00\x00II*\x00\xff\xff\xff\xff", b"rubbish")):
        path = tmp_path / f"{number}.jpg"
        photo.save(path, exif=block)
        assert torch.equal(read_image(path, (4, 6), SOURCE), expected)


@pytest.mark.parametrize("orientation", [3, 6])
def test_masks_lie_on_turned_photos(
    tmp_path: Path, orientation: int, caplog: pytest.LogCaptureFixture
) -> None:
    """Stored on the side or on the head, annotated upright; it is told once, with the number."""
    root = write_plain(tmp_path)
    expected = CocoInstances(root, "val")[1]
    turn = {3: Image.Transpose.ROTATE_180, 6: Image.Transpose.ROTATE_90}[orientation]
    for path in sorted((root / "val").iterdir())[1:]:
        Image.open(path).transpose(turn).save(path, exif=exif(orientation))
    dataset = CocoInstances(root, "val")
    with caplog.at_level(logging.INFO):
        dataset.verify(decode=False)
    assert [record.message for record in caplog.records] == [
        f"{dataset.annotation_file}: 3 of 4 images are turned as their EXIF orientation says"
    ]
    image, target = dataset[1]
    assert torch.equal(image, expected[0])
    assert torch.equal(target["masks"], expected[1]["masks"])


def test_annotations_of_the_stored_pixels(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A tool that knows no EXIF drew them: what it saw is what is read."""
    root = write_plain(tmp_path)
    for path in (root / "val").iterdir():
        Image.open(path).save(path, exif=exif(6))
    dataset = CocoInstances(root, "val")
    with caplog.at_level(logging.INFO):
        dataset.verify(decode=True)
    assert not caplog.records
    assert torch.equal(dataset[0][0], pixels(picture(plain(), 1)))
    assert SIZE == (64, 48)


@pytest.mark.parametrize(
    ("mode", "suffix"),
    [
        ("1", "png"), ("L", "png"), ("LA", "png"), ("P", "png"), ("P", "gif"), ("RGB", "jpg"),
        ("RGBA", "png"), ("RGBA", "webp"), ("CMYK", "jpg"), ("CMYK", "tif"), ("YCbCr", "jpg"),
    ],
)  # fmt: skip
def test_pixels_of_every_kind_become_colours(
    tmp_path: Path, photo: Image.Image, mode: str, suffix: str
) -> None:
    path = tmp_path / f"photo.{suffix}"
    flat = Image.new("RGB", (32, 16), (200, 100, 50))
    flat.convert(mode).save(path)
    expected = np.asarray(flat.convert(mode).convert("RGB"))[0, 0].tolist()
    found = read_image(path, (16, 32), SOURCE)
    assert found.shape == (3, 16, 32)
    assert found[:, 8, 16].tolist() == pytest.approx(expected, abs=4)


def test_palettes_with_transparency_do_not_warn(
    tmp_path: Path, photo: Image.Image, recwarn: pytest.WarningsRecorder
) -> None:
    path = tmp_path / "photo.png"
    photo.quantize(8).save(path, transparency=bytes((0, 128, 255, 255, 255, 255, 255, 255)))
    assert read_image(path, (4, 6), SOURCE).shape == (3, 4, 6)
    assert not recwarn.list


def test_colours_of_16_bits_lose_the_lower_ones(tmp_path: Path) -> None:
    path = tmp_path / "deep.png"
    row = b"\x00" + struct.pack(">3H", 200 << 8 | 77, 100 << 8, 50 << 8) * 3
    write_png(path, width=3, height=2, depth=16, colour=2, content=zlib.compress(row * 2))
    assert read_image(path, (2, 3), SOURCE)[:, 1, 2].tolist() == [200, 100, 50]


def test_animations_give_their_first_picture(tmp_path: Path, photo: Image.Image) -> None:
    for suffix in ("png", "webp", "tif"):
        path = tmp_path / f"photo.{suffix}"
        photo.save(path, save_all=True, append_images=[ImageOps.invert(photo)], lossless=True)
        assert len(list(ImageSequence.Iterator(Image.open(path)))) == 2
        assert torch.equal(read_image(path, (4, 6), SOURCE), pixels(photo))


@pytest.mark.parametrize(("mode", "told"), [("I;16", "I;16"), ("I", "I"), ("F", "F"), ("LAB", "LAB")])
def test_pixels_that_are_no_colours_are_named(tmp_path: Path, mode: str, told: str) -> None:
    """By the header already."""
    path = tmp_path / "photo.tif"
    Image.new(mode, (6, 4)).save(path)
    for look in (read_image, check_image):
        with pytest.raises(DataError, match=rf"photo.tif has the pixel mode {told}; a photo has 8 bits"):
            look(path, (4, 6), SOURCE)


def write_png(path: Path, *, width: int, height: int, depth: int, colour: int, content: bytes) -> None:
    """A PNG from its parts, so that it may claim any size."""
    header = struct.pack(">2I5B", width, height, depth, colour, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", content), (b"IEND", b""))
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n"
        + b"".join(
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
            for kind, data in chunks
        )
    )


@pytest.mark.parametrize("is_lifted", [False, True])
def test_images_of_too_many_pixels_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_lifted: bool
) -> None:
    """Pillow refuses them itself, unless a library that was imported has lifted its bound for all."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None if is_lifted else MAX_PIXELS // 2)
    path = tmp_path / "map.png"
    write_png(path, width=20_000, height=10_000, depth=8, colour=2, content=b"")
    assert MAX_PIXELS == 178_956_970
    message = r"map.png has more than 178,956,970 pixels \(.*200000000 pixels.*\): cut it into tiles"
    for look in (read_image, check_image):
        with pytest.raises(DataError, match=message):
            look(path, (10_000, 20_000), SOURCE)
    with pytest.raises(DataError, match=message):
        read_labels(path)


def test_large_images_within_the_bound_neither_warn_nor_fail(tmp_path: Path) -> None:
    """In a process of its own, where warnings are errors."""
    path = tmp_path / "map.png"
    Image.new("L", (12_000, 8_000)).save(path)
    program = f"""
from pathlib import Path
from sparsevit.data.images import check_image, read_labels
check_image(Path({str(path)!r}), (8_000, 12_000), "labels.json")
print(read_labels(Path({str(path)!r})).shape)
"""
    command = [sys.executable, "-W", "error::Warning:PIL.Image", "-c", program]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout == "torch.Size([8000, 12000])\n"


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "gif", "tif", "bmp"])
def test_files_cut_anywhere_are_named(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"photo.{suffix}"
    noise = np.random.default_rng(0).integers(0, 255, (40, 60, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    content = path.read_bytes()
    for share in (0.0, 0.01, 0.1, 0.5, 0.9):
        path.write_bytes(content[: int(share * len(content))])
        with pytest.raises(DataError, match=rf"photo.{suffix} (cannot be decoded|is not a readable)"):
            read_image(path, (40, 60), SOURCE)


def test_folders_are_no_images(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is not a readable image: .*directory"):
        read_image(tmp_path, (4, 6), SOURCE)
    with pytest.raises(DataError, match=r"image .*none.png does not exist"):
        read_image(tmp_path / "none.png", (4, 6), SOURCE)
