"""Mask R-CNN (arXiv 1703.06870) on a sparse Swin: torchvision's parts, with conventions that are settings."""

from sparsevit.tasks.mask_rcnn.config import Conventions, MaskRCNNConfig, PhotoInput
from sparsevit.tasks.mask_rcnn.model import SparseMaskRCNN, SparsePyramid

__all__ = ["Conventions", "MaskRCNNConfig", "PhotoInput", "SparseMaskRCNN", "SparsePyramid"]
