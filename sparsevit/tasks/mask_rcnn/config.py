"""Settings of a Mask R-CNN: widths, how a photo becomes an input, what weights were trained with."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

PASTINGS = ("float", "integer")
RESIZES = ("float", "uint8")


def _one_of(name: str, value: Any, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")


@dataclass(frozen=True)
class PhotoInput:
    """How a photo becomes an input: resized, normalised, padded with zeros at the bottom and right.

    Attributes:
        longest_side, shortest_side: pixels that the sides of a photo are resized to fit, its ratio kept.
        fixed_size: height and width that every photo is resized to instead, its ratio not kept.
        divisor: both sides are padded to a multiple of it; `longest_side` makes every input a square.
        resize: bilinear in ``float``, or in ``uint8`` with OpenCV's fixed-point arithmetic, as mmdet does.
    """

    longest_side: int
    shortest_side: int
    fixed_size: tuple[int, int] | None = None
    divisor: int = 32
    resize: str = "float"

    def __post_init__(self) -> None:
        if self.fixed_size is not None:
            object.__setattr__(self, "fixed_size", tuple(self.fixed_size))
            if len(self.fixed_size) != 2:
                raise ValueError(f"fixed_size is height and width, got {list(self.fixed_size)}")
        sides = (self.longest_side, self.shortest_side, self.divisor, *(self.fixed_size or ()))
        is_whole = all(isinstance(side, int) and side >= 1 for side in sides)
        if not is_whole or self.shortest_side > self.longest_side:
            raise ValueError(
                "longest_side, shortest_side, fixed_size and divisor must be whole numbers from 1, the "
                f"shortest no longer than the longest, got {self}"
            )
        _one_of("resize", self.resize, RESIZES)

    def size_of(self, height: int, width: int) -> tuple[int, int]:
        """Height and width that a photo is resized to, rounded half up."""
        if self.fixed_size is not None:
            return self.fixed_size
        scale = min(self.longest_side / max(height, width), self.shortest_side / min(height, width))
        return max(1, int(height * scale + 0.5)), max(1, int(width * scale + 0.5))

    def padded(self, height: int, width: int) -> tuple[int, int]:
        """The size of the input, given that of the resized photo."""
        return -(-height // self.divisor) * self.divisor, -(-width // self.divisor) * self.divisor

    def __str__(self) -> str:
        if self.fixed_size is not None:
            return f"exactly {self.fixed_size[1]}×{self.fixed_size[0]} pixels"
        return (
            f"within {self.longest_side}×{self.shortest_side} pixels, padded to multiples of {self.divisor}"
        )


@dataclass(frozen=True)
class Conventions:
    """What weights were trained with, and are only right with. The defaults are ours.

    Attributes:
        roi_aligned: whether RoIAlign takes pixel centres at half a pixel (mmdet, Detectron2) or leaves
            regions half a pixel off (torchvision).
        roi_sampling_ratio: samples per bin and axis; 0 for as many as a bin has cells.
        rounded_anchors: whether the sides of anchors are rounded to whole pixels (torchvision).
        anchor_strides: pixels between the anchors of every level of the pyramid.
        anchor_ratios: height over width of the anchors at a place.
        proposal_weights, box_weights: by which the offsets of proposals and boxes are divided: the
            reciprocals of their standard deviations.
        mask_pasting: a mask is sampled onto its ``float`` box, or onto one of ``integer`` corners
            (torchvision).
    """

    roi_aligned: bool = True
    roi_sampling_ratio: int = 2
    rounded_anchors: bool = False
    anchor_strides: tuple[int, ...] = (4, 8, 16, 32, 64)
    anchor_ratios: tuple[float, ...] = (0.5, 1.0, 2.0)
    proposal_weights: tuple[float, ...] = (1.0, 1.0, 1.0, 1.0)
    box_weights: tuple[float, ...] = (10.0, 10.0, 5.0, 5.0)
    mask_pasting: str = "float"

    def __post_init__(self) -> None:
        for name in ("anchor_strides", "anchor_ratios", "proposal_weights", "box_weights"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
            if not getattr(self, name) or min(getattr(self, name)) <= 0:
                raise ValueError(f"{name} must be positive numbers, got {list(getattr(self, name))}")
        for name in ("proposal_weights", "box_weights"):
            if len(getattr(self, name)) != 4:
                raise ValueError(f"{name} are of x, y, width and height, got {list(getattr(self, name))}")
        if self.roi_sampling_ratio < 0:
            raise ValueError(f"roi_sampling_ratio must be at least 0, got {self.roi_sampling_ratio}")
        _one_of("mask_pasting", self.mask_pasting, PASTINGS)


@dataclass(frozen=True)
class MaskRCNNConfig:
    """Widths, sampling and conventions of the detector. The defaults are those of the paper's recipe.

    Attributes:
        image_size: side of the square that training crops have.
        scale_range: of the random resize in training, relative to that square.
        num_proposals: that are left after their non-maximum suppression, of every image.
        num_proposals_per_level: that go into it, of every level of the pyramid; as many if None.
        proposal_overlap, detection_overlap: IoU above which the weaker of two proposals of a level, and of
            two detections of a class, goes.
        score_threshold: that a detection must exceed.
        mask_threshold: probability from which a pixel belongs to a mask.
        input: of evaluation and use; if None, photos are resized to fit the training square, and padded to
            it.
    """

    num_classes: int
    image_size: int = 672
    scale_range: tuple[float, float] = (0.5, 1.5)
    fpn_channels: int = 256
    box_channels: int = 1024
    mask_channels: int = 256
    smallest_anchor: int = 32
    num_proposals: int = 1000
    num_proposals_per_level: int | None = None
    num_rois_per_image: int = 512
    num_detections: int = 100
    proposal_overlap: float = 0.7
    detection_overlap: float = 0.5
    score_threshold: float = 0.05
    mask_threshold: float = 0.5
    input: PhotoInput | None = None
    conventions: Conventions = Conventions()

    def __post_init__(self) -> None:
        object.__setattr__(self, "scale_range", tuple(self.scale_range))
        if isinstance(self.input, Mapping):
            object.__setattr__(self, "input", PhotoInput(**self.input))
        if isinstance(self.conventions, Mapping):
            object.__setattr__(self, "conventions", Conventions(**self.conventions))
        for each in fields(self):
            value = getattr(self, each.name)
            is_optional = each.type == int | None
            if (each.type is int or (is_optional and value is not None)) and (
                not isinstance(value, int) or value < 1
            ):
                raise ValueError(f"{each.name} must be a whole number of at least 1, got {value!r}")
        for name in ("proposal_overlap", "detection_overlap", "score_threshold", "mask_threshold"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be between 0 and 1, got {getattr(self, name)}")

        if self.mask_threshold == 0:
            raise ValueError("mask_threshold must be above 0: every pixel has a probability of at least 0")

    @property
    def photo_input(self) -> PhotoInput:
        """How a photo becomes an input, a square if nothing else was said."""
        return self.input or PhotoInput(self.image_size, self.image_size, divisor=self.image_size)
