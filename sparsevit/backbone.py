"""SparseSwin: a Swin Transformer whose stages run on the windows that matter.

Swin: arXiv 2103.14030. SparseViT: arXiv 2303.17605. At ratio 0 it equals dense Swin at every
input size (padding after LN1, odd grids padded before merging, no shift on an axis that a single
window covers).

Legend: B images; H, W token grid; L = H · W; C channels.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Self, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparsevit.block import KeptWindows, SwinBlock
from sparsevit.inference import compute_dtype, is_bare, is_bare_norm, is_gpu_inference, on_device
from sparsevit.linear import linear
from sparsevit.parts import apply_in_parts
from sparsevit.scoring import Score, find_score, rank_windows, score_tokens, select_windows
from sparsevit.sparsity import SparsitySpace, SparsityVector, check_fits
from sparsevit.windows import BlockPlan, StagePlan, plan_stage

if TYPE_CHECKING:
    from sparsevit.specialized import SpecializedSwin

Pruned = Literal["identity", "zero"]


@dataclass(frozen=True)
class SwinConfig:
    """Shape of a Swin: channels of the first stage, blocks and heads per stage, window size."""

    embed_dim: int
    depths: tuple[int, ...]
    num_heads: tuple[int, ...]
    window_size: int = 7
    patch_size: int = 4
    mlp_ratio: float = 4.0


BACKBONES = {
    "swin_nano": SwinConfig(32, (2, 2, 6, 2), (1, 2, 4, 8), window_size=4),
    "swin_t": SwinConfig(96, (2, 2, 6, 2), (3, 6, 12, 24)),
    "swin_s": SwinConfig(96, (2, 2, 18, 2), (3, 6, 12, 24)),
    "swin_b": SwinConfig(128, (2, 2, 18, 2), (4, 8, 16, 32)),
    "swin_l": SwinConfig(192, (2, 2, 18, 2), (6, 12, 24, 48)),
    "swin_b_window12": SwinConfig(128, (2, 2, 18, 2), (4, 8, 16, 32), window_size=12),
    "swin_l_window12": SwinConfig(192, (2, 2, 18, 2), (6, 12, 24, 48), window_size=12),
}


@dataclass(frozen=True)
class FeatureInfo:
    """A feature map that the backbone returns: its channels, and input pixels per pixel of it."""

    num_channels: int
    stride: int


class PatchEmbedding(nn.Module):
    """Cut the image into patches and embed them: [B, 3, h, w] to tokens [B, H, W, C]."""

    def __init__(self, channels: int, patch_size: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, channels, kernel_size=patch_size, stride=patch_size)
        self.norm = nn.LayerNorm(channels)

    def forward(self, images: Tensor) -> Tensor:
        patch_size = self.proj.kernel_size[0]
        dtype = compute_dtype(images)
        is_plain = is_bare(self.proj, nn.Conv2d) and is_bare_norm(self.norm)
        if is_plain and is_gpu_inference(images.device, dtype):
            from sparsevit import gpu_kernels

            if gpu_kernels.fits_patches(self.proj):
                return gpu_kernels.embed_patches(images, self.proj, self.norm, dtype, _norm_dtype(images))
        images = images[:, :, : images.shape[2] // patch_size * patch_size]
        return apply_in_parts(self._embed, images, dim=2, multiple=patch_size)

    def _embed(self, images: Tensor) -> Tensor:
        images = images.contiguous(memory_format=torch.channels_last)  # so that tokens come out whole
        x_BHWC: Tensor = self.norm(self.proj(images).permute(0, 2, 3, 1))
        return x_BHWC


class PatchMerging(nn.Module):
    """Join 2 × 2 tokens into one of twice the channels; odd grids are padded first."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4 * channels)
        self.reduction = nn.Linear(4 * channels, 2 * channels, bias=False)

    def forward(self, x_BHWC: Tensor) -> Tensor:
        dtype = compute_dtype(x_BHWC)
        if is_bare_norm(self.norm) and is_gpu_inference(x_BHWC.device, dtype):
            from sparsevit import gpu_kernels

            return linear(gpu_kernels.merge_corners(x_BHWC, self.norm, dtype), self.reduction)
        return apply_in_parts(self._merge, x_BHWC, dim=1, multiple=2)

    def _merge(self, x_BHWC: Tensor) -> Tensor:
        height, width = x_BHWC.shape[1:3]
        if height % 2 or width % 2:
            x_BHWC = F.pad(x_BHWC, (0, 0, 0, width % 2, 0, height % 2))
        corners = [x_BHWC[:, row::2, column::2] for column in (0, 1) for row in (0, 1)]
        return linear(self.norm(torch.cat(corners, dim=-1)), self.reduction)


class SparseStage(nn.Module):
    """Blocks on one token grid. Scores are taken once, where the first pruned block begins."""

    def __init__(
        self, blocks: Sequence[SwinBlock], window_size: int, *, score: Score, pruned: Pruned
    ) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.window_size = window_size
        self.score = score
        self.pruned = pruned

    def forward(self, x_BHWC: Tensor, plan: StagePlan) -> Tensor:
        """Run every block on the windows that the plan keeps.

        Args:
            x_BHWC: tokens; this buffer is overwritten.
            plan: one entry per block, for this grid.
        """
        num_images, height, width, channels = x_BHWC.shape
        x_RC = x_BHWC.reshape(-1, channels)
        is_on_gpu = is_gpu_inference(x_RC.device, compute_dtype(x_RC)) and all(
            block.takes_kernels()  # type: ignore[operator]
            for block in self.blocks
        )
        is_padded = height % self.window_size > 0 or width % self.window_size > 0
        if is_padded and not (is_on_gpu and self.pruned == "identity"):  # those kernels leave padding alone
            x_RC = torch.cat((x_RC, x_RC.new_zeros(1, channels)))  # the sink row of the padding
        num_rows = num_images * height * width
        scores_BL: Tensor | None = None
        rankings: dict[int, Tensor] = {}
        kept: dict[tuple[int, int | None], KeptWindows] = {}
        for block, step in zip(self.blocks, plan, strict=True):
            if step.num_kept is not None and scores_BL is None:
                tokens_BLC = x_RC[:num_rows].view(num_images, -1, channels)
                scores_BL = score_tokens(tokens_BLC, self.score)
            key = id(step.grid), step.num_kept
            if key not in kept:
                kept[key] = _keep(step, scores_BL, rankings, num_images, is_on_gpu)
            windows = kept[key]
            x_RC = block(x_RC, windows, is_on_gpu)
            if step.num_kept is not None and self.pruned == "zero":
                is_kept_R1 = x_RC.new_zeros(len(x_RC), 1).index_fill_(0, windows.rows_PN.flatten(), 1.0)
                x_RC = x_RC * is_kept_R1
        return x_RC[:num_rows].view(num_images, height, width, channels)


def _keep(
    step: BlockPlan, scores_BL: Tensor | None, rankings: dict[int, Tensor], num_images: int, is_on_gpu: bool
) -> KeptWindows:
    """The windows that a block computes, by the scores of its stage's tokens.

    Args:
        rankings: of the windows of grids that have been ranked, by the identity of the grid.
    """
    if step.num_kept is None or scores_BL is None:
        return KeptWindows.gather(step.grid, None, num_images)
    if is_on_gpu:
        return KeptWindows.select_on_gpu(step.grid, scores_BL, step.num_kept, num_images)
    if id(step.grid) not in rankings:
        rankings[id(step.grid)] = rank_windows(scores_BL, step.grid)
    kept_BK = select_windows(rankings[id(step.grid)], step.num_kept)
    return KeptWindows.gather(step.grid, kept_BK, num_images)


class SparseSwin(nn.Module):
    """Swin backbone for dense prediction, at any sparsity.

    Args:
        config: shape of the network.
        drop_path_rate: stochastic depth of the last block in training; it grows linearly from 0.
        score: what makes a window important: ``mean_abs`` (as released), ``l2`` (as in the paper's
            text), ``random`` (for ablations), or a function from tokens [B, L, C] to [B, L].
        pruned: what a pruned window keeps: ``identity`` leaves it as it is (the paper), ``zero``
            clears it.
        frozen_stages: 0 freezes the patch embedding, n also the first n stages with their norms;
            -1 nothing. Frozen parts need no gradient and stay in evaluation mode.
        checkpoints: in training, keep each block's input alone and compute the rest again in the
            backward pass: less memory for about a quarter more time.

    Attributes:
        num_channels: channels of every stage's output.
        strides: input pixels per output pixel, for every stage.

    Raises:
        ValueError: for an unknown choice or a number out of range, naming what is possible.
    """

    def __init__(
        self,
        config: SwinConfig,
        drop_path_rate: float = 0.0,
        *,
        score: str | Score = "mean_abs",
        pruned: Pruned = "identity",
        frozen_stages: int = -1,
        checkpoints: bool = False,
    ) -> None:
        super().__init__()
        if not 0.0 <= drop_path_rate < 1.0:
            raise ValueError(f"drop_path_rate lies in [0, 1), got {drop_path_rate}")
        if pruned not in get_args(Pruned):
            raise ValueError(f"unknown {pruned=}; choose one of {', '.join(get_args(Pruned))}")
        if not -1 <= frozen_stages <= len(config.depths):
            raise ValueError(f"frozen_stages lies in -1 … {len(config.depths)}, got {frozen_stages}")
        self.config = config
        self.depths = config.depths
        self.frozen_stages = frozen_stages
        self.num_channels = tuple(config.embed_dim * 2**stage for stage in range(len(config.depths)))
        self.strides = tuple(config.patch_size * 2**stage for stage in range(len(config.depths)))
        last = sum(config.depths) - 1
        drop_path_rates = (drop_path_rate * block / max(1, last) for block in range(last + 1))
        self.patch_embed = PatchEmbedding(config.embed_dim, config.patch_size)
        self.stages = nn.ModuleList(
            SparseStage(
                [
                    SwinBlock(
                        channels, num_heads, config.window_size, config.mlp_ratio, next(drop_path_rates),
                        checkpoints=checkpoints,
                    )
                    for _ in range(depth)
                ],
                config.window_size,
                score=find_score(score),
                pruned=pruned,
            )
            for channels, depth, num_heads in zip(
                self.num_channels, config.depths, config.num_heads, strict=True
            )
        )  # fmt: skip
        self.downsamples = nn.ModuleList(PatchMerging(channels) for channels in self.num_channels[:-1])
        self.norms = nn.ModuleList(nn.LayerNorm(channels) for channels in self.num_channels)
        self.apply(_initialize)
        for module in self._frozen():
            module.requires_grad_(False)

    @property
    def feature_info(self) -> tuple[FeatureInfo, ...]:
        """What a neck needs to know of every feature map, highest resolution first."""
        return tuple(map(FeatureInfo, self.num_channels, self.strides))

    def train(self, mode: bool = True) -> Self:
        """As in every module, but what is frozen stays in evaluation mode."""
        super().train(mode)
        for module in self._frozen():
            module.eval()
        return self

    def _frozen(self) -> list[nn.Module]:
        """The modules that are not trained; a merging is frozen with the stage that it leads to."""
        if self.frozen_stages < 0:
            return []
        count = self.frozen_stages
        merging = self.downsamples[: max(0, count - 1)]
        return [self.patch_embed, *self.stages[:count], *self.norms[:count], *merging]

    @property
    def space(self) -> SparsitySpace:
        """All vectors of this backbone over the published choices 0, 0.1 … 0.8."""
        return SparsitySpace(self.depths)

    def forward(self, images: Tensor, sparsity: SparsityVector | None = None) -> list[Tensor]:
        """Compute one feature map per stage, after its norm.

        Images do not influence each other. Non-finite pixels are not looked for: they spread through
        the features of their own image.

        Args:
            images: [B, 3, h, w], floating point, at least one patch in each direction; what is left
                of the last patch is cut off.
            sparsity: ratios per pair of blocks; dense if None.

        Returns:
            [B, C, H, W] per stage, channels last in memory.

        Raises:
            ValueError: if the images have another shape or dtype, or the vector does not fit the
                depths of this backbone.
        """
        self._check(images)
        if sparsity is None:
            sparsity = self.space.dense
        return self.run(images, self.plan(sparsity, (images.shape[2], images.shape[3]), images.device))

    def plan(
        self, sparsity: SparsityVector, image_size: tuple[int, int], device: torch.device
    ) -> tuple[StagePlan, ...]:
        """What every block does at a vector and an input size.

        Raises:
            ValueError: if the vector does not fit the depths of this backbone, or the size is smaller
                than a patch.
        """
        check_fits(sparsity, self.depths)
        patch = self.config.patch_size
        if min(image_size) < patch:
            raise ValueError(
                f"an image of {image_size[0]}×{image_size[1]} pixels is smaller than a patch of "
                f"{patch}×{patch}"
            )
        height, width = (size // patch for size in image_size)
        plans = []
        for depth, ratios in zip(self.depths, self.space.split(sparsity.ratios), strict=True):
            per_block = [ratios[block // 2] for block in range(depth)]
            plans.append(plan_stage((height, width), self.config.window_size, per_block, device))
            height, width = -(-height // 2), -(-width // 2)
        return tuple(plans)

    def run(self, images: Tensor, plans: Sequence[StagePlan]) -> list[Tensor]:
        """`forward` by plans that were made for these images' size and device."""
        features = []
        with on_device(images.device):
            x_BHWC = self.patch_embed(images)
            for index, plan in enumerate(plans):
                x_BHWC = self.stages[index](x_BHWC, plan)
                features.append(self._normalize(x_BHWC, index).permute(0, 3, 1, 2))
                if index < len(self.downsamples):
                    x_BHWC = self.downsamples[index](x_BHWC)
        return features

    def _normalize(self, x_BHWC: Tensor, stage: int) -> Tensor:
        norm: nn.LayerNorm = self.norms[stage]  # type: ignore[assignment]
        if not (is_bare_norm(norm) and is_gpu_inference(x_BHWC.device, compute_dtype(x_BHWC))):
            out: Tensor = norm(x_BHWC)
            return out
        from sparsevit import gpu_kernels

        return gpu_kernels.normalize(x_BHWC, norm, _norm_dtype(x_BHWC))

    def specialize(self, sparsity: SparsityVector, image_size: tuple[int, int]) -> "SpecializedSwin":
        """The vector made permanent: a module of static shapes for compilers and exporters.

        Raises:
            ValueError: if the vector does not fit, or the size is smaller than a patch.
        """
        from sparsevit.specialized import SpecializedSwin

        return SpecializedSwin(self, sparsity, image_size)

    def _check(self, images: Tensor) -> None:
        if images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(f"images are a batch [B, 3, h, w], got the shape {list(images.shape)}")
        if not images.is_floating_point():
            raise ValueError(f"images are floating point and normalised, got {images.dtype}")
        if images.shape[0] == 0:
            raise ValueError("the batch holds no image")


def create_backbone(
    name: str,
    *,
    drop_path_rate: float = 0.0,
    score: str | Score = "mean_abs",
    pruned: Pruned = "identity",
    frozen_stages: int = -1,
    checkpoints: bool = False,
) -> SparseSwin:
    """Build a backbone by name, randomly initialised. The options are those of `SparseSwin`.

    Raises:
        ValueError: for an unknown name, listing the known ones.
    """
    if name not in BACKBONES:
        raise ValueError(f"unknown backbone {name!r}; choose one of {', '.join(BACKBONES)}")
    return SparseSwin(
        BACKBONES[name],
        drop_path_rate,
        score=score,
        pruned=pruned,
        frozen_stages=frozen_stages,
        checkpoints=checkpoints,
    )


def _norm_dtype(x: Tensor) -> torch.dtype:
    """What LayerNorm returns of `x`: float32 under autocast."""
    return torch.float32 if torch.is_autocast_enabled(x.device.type) else x.dtype


def _initialize(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
