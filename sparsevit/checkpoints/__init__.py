"""Weights in and out: files that other people wrote, and our own."""

from sparsevit.checkpoints.backbone import export_backbone_weights, load_backbone_weights
from sparsevit.checkpoints.files import CheckpointError, read_weights, write_weights
from sparsevit.checkpoints.foreign import Imported, import_checkpoint
from sparsevit.checkpoints.model import ModelReport, load_model_weights

__all__ = [
    "CheckpointError",
    "Imported",
    "ModelReport",
    "export_backbone_weights",
    "import_checkpoint",
    "load_backbone_weights",
    "load_model_weights",
    "read_weights",
    "write_weights",
]
