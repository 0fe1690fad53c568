"""Where the next vector comes from: Optuna samplers, by name."""

from collections.abc import Callable

from search.problem import SearchProblem
from search.samplers.base import SamplerConfig, VectorSampler
from search.samplers.evolution import EvolutionSampler
from search.samplers.nsga2 import VectorNSGAIISampler
from search.samplers.plain import RandomVectorSampler, exhaustive, uniform_levels
from search.samplers.stock import nsga2_stock, tpe

__all__ = ["SAMPLERS", "SamplerConfig", "VectorSampler", "create_sampler"]

SAMPLERS: dict[str, Callable[[SearchProblem, SamplerConfig], VectorSampler]] = {
    "nsga2": VectorNSGAIISampler,
    "evolution": EvolutionSampler,
    "random": RandomVectorSampler,
    "uniform": uniform_levels,
    "exhaustive": exhaustive,
    "tpe": tpe,
    "nsga2_stock": nsga2_stock,
}
POPULATION_SAMPLERS = ("nsga2", "evolution", "nsga2_stock")


def create_sampler(problem: SearchProblem, config: SamplerConfig) -> VectorSampler:
    """The sampler that `config` names.

    Raises:
        ValueError: for an unknown name or a setting out of range.
    """
    if config.name not in SAMPLERS:
        raise ValueError(f"unknown sampler {config.name!r}; choose one of {', '.join(SAMPLERS)}")
    if config.name in POPULATION_SAMPLERS and config.population_size > problem.space.size:
        raise ValueError(
            f"sampler.population_size={config.population_size} is larger than the space, which has "
            f"{problem.space.size} vectors: take sampler=exhaustive or a smaller population"
        )
    return SAMPLERS[config.name](problem, config)
