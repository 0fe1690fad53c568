"""Which windows a forward pass computed, as pictures.

Legend: B images; h, w pixels of what the backbone got; H, W token grid of a stage.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparsevit.backbone import SparseSwin
from sparsevit.block import KeptWindows
from sparsevit.data.sample import IMAGE_MEAN, IMAGE_STD

DIMMED = 0.25
"""Brightness of a window that no block of a stage computed."""


@dataclass
class KeptWindowTrace:
    """What one forward pass did.

    Attributes:
        images: the normalised images that the backbone got, [B, 3, h, w].
        shares: for every stage, the share of its blocks that computed a token: [B, H, W].
        strides: pixels per token of every stage.
    """

    images: Tensor = field(default_factory=lambda: torch.empty(0))
    shares: list[Tensor] = field(default_factory=list)
    strides: tuple[int, ...] = ()

    def overlay(self, stage: int) -> Tensor:
        """The images, darkened where the blocks of a stage left windows out: [B, 3, h, w] uint8."""
        height, width = self.images.shape[-2:]
        mean, std = (self.images.new_tensor(values).view(3, 1, 1) for values in (IMAGE_MEAN, IMAGE_STD))
        share = F.interpolate(self.shares[stage][:, None], scale_factor=self.strides[stage], mode="nearest")
        # What is left of the last patch belongs to no token: it is shown like its neighbour.
        beyond = max(0, width - share.shape[-1]), max(0, height - share.shape[-2])
        share = F.pad(share, (0, beyond[0], 0, beyond[1]), mode="replicate")[..., :height, :width]
        pictures = (self.images * std + mean).clamp(0, 1) * (DIMMED + (1 - DIMMED) * share)
        return (255 * pictures).to(torch.uint8).cpu()


@contextmanager
def trace_kept_windows(backbone: SparseSwin) -> Iterator[KeptWindowTrace]:
    """Record the last forward pass of `backbone` inside the context."""
    trace = KeptWindowTrace(strides=backbone.strides)
    counts: list[Tensor] = []
    handles = [
        backbone.patch_embed.register_forward_pre_hook(partial(_begin, trace, counts)),
        *(stage.register_forward_pre_hook(partial(_begin_stage, counts)) for stage in backbone.stages),
        *(
            block.register_forward_pre_hook(partial(_count, counts))
            for stage in backbone.stages
            for block in stage.blocks  # type: ignore[union-attr]
        ),
    ]
    try:
        yield trace
    finally:
        for handle in handles:
            handle.remove()
    trace.shares = [count / depth for count, depth in zip(counts, backbone.depths, strict=False)]


def _begin(trace: KeptWindowTrace, counts: list[Tensor], module: nn.Module, inputs: tuple[Any, ...]) -> None:
    counts.clear()
    trace.images = inputs[0].detach().float()


def _begin_stage(counts: list[Tensor], module: nn.Module, inputs: tuple[Any, ...]) -> None:
    x_BHWC: Tensor = inputs[0]
    counts.append(torch.zeros(x_BHWC.shape[:3], device=x_BHWC.device))


def _count(counts: list[Tensor], module: nn.Module, inputs: tuple[Any, ...]) -> None:
    windows: KeptWindows = inputs[1]
    rows = windows.rows_PN.flatten()
    count_R = counts[-1].flatten()
    counts[-1] += (torch.bincount(rows, minlength=len(count_R))[: len(count_R)] > 0).view_as(counts[-1])
