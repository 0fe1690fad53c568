"""Photos, drawn ones and real ones where they lie beside the checkout: loader, metric and augmentation."""

from pathlib import Path

import pytest
import torch

from sparsevit.data.augmentation import instance_augmentation
from sparsevit.data.coco import CocoInstances
from sparsevit.data.coco_metrics import average_precision
from tests.sparsevit_tests.coco_format import perfect_results
from tests.sparsevit_tests.drawn_photos import CATEGORIES, NUM_OBJECTS, SIZES, write_drawn_photos

COCO = Path(__file__).parents[3] / "shared" / "data" / "coco_small"
REAL = pytest.mark.skipif(not COCO.is_dir(), reason=f"no COCO photos at {COCO}")


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_drawn_photos(tmp_path_factory.mktemp("photos"))


@pytest.fixture(params=["drawn", pytest.param("real", marks=REAL)])
def photos(request: pytest.FixtureRequest, drawn: Path) -> CocoInstances:
    return CocoInstances(drawn if request.param == "drawn" else COCO, "val2017")


@REAL
@pytest.mark.parametrize(("split", "num_images"), [("train2017", 45), ("val2017", 47)])
def test_photos_and_annotations_are_whole(split: str, num_images: int) -> None:
    dataset = CocoInstances(COCO, split)
    assert len(dataset) == num_images
    assert len(dataset.class_names) == 80
    dataset.verify(decode=True)


def test_drawn_photos_are_read_as_they_are(drawn: Path) -> None:
    dataset = CocoInstances(drawn, "val2017")
    dataset.verify(decode=True)
    assert dataset.class_names == tuple(f"thing {each}" for each in CATEGORIES)
    for index, (width, height) in enumerate(SIZES):
        image, target = dataset[index]
        assert image.shape == (3, height, width)
        assert torch.equal(image[0], image[1]) == (index == 1)  # grey
        assert len(target["labels"]) == NUM_OBJECTS - 1
        corners = target["boxes"].as_subclass(torch.Tensor)
        for mask, (left, top, right, bottom) in zip(target["masks"], corners.tolist(), strict=True):
            ys, xs = torch.nonzero(mask.as_subclass(torch.Tensor), as_tuple=True)
            found = (xs.min(), ys.min(), xs.max() + 1, ys.max() + 1)
            assert [int(each) for each in found] == pytest.approx([left, top, right, bottom], abs=1.01)


def test_ground_truth_scores_one_with_crowds_ignored(photos: CocoInstances) -> None:
    """Detections equal to the annotations have AP 1, although crowd regions are in the data."""
    crowds = [each for each in photos.coco.anns.values() if each.get("iscrowd")]
    assert crowds
    assert len(perfect_results(photos)) == len(photos.coco.anns) - len(crowds)
    for kind in ("segm", "bbox"):
        average, by_category = average_precision(
            photos.coco, perfect_results(photos), photos.sample_ids, kind
        )
        assert average == pytest.approx(1.0, abs=2e-3)
        assert min(by_category.values()) > 0.9


def test_detections_of_a_crowd_count_neither_way(photos: CocoInstances) -> None:
    """Those inside a crowd region are no false alarms; the same somewhere else are."""
    results = perfect_results(photos)
    crowds = [each for each in photos.coco.anns.values() if each.get("iscrowd")]
    inside = [
        {
            "image_id": each["image_id"], "category_id": each["category_id"], "score": 2.0,
            "bbox": each["bbox"],
        }
        for each in crowds
    ]  # fmt: skip
    of_crowds = {each["category_id"] for each in crowds}
    _, plain = average_precision(photos.coco, results, photos.sample_ids, "bbox")
    _, with_crowds = average_precision(photos.coco, [*results, *inside], photos.sample_ids, "bbox")
    assert with_crowds == pytest.approx(plain)
    elsewhere = [{**each, "bbox": [0.0, 0.0, 3.0, 3.0]} for each in inside]
    _, with_others = average_precision(photos.coco, [*results, *elsewhere], photos.sample_ids, "bbox")
    assert any(with_others[each] < plain[each] - 0.01 for each in of_crowds if each in plain)


def test_augmented_photos_keep_their_instances(photos: CocoInstances) -> None:
    count = min(10, len(photos))
    plain = sum(len(photos[index][1]["labels"]) for index in range(count))
    photos.transform = instance_augmentation(512, (1.0, 1.0))
    torch.manual_seed(0)
    augmented = [photos[index] for index in range(count)]
    assert all(image.shape == (3, 512, 512) for image, _ in augmented)
    assert 0.9 * plain <= sum(len(target["labels"]) for _, target in augmented) <= plain
