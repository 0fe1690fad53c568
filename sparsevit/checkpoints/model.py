"""Weights of a whole model: everything, all but the class-dependent layers, or the backbone alone."""

import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor, nn

from sparsevit.backbone import SparseSwin
from sparsevit.checkpoints.backbone import LoadReport, load_named_weights
from sparsevit.checkpoints.files import CheckpointError, Weights, mismatch_error, read_weights

logger = logging.getLogger(__name__)


def load_model_weights(
    model: nn.Module,
    backbone: SparseSwin,
    path: Path,
    *,
    class_layers: str,
    foreign_names: Sequence[tuple[str, str]],
    loads_classifier: bool = True,
) -> tuple[str, ...]:
    """Load a checkpoint into a dense model and return the tensors that it did not cover.

    The file may be one of this project, one of another library whose names are ours but for
    `foreign_names` and the backbone, or one of a backbone alone, which leaves all else as it is.

    Args:
        class_layers: regular expression of the class-dependent parameters.
        foreign_names: regular expressions of names in other libraries, and what ours have instead; the
            first that is found counts.
        loads_classifier: whether the class-dependent layers are taken from the file too; else they keep
            their values, whatever their shape there.

    Raises:
        CheckpointError: if the file is unusable, of another model, or of another number of classes.
    """
    weights = {_ours(name, foreign_names): value for name, value in read_weights(path).items()}
    own = model.state_dict()
    prefix = {id(module): name for name, module in model.named_modules()}[id(backbone)] + "."
    head = {name for name in own if not name.startswith(prefix)}
    if head.isdisjoint(weights):
        _warn_if_resized(load_named_weights(backbone, weights, path), path)
        return tuple(sorted(head))
    of_classes = {name for name in head if re.search(class_layers, name)}
    if not loads_classifier:
        weights = {name: value for name, value in weights.items() if name not in of_classes}
    expected = head - (set() if loads_classifier else of_classes)
    _check_head(own, weights, expected, of_classes, path)
    rest = {name: value for name, value in weights.items() if name not in head}
    _check_is_backbone(rest, prefix, own, path)
    _warn_if_resized(load_named_weights(backbone, rest, path), path)
    model.load_state_dict({name: weights[name] for name in expected}, strict=False)
    return tuple(sorted(head - expected))


def _check_head(
    own: Mapping[str, Tensor], weights: Weights, expected: set[str], of_classes: set[str], path: Path
) -> None:
    """Everything but the backbone is there and has our shape."""
    missing = sorted(expected - weights.keys())
    differing = {name for name in expected & weights.keys() if own[name].shape != weights[name].shape}
    if not missing and differing and differing <= of_classes:
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


def _warn_if_resized(report: LoadReport, path: Path) -> None:
    if report.resized:
        logger.warning(
            "  %s has another window size: %d tables of relative positions were resampled, so the dense "
            "model is no longer quite the one that was trained; is there a backbone of that window size?",
            path, len(report.resized),
        )  # fmt: skip


def _check_is_backbone(rest: Weights, prefix: str, own: Mapping[str, Tensor], path: Path) -> None:
    """In a file of our own names, nothing but the backbone is left."""
    if any(name.startswith(prefix) and name in own for name in rest):
        unexpected = sorted(name for name in rest if not name.startswith(prefix))
        if unexpected:
            raise mismatch_error(
                f"{path} is a checkpoint of another model", unexpected=unexpected, missing=[], wrong_shape=[]
            )


def _ours(name: str, foreign_names: Sequence[tuple[str, str]]) -> str:
    renamed = (re.subn(theirs, ours, name) for theirs, ours in foreign_names)
    return next((new for new, count in renamed if count), name)
