"""Multiply-accumulate operations of a backbone at a sparsity vector: the baseline for latency."""

from sparsevit.backbone import SwinConfig
from sparsevit.sparsity import SparsitySpace, SparsityVector, count_kept_windows


def count_macs(config: SwinConfig, image_size: tuple[int, int], sparsity: SparsityVector) -> int:
    """Count matrix products of one image (SparseViT, table 2).

    Padding takes part in attention alone. Of windows that are kept it is assumed that they hold as
    little of it as possible: a window of padding has a low score.

    Args:
        image_size: height and width in pixels.
    """
    height, width = (size // config.patch_size for size in image_size)
    channels = config.embed_dim
    positions = config.window_size**2
    macs = height * width * channels * 3 * config.patch_size**2
    for stage, ratios in enumerate(SparsitySpace(config.depths).split(sparsity.ratios)):
        num_windows = -(-height // config.window_size) * -(-width // config.window_size)
        per_token = int((4 + 2 * config.mlp_ratio) * channels**2)
        for block in range(config.depths[stage]):
            ratio = ratios[block // 2]
            num_kept = count_kept_windows(num_windows, ratio) if ratio else num_windows
            macs += per_token * min(num_kept * positions, height * width)
            macs += num_kept * 2 * positions**2 * channels
        if stage + 1 < len(config.depths):
            height, width = -(-height // 2), -(-width // 2)
            macs += height * width * 4 * channels * 2 * channels
            channels *= 2
    return macs
