"""A whole search in one call."""

from collections.abc import Iterable
from pathlib import Path

from search.dispatch import Budget, Dispatcher, OnTrial
from search.engine import EngineConfig, run_search
from search.evaluator import EvaluatorFactory
from search.pareto import ParetoFront
from search.problem import SearchProblem
from search.samplers import SamplerConfig, create_sampler
from search.space import Vector
from search.study import enqueue, open_study


def find_front(
    problem: SearchProblem,
    factory: EvaluatorFactory,
    study: Path | str,
    budget: Budget,
    *,
    sampler: SamplerConfig | None = None,
    engine: EngineConfig | None = None,
    deterministic: bool = False,
    first: Iterable[Vector] = (),
    sample_budget: int | None = None,
    on_trial: OnTrial = lambda trial, progress: None,
) -> ParetoFront:
    """Search until the budget is spent, and return the front.

    Called again with the same study it goes on: nothing finished is evaluated twice.

    Args:
        factory: builds the evaluator in every worker; it must be picklable, so a function or class of
            an importable module, or of the script itself.
        study: the journal file, written as the search goes.
        deterministic: the same vectors for any number of workers, which wait for each other at the
            end of every generation.
        first: vectors to begin with.
        sample_budget: handed to the evaluator with every vector.
        on_trial: called for every finished trial.

    Raises:
        ValueError: for bad input, before any work: what no vector can meet, a study of something else.
    """
    problem.require_feasible()
    config = sampler or SamplerConfig()
    proposer = create_sampler(problem, config)
    with open_study(Path(study), problem, proposer) as opened:
        enqueue(opened, [*first, *proposer.first_vectors()], problem.space)
        dispatcher = Dispatcher(
            opened, problem, budget, on_trial=on_trial,
            batch_size=config.population_size if deterministic else None,
        )  # fmt: skip
        run_search(dispatcher, factory, engine or EngineConfig(), sample_budget=sample_budget)
    return dispatcher.progress.front
