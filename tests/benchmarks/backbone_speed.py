"""How fast the sparse backbone is, as ratios from one interleaved run.

    python tests/benchmarks/backbone_speed.py --backbone swin_t --size 672 --batch 1 4

Prints one row per batch size and vector: median milliseconds, ratio to our own dense forward pass,
the same ratio of MACs, and the ratio to torchvision's dense Swin with the same shape.
"""

import argparse
import statistics
from collections.abc import Callable

import torch
import torchvision

from sparsevit import SparsityVector, create_backbone
from sparsevit.latency.calibration import device_name
from sparsevit.latency.macs import count_macs
from sparsevit.latency.timing import time_interleaved_ms

PUBLISHED = ((0.3, 0, 0.1, 0.2, 0.2, 0), (0.6, 0, 0.2, 0.4, 0.5, 0), (0.7, 0, 0.2, 0.4, 0.5, 0))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--backbone", default="swin_t", choices=("swin_t", "swin_s", "swin_b"))
    parser.add_argument("--size", type=int, default=672)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    backbone = create_backbone(arguments.backbone).eval().to(device)
    peer = getattr(torchvision.models, arguments.backbone)(weights=None).features.eval().to(device)
    size = (arguments.size, arguments.size)
    vectors = [backbone.space.uniform(ratio) for ratio in (0.0, 0.2, 0.4, 0.6, 0.8)]
    if arguments.backbone == "swin_t":
        vectors += [SparsityVector(ratios) for ratios in PUBLISHED]
    dense_macs = count_macs(backbone.config, size, backbone.space.dense)
    print(f"{arguments.backbone}, {size[0]}×{size[1]}, fp32, {device_name(device)}")
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}, {arguments.rounds} rounds")
    print(f"{'batch':>5} {'vector':<26} {'ms':>8} {'of dense':>9} {'MACs':>6} {'of torchvision':>15}")
    for batch in arguments.batch:
        images = torch.randn(batch, 3, *size, device=device)

        def forward(vector: SparsityVector, images: torch.Tensor = images) -> Callable[[], object]:
            return lambda: backbone(images, vector)

        def forward_peer(images: torch.Tensor = images) -> object:
            return peer(images)

        with torch.inference_mode():
            times, _ = time_interleaved_ms(
                [*(forward(vector) for vector in vectors), forward_peer],
                forward(backbone.space.dense),
                device=device,
                num_rounds=arguments.rounds,
                generator=torch.Generator().manual_seed(0),
            )
        medians = [statistics.median(row) for row in times]
        for vector, milliseconds in zip(vectors, medians[:-1], strict=True):
            macs = count_macs(backbone.config, size, vector) / dense_macs
            print(
                f"{batch:>5} {vector!s:<26} {milliseconds:>8.1f} {milliseconds / medians[0]:>9.3f} "
                f"{macs:>6.3f} {milliseconds / medians[-1]:>15.3f}"
            )
        print(f"{batch:>5} {'torchvision, dense':<26} {medians[-1]:>8.1f}")


if __name__ == "__main__":
    main()
