"""Where annotations and images of COCO-format data lie: found by themselves, through links, or named."""

import json
from pathlib import Path

import pytest

from sparsevit.data.coco import CocoInstances
from sparsevit.data.errors import DataError
from tests.sparsevit_tests.coco_format import plain, write_pictures, write_plain


def write_layout(root: Path, annotations: str, images: str, prefix: str = "") -> None:
    dataset = plain()
    write_pictures(root / images, dataset)
    for image in dataset["images"]:
        image["file_name"] = prefix + image["file_name"]
    (root / annotations).parent.mkdir(parents=True, exist_ok=True)
    (root / annotations).write_text(json.dumps(dataset))


@pytest.mark.parametrize(
    ("annotations", "images", "split", "known"),
    [
        ("annotations/instances_val.json", "val", "val", "val"),
        ("annotations/instances_val.json", "images/val", "val", "val"),
        ("annotations/instances_val.json", "val/images", "val", "val"),
        ("annotations/instances_val.json", "images", "val", "val"),
        ("annotations/instances_val.json", ".", "val", "val"),
        ("valid/_annotations.coco.json", "valid", "valid", "valid"),  # Roboflow
        ("_annotations.coco.json", ".", "_annotations.coco.json", "_annotations.coco.json"),
        ("labels.json", "data", "labels.json", "labels.json"),  # FiftyOne, one data set
        ("val/labels.json", "val/data", "val", "val"),  # FiftyOne, one split of several
        ("labels/mine.json", "labels/images", "labels/mine.json", None),
        ("annotations/instances_default.json", "images/default", "default", "default"),  # CVAT
    ],
)
def test_layouts_are_found(
    tmp_path: Path, annotations: str, images: str, split: str, known: str | None
) -> None:
    write_layout(tmp_path, annotations, images)
    assert CocoInstances.known_splits(tmp_path) == ([] if known is None else [known])
    dataset = CocoInstances(tmp_path, split)
    dataset.verify(decode=True)
    assert dataset.image_path(1).samefile(tmp_path / images / "p1.png")


@pytest.mark.parametrize("prefix", ["images/", "./images/", "images\\"])
def test_file_names_may_tell_folders(tmp_path: Path, prefix: str) -> None:
    write_layout(tmp_path, "annotations/instances_val.json", "images", prefix)
    CocoInstances(tmp_path, "val").verify(decode=True)


def test_splits_of_several_kinds_are_listed_once(tmp_path: Path) -> None:
    write_layout(tmp_path, "train/_annotations.coco.json", "train")
    write_layout(tmp_path, "annotations/instances_train.json", "train")
    write_layout(tmp_path, "test/_annotations.coco.json", "test")
    assert CocoInstances.known_splits(tmp_path) == ["test", "train"]
    assert CocoInstances(tmp_path, "train").annotation_file.name == "instances_train.json"


def test_folder_of_the_split_goes_first(tmp_path: Path) -> None:
    write_layout(tmp_path, "annotations/instances_val.json", "images")
    write_layout(tmp_path, "annotations/instances_val.json", "val")
    assert CocoInstances(tmp_path, "val").image_folder == tmp_path / "val"
    chosen = CocoInstances(tmp_path, "val", image_folder="images")
    assert chosen.image_folder == tmp_path / "images"
    assert chosen.subset([1]).image_path(1) == tmp_path / "images" / "p1.png"


def test_images_anywhere_else_are_named(tmp_path: Path) -> None:
    write_layout(tmp_path, "annotations/instances_val.json", "photos/2026")
    assert len(CocoInstances(tmp_path, "val", image_folder="photos/2026")[0][1]["boxes"]) == 2
    places = ", ".join(f"{tmp_path}/{place}" for place in ("val", "val/images", "val/data", "images/val"))
    with pytest.raises(
        DataError, match=rf"image 'p1.png', the first in .* does not exist in {places}, .*/data,"
    ):
        CocoInstances(tmp_path, "val")
    with pytest.raises(DataError, match=rf"image 'p1.png', .* does not exist in {tmp_path}/photos: put"):
        CocoInstances(tmp_path, "val", image_folder="photos")


def test_images_and_folders_may_be_links(tmp_path: Path) -> None:
    """As DVC and the caches of hubs have them: the files are somewhere else, under other names."""
    expected = CocoInstances(write_plain(tmp_path / "plain"), "val")
    write_plain(tmp_path / "links")
    store = tmp_path / "store"
    store.mkdir()
    for number, path in enumerate(sorted((tmp_path / "links" / "val").iterdir())):
        path.rename(store / f"{number:032x}")
        path.symlink_to(store / f"{number:032x}")
    write_plain(tmp_path / "folder")
    (tmp_path / "folder" / "val").rename(store / "val")
    (tmp_path / "folder" / "val").symlink_to(store / "val")
    for name in ("links", "folder"):
        dataset = CocoInstances(tmp_path / name, "val")
        dataset.verify(decode=True)
        assert (dataset[0][0] == expected[0][0]).all()


@pytest.mark.parametrize(
    "file_name", ["../val/p1.png", "a/../../val/p1.png", "..\\val\\p1.png", "/val/p1.png"]
)
def test_file_names_may_not_leave_the_data(tmp_path: Path, file_name: str) -> None:
    root = write_plain(tmp_path, lambda dataset: dataset["images"][0].update(file_name=file_name))
    with pytest.raises(DataError, match="of image 1 leaves the data root: name it relative to the images"):
        CocoInstances(root, "val")
