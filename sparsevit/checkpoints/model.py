"""Weights of a whole model: everything, all but the class-dependent layers, or the backbone alone."""

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from sparsevit.backbone import SparseSwin
from sparsevit.checkpoints.backbone import plan_backbone
from sparsevit.checkpoints.files import CheckpointError, Weights, check_finite, mismatch_error
from sparsevit.checkpoints.foreign import Imported, without_common_prefix
from sparsevit.checkpoints.formats import RECOMPUTED

logger = logging.getLogger(__name__)
_IMAGE_CLASSIFIER = re.compile(
    r"(head|head\.fc|fc|classifier|norm|layernorm|swin\.layernorm)\.(weight|bias)|(.*\.)?mask_token"
)
"""What a Swin has of its training on images alone: after its last stage, and for masked patches."""


@dataclass(frozen=True)
class ModelReport:
    """What of a checkpoint was used.

    Attributes:
        format, backbone_format: how the file was recognised, and how its backbone was.
        uncovered: our tensors that kept their values.
        unused: names in the file that nothing was taken from.
        resized: our tables of relative positions that were resampled from another window size.
    """

    format: str
    backbone_format: str
    uncovered: tuple[str, ...]
    unused: tuple[str, ...]
    resized: tuple[str, ...]


def load_model_weights(
    model: nn.Module,
    backbone: SparseSwin,
    imported: Imported,
    *,
    class_layers: str,
    loads_classifier: bool = True,
    loads_heads: bool = True,
) -> ModelReport:
    """Load a checkpoint into a dense model, which keeps its weights on an error.

    The file may be one of a whole model, or one of a backbone alone, which leaves all else as it is.

    Args:
        class_layers: regular expression of the class-dependent parameters.
        loads_classifier: whether the class-dependent layers are taken from the file too; else they keep
            their values, whatever their shape there.
        loads_heads: whether anything but the backbone is.

    Raises:
        CheckpointError: if the file is unusable, of another model, of another number of classes, or of a
            whole model of which only the backbone is known here.
    """
    path, own = imported.path, model.state_dict()
    prefix = {id(module): name for name, module in model.named_modules()}[id(backbone)] + "."
    head = {name for name in own if not name.startswith(prefix)}
    weights = _with_head(imported.weights, head)
    is_whole = loads_heads and not head.isdisjoint(weights)
    of_classes = {name for name in head if re.search(class_layers, name)} if not loads_classifier else set()
    expected = head - of_classes if is_whole else set()
    if is_whole:
        _check_head(
            own, {n: v for n, v in weights.items() if n not in of_classes}, expected, class_layers, path
        )
    rest = {name: value for name, value in weights.items() if name not in head}
    plan = plan_backbone(backbone, rest, path)
    found = plan.report
    unused = tuple(name for name in found.left_over if not RECOMPUTED.search(name))
    if loads_heads:
        _require_used(unused, found.prefix, path, is_whole)
    check_finite({name: weights[name] for name in expected}, path)
    plan.load()
    if found.resized:
        logger.warning(
            "  %s has another window size: %d tables of relative positions were resampled, so the dense "
            "model is no longer quite the one that was trained; is there a backbone of that window size?",
            path, len(found.resized),
        )  # fmt: skip
    model.load_state_dict({name: weights[name] for name in expected}, strict=False)
    # A classifier of images has the norm of its last stage alone; a whole model has those that it uses.
    norms = set() if is_whole else {f"{prefix}{name}" for name in found.missing}
    uncovered = tuple(sorted((head - expected) | norms))
    return ModelReport(imported.format, found.format, uncovered, unused, found.resized)


def _with_head(weights: Weights, head: set[str]) -> Weights:
    """The weights without what stands before all names, where that makes them ours."""
    readings = list(without_common_prefix(weights))
    return next((each for each in readings if not head.isdisjoint(each)), weights)


def _require_used(unused: tuple[str, ...], prefix: str, path: Path, is_whole: bool) -> None:
    """Nothing that was trained is dropped without a word, but for what a backbone has of its own.

    Args:
        prefix: of the backbone's names.
    """
    dropped = [
        name
        for name in unused
        if not any(_IMAGE_CLASSIFIER.fullmatch(each) for each in (name, name.removeprefix(prefix)))
    ]
    if not dropped:
        return
    if is_whole:
        raise mismatch_error(
            f"{path} is a checkpoint of another model", unexpected=dropped, missing=[], wrong_shape=[]
        )
    raise CheckpointError(
        f"{path} holds more than a backbone, and {len(dropped)} of its tensors have no place in this model: "
        f"{', '.join(dropped[:5])}{' …' if len(dropped) > 5 else ''}. init_heads=random takes the backbone "
        "and trains all else anew"
    )


def _check_head(
    own: Mapping[str, Tensor], weights: Weights, expected: set[str], class_layers: str, path: Path
) -> None:
    """Everything but the backbone is there and has our shape."""
    missing = sorted(expected - weights.keys())
    differing = {name for name in expected & weights.keys() if own[name].shape != weights[name].shape}
    if not missing and differing and all(re.search(class_layers, name) for name in differing):
        name = min(sorted(differing), key=lambda each: own[each].numel())
        there, here = (each[name].shape[0] - 1 for each in (weights, own))  # one row is for "no class"
        raise CheckpointError(
            f"{path} was trained on {there} classes, but here are {here} ({name}). init_classifier=random "
            "loads all but the layers that depend on them"
        )
    if missing or differing:
        raise mismatch_error(
            f"{path} is a checkpoint of another model",
            unexpected=[],
            missing=missing,
            wrong_shape=sorted(differing),
        )
