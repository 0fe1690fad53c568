"""Real COCO photos, where they lie beside the checkout: loader, metric and augmentation."""

from pathlib import Path

import pytest
import torch

from sparsevit.data.augmentation import instance_augmentation
from sparsevit.data.coco import CocoInstances
from sparsevit.data.coco_metrics import average_precision, to_results

COCO = Path(__file__).parents[3] / "shared" / "data" / "coco_small"
pytestmark = pytest.mark.skipif(not COCO.is_dir(), reason=f"no COCO photos at {COCO}")


@pytest.mark.parametrize(("split", "num_images"), [("train2017", 45), ("val2017", 47)])
def test_photos_and_annotations_are_whole(split: str, num_images: int) -> None:
    dataset = CocoInstances(COCO, split)
    assert len(dataset) == num_images
    assert len(dataset.class_names) == 80
    dataset.verify(decode=True)


def test_ground_truth_scores_one_with_crowds_ignored() -> None:
    """Detections equal to the annotations have AP 1, although crowd regions are in the data."""
    dataset = CocoInstances(COCO, "val2017")
    assert any(annotation.get("iscrowd") for annotation in dataset.coco.anns.values())
    results = []
    for index in range(len(dataset)):
        _, target = dataset[index]
        detections = {
            "boxes": target["boxes"].as_subclass(torch.Tensor),
            "labels": target["labels"],
            "masks": target["masks"].as_subclass(torch.Tensor)[:, None].float(),
            "scores": torch.ones(len(target["labels"])),
        }
        results += to_results(detections, target["image_id"], dataset.category_ids)
    for kind in ("segm", "bbox"):
        average, by_category = average_precision(dataset.coco, results, dataset.sample_ids, kind)
        assert average == pytest.approx(1.0, abs=2e-3)
        assert min(by_category.values()) > 0.9


def test_augmented_photos_keep_their_instances() -> None:
    dataset = CocoInstances(COCO, "train2017")
    plain = sum(len(dataset[index][1]["labels"]) for index in range(10))
    dataset.transform = instance_augmentation(512, (1.0, 1.0))
    torch.manual_seed(0)
    augmented = [dataset[index] for index in range(10)]
    assert all(image.shape == (3, 512, 512) for image, _ in augmented)
    assert 0.9 * plain <= sum(len(target["labels"]) for _, target in augmented) <= plain
