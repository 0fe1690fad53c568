"""What tests of training share."""

import pytest

from sparsevit.data.augmentation import instance_augmentation
from sparsevit.data.coco import CocoInstances
from sparsevit.data.shapes import ShapesConfig, write_shapes


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> CocoInstances:
    """Six pictures of shapes, 64×64, as training sees them."""
    root = tmp_path_factory.mktemp("data") / "shapes"
    write_shapes(root, ShapesConfig(image_size=64, num_images={"train": 6}))
    dataset = CocoInstances(root, "train")
    dataset.transform = instance_augmentation(64, (0.8, 1.2))
    return dataset
