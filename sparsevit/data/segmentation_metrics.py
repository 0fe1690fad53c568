"""Intersection over union of label maps, by Cityscapes' definition (arXiv 1604.01685, section 4.1).

Legend: H, W size of a label map; K classes.
"""

import torch
from torch import Tensor

from sparsevit.data.sample import IGNORED


def confusion_matrix(truth: Tensor, predicted: Tensor, num_classes: int) -> Tensor:
    """Count pixels by true and predicted class, without those whose truth is ignored: [K, K].

    Args:
        truth: [H, W] train ids, `IGNORED` where no class counts.
        predicted: [H, W] train ids.
    """
    counted = truth != IGNORED
    pairs = truth[counted].long() * num_classes + predicted[counted].long()
    return torch.bincount(pairs, minlength=num_classes**2).view(num_classes, num_classes)


def class_ious(confusion: Tensor) -> Tensor:
    """True positives over true positives, false positives and false negatives: [K].

    NaN for a class that is neither in the truth nor predicted.
    """
    hits = confusion.diagonal().double()
    return hits / (confusion.sum(0) + confusion.sum(1) - confusion.diagonal())


def mean_iou(ious: Tensor) -> float:
    """Mean over the classes that occur; 0 if none does."""
    return float(ious.nanmean().nan_to_num())
