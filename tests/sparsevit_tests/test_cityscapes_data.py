"""Data in the layout of Cityscapes: what is read, what is refused, and the official IoU."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from cityscapesscripts.evaluation import evalPixelLevelSemanticLabeling as official
from cityscapesscripts.helpers.labels import labels as official_labels
from PIL import ExifTags, Image
from torchvision import tv_tensors

from sparsevit.data.augmentation import segmentation_augmentation
from sparsevit.data.cityscapes import CLASSES, CityscapesFrames, to_train_ids
from sparsevit.data.errors import DataError
from sparsevit.data.sample import IGNORED
from sparsevit.data.segmentation_metrics import class_ious, confusion_matrix, mean_iou
from sparsevit.data.streets import StreetsConfig, write_streets

SMALL = StreetsConfig(image_size=(64, 128), num_images={"train": 12, "val": 2})


@pytest.fixture(scope="module")
def streets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data") / "streets"
    write_streets(root, SMALL)
    return root


@pytest.fixture
def tiny_city(tmp_path: Path) -> Path:
    """One 8×4 frame, to be spoilt by a test."""
    for kind in ("leftImg8bit", "gtFine"):
        (tmp_path / kind / "val" / "ulm").mkdir(parents=True)
    Image.fromarray(np.zeros((4, 8, 3), dtype=np.uint8)).save(photo(tmp_path))
    Image.fromarray(np.array([[0, 7, 8, 33, 6, 23, 24, 26]] * 4, dtype=np.uint8)).save(labels(tmp_path))
    return tmp_path


def photo(root: Path) -> Path:
    return root / "leftImg8bit" / "val" / "ulm" / "ulm_000000_000019_leftImg8bit.png"


def labels(root: Path) -> Path:
    return root / "gtFine" / "val" / "ulm" / "ulm_000000_000019_gtFine_labelIds.png"


def test_classes_are_cityscapes() -> None:
    evaluated = sorted(
        (each for each in official_labels if 0 <= each.trainId < IGNORED), key=lambda e: e.trainId
    )
    ours = [(each.name, each.label_id, each.colour) for each in CLASSES]
    assert ours == [(each.name, each.id, each.color) for each in evaluated]
    for each in official_labels:
        if each.id >= 0:
            assert int(to_train_ids(torch.tensor([each.id]))) == (
                each.trainId if each.trainId >= 0 else IGNORED
            )


def test_item(tiny_city: Path) -> None:
    dataset = CityscapesFrames(tiny_city, "val")
    assert dataset.sample_ids == ["ulm/ulm_000000_000019"]
    image, target = dataset[0]
    assert image.shape == (3, 4, 8)
    assert target["labels"][0].tolist() == [255, 0, 1, 18, 255, 10, 11, 13]


def test_streets_are_a_function_of_the_seed(streets: Path, tmp_path: Path) -> None:
    write_streets(tmp_path / "again", SMALL)
    files = sorted(streets.rglob("*.png"))
    assert len(files) == 2 * 14
    for path in files:
        assert path.read_bytes() == (tmp_path / "again" / path.relative_to(streets)).read_bytes()
    assert json.loads((streets / "provenance.json").read_text())["config"]["seed"] == 0


def test_streets_hold_every_class_and_ignored_pixels(streets: Path) -> None:
    dataset = CityscapesFrames(streets, "train")
    assert dataset.known_splits(streets) == ["train", "val"]
    dataset.verify(decode=True)
    label_maps = [dataset[index][1]["labels"] for index in range(len(dataset))]
    found = {train_id for each in label_maps for train_id in each.flatten().tolist()}
    names = {CLASSES[train_id].name for train_id in found if train_id != IGNORED}
    assert names == {"road", "sidewalk", "building", "pole", "vegetation", "sky", "person", "car"}
    assert IGNORED in found


def test_digest_follows_labels_and_samples(tiny_city: Path, streets: Path) -> None:
    before = CityscapesFrames(tiny_city, "val").digest()
    Image.fromarray(np.full((4, 8), 7, dtype=np.uint8)).save(labels(tiny_city))
    assert CityscapesFrames(tiny_city, "val").digest() != before
    rest, held_out = CityscapesFrames(streets, "train").hold_out(3, seed=0)
    assert len({rest.digest(), held_out.digest()}) == 2


def test_augmentation_keeps_image_and_labels_together() -> None:
    augment = segmentation_augmentation((32, 64), (0.5, 2.0))
    image = tv_tensors.Image(torch.zeros(3, 40, 80, dtype=torch.uint8))
    label_map = tv_tensors.Mask(torch.zeros(40, 80, dtype=torch.uint8))
    image[:, 10:30, 20:60] = 255
    label_map[10:30, 20:60] = 1
    num_mixed = 0
    for seed in range(20):
        torch.manual_seed(seed)
        augmented, target = augment(image, {"labels": label_map, "sample_id": "a"})
        assert augmented.shape == (3, 32, 64)
        found = target["labels"]
        assert found.shape == (32, 64)
        assert set(found.unique().tolist()) <= {0, 1, IGNORED}
        brightness, counted = augmented.float().mean(dim=0), found != IGNORED
        middle = (brightness[counted].max() + brightness[counted].min()) / 2
        if set(found[counted].tolist()) == {0, 1}:
            assert ((brightness > middle) == (found == 1))[counted].float().mean() > 0.93
            num_mixed += 1
    assert num_mixed > 10


def test_nothing_is_learnt_from_the_padding_of_crops() -> None:
    """An image of one class, made half as large: so many pixels have it, and all others none."""
    augment = segmentation_augmentation((32, 64), (0.5, 0.5))
    image = tv_tensors.Image(torch.zeros(3, 40, 80, dtype=torch.uint8))
    _, target = augment(image, {"labels": tv_tensors.Mask(torch.full((40, 80), 3, dtype=torch.uint8))})
    values, counts = target["labels"].unique(return_counts=True)
    assert dict(zip(values.tolist(), counts.tolist(), strict=True)) == {
        3: 20 * 40, IGNORED: 32 * 64 - 20 * 40,
    }  # fmt: skip


def test_missing_and_unpaired_files_are_named(tiny_city: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"data root .*nowhere is not a folder"):
        CityscapesFrames(tmp_path / "nowhere", "val")
    with pytest.raises(DataError, match=r"leftImg8bit/test does not exist; .* has the splits \['val'\]"):
        CityscapesFrames(tiny_city, "test")
    (tiny_city / "leftImg8bit" / "train").mkdir()
    (tiny_city / "gtFine" / "train").mkdir()
    with pytest.raises(DataError, match="the split 'train' is empty"):
        CityscapesFrames(tiny_city, "train")
    content = labels(tiny_city).read_bytes()
    labels(tiny_city).unlink()
    with pytest.raises(DataError, match="leftImg8bit.png has no counterpart .*gtFine_labelIds.png"):
        CityscapesFrames(tiny_city, "val")
    labels(tiny_city).write_bytes(content)
    photo(tiny_city).unlink()
    with pytest.raises(DataError, match="gtFine_labelIds.png has no counterpart .*leftImg8bit.png"):
        CityscapesFrames(tiny_city, "val")


def test_labels_of_another_size(tiny_city: Path) -> None:
    Image.fromarray(np.zeros((5, 8), dtype=np.uint8)).save(labels(tiny_city))
    dataset = CityscapesFrames(tiny_city, "val")
    for look in (lambda: dataset.verify(decode=False), lambda: dataset[0]):
        with pytest.raises(DataError, match=r"leftImg8bit.png is 8×4 pixels, but .*labelIds.png says 8×5"):
            look()


def test_label_ids_outside_the_table(tiny_city: Path) -> None:
    """Also where images are not decoded: one such file would end a training midway."""
    dataset = CityscapesFrames(tiny_city, "val")
    Image.fromarray(np.full((4, 8), 255, dtype=np.uint8)).save(labels(tiny_city))
    message = r"has the label ids \[255\], but Cityscapes' end at 33: write labelIds"
    with pytest.raises(DataError, match=message):
        dataset.verify(decode=False)
    Image.fromarray(np.full((4, 8), 40_000, dtype=np.uint16)).save(labels(tiny_city))
    with pytest.raises(DataError, match=r"has the label ids \[40000\]"):
        dataset.verify(decode=False)
    Image.fromarray(np.full((4, 8), 7, dtype=np.uint8)).save(labels(tiny_city))
    Image.fromarray(np.full((4, 8), 40_000, dtype=np.uint16)).save(photo(tiny_city))
    with pytest.raises(DataError, match="has the pixel mode I;16; a photo has 8 bits per channel"):
        dataset.verify(decode=True)


def test_split_of_ignored_pixels(tiny_city: Path) -> None:
    """Unlabelled and other classes that are not evaluated: nothing to learn from or to measure on."""
    Image.fromarray(np.array([[0, 4, 6, 30] * 2] * 4, dtype=np.uint8)).save(labels(tiny_city))
    message = r"every pixel of the 1 label images in use of .*gtFine/val is ignored: .* \[0, 4, 6, 30\]"
    with pytest.raises(DataError, match=message):
        CityscapesFrames(tiny_city, "val").verify(decode=False)
    Image.fromarray(np.array([[0, 4, 6, 26] * 2] * 4, dtype=np.uint8)).save(labels(tiny_city))
    CityscapesFrames(tiny_city, "val").verify(decode=False)


def test_photos_that_are_links_or_turned(tiny_city: Path, tmp_path: Path) -> None:
    """A photo stored lying down has labels that stand upright."""
    upright = np.zeros((4, 8, 3), dtype=np.uint8)
    upright[0, 7] = 200, 100, 50
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    stored = tmp_path / "stored.png"
    Image.fromarray(upright).transpose(Image.Transpose.ROTATE_90).save(stored, exif=exif)
    photo(tiny_city).unlink()
    photo(tiny_city).symlink_to(stored)
    dataset = CityscapesFrames(tiny_city, "val")
    dataset.verify(decode=True)
    assert dataset[0][0].permute(1, 2, 0).tolist() == upright.tolist()


def test_coloured_labels_and_broken_files(tiny_city: Path) -> None:
    dataset = CityscapesFrames(tiny_city, "val")
    Image.fromarray(np.zeros((4, 8, 3), dtype=np.uint8)).save(labels(tiny_city))
    with pytest.raises(DataError, match="has the pixel mode RGB; a label image has one number per pixel"):
        dataset.verify(decode=True)
    photo(tiny_city).write_text("no image")
    with pytest.raises(DataError, match="leftImg8bit.png is not a readable image"):
        dataset.verify(decode=False)


@pytest.mark.parametrize("seed", range(4))
def test_iou_is_that_of_the_official_evaluation(seed: int) -> None:
    """Random maps, some classes absent, one predicted where it never is, ignored pixels everywhere."""
    rng = np.random.default_rng(seed)
    label_ids = rng.choice([0, 1, 7, 8, 11, 23, 24, 26], (3, 20, 30)).astype(np.uint8)
    guesses = np.where(
        rng.random(label_ids.shape) < 0.6, label_ids, rng.choice([7, 8, 11, 33], label_ids.shape)
    )
    guesses = np.where(np.isin(guesses, (0, 1)), 7, guesses).astype(np.uint8)
    arguments = official.args
    confusion = official.generateMatrix(arguments)
    ours = torch.zeros(19, 19, dtype=torch.int64)
    for truth, guess in zip(label_ids, guesses, strict=True):
        np.add.at(confusion, (truth, guess), 1)
        ours += confusion_matrix(
            to_train_ids(torch.from_numpy(truth)), to_train_ids(torch.from_numpy(guess)), num_classes=19
        )
    expected = {
        each.name: official.getIouScoreForLabel(each.id, confusion, arguments)
        for each in official_labels
        if 0 <= each.trainId < IGNORED
    }
    ious = class_ious(ours)
    assert ious.tolist() == pytest.approx([expected[each.name] for each in CLASSES], nan_ok=True)
    assert ious.isnan().any()
    assert (ious == 0).any()
    assert mean_iou(ious) == pytest.approx(official.getScoreAverage(expected, arguments))


def test_iou_by_hand() -> None:
    truth = torch.tensor([[0, 0, 0, 1, IGNORED]], dtype=torch.uint8)
    predicted = torch.tensor([[0, 0, 1, 1, 1]], dtype=torch.uint8)
    ious = class_ious(confusion_matrix(truth, predicted, 3))
    assert ious.tolist() == pytest.approx([2 / 3, 1 / 2, float("nan")], nan_ok=True)
    assert mean_iou(ious) == pytest.approx(7 / 12)
    nothing = confusion_matrix(torch.full((2, 2), IGNORED, dtype=torch.uint8), torch.zeros(2, 2), 3)
    assert mean_iou(class_ious(nothing)) == 0.0
