"""A whole search in one call."""

import logging
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from search.dispatch import Budget, Dispatcher, OnTrial
from search.engine import EngineConfig, run_search
from search.evaluator import EvaluatorFactory
from search.pareto import ParetoFront
from search.problem import SearchProblem
from search.samplers import SamplerConfig, create_sampler
from search.space import Vector, validate
from search.study import enqueue, open_study

logger = logging.getLogger(__name__)


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

    Called again with the same study it goes on: nothing finished is evaluated twice. Trials that failed
    are logged as a warning, by reason, and so is a front that stays empty.

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
        ValueError: for bad input, before any work: constraints that no vector meets, a vector that the
            space does not hold, a study of something else; or if no worker can build the evaluator.
    """
    problem.require_feasible()
    beginning = [validate(vector, problem.space) for vector in first]
    config = sampler or SamplerConfig()
    proposer = create_sampler(problem, config)
    with open_study(Path(study), problem, proposer) as opened:
        enqueue(opened, [*beginning, *proposer.first_vectors()], problem)
        dispatcher = Dispatcher(
            opened, problem, budget, on_trial=on_trial,
            batch_size=config.population_size if deterministic else None,
        )  # fmt: skip
        stopped_by = run_search(dispatcher, factory, engine or EngineConfig(), sample_budget=sample_budget)
    progress = dispatcher.progress
    for reason, count in Counter(progress.failures).items():
        logger.warning("%d trials failed: %s", count, reason)
    if not progress.front.members:
        logger.warning(
            "the front is empty (%s): %d trials failed, %d break a constraint (%s)",
            stopped_by, len(progress.failures), progress.num_infeasible, problem.described_constraints,
        )  # fmt: skip
    return progress.front
