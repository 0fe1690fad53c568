"""What sparsity saves in training: a forward and backward pass of the backbone, interleaved.

    python tests/benchmarks/training_speed.py --backbone swin_t --size 672 672

Prints the median milliseconds of a step at several uniform ratios, with and without activation
checkpoints, the ratio to the dense step, and the peak memory of a step in a process of its own.
"""

import argparse
import multiprocessing
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from sparsevit import SparseSwin, SparsityVector, create_backbone
from sparsevit.latency.machine import device_name
from sparsevit.latency.timing import TimingLimits, time_interleaved


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--backbone", default="swin_t")
    parser.add_argument("--size", type=int, nargs=2, default=(672, 672))
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--ratios", type=float, nargs="+", default=(0.0, 0.4))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--checkpoints", nargs="+", default=["no", "yes"], choices=["no", "yes"])
    arguments = parser.parse_args()
    device = torch.device("cpu")
    size = (arguments.batch, 3, *arguments.size)
    print(f"{arguments.backbone}, {'×'.join(map(str, size))}, fp32, {device_name(device)}")
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}, {arguments.rounds} rounds")
    flags = [choice == "yes" for choice in arguments.checkpoints]
    cases = [(checkpoints, ratio) for checkpoints in flags for ratio in arguments.ratios]
    images = torch.randn(size)
    backbones = {flag: create_backbone(arguments.backbone, checkpoints=flag) for flag in flags}
    calls: list[Callable[[], object]] = [
        partial(step, backbones[flag], images, backbones[flag].space.uniform(ratio)) for flag, ratio in cases
    ]
    timings = time_interleaved(
        calls, calls[0], device=device, limits=TimingLimits.exactly(arguments.rounds),
        generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    medians = [timing.median_ms for timing in timings.calls]
    del calls, backbones  # their gradients
    print(f"{'checkpoints':<12} {'ratio':>6} {'ms':>9} {'of dense':>9} {'peak GiB':>9}")
    for (flag, ratio), milliseconds in zip(cases, medians, strict=True):
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            peak = pool.apply(_peak_gib, (arguments.backbone, size, flag, ratio))
        print(
            f"{flag!s:<12} {ratio:6.1f} {milliseconds:9.1f} {milliseconds / medians[0]:9.3f} {peak:9.2f}",
            flush=True,
        )


def step(backbone: SparseSwin, images: Tensor, vector: SparsityVector) -> None:
    backbone.train().zero_grad()
    losses = [feature.square().mean() for feature in backbone(images, vector)]
    torch.autograd.backward(losses)


def _peak_gib(name: str, size: tuple[int, ...], checkpoints: bool, ratio: float) -> float:
    backbone = create_backbone(name, checkpoints=checkpoints)
    step(backbone, torch.randn(size), backbone.space.uniform(ratio))
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) / 2**20


if __name__ == "__main__":
    main()
