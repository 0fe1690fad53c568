"""Sparsity-aware adaptation: a random legal vector at every training step (SparseViT, 3.3)."""

from collections.abc import Callable

import torch

from sparsevit.sparsity import SparsitySpace, SparsityVector

SamplingLaw = Callable[[SparsitySpace, torch.Generator], SparsityVector]


def sorted_genes(space: SparsitySpace, generator: torch.Generator) -> SparsityVector:
    """Every pair draws from the choices, then each stage is sorted: the paper's law."""
    return space.draw(generator)


def uniform_ratio(space: SparsitySpace, generator: torch.Generator) -> SparsityVector:
    """One ratio for all pairs."""
    return space.uniform(space.choices[int(torch.randint(len(space.choices), (), generator=generator))])


def sandwich(space: SparsitySpace, generator: torch.Generator) -> SparsityVector:
    """The paper's law for half of the steps, the dense and the sparsest vector for a quarter each."""
    kind = int(torch.randint(4, (), generator=generator))
    return (space.dense, space.sparsest)[kind] if kind < 2 else space.draw(generator)


SAMPLING_LAWS: dict[str, SamplingLaw] = {
    "sorted_genes": sorted_genes,
    "uniform_ratio": uniform_ratio,
    "sandwich": sandwich,
}


def sampling_law(name: str) -> SamplingLaw:
    """Look up a law by name.

    Raises:
        ValueError: for an unknown name, listing the known ones.
    """
    if name not in SAMPLING_LAWS:
        raise ValueError(f"unknown sampling law {name!r}; choose one of {', '.join(SAMPLING_LAWS)}")
    return SAMPLING_LAWS[name]
