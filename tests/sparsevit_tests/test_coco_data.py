"""Data in COCO format: what is read, and what is refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from sparsevit.data.augmentation import instance_augmentation
from sparsevit.data.coco import CocoInstances
from sparsevit.data.coco_metrics import average_precision, to_results
from sparsevit.data.errors import DataError
from sparsevit.data.shapes import CLASSES, ShapesConfig, write_shapes

SMALL = ShapesConfig(image_size=64, num_images={"train": 40}, empty_share=0.2, crowd_share=0.3)


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data") / "shapes"
    write_shapes(root, SMALL)
    return root


@pytest.fixture
def tiny_coco(tmp_path: Path) -> Path:
    """One 20×10 photo with one rectangle, to be spoilt by a test."""
    (tmp_path / "annotations").mkdir()
    (tmp_path / "val").mkdir()
    Image.fromarray(np.zeros((10, 20, 3), dtype=np.uint8)).save(tmp_path / "val" / "a.png")
    dataset = {
        "images": [{"id": 7, "file_name": "a.png", "width": 20, "height": 10}],
        "categories": [{"id": 3, "name": "cat"}, {"id": 9, "name": "dog"}],
        "annotations": [
            {
                "id": 1, "image_id": 7, "category_id": 9, "bbox": [2, 1, 10, 5], "area": 50, "iscrowd": 0,
                "segmentation": [[2, 1, 12, 1, 12, 6, 2, 6]],
            }
        ],
    }  # fmt: skip
    (tmp_path / "annotations" / "instances_val.json").write_text(json.dumps(dataset))
    return tmp_path


def spoil(root: Path, change: Callable[[dict[str, Any]], object]) -> None:
    path = root / "annotations" / "instances_val.json"
    dataset = json.loads(path.read_text())
    change(dataset)
    path.write_text(json.dumps(dataset))


def test_shapes_are_a_function_of_the_seed(shapes: Path, tmp_path: Path) -> None:
    write_shapes(tmp_path / "again", SMALL)
    for path in sorted(shapes.rglob("*.j*")):
        assert path.read_bytes() == (tmp_path / "again" / path.relative_to(shapes)).read_bytes()


def test_shapes_hold_every_kind_of_annotation(shapes: Path) -> None:
    dataset = CocoInstances(shapes, "train")
    annotations = dataset.coco.dataset["annotations"]
    assert dataset.class_names == CLASSES
    assert {annotation["category_id"] for annotation in annotations} == {1, 2, 3}
    assert any(annotation["iscrowd"] for annotation in annotations)
    assert any(isinstance(a["segmentation"], list) for a in annotations)
    assert any(isinstance(a["segmentation"], dict) and not a["iscrowd"] for a in annotations)
    assert any(not dataset.coco.imgToAnns[image_id] for image_id in dataset.sample_ids)
    for annotation in annotations:
        assert dataset.coco.annToMask(annotation).sum() == annotation["area"]


def test_shapes_are_not_written_twice_nor_over_other_data(shapes: Path, tmp_path: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in shapes.rglob("*")}
    write_shapes(shapes, SMALL)
    assert before == {path: path.stat().st_mtime_ns for path in shapes.rglob("*")}
    (tmp_path / "mine").mkdir()
    with pytest.raises(DataError, match="was not written by a generator of this project"):
        write_shapes(tmp_path / "mine", SMALL)


def test_item(tiny_coco: Path) -> None:
    image, target = CocoInstances(tiny_coco, "val")[0]
    assert image.shape == (3, 10, 20)
    assert target["boxes"].tolist() == [[2, 1, 12, 6]]
    assert target["labels"].tolist() == [2]
    assert target["masks"].sum() == 50
    assert target["image_id"] == 7


def test_augmentation_keeps_boxes_and_masks_together(shapes: Path) -> None:
    """A mask lies in its box, and fills it to the sides where the crop cuts nothing off."""
    dataset = CocoInstances(shapes, "train")
    dataset.transform = instance_augmentation(64, (0.5, 1.5))
    torch.manual_seed(0)
    num_whole = num_cut = 0
    for index in range(len(dataset)):
        image, target = dataset[index]
        assert image.shape == (3, 64, 64)
        assert target["masks"].shape[1:] == (64, 64)
        assert len(target["boxes"]) == len(target["labels"]) == len(target["masks"])
        for box, mask in zip(target["boxes"].tolist(), target["masks"].bool(), strict=True):
            rows, columns = torch.where(mask)
            extent = [int(columns.min()), int(rows.min()), int(columns.max()) + 1, int(rows.max()) + 1]
            assert min(box) >= 0 and max(box) <= 64
            assert all(lowest >= side - 2 for lowest, side in zip(extent[:2], box[:2], strict=True))
            assert all(highest <= side + 2 for highest, side in zip(extent[2:], box[2:], strict=True))
            if min(box) > 0 and max(box) < 64:
                assert extent == pytest.approx(box, abs=3)
                num_whole += 1
            else:
                num_cut += 1
    assert num_whole > 20 and num_cut > 5


def test_hold_out_is_disjoint_and_complete(shapes: Path) -> None:
    dataset = CocoInstances(shapes, "train")
    rest, held_out = dataset.hold_out(10, seed=0)
    assert len(held_out) == 10
    assert sorted(rest.sample_ids + held_out.sample_ids) == dataset.sample_ids
    with pytest.raises(DataError, match="cannot hold out 40 images .* lower data.num_search"):
        dataset.hold_out(40, seed=0)


def test_missing_root(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"data root .*nowhere is not a folder"):
        CocoInstances(tmp_path / "nowhere", "val")


def test_missing_split_lists_the_others(tiny_coco: Path) -> None:
    places = "instances_train.json or .*train/_annotations.coco.json or .*train/labels.json does not exist"
    with pytest.raises(DataError, match=rf"{places}; .* has the splits \['val'\]"):
        CocoInstances(tiny_coco, "train")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.pop("annotations"), "not COCO format: 'annotations' is not a list of objects"),
        (lambda d: d.update(images=None), "not COCO format: 'images' is not a list of objects"),
        (lambda d: d.update(categories=["cat"]), "not COCO format: 'categories' is not a list of objects"),
        (lambda d: d["images"][0].update(id=8), r"annotation 1 has the unknown image_id 7; known are \[8\]"),
        (lambda d: d["annotations"][0].update(category_id=4), r"unknown category_id 4; known are \[3, 9\]"),
        (lambda d: d["images"][0].update(file_name="../../etc/passwd"), "leaves the data root"),
        (lambda d: d["images"][0].update(file_name="/etc/passwd"), "leaves the data root"),
        (lambda d: d["images"][0].update(file_name=None), "image 7 has the file_name None"),
        (lambda d: d["images"].append(dict(d["images"][0])), "lists image id 7 2 times"),
        (
            lambda d: d["images"].append(d["images"][0] | {"id": 8, "file_name": "./a.png"}),
            "lists the file_name 'a.png' 2 times",
        ),
        (lambda d: d["annotations"][0].update(segmentation=[[1, 2, 3]]), "malformed segmentation"),
        (lambda d: d["annotations"].append(dict(d["annotations"][0])), "lists annotation id 1 2 times"),
        (
            lambda d: d["annotations"][0].update(segmentation={"size": [9, 9], "counts": [81]}),
            r"annotation 1 has an RLE mask of size \[9, 9\], but its image is \[10, 20\]",
        ),
        (lambda d: d["annotations"][0].update(bbox=[1, 2, float("nan"), 4]), "four finite numbers"),
        (lambda d: d["images"][0].update(width=0), "has the width 0; width and height must be positive"),
        (lambda d: (d["images"].clear(), d["annotations"].clear()), "lists no images"),
        (lambda d: (d["categories"].clear(), d["annotations"].clear()), "lists no categories"),
        (lambda d: d["categories"][0].pop("name"), "category 3 has no name"),
        (lambda d: d["categories"][0].update(name="dog"), "lists the category name 'dog' 2 times"),
    ],
)
def test_broken_annotations(tiny_coco: Path, change: Callable[[dict[str, Any]], None], message: str) -> None:
    spoil(tiny_coco, change)
    with pytest.raises(DataError, match=f"instances_val.json: .*{message}"):
        CocoInstances(tiny_coco, "val")


def test_boxes_and_masks_of_no_area_are_dropped_and_counted(tiny_coco: Path) -> None:
    def add_degenerate(dataset: dict[str, Any]) -> None:
        good = dataset["annotations"][0]
        dataset["annotations"] += [
            good | {"id": 2, "bbox": [2, 1, 0, 5]},
            good | {"id": 3, "area": 0},
            good | {"id": 4, "segmentation": []},
            good | {"id": 5, "segmentation": [[1, 2, 3, 4]]},
        ]

    spoil(tiny_coco, add_degenerate)
    dataset = CocoInstances(tiny_coco, "val")
    assert dataset.num_dropped == 4
    assert len(dataset[0][1]["boxes"]) == 1


def test_missing_unreadable_and_truncated_images(tiny_coco: Path) -> None:
    dataset = CocoInstances(tiny_coco, "val")
    path = tiny_coco / "val" / "a.png"
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(DataError, match=r"a.png (cannot be decoded|is not a readable image)"):
        dataset.verify(decode=True)
    path.write_text("no image")
    with pytest.raises(DataError, match="a.png is not a readable image"):
        dataset.verify(decode=False)
    path.unlink()
    with pytest.raises(DataError, match="a.png does not exist"):
        dataset.verify(decode=False)


def test_image_of_another_size(tiny_coco: Path) -> None:
    spoil(tiny_coco, lambda dataset: dataset["images"][0].update(width=21))
    with pytest.raises(DataError, match=r"is 20×10 pixels, but .* says 21×10"):
        CocoInstances(tiny_coco, "val").verify(decode=False)


def test_perfect_detections_have_average_precision_one(shapes: Path) -> None:
    dataset = CocoInstances(shapes, "train")
    results, shifted = [], []
    for image, target in (dataset[index] for index in range(len(dataset))):
        detections = {
            "boxes": target["boxes"].as_subclass(torch.Tensor),
            "labels": target["labels"],
            "masks": target["masks"].as_subclass(torch.Tensor)[:, None].float(),
            "scores": torch.ones(len(target["labels"])),
        }
        assert image.ndim == 3
        results += to_results(detections, target["image_id"], dataset.category_ids)
        wrong = detections | {"labels": detections["labels"] % 3 + 1}
        shifted += to_results(wrong, target["image_id"], dataset.category_ids)
    for kind in ("bbox", "segm"):
        assert average_precision(dataset.coco, results, dataset.sample_ids, kind)[0] == pytest.approx(1.0)
        assert average_precision(dataset.coco, shifted, dataset.sample_ids, kind)[0] < 0.1
    assert average_precision(dataset.coco, [], dataset.sample_ids, "segm")[0] == 0.0
