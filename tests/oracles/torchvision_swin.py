"""torchvision's Swin as an oracle: its features after every stage, and weights that are no identity."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def randomize(model: nn.Module) -> nn.Module:
    """Norms and biases start as ones and zeros: too easy."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.ndim == 1:
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.data.add_(noise, alpha=0.1)
    return model.eval()


def torchvision_features(model: nn.Module, images: Tensor) -> list[Tensor]:
    """The last stage after its norm, the others after one that has no parameters."""
    features, x = [], images
    for index, layer in enumerate(model.get_submodule("features").children()):
        x = layer(x)
        if index % 2:
            features.append(x)
    return normed(features, model.get_submodule("norm"))


def normed(features: Sequence[Tensor], norm: nn.Module) -> list[Tensor]:
    """Channels-last maps of a classifier as a backbone gives them: the last by `norm`, channels first."""
    plain = [F.layer_norm(feature, feature.shape[-1:]) for feature in features[:-1]]
    return [feature.permute(0, 3, 1, 2) for feature in (*plain, norm(features[-1]))]
