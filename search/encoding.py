"""Vectors as Optuna parameters: one categorical per gene, by its name."""

from collections.abc import Mapping
from typing import Any

from optuna.distributions import BaseDistribution, CategoricalDistribution
from optuna.trial import FrozenTrial

from search.space import SearchSpace, Vector


def distributions(space: SearchSpace) -> dict[str, BaseDistribution]:
    return {
        name: CategoricalDistribution(choices)
        for name, choices in zip(space.gene_names, space.gene_choices, strict=True)
    }


def encode(vector: Vector, space: SearchSpace) -> dict[str, Any]:
    return dict(zip(space.gene_names, vector, strict=True))


def decode(params: Mapping[str, Any], space: SearchSpace) -> Vector:
    return space.canonicalize(params[name] for name in space.gene_names)


def vector_of(trial: FrozenTrial, space: SearchSpace) -> Any:
    """The vector of a trial; None while its parameters are not all drawn."""
    params = {**trial.system_attrs.get("fixed_params", {}), **trial.params}
    if any(name not in params for name in space.gene_names):
        return None
    return decode(params, space)
