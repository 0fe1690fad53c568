"""Does latency fall with every gene? One gene is pruned more and more, the others stay as they are.

    python tests/benchmarks/gene_latency.py --backbone swin_t --size 672 672 --dtypes bf16

The later genes of its stage have the largest ratio, since ratios may not decrease there; all others
are dense. A round runs up and down the ratios of a gene, so that neighbours are timed side by side
and a drift of the machine falls out of their difference. Prints the median latency of every gene and
ratio as a share of dense, and for every gene the largest rise from a ratio to the next, the median
of its differences, in standard errors.
"""

import argparse
import itertools
import math
import statistics
from functools import partial

import torch

from sparsevit import SparseSwin, SparsitySpace, SparsityVector, create_backbone
from sparsevit.latency.machine import device_name
from sparsevit.latency.subject import DTYPES
from sparsevit.latency.timing import time_once_ms


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--backbone", default="swin_t")
    parser.add_argument("--size", type=int, nargs=2, default=(672, 672))
    parser.add_argument("--dtypes", nargs="+", default=["fp32", "bf16"], choices=sorted(DTYPES))
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    print(f"{arguments.backbone}, {arguments.size[0]}×{arguments.size[1]}, {arguments.rounds} rounds")
    print(f"{device_name(device)}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    for name in arguments.dtypes:
        backbone = create_backbone(arguments.backbone).to(device, DTYPES[name]).eval()
        images = torch.randn(1, 3, *arguments.size, device=device, dtype=DTYPES[name])
        with torch.inference_mode():
            print_table(name, backbone, images, arguments.rounds)


def print_table(dtype: str, backbone: SparseSwin, images: torch.Tensor, num_rounds: int) -> None:
    space = backbone.space
    print(f"\n{dtype:<5}", *(f"{ratio:6g}" for ratio in space.choices), " largest rise")
    for gene in range(space.num_genes):
        rounds = [
            time_round(backbone, images, [with_gene(space, gene, ratio) for ratio in space.choices])
            for _ in range(num_rounds)
        ]
        shares = [statistics.median(column) for column in zip(*rounds, strict=True)]
        rises = [
            median_and_error([row[index + 1] - row[index] for row in rounds])
            for index in range(len(shares) - 1)
        ]
        rise, error = max(rises, key=lambda pair: pair[0] / pair[1])
        columns = (f"{share:6.3f}" for share in shares)
        print(f"{gene:<5}", *columns, f" {rise:+.3f} ({rise / error:+.1f})", flush=True)


def time_round(backbone: SparseSwin, images: torch.Tensor, vectors: list[SparsityVector]) -> list[float]:
    """Latency of every vector as a share of dense: the mean of a way up and a way down."""
    calls = [partial(backbone, images, vector) for vector in (backbone.space.dense, *vectors)]
    way_up = [time_once_ms(call, images.device) for call in calls]
    way_down = [time_once_ms(call, images.device) for call in reversed(calls)][::-1]
    dense, *times = map(sum, zip(way_up, way_down, strict=True))
    return [time / dense for time in times]


def median_and_error(values: list[float]) -> tuple[float, float]:
    """The median and its standard error, 1.25 of a mean's, from the median deviation."""
    median = statistics.median(values)
    deviation = 1.48 * statistics.median(abs(value - median) for value in values)
    return median, max(1e-6, 1.25 * deviation / math.sqrt(len(values)))


def with_gene(space: SparsitySpace, gene: int, ratio: float) -> SparsityVector:
    """A gene at a ratio, the later ones of its stage at the largest, all others at 0."""
    end = next(last for last in itertools.accumulate(space.group_sizes) if last > gene)
    later = [space.choices[-1]] * (end - gene - 1)
    return SparsityVector((*[0.0] * gene, ratio, *later, *[0.0] * (space.num_genes - end)))


if __name__ == "__main__":
    main()
