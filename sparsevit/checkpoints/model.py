"""Weights of a whole model: everything, all but the class-dependent layers, or the backbone alone."""

import re
from pathlib import Path

from torch import nn

from sparsevit.backbone import SparseSwin
from sparsevit.checkpoints.backbone import load_backbone_weights
from sparsevit.checkpoints.files import mismatch_error, read_weights


def load_model_weights(
    model: nn.Module, backbone: SparseSwin, path: Path, *, class_layers: str
) -> tuple[str, ...]:
    """Load a checkpoint into a dense model and return the layers that it did not cover.

    A file of a whole model may differ in the layers whose shape depends on the number of classes;
    they keep their initial values. A file that holds a backbone alone leaves all else as it is.

    Args:
        class_layers: regular expression of the class-dependent parameters.

    Raises:
        CheckpointError: if the file is unusable or of another model.
    """
    weights = read_weights(path)
    own = model.state_dict()
    if not any(name in own for name in weights):
        load_backbone_weights(backbone, path)
        prefixes = {id(module): name for name, module in model.named_modules()}
        prefix = prefixes[id(backbone)] + "."
        return tuple(sorted(name for name in own if not name.startswith(prefix)))
    missing = sorted(own.keys() - weights.keys())
    unexpected = sorted(weights.keys() - own.keys())
    differing = sorted(name for name in own.keys() & weights.keys() if own[name].shape != weights[name].shape)
    foreign = [name for name in differing if not re.search(class_layers, name)]
    if missing or unexpected or foreign:
        raise mismatch_error(
            f"{path} is a checkpoint of another model",
            unexpected=unexpected,
            missing=missing,
            wrong_shape=foreign,
        )
    model.load_state_dict({name: weights[name] for name in own if name not in differing}, strict=False)
    return tuple(differing)
