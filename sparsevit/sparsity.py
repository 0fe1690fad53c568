"""Sparsity vectors: which share of the windows every pair of Swin blocks skips.

A Swin stage of depth ``d`` is a chain of ``d / 2`` pairs (one W-MSA and one SW-MSA block).
A pair has one ratio, its gene. Inside a stage the ratios never decrease, because the kept
windows of later blocks are a subset of those of earlier ones (SparseViT, section 3.2).
"""

import bisect
import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache

import torch

DEFAULT_CHOICES = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8)


@lru_cache(maxsize=4096)
def count_kept_windows(num_windows: int, ratio: float) -> int:
    """``floor(num_windows · (1 − ratio))`` in exact decimal arithmetic, at least 1.

    ``int(100 * (1 - 0.8))`` is 19 in floating point; this returns 20.
    """
    return max(1, math.floor(num_windows * (1 - Fraction(str(ratio)))))


@dataclass(frozen=True)
class SparsityVector:
    """One pruning ratio in [0, 1) per pair of blocks, stage by stage.

    Raises:
        ValueError: if a ratio is not a finite number in [0, 1).
    """

    ratios: tuple[float, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "ratios", tuple(float(ratio) for ratio in self.ratios))
        for index, ratio in enumerate(self.ratios):
            if not 0.0 <= ratio < 1.0:
                raise ValueError(
                    f"sparsity ratios lie in [0, 1), but ratio {index} of {list(self.ratios)} is {ratio}"
                )

    def __len__(self) -> int:
        return len(self.ratios)

    def __iter__(self) -> Iterator[float]:
        return iter(self.ratios)

    def __str__(self) -> str:
        return "[" + " ".join(f"{ratio:g}" for ratio in self.ratios) + "]"

    @property
    def is_dense(self) -> bool:
        return not any(self.ratios)


@dataclass(frozen=True)
class SparsitySpace:
    """All legal vectors of a backbone: ratios from `choices`, non-decreasing inside a stage.

    Args:
        depths: blocks per stage; an odd last block is a pair of its own.
        choices: the ratios a pair may take, in increasing order.

    Raises:
        ValueError: if depths or choices are empty, out of range or not increasing.
    """

    depths: tuple[int, ...]
    choices: tuple[float, ...] = DEFAULT_CHOICES

    def __post_init__(self) -> None:
        object.__setattr__(self, "depths", tuple(int(depth) for depth in self.depths))
        object.__setattr__(self, "choices", SparsityVector(tuple(self.choices)).ratios)
        if not self.depths or min(self.depths) < 1:
            raise ValueError(f"depths must be positive, got {list(self.depths)}")
        if not self.choices or any(a >= b for a, b in itertools.pairwise(self.choices)):
            raise ValueError(f"choices must be increasing and not empty, got {list(self.choices)}")

    @property
    def group_sizes(self) -> tuple[int, ...]:
        """Genes per stage."""
        return tuple((depth + 1) // 2 for depth in self.depths)

    @property
    def num_genes(self) -> int:
        return sum(self.group_sizes)

    @property
    def gene_choices(self) -> tuple[tuple[float, ...], ...]:
        """The choices, once per gene."""
        return (self.choices,) * self.num_genes

    @property
    def gene_names(self) -> tuple[str, ...]:
        """``stage3.pair2`` is the second pair of blocks of the third stage."""
        return tuple(
            f"stage{stage}.pair{pair}"
            for stage, num_pairs in enumerate(self.group_sizes, start=1)
            for pair in range(1, num_pairs + 1)
        )

    @property
    def size(self) -> int:
        """Number of legal vectors: a product of multiset coefficients."""
        return math.prod(
            math.comb(len(self.choices) + num_pairs - 1, num_pairs) for num_pairs in self.group_sizes
        )

    def split(self, ratios: Sequence[float]) -> list[tuple[float, ...]]:
        """Cut a flat sequence of genes into one tuple per stage."""
        bounds = [0, *itertools.accumulate(self.group_sizes)]
        return [tuple(ratios[start:end]) for start, end in itertools.pairwise(bounds)]

    def validate(self, vector: SparsityVector) -> SparsityVector:
        """Return `vector` if this space holds it.

        Raises:
            ValueError: naming the gene, its value and the rule it breaks.
        """
        check_fits(vector, self.depths)
        for name, ratio in zip(self.gene_names, vector, strict=True):
            if ratio not in self.choices:
                raise ValueError(f"{name} is {ratio}, which is not one of the choices {list(self.choices)}")
        return vector

    def canonicalize(self, ratios: Iterable[float]) -> SparsityVector:
        """Sort the ratios inside every stage, so that any genes become a legal order."""
        stages = self.split(tuple(ratios))
        return SparsityVector(tuple(ratio for stage in stages for ratio in sorted(stage)))

    def uniform(self, ratio: float) -> SparsityVector:
        return SparsityVector((ratio,) * self.num_genes)

    @property
    def dense(self) -> SparsityVector:
        return self.uniform(self.choices[0])

    @property
    def sparsest(self) -> SparsityVector:
        return self.uniform(self.choices[-1])

    def __contains__(self, vector: SparsityVector) -> bool:
        try:
            self.validate(vector)
        except ValueError:
            return False
        return True

    def __iter__(self) -> Iterator[SparsityVector]:
        """Every legal vector, in lexicographic order."""
        stages = [
            itertools.combinations_with_replacement(self.choices, num_pairs) for num_pairs in self.group_sizes
        ]
        for parts in itertools.product(*stages):
            yield SparsityVector(tuple(itertools.chain.from_iterable(parts)))

    def draw(self, generator: torch.Generator) -> SparsityVector:
        """Draw every gene from `choices`, then sort inside the stages (SparseViT, section 3.3)."""
        indices = torch.randint(len(self.choices), (self.num_genes,), generator=generator)
        return self.canonicalize(self.choices[index] for index in indices.tolist())

    def nearest(self, ratio: float) -> float:
        """The choice closest to `ratio`."""
        position = bisect.bisect_left(self.choices, ratio)
        return min(self.choices[max(0, position - 1) : position + 1], key=lambda choice: abs(choice - ratio))


def check_fits(vector: SparsityVector, depths: Sequence[int]) -> None:
    """Raise `ValueError` unless `vector` has one ratio per pair and never decreases inside a stage."""
    genes_per_stage = [(depth + 1) // 2 for depth in depths]
    if len(vector) != sum(genes_per_stage):
        raise ValueError(
            f"the sparsity vector {vector} has {len(vector)} ratios, but depths {list(depths)} "
            f"need {sum(genes_per_stage)}: one per pair of blocks"
        )
    start = 0
    for stage, num_pairs in enumerate(genes_per_stage, start=1):
        ratios = vector.ratios[start : start + num_pairs]
        if any(a > b for a, b in itertools.pairwise(ratios)):
            raise ValueError(
                f"ratios may not decrease inside a stage, but stage {stage} of {vector} has {list(ratios)}"
            )
        start += num_pairs
