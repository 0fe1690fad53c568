"""A model over a data set: what every evaluation goes through."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from sparsevit.data.sample import collate
from sparsevit.data.split import DataSplit
from sparsevit.sparsity import SparsityVector


def predictions_of(
    model: nn.Module,
    dataset: DataSplit,
    sparsity: SparsityVector | None,
    *,
    batch_size: int,
    device: torch.device,
    on_batch: Callable[[int], None] = lambda num_images: None,
    beside_images: Callable[[Sequence[dict[str, Any]]], tuple[Any, ...]] = lambda targets: (),
) -> Iterator[tuple[dict[str, Any], Any]]:
    """Every sample's target and what the model predicts for it, in evaluation mode.

    The model takes a list of images, perhaps more, and gives a list of predictions.

    Args:
        beside_images: what else the model takes, from the targets of a batch.
    """
    was_training = model.training
    model.eval()
    for images, targets in DataLoader(dataset, batch_size, collate_fn=collate):
        inputs = to_inputs(images, device), *beside_images(targets)
        yield from zip(targets, model(*inputs, sparsity=sparsity), strict=True)
        on_batch(len(images))
    model.train(was_training)


def to_inputs(images: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """Images of a data set, uint8, as models take them: plain tensors in [0, 1] on the device."""
    return [image.to(device).as_subclass(Tensor) / 255 for image in images]
