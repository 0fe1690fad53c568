"""Annotations as people's tools write them: what works all the same, and what is named before a run."""

import copy
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pycocotools import mask as coco_mask

from sparsevit.data.augmentation import instance_augmentation
from sparsevit.data.coco import CocoBoxes, CocoInstances
from sparsevit.data.coco_metrics import average_precision
from sparsevit.data.coco_rles import run_lengths
from sparsevit.data.errors import DataError
from tests.sparsevit_tests.coco_format import COLOUR, SIZE, perfect_results, plain, write_plain

WIDTH, HEIGHT = SIZE
NAN, INFINITY = float("nan"), float("inf")
Dataset = dict[str, Any]
Change = Callable[[Dataset], object]


def each(**values: Any) -> Change:
    """A change of all annotations; a value may be a function of the annotation, or `MISSING`."""

    def change(dataset: Dataset) -> None:
        for annotation in dataset["annotations"]:
            for key, value in values.items():
                annotation[key] = value(annotation) if callable(value) else value
                if annotation[key] is MISSING:
                    del annotation[key]

    return change


def third(**values: Any) -> Change:
    return lambda dataset: dataset["annotations"][2].update(values)


MISSING = object()


def rle(annotation: Dataset) -> Dataset:
    """The compressed RLE of a plain annotation's polygon, as JSON has it."""
    encoded = coco_mask.frPyObjects(annotation["segmentation"], HEIGHT, WIDTH)[0]
    return {"size": [HEIGHT, WIDTH], "counts": encoded["counts"].decode()}


def cut(annotation: Dataset, end: int) -> Dataset:
    whole = rle(annotation)
    return whole | {"counts": whole["counts"][:end]}


def counts(annotation: Dataset) -> list[int]:
    """The same, uncompressed."""
    flat = coco_mask.decode(rle(annotation)).flatten(order="F")
    borders = np.flatnonzero(np.diff(flat, prepend=0, append=2))
    return [int(run) for run in np.diff(borders, prepend=0)]


def points(annotation: Dataset) -> list[list[float]]:
    (polygon,) = annotation["segmentation"]
    return [list(point) for point in zip(polygon[::2], polygon[1::2], strict=True)]


def rename(dataset: Dataset, kind: str, name: Callable[[Any], Any]) -> None:
    """Give images or categories other ids."""
    for record in dataset["images" if kind == "image" else "categories"]:
        record["id"] = name(record["id"])
    for annotation in dataset["annotations"]:
        annotation[f"{kind}_id"] = name(annotation[f"{kind}_id"])


WORKS: dict[str, Change] = {
    "plain": lambda dataset: None,
    "ids are strings": each(id=lambda a: f"obj-{a['id']:04d}"),
    "ids are mixed": each(id=lambda a: a["id"] if a["id"] % 2 else str(a["id"])),
    "ids are null": each(id=None),
    "ids are missing": each(id=MISSING),
    "ids from 0": each(id=lambda a: a["id"] - 1),
    "image ids are strings": lambda d: rename(d, "image", lambda number: f"photo-{number}"),
    "image ids from 0": lambda d: rename(d, "image", lambda number: number - 1),
    "image ids are floats": lambda d: rename(d, "image", float),
    "category ids are strings": lambda d: rename(d, "category", lambda number: f"class-{number}"),
    "category ids from 0": lambda d: rename(d, "category", lambda number: number - 1),
    "iscrowd null": each(iscrowd=None),
    "iscrowd missing": each(iscrowd=MISSING),
    "iscrowd false": each(iscrowd=False),
    "iscrowd a string": each(iscrowd="0"),
    "area null": each(area=None),
    "area missing": each(area=MISSING),
    "area a string": each(area="396.0"),
    "area NaN": each(area=NAN),
    "bbox null": each(bbox=None),
    "bbox missing": each(bbox=MISSING),
    "bbox empty": each(bbox=[]),
    "bbox of strings": each(bbox=lambda a: [str(side) for side in a["bbox"]]),
    "bbox and area missing": each(bbox=MISSING, area=MISSING),
    "polygons of points": each(segmentation=lambda a: [points(a)]),
    "one polygon, of points": each(segmentation=points),
    "one polygon, flat": each(segmentation=lambda a: a["segmentation"][0]),
    "polygons of strings": each(segmentation=lambda a: [[str(side) for side in a["segmentation"][0]]]),
    "RLE": each(segmentation=rle),
    "RLE in a list": each(segmentation=lambda a: [rle(a)]),
    "RLE, uncompressed": each(segmentation=lambda a: {"size": [HEIGHT, WIDTH], "counts": counts(a)}),
    "RLE of floats": each(
        segmentation=lambda a: {"size": [48.0, 64.0], "counts": [float(run) for run in counts(a)]}
    ),
    "sizes are strings": lambda d: [image.update(width="64", height="48") for image in d["images"]],
    "sizes are floats": lambda d: [image.update(width=64.0, height=48.0) for image in d["images"]],
    "info null": lambda d: d.update(info=None),
    "names are numbers": lambda d: [category.update(name=category["id"]) for category in d["categories"]],
    "Windows' paths": lambda d: [image.update(file_name=f".\\{image['file_name']}") for image in d["images"]],
}


@pytest.mark.parametrize("change", WORKS.values(), ids=WORKS)
def test_what_means_the_same_gives_the_same(tmp_path: Path, change: Change) -> None:
    """Targets are equal to those of plain annotations, and perfect detections score one."""
    expected = CocoInstances(write_plain(tmp_path / "plain"), "val")
    dataset = CocoInstances(write_plain(tmp_path / "changed", change), "val")
    dataset.verify(decode=True)
    assert dataset.num_dropped == 0
    assert [annotation["id"] for annotation in dataset.coco.dataset["annotations"]] == [1, 2, 3, 4, 5, 6]
    assert [annotation["area"] for annotation in dataset.coco.dataset["annotations"]] == [396] * 6
    for index in range(4):
        (image, ours), (_, theirs) = dataset[index], expected[index]
        assert ours["image_id"] == dataset.sample_ids[index]
        for key in ("boxes", "labels", "masks"):
            torch.testing.assert_close(ours[key], theirs[key])
        inside = image[:, ours["masks"].bool().any(dim=0)]
        assert (inside == torch.tensor(COLOUR)[:, None]).all()
    results = perfect_results(dataset)
    for kind in ("bbox", "segm"):
        average, by_category = average_precision(dataset.coco, results, dataset.sample_ids, kind)
        assert average == pytest.approx(1.0)
        assert by_category == pytest.approx(dict.fromkeys(dataset.category_ids, 1.0))
    assert average_precision(dataset.coco, [], dataset.sample_ids, "segm")[1] == dict.fromkeys(
        dataset.category_ids, 0.0
    )


REFUSED: dict[str, tuple[Change, str]] = {
    "polygon NaN": (
        third(segmentation=[[NAN, 8, 28, 8, 28, 30]]),
        r"annotation 3 has a polygon with the point \(nan, 8\), but its image is 64×48: x must lie in "
        r"\[-64, 128\] and y in \[-48, 96\]",
    ),
    "polygon null": (third(segmentation=[[5, None, 28, 8, 28, 30]]), r"annotation 3 .* point \(5, nan\)"),
    "polygon infinite": (
        third(segmentation=[[5, 8, 28, 8, 28, 30], [5, 8, INFINITY, 8, 28, 30]]),
        r"annotation 3 .* point \(inf, 8\)",
    ),
    "polygon far": (third(segmentation=[[5, 8, 28, 1e9, 28, 30]]), r"annotation 3 .* point \(28, 1e\+09\)"),
    "polygon just too far": (
        third(segmentation=[[5, 8, -64.5, 8, 28, 30]]),
        r"annotation 3 .* point \(-64.5, 8\)",
    ),
    "polygon of words": (
        third(segmentation=[[5, 8, "left", 8, 28, 30]]),
        "annotation 3 has a mask with 'left' in it, which is not a number",
    ),
    "polygon of objects": (
        third(segmentation=[[{"x": 1, "y": 2}, {"x": 5, "y": 2}, {"x": 5, "y": 7}, {"x": 1, "y": 7}] * 2]),
        "annotation 3 has a mask with {'x': 1, 'y': 2} in it, which is not a number",
    ),
    "polygon of triples": (
        third(segmentation=[[[1, 2, 0], [5, 2, 0], [5, 7, 0]]]),
        "annotation 3 has the malformed polygon .* a point has two coordinates",
    ),
    "segmentation a file": (third(segmentation="mask.png"), "annotation 3 has the malformed segmentation"),
    "RLE too short": (
        third(segmentation={"size": [HEIGHT, WIDTH], "counts": [100, 50, 30]}),
        r"annotation 3 has an RLE mask with the counts \[100.0, 50.0, 30.0\] that sum to 180; they must be "
        "whole numbers, none below 0, that sum to height × width, 48 × 64 = 3072",
    ),
    "RLE too long": (
        third(segmentation={"size": [HEIGHT, WIDTH], "counts": [3000, 50, 30]}),
        "annotation 3 .* that sum to 3080; they must",
    ),
    "RLE negative": (
        third(segmentation={"size": [HEIGHT, WIDTH], "counts": [3082, -10]}),
        r"annotation 3 .* counts \[3082.0, -10.0\] that sum to 3072; they must be whole numbers, none",
    ),
    "RLE of fractions": (
        third(segmentation={"size": [HEIGHT, WIDTH], "counts": [3000.5, 71.5]}),
        r"annotation 3 .* counts \[3000.5, 71.5\] that sum to 3072; they must be whole numbers",
    ),
    "RLE infinite": (
        third(segmentation={"size": [HEIGHT, WIDTH], "counts": [3000, INFINITY]}),
        r"annotation 3 .* counts \[3000.0, inf\] that sum to inf; they must",
    ),
    "RLE of words": (
        third(segmentation={"size": [HEIGHT, WIDTH], "counts": [3000, "x"]}),
        "annotation 3 has a mask with 'x' in it, which is not a number",
    ),
    "RLE ragged": (
        third(segmentation={"size": [HEIGHT, WIDTH], "counts": [[3000], [70, 2]]}),
        r"annotation 3 has a mask with \[3000\] in it, which is not a number",
    ),
    "RLE a number": (
        third(segmentation={"size": [HEIGHT, WIDTH], "counts": 3072}),
        "annotation 3 has an RLE mask with the broken counts 3072; write them by pycocotools",
    ),
    "RLE string cut": (
        lambda d: d["annotations"][2].update(segmentation=cut(d["annotations"][2], 20)),
        r"annotation 3 has an RLE mask with the counts \[488, 22, .* that sum to 872; they must",
    ),
    "RLE string cut within a number": (
        lambda d: d["annotations"][2].update(segmentation=cut(d["annotations"][2], -2)),
        "annotation 3 has an RLE mask with the broken counts",
    ),
    "RLE string negative": (
        third(segmentation={"size": [HEIGHT, WIDTH], "counts": "NRR3" + "0" * 40}),
        r"annotation 3 has an RLE mask with the counts \[-2, ",
    ),
    "RLE string of other characters": (
        third(segmentation={"size": [HEIGHT, WIDTH], "counts": "§½ no counts"}),
        "annotation 3 has an RLE mask with the broken counts '§½ no counts'; write them by pycocotools",
    ),
    "RLE string endless": (
        third(segmentation={"size": [HEIGHT, WIDTH], "counts": "o" * 500}),
        "annotation 3 has an RLE mask with the broken counts",
    ),
    "RLE without size": (third(segmentation={"counts": [3072]}), "annotation 3 has an RLE mask of size None"),
    "bbox far": (third(bbox=[6, 8, 1e30, 22]), r"annotation 3 has bbox \[6.0, 8.0, 1e\+30, 22.0\], but its"),
    "bbox infinite": (third(bbox=[-INFINITY, 8, 18, 22]), "annotation 3 has bbox .* four finite numbers"),
    "bbox of words": (third(bbox=["left", 8, 18, 22]), "annotation 3 has bbox .* four finite numbers"),
    "bbox of three": (third(bbox=[6, 8, 18]), r"annotation 3 has bbox \[6, 8, 18\]; it must be four finite"),
    "area negative": (third(area=-396), "annotation 3 has the area -396; .* may be left out"),
    "area infinite": (third(area=INFINITY), "annotation 3 has the area inf; .* may be left out"),
    "area absurd": (third(area=1e12), r"annotation 3 has the area 1000000000000.0; .* \(.* 0 to 27648\)"),
    "area a word": (third(area="large"), "annotation 3 has the area 'large'; .* may be left out"),
    "iscrowd a word": (third(iscrowd="no"), "annotation 3 has iscrowd 'no'; it is 0 or 1"),
    "iscrowd 2": (third(iscrowd=2), "annotation 3 has iscrowd 2; it is 0 or 1"),
    "image id a string": (third(image_id="2"), r"annotation 3 has the unknown image_id '2'; known are"),
    "image id a list": (third(image_id=[2]), r"annotation 3 has the unknown image_id \[2\]"),
    "image id missing": (lambda d: d["annotations"][2].pop("image_id"), "has the unknown image_id None"),
    "category id null": (third(category_id=None), "annotation 3 has the unknown category_id None"),
    "image ids mixed": (
        lambda d: rename(d, "image", lambda number: number if number % 2 else f"photo-{number}"),
        "ids of image records are integers and strings, such as 1 and 'photo-2': make them one or the other",
    ),
    "image ids null": (lambda d: rename(d, "image", lambda number: None), "has the id None; it must be"),
    "category ids mixed": (
        lambda d: rename(d, "category", lambda number: number if number % 2 else "2"),
        "ids of category records are integers and strings, such as 1 and '2'",
    ),
    "width a word": (lambda d: d["images"][2].update(width="wide"), "image 3 has the width 'wide'; width"),
    "width a fraction": (lambda d: d["images"][2].update(width=64.5), "image 3 has the width 64.5; width"),
    "height missing": (lambda d: d["images"][2].pop("height"), "image 3 has the height None; width"),
    "size absurd": (
        lambda d: d["images"][2].update(width=20_000, height=10_000),
        "image 3 has size 20000×10000, more than 178,956,970 pixels",
    ),
    "no annotations": (lambda d: d["annotations"].clear(), "no object to learn from .* among 0 annotations"),
    "areas 0": (each(area=0), "no object .* among 6 annotations; 6 have the area 0"),
    "crowds": (each(iscrowd=1), "no object .* among 6 annotations; 6 have iscrowd 1, so they are ignored"),
    "boxes of no extent": (each(bbox=[6, 8, 0, 22]), "6 have no box of a positive size within their image"),
    "boxes outside": (each(bbox=[70, 8, 10, 10]), "6 have no box of a positive size within their image"),
    "masks are empty": (
        each(segmentation={"size": [HEIGHT, WIDTH], "counts": [HEIGHT * WIDTH]}),
        "among 6 annotations; 6 have no mask",
    ),
    "masks are []": (
        each(segmentation=[]),
        "among 6 annotations; 6 have no mask, .*docs/own-detector.md has the way for boxes alone",
    ),
    "masks are null": (each(segmentation=None), "among 6 annotations; 6 have no mask"),
    "masks are missing": (each(segmentation=MISSING), "among 6 annotations; 6 have no mask"),
}  # fmt: skip


@pytest.mark.parametrize(("change", "message"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_used_is_named(tmp_path: Path, change: Change, message: str) -> None:
    root = write_plain(tmp_path, change)
    with pytest.raises(DataError, match=f"instances_val.json: .*{message}"):
        CocoInstances(root, "val")


ODD: tuple[Any, ...] = (
    None, True, 0, 1, -1, 7, 2.5, 1e300, NAN, INFINITY, -INFINITY, "", "1", "a", [], [[]], [None], ["a"],
    [1, 2], [[1, 2]], [[1, 2], [9, 4], [5, 16]], [1, 2, 3, 4], [NAN] * 4, [[5, 5, 9, 5, 9, 9]], {},
    {"size": [HEIGHT, WIDTH]}, {"counts": "a"}, {"size": [HEIGHT, WIDTH], "counts": {}}, 10**400, 64.0, "48",
)  # fmt: skip


@pytest.mark.parametrize(
    ("table", "inner", "min_used"),
    [
        ("images", [], 1),
        ("categories", [], 5),
        ("annotations", [("segmentation", 0), ("segmentation", 0, 3), ("bbox", 1)], 30),
        ("RLE", [("segmentation", "counts"), ("segmentation", "size"), ("segmentation", "size", 0)], 2),
    ],
)
def test_odd_values_anywhere_are_refused_or_work_to_the_end(
    tmp_path: Path, table: str, inner: list[tuple[Any, ...]], min_used: int
) -> None:
    """Every field of every kind of record, and fields inside of masks, take every odd value."""
    root = write_plain(tmp_path)
    original = plain()
    if table == "RLE":
        each(segmentation=rle)(original)
        table = "annotations"
    else:
        inner = [(key,) for key in original[table][1]] + inner
    num_refused = num_used = 0
    for path, value in itertools.product(inner, ODD):
        dataset = copy.deepcopy(original)
        *parents, last = path
        record = dataset[table][1]
        for parent in parents:
            record = record[parent]
        record[last] = value
        (root / "annotations" / "instances_val.json").write_text(json.dumps(dataset))
        try:
            found = CocoInstances(root, "val")
            found.verify(decode=False)
        except DataError:
            num_refused += 1
            continue
        results = perfect_results(found)
        for kind in ("bbox", "segm"):
            average = average_precision(found.coco, results, found.sample_ids, kind)[0]
            assert average == pytest.approx(1.0), (path, value)
        num_used += 1
    assert num_refused > 20
    assert num_used >= min_used


def test_polygons_may_overhang_the_image(tmp_path: Path) -> None:
    """Up to its own size beyond a border; the mask ends at the border."""
    polygon = [-64, 8, 20, 8, 20, 96, -64, 96]
    root = write_plain(tmp_path, third(segmentation=[polygon], bbox=None, area=None))
    dataset = CocoInstances(root, "val")
    mask = dataset[1][1]["masks"][0]
    assert mask[8:, :20].all()
    assert mask.sum() == 40 * 20
    assert dataset[1][1]["boxes"].tolist() == [[0, 8, 20, 48]]
    assert dataset.coco.anns[3]["area"] == 800


@pytest.mark.parametrize("kind", [CocoInstances, CocoBoxes])
@pytest.mark.parametrize("flag", [1, True, 1.0, "1"])
def test_crowds_are_known_to_the_evaluation_alone(
    tmp_path: Path, kind: type[CocoInstances], flag: Any
) -> None:
    """Such a region is no target, counts for no class, and detections in it are not counted as wrong."""
    dataset = kind(write_plain(tmp_path, third(iscrowd=flag)), "val")
    assert dataset.coco.anns[3]["iscrowd"] == 1
    assert dataset.class_counts() == {"square": 3, "other": 2}
    for transform in (None, instance_augmentation(64, (1.0, 1.0))):
        dataset.transform = transform
        for index, number in enumerate((2, 0, 2, 1)):
            target = dataset[index][1]
            counted = [len(target[key]) for key in ("boxes", "labels", "masks") if key in target]
            assert counted == [number] * (3 if kind.needs_masks else 2)
    with pytest.raises(DataError, match="none of the 1 images in use"):
        dataset.subset([2]).verify(decode=False)
    wrong = perfect_results(kind(write_plain(tmp_path / "other"), "val"))
    assert len(wrong) == 6
    measured = "segm" if kind.needs_masks else "bbox"
    assert average_precision(dataset.coco, wrong, dataset.sample_ids, measured)[0] == pytest.approx(1.0)


def test_run_lengths_are_pycocotools() -> None:
    """Masks of every kind, all decoded at once: noise, blocks, empty, full, and of one pixel."""
    rng = np.random.default_rng(0)
    masks = [np.ones((1, 1), dtype=np.uint8)]
    for share in (0.0, 0.01, 0.5, 1.0) * 5:
        mask = (rng.random((37, 211)) < share).astype(np.uint8)
        mask[:, : int(rng.integers(200))] = rng.integers(2)
        masks.append(mask)
    texts = [coco_mask.encode(np.asfortranarray(mask))["counts"].decode() for mask in masks]
    runs, num_runs = run_lengths(texts)
    assert len(num_runs) == len(masks)
    for mask, own in zip(masks, np.split(runs, np.cumsum(num_runs)[:-1]), strict=True):
        np.testing.assert_array_equal(np.repeat(np.arange(len(own)) % 2, own), mask.flatten(order="F"))


def test_boxes_alone_have_a_reader_of_their_own(tmp_path: Path) -> None:
    """Boxes without masks and masks without boxes give the same targets."""
    expected = CocoInstances(write_plain(tmp_path / "plain"), "val")
    boxes_alone = each(segmentation=MISSING, area=MISSING)
    masks_alone = each(bbox=MISSING)
    for name, change in (("boxes", boxes_alone), ("masks", masks_alone)):
        dataset = CocoBoxes(write_plain(tmp_path / name, change), "val")
        dataset.verify(decode=True)
        for index in range(4):
            target = dataset[index][1]
            assert set(target) == {"boxes", "labels", "image_id"}
            assert target["boxes"].tolist() == expected[index][1]["boxes"].tolist()
        assert dataset.coco.anns[1]["area"] == 396
        results = perfect_results(dataset)
        assert average_precision(dataset.coco, results, dataset.sample_ids, "bbox")[0] == pytest.approx(1.0)
    dataset.transform = instance_augmentation(64, (0.9, 1.1))
    assert set(dataset[0][1]) == {"boxes", "labels", "image_id"}
    with pytest.raises(DataError, match="6 have no box of a positive size"):
        CocoBoxes(write_plain(tmp_path / "neither", each(segmentation=[], bbox=None)), "val")


def test_images_in_use_need_an_object(tmp_path: Path) -> None:
    """Two of four images have objects: the others alone are nothing to measure on."""
    root = write_plain(tmp_path, lambda d: d.update(annotations=d["annotations"][:3]))
    dataset = CocoInstances(root, "val")
    dataset.subset([2, 3]).verify(decode=True)
    with pytest.raises(
        DataError, match="none of the 2 images in use of .*instances_val.json has an annotation"
    ):
        dataset.subset([3, 4]).verify(decode=True)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not valid JSON, or not all of it"),
        (json.dumps(plain()).encode()[:-900], "not valid JSON, or not all of it: .*column"),
        (b"\xff\xfe\xfa", "not valid JSON, or not all of it"),
        (b"[" * 1_000_000, "not valid JSON, or not all of it"),
        (json.dumps([plain()]).encode(), "not COCO format: at the top is a list, not an object with images"),
        (b"null", "not COCO format: at the top is a NoneType"),
    ],
    ids=["empty", "truncated", "not text", "nested", "list", "null"],
)
def test_files_that_are_no_coco_format(tmp_path: Path, content: bytes, message: str) -> None:
    root = write_plain(tmp_path)
    (root / "annotations" / "instances_val.json").write_bytes(content)
    with pytest.raises(DataError, match=f"instances_val.json: .*{message}"):
        CocoInstances(root, "val")


def test_byte_order_mark(tmp_path: Path) -> None:
    root = write_plain(tmp_path)
    file = root / "annotations" / "instances_val.json"
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    assert len(CocoInstances(root, "val")) == 4


def test_info_is_there_for_pycocotools(tmp_path: Path) -> None:
    """Its versions 2.0.9 and 2.0.10 copy ``info`` when they load results, there or not."""
    dataset = CocoInstances(write_plain(tmp_path), "val")
    assert dataset.coco.dataset["info"] == {}
    named = write_plain(tmp_path / "named", lambda d: d.update(info={"year": 2026}))
    assert CocoInstances(named, "val").coco.dataset["info"] == {"year": 2026}
