"""transformers' Mask2Former on a sparse Swin (arXiv 2112.01527).

Pixel decoder, transformer decoder and losses are the library's; the sparsity vector is an argument of
`forward`, never state.

Legend: B images; h, w size of a padded batch, H, W of one image; Q queries; K classes.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Mask2FormerConfig as LibraryConfig
from transformers import Mask2FormerForUniversalSegmentation, SwinConfig

from sparsevit.backbone import SparseSwin
from sparsevit.checkpoints.detectron2_mask2former import Detectron2Mask2Former
from sparsevit.checkpoints.foreign import Renamed
from sparsevit.data.sample import IGNORED, IMAGE_MEAN, IMAGE_STD
from sparsevit.sparsity import SparsityVector

SIZE_DIVISOR = 32
"""Images are padded at the bottom and right to multiples of it, as the library's processor does."""
NUM_NORM_GROUPS = 32
"""Of the pixel decoder's group norms."""
FOREIGN_FORMATS = (
    Detectron2Mask2Former(),
    Renamed(
        "transformers",
        (
            (r"^model\.pixel_level_module\.decoder\.", "pixel_decoder."),
            (r"^model\.transformer_module\.", "transformer."),
        ),
    ),
)
"""Detectron2's, and transformers', which has some of our tensors under another name."""


@dataclass(frozen=True)
class Mask2FormerConfig:
    """Widths and sampling. The defaults are those of the published models for Cityscapes.

    Attributes:
        crop_size: height and width of a training crop.
        scale_range: of the random resize before the crop.
        decoder_layers: of the transformer decoder.
        num_points: at which the mask losses are sampled.
    """

    num_classes: int
    crop_size: tuple[int, int] = (512, 1024)
    scale_range: tuple[float, float] = (0.5, 2.0)
    feature_channels: int = 256
    hidden_channels: int = 2048
    encoder_hidden_channels: int = 1024
    encoder_layers: int = 6
    decoder_layers: int = 9
    num_heads: int = 8
    num_queries: int = 100
    num_points: int = 12544

    def __post_init__(self) -> None:
        low, high = self.scale_range if len(self.scale_range) == 2 else (0.0, 0.0)
        if len(self.crop_size) != 2 or min(self.crop_size) < SIZE_DIVISOR:
            raise ValueError(
                f"crop_size is height and width, at least {SIZE_DIVISOR} each, got {list(self.crop_size)}"
            )
        if not 0 < low <= high:
            raise ValueError(
                f"scale_range is a lower and an upper factor above 0, got {list(self.scale_range)}"
            )
        if self.feature_channels % NUM_NORM_GROUPS or self.feature_channels % max(1, self.num_heads):
            raise ValueError(
                f"feature_channels must be a multiple of {NUM_NORM_GROUPS} and of num_heads, got "
                f"{self.feature_channels} and {self.num_heads}"
            )
        for name in (
            "num_classes", "feature_channels", "hidden_channels", "encoder_hidden_channels", "encoder_layers",
            "decoder_layers", "num_heads", "num_queries", "num_points",
        ):  # fmt: skip
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")


class SparseMask2Former(nn.Module):
    """Semantic segmentation by masks that have a class."""

    def __init__(self, backbone: SparseSwin, config: Mask2FormerConfig) -> None:
        super().__init__()
        parts = Mask2FormerForUniversalSegmentation(_library_config(backbone, config))
        self.num_classes = config.num_classes
        self.backbone = backbone
        self.pixel_decoder = parts.model.pixel_level_module.decoder
        self.transformer = parts.model.transformer_module
        self.class_predictor = parts.class_predictor
        self.criterion = parts.criterion
        self.loss_weights: dict[str, float] = parts.weight_dict

    def forward(
        self,
        images: list[Tensor],
        labels: list[Tensor] | None = None,
        sparsity: SparsityVector | None = None,
    ) -> dict[str, Tensor] | list[Tensor]:
        """Losses by name in training mode, one label map [H, W] per image otherwise.

        Args:
            images: [3, H, W] each, in [0, 1].
            labels: [H, W] train ids each, 255 where nothing is learnt; needed in training.
            sparsity: for the backbone; dense if None.
        """
        if not self.training:
            return self._predict(images, sparsity)
        assert labels is not None
        batch, _ = self.to_batch(images)
        class_logits, mask_logits = self.logits(batch, sparsity)
        return self._losses(class_logits, mask_logits, [self._pad(each, batch) for each in labels])

    def _predict(self, images: Sequence[Tensor], sparsity: SparsityVector | None) -> list[Tensor]:
        """Images that are padded to the same size go together, so that none depends on the others."""
        padded = [tuple(-(-side // SIZE_DIVISOR) for side in image.shape[-2:]) for image in images]
        label_maps: dict[int, Tensor] = {}
        for size in dict.fromkeys(padded):
            members = [index for index, each in enumerate(padded) if each == size]
            batch, sizes = self.to_batch([images[index] for index in members])
            class_logits, mask_logits = self.logits(batch, sparsity)
            found = self._label_maps(class_logits[-1], mask_logits[-1], batch, sizes)
            label_maps.update(zip(members, found, strict=True))
        return [label_maps[index] for index in range(len(images))]

    def to_batch(self, images: Sequence[Tensor]) -> tuple[Tensor, list[tuple[int, int]]]:
        """Normalise and pad images: the batch [B, 3, h, w], and the size of every image."""
        sizes = [(int(image.shape[-2]), int(image.shape[-1])) for image in images]
        height, width = (-(-max(side) // SIZE_DIVISOR) * SIZE_DIVISOR for side in zip(*sizes, strict=True))
        mean, std = (images[0].new_tensor(values).view(3, 1, 1) for values in (IMAGE_MEAN, IMAGE_STD))
        padded = [
            F.pad((image - mean) / std, (0, width - image.shape[-1], 0, height - image.shape[-2]))
            for image in images
        ]
        return torch.stack(padded), sizes

    def logits(
        self, images: Tensor, sparsity: SparsityVector | None = None
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Class logits [B, Q, K + 1] and mask logits [B, Q, h / 4, w / 4] after every decoder layer.

        The decoders run in full precision under autocast too: sampling positions and the masks that
        steer the attention do not bear bfloat16.

        Args:
            images: normalised, [B, 3, h, w].
        """
        features = [feature.contiguous().float() for feature in self.backbone(images, sparsity)]
        with torch.autocast(images.device.type, enabled=False):
            decoded = self.pixel_decoder(features, output_hidden_states=False, return_dict=True)
            outputs = self.transformer(
                multi_scale_features=decoded.multi_scale_features, mask_features=decoded.mask_features
            )
            states = outputs.intermediate_hidden_states
            class_logits = [self.class_predictor(state.transpose(0, 1)) for state in states]
        return class_logits, list(outputs.masks_queries_logits)

    def _losses(
        self, class_logits: Sequence[Tensor], mask_logits: Sequence[Tensor], labels: Sequence[Tensor]
    ) -> dict[str, Tensor]:
        """The three losses, weighted and summed over the decoder layers."""
        present = [torch.unique(each) for each in labels]
        classes = [each[each != IGNORED] for each in present]
        masks = [(each == found.view(-1, 1, 1)).float() for each, found in zip(labels, classes, strict=True)]
        layers = [
            {"class_queries_logits": each, "masks_queries_logits": mask}
            for each, mask in zip(class_logits, mask_logits, strict=True)
        ]
        with torch.autocast(labels[0].device.type, enabled=False):
            losses = self.criterion(
                **layers[-1],
                mask_labels=masks,
                class_labels=[found.long() for found in classes],
                auxiliary_predictions=layers[:-1],
            )
        return {
            name: torch.stack([value for key, value in losses.items() if key.startswith(name)]).sum() * weight
            for name, weight in self.loss_weights.items()
        }

    def _label_maps(
        self, class_logits: Tensor, mask_logits: Tensor, batch: Tensor, sizes: Sequence[tuple[int, int]]
    ) -> list[Tensor]:
        """Every pixel's class, by the sum of its masks weighted by their classes (section 3.1).

        As transformers' processor does, but at the size of the image, without its way through 384×384.
        """
        class_shares_BQK = class_logits.softmax(dim=-1)[..., :-1]
        maps = []
        for class_shares_QK, mask, (height, width) in zip(class_shares_BQK, mask_logits, sizes, strict=True):
            resized = F.interpolate(mask[None], batch.shape[-2:], mode="bilinear", align_corners=False)[0]
            mask_shares_QHW = resized[:, :height, :width].sigmoid()
            scores_KHW = torch.einsum("qk,qhw->khw", class_shares_QK, mask_shares_QHW)
            maps.append(scores_KHW.argmax(dim=0).to(torch.uint8))
        return maps

    def _pad(self, labels: Tensor, batch: Tensor) -> Tensor:
        bottom, right = (whole - part for whole, part in zip(batch.shape[-2:], labels.shape, strict=True))
        return F.pad(labels, (0, right, 0, bottom), value=IGNORED)


def _library_config(backbone: SparseSwin, config: Mask2FormerConfig) -> LibraryConfig:
    """transformers' configuration, with the smallest Swin that has our channels: it is not used."""
    num_stages = len(backbone.depths)
    unused = SwinConfig(
        embed_dim=backbone.num_channels[0],
        depths=[1] * num_stages,
        num_heads=[1] * num_stages,
        out_features=[f"stage{stage + 1}" for stage in range(num_stages)],
    )
    return LibraryConfig(
        backbone_config=unused,
        num_labels=config.num_classes,
        feature_size=config.feature_channels,
        mask_feature_size=config.feature_channels,
        hidden_dim=config.feature_channels,
        encoder_feedforward_dim=config.encoder_hidden_channels,
        dim_feedforward=config.hidden_channels,
        encoder_layers=config.encoder_layers,
        decoder_layers=config.decoder_layers + 1,  # the library counts the prediction before the first
        num_attention_heads=config.num_heads,
        num_queries=config.num_queries,
        train_num_points=config.num_points,
    )
