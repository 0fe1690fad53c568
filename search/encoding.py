"""Sparsity vectors as Optuna parameters: one categorical per gene, named after its pair of blocks."""

from collections.abc import Mapping
from typing import Any

from optuna.distributions import BaseDistribution, CategoricalDistribution
from optuna.trial import FrozenTrial

from sparsevit.sparsity import SparsitySpace, SparsityVector


def distributions(space: SparsitySpace) -> dict[str, BaseDistribution]:
    return {name: CategoricalDistribution(space.choices) for name in space.gene_names}


def encode(vector: SparsityVector, space: SparsitySpace) -> dict[str, Any]:
    return dict(zip(space.gene_names, vector.ratios, strict=True))


def decode(params: Mapping[str, Any], space: SparsitySpace) -> SparsityVector:
    return SparsityVector(tuple(params[name] for name in space.gene_names))


def vector_of(trial: FrozenTrial, space: SparsitySpace) -> SparsityVector | None:
    """The vector of a trial; None while its parameters are not all drawn."""
    params = {**trial.system_attrs.get("fixed_params", {}), **trial.params}
    if any(name not in params for name in space.gene_names):
        return None
    return decode(params, space)
