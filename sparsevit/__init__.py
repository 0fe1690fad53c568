"""SparseViT: Swin backbones that skip the windows that matter least."""

from sparsevit.backbone import BACKBONES, SparseSwin, SwinConfig, create_backbone
from sparsevit.checkpoints import export_backbone_weights, load_backbone_weights
from sparsevit.export import load_exported
from sparsevit.sparsity import SparsitySpace, SparsityVector

__version__ = "0.1.0"

__all__ = [
    "BACKBONES",
    "SparseSwin",
    "SparsitySpace",
    "SparsityVector",
    "SwinConfig",
    "create_backbone",
    "export_backbone_weights",
    "load_backbone_weights",
    "load_exported",
]
