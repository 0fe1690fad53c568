"""Does latency fall with every gene? One gene is pruned more and more, the others stay as they are.

    python tests/benchmarks/gene_latency.py --backbone swin_t --size 672 672 --dtype bf16

The later genes of its stage have the largest ratio, since ratios may not decrease there; all others
are dense. Prints latency as a share of dense for every gene and ratio, medians of one interleaved
run, and for every gene the largest rise from a ratio to the next, beside the noise: the standard
error of the difference of two such medians.
"""

import argparse
import itertools
import math
import statistics
from functools import partial

import torch

from sparsevit import SparsitySpace, SparsityVector, create_backbone
from sparsevit.latency.calibration import DTYPES, device_name
from sparsevit.latency.timing import time_interleaved_ms


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--backbone", default="swin_t")
    parser.add_argument("--size", type=int, nargs=2, default=(672, 672))
    parser.add_argument("--dtype", default="fp32", choices=sorted(DTYPES))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    device, dtype = torch.device(arguments.device), DTYPES[arguments.dtype]
    backbone = create_backbone(arguments.backbone).to(device, dtype).eval()
    images = torch.randn(1, 3, *arguments.size, device=device, dtype=dtype)
    space = backbone.space
    vectors = [with_gene(space, gene, ratio) for gene in range(space.num_genes) for ratio in space.choices]
    with torch.inference_mode():
        (dense_times, *times), _ = time_interleaved_ms(
            [partial(backbone, images, vector) for vector in (space.dense, *vectors)],
            partial(backbone, images),
            device=device,
            num_rounds=arguments.rounds,
            generator=torch.Generator().manual_seed(0),
        )
    dense_ms = statistics.median(dense_times)
    spread = statistics.median(statistics.stdev(row) for row in times) / dense_ms
    noise = 1.25 * math.sqrt(2 / arguments.rounds) * spread  # a median's error is 1.25 of a mean's
    print(f"{arguments.backbone}, {arguments.size[0]}×{arguments.size[1]}, {arguments.dtype}")
    print(f"{device_name(device)}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    print(f"dense {dense_ms:.1f} ms; noise of a difference {noise:.3f}; {arguments.rounds} rounds")
    print("gene ", *(f"{ratio:6g}" for ratio in space.choices), " largest rise")
    num_choices = len(space.choices)
    for gene in range(space.num_genes):
        rows = times[gene * num_choices : (gene + 1) * num_choices]
        shares = [statistics.median(row) / dense_ms for row in rows]
        rise = max(after - before for before, after in itertools.pairwise(shares))
        print(f"{gene:<5}", *(f"{share:6.3f}" for share in shares), f" {rise:+.3f}", flush=True)


def with_gene(space: SparsitySpace, gene: int, ratio: float) -> SparsityVector:
    """A gene at a ratio, the later ones of its stage at the largest, all others at 0."""
    end = next(last for last in itertools.accumulate(space.genes_per_stage) if last > gene)
    later = [space.choices[-1]] * (end - gene - 1)
    return SparsityVector((*[0.0] * gene, ratio, *later, *[0.0] * (space.num_genes - end)))


if __name__ == "__main__":
    main()
