"""How mmdet made an input of a photo: read from the pipeline of transforms in a configuration.

Every transform must be one that is known to leave photos as they are, or to do what `PhotoInput` does: a file
that was tested on other inputs would predict other things here.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from sparsevit.checkpoints.files import CheckpointError
from sparsevit.data.sample import IMAGE_MEAN, IMAGE_STD
from sparsevit.tasks.mask_rcnn.config import PhotoInput

_WITHOUT_EFFECT = {
    "LoadImageFromFile", "LoadAnnotations", "PackDetInputs", "DefaultFormatBundle", "ImageToTensor",
    "Collect", "RandomFlip", "MultiScaleFlipAug",
}  # fmt: skip
"""In testing. `RandomFlip` flips there only inside of `MultiScaleFlipAug`, which says so itself."""
_RESIZE_OPTIONS = {"backend": "cv2", "interpolation": "bilinear"}
"""Arguments of ``Resize`` that matter beside the size, as they are done here."""
_COLOURS = {
    name: [255 * share for share in shares] for name, shares in (("mean", IMAGE_MEAN), ("std", IMAGE_STD))
}


def at(node: Any, *keys: str) -> Any:
    """What stands at a path of keys; None where one is missing. Of a list, its first entry."""
    for key in keys:
        if isinstance(node, list):
            node = node[0] if node else None
        node = node.get(key) if isinstance(node, Mapping) else None
    return node


def kind(node: Any) -> str | None:
    """The class that a section names, without the scope or module before it."""
    name = at(node, "type")
    return None if name is None else str(name).rpartition(".")[2]


def photo_input(settings: Mapping[str, Any], path: Path) -> PhotoInput | None:
    """The input that a configuration tested on; None if it has no pipeline.

    Raises:
        CheckpointError: naming a transform that is not done here.
    """
    steps = list(_steps(_test_pipeline(settings)))
    if not steps:
        return None
    resize: Mapping[str, Any] = {}
    preprocessing = at(settings, "model", "data_preprocessor")  # of mmdet 3; a step of the pipeline in 2
    divisor = preprocessing.get("pad_size_divisor", 1) if preprocessing else 32
    for step in steps:
        name = kind(step)
        if name == "Resize" and not resize:
            resize = step
        elif name == "Normalize":
            _require(step, {**_COLOURS, "to_rgb": True}, path)
            divisor = 1
        elif name == "Pad" and divisor == 1 and not preprocessing and step.get("size_divisor"):
            _require(step, {"pad_to_square": False, "pad_val": 0}, path)
            divisor = step["size_divisor"]
        elif name == "MultiScaleFlipAug" and step.get("flip"):
            raise _refused(path, f"{name}(flip={step['flip']})")
        elif name not in _WITHOUT_EFFECT:
            raise _refused(path, f"{name}({', '.join(f'{k}={v}' for k, v in step.items() if k != 'type')})")
    outer = next((step for step in steps if kind(step) == "MultiScaleFlipAug"), {})
    width, height = _size(resize, outer, path)
    _require(resize, _RESIZE_OPTIONS, path)
    keeps_ratio = resize.get("keep_ratio", "scale" not in resize)  # the default of mmdet 2, and of 3
    return PhotoInput(
        longest_side=max(width, height),
        shortest_side=min(width, height),
        fixed_size=None if keeps_ratio else (height, width),
        divisor=divisor,
        resize="uint8",
    )


def _test_pipeline(settings: Mapping[str, Any]) -> Any:
    """What mmdet's test tools use: of the data set, however it is wrapped; or else of that name."""
    for dataset in (at(settings, "test_dataloader", "dataset"), at(settings, "data", "test")):
        while dataset is not None:
            if at(dataset, "pipeline"):
                return at(dataset, "pipeline")
            dataset = at(dataset, "dataset") or at(dataset, "datasets")
    return settings.get("test_pipeline")


def _steps(pipeline: Any) -> Iterator[dict[str, Any]]:
    """The steps of a pipeline, also those inside others."""
    for step in pipeline if isinstance(pipeline, list) else []:
        if isinstance(step, dict):
            yield step
            yield from _steps(step.get("transforms"))


def _size(resize: Mapping[str, Any], outer: Mapping[str, Any], path: Path) -> tuple[int, int]:
    """Width and height that photos were resized to, or to fit."""
    if not resize:
        raise _refused(path, "no Resize")
    scale = resize.get("scale") or resize.get("img_scale") or outer.get("img_scale")
    if isinstance(scale, list) and len(scale) == 1 and isinstance(scale[0], list):
        scale = scale[0]
    if isinstance(scale, int):
        scale = [scale, scale]
    if not isinstance(scale, list) or len(scale) != 2 or not all(isinstance(side, int) for side in scale):
        wanted = scale if scale is not None else dict(resize)
        raise _refused(path, f"photos resized by {wanted!r}")
    return scale[0], scale[1]


def _require(step: Mapping[str, Any], known: Mapping[str, Any], path: Path) -> None:
    """The arguments of a step that are listed have their values, where they are given."""
    for name, usual in known.items():
        found = step.get(name)
        if isinstance(found, dict):  # padding by what is padded
            found = found.get("img")
        if found is not None and not _is_usual(found, usual):
            raise _refused(path, f"{kind(step)}({name}={found})")


def _is_usual(found: Any, usual: Any) -> bool:
    if isinstance(usual, list):
        is_list = isinstance(found, list) and len(found) == len(usual)
        return is_list and all(abs(one - other) < 1e-2 for one, other in zip(found, usual, strict=True))
    return all(each == usual for each in found) if isinstance(found, list) else bool(found == usual)


def _refused(path: Path, what: str) -> CheckpointError:
    return CheckpointError(
        f"{path} was tested with {what}; here photos are resized bilinearly to fit a longest and a shortest "
        "side, or to a width and height, normalised, and padded with zeros to multiples of a divisor. "
        "init_heads=random takes its backbone alone"
    )
