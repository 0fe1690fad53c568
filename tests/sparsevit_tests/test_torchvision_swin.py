"""Dense Swin-T against torchvision's, at sizes that users have: seconds per test."""

import pytest
import torch
import torchvision
from torch import nn

from sparsevit import SparseSwin, create_backbone, load_backbone_weights
from tests.oracles.torchvision_swin import randomize, torchvision_features


@pytest.fixture(scope="module")
def swin_t_pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[SparseSwin, nn.Module]:
    """Our Swin-T and torchvision's, with the same random weights."""
    torch.manual_seed(0)
    theirs = randomize(torchvision.models.swin_t(weights=None))
    ours = create_backbone("swin_t").eval()
    path = tmp_path_factory.mktemp("swin_t") / "torchvision.pth"
    torch.save(theirs.state_dict(), path)
    load_backbone_weights(ours, path)
    return ours, theirs


@pytest.mark.parametrize("size", [(224, 224), (640, 640), (256, 704), (333, 517)])
def test_ratio_zero_equals_torchvision(
    swin_t_pair: tuple[SparseSwin, nn.Module], size: tuple[int, int]
) -> None:
    ours, theirs = swin_t_pair
    images = torch.randn(2 if size[0] < 300 else 1, 3, *size, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        expected = torchvision_features(theirs, images)
        for sparsity in (None, ours.space.dense):
            for mine, reference in zip(ours(images, sparsity), expected, strict=True):
                assert mine.shape == reference.shape
                assert (mine - reference).norm() / reference.norm() <= 1e-5
