"""How fast each sampler finds the front, replayed on a table that holds every vector's values.

    python -m tests.benchmarks.samplers --plot samplers.png

For every sampler and seed a search runs one vector at a time; hypervolume is stated as a share of
that of the whole space's front. The paper's search looks for the most accurate vector in a band of
latency: here it runs in five bands by turns, each with a fifth of the population and the budget.
Prints medians and quartiles over the seeds at several budgets, how many evaluations each sampler
takes to reach what stock NSGA-II has at the end, and draws the curves.
"""

import argparse
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import numpy.typing as npt
import optuna
import pandas as pd
from matplotlib import pyplot as plt

from search.dispatch import Budget, Dispatcher
from search.pareto import FrontMember, ParetoFront
from search.problem import Constraint, Objective, SearchProblem
from search.samplers import SamplerConfig, create_sampler
from search.study import enqueue
from sparsevit.sparsity import SparsityVector
from tests.benchmarks.search_table import TABLES, load_table

SAMPLERS = ("nsga2", "nsga2_stock", "evolution", "random", "tpe", "uniform")
METRIC, COST = "mask_ap", "latency_ms"
POPULATION = 50  # Optuna's default
BUDGETS = (25, 50, 100, 200, 300, 400, 500, 1000)
NUM_BANDS = 5


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--table", default="swin_nano_coco")
    parser.add_argument("--samplers", nargs="+", default=SAMPLERS)
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--evaluations", type=int, default=500)
    parser.add_argument("--population", type=int, default=POPULATION)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--plot", type=Path, help="where to draw the curves")
    arguments = parser.parse_args()
    jobs = [(name, seed) for name in arguments.samplers for seed in range(arguments.seeds)]
    search = partial(
        run, table=arguments.table, population=arguments.population, num_evaluations=arguments.evaluations
    )
    with get_context("spawn").Pool(arguments.processes) as pool:
        curves = pool.starmap(search, jobs, chunksize=1)
    by_sampler = {
        name: np.array([curve for (other, _), curve in zip(jobs, curves, strict=True) if other == name])
        for name in arguments.samplers
    }
    budgets = [budget for budget in BUDGETS if budget <= arguments.evaluations]
    print(table_of(by_sampler, budgets).to_string())
    if "nsga2_stock" in by_sampler:
        goal = float(np.median(by_sampler["nsga2_stock"][:, -1]))
        print(f"\nevaluations until the median reaches {goal:.4f}, stock NSGA-II's at the end")
        for name, values in by_sampler.items():
            reached = np.flatnonzero(np.median(values, axis=0) >= goal)
            print(f"  {name:<12} {reached[0] + 1 if len(reached) else 'not reached'}")
    if arguments.plot:
        draw(arguments.plot, by_sampler)


def run(name: str, seed: int, *, table: str, population: int, num_evaluations: int) -> list[float]:
    """Hypervolume after every evaluation, as a share of the whole space's."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    space, values = load_table(table)

    def latency(vector: SparsityVector) -> float:
        return values[vector.ratios][COST]

    objectives = (Objective(METRIC, "maximize"), Objective(COST, "minimize"))
    problem = SearchProblem(space, objectives, {COST: latency}, (METRIC,))
    problems = bands_of(problem) if name == "evolution" else [problem]
    searches = [start(each, name, seed, population // len(problems), num_evaluations) for each in problems]
    found = ParetoFront.of([], objectives)
    volumes: list[float] = []
    while len(volumes) < num_evaluations:
        dispatcher = searches[len(volumes) % len(searches)]
        trial = dispatcher.next_trial()
        if trial is None:
            break
        vector = dispatcher.vector_of(trial)
        dispatcher.tell(trial.number, {METRIC: values[tuple(vector)][METRIC]})
        found = found.with_candidate(FrontMember(vector, values[tuple(vector)]))
        volumes.append(found.hypervolume(problem.reference))
    everything = [FrontMember(vector, row) for vector, row in values.items()]
    whole = ParetoFront.of(everything, objectives).hypervolume(problem.reference)
    shares = [volume / whole for volume in volumes]
    return shares + shares[-1:] * (num_evaluations - len(shares))


def start(problem: SearchProblem, name: str, seed: int, population: int, num_evaluations: int) -> Dispatcher:
    config = SamplerConfig(name, seed, population, num_parents=max(2, population // 4))
    sampler = create_sampler(problem, config)
    study = optuna.create_study(directions=["maximize", "minimize"], sampler=sampler)
    enqueue(study, sampler.first_vectors(), problem)
    return Dispatcher(study, problem, Budget(num_evaluations))


def bands_of(problem: SearchProblem) -> list[SearchProblem]:
    """The problem in bands of latency of equal width."""
    low, high = problem.reachable(COST)
    width = (high - low) / NUM_BANDS
    bounds = [(low + band * width, low + (band + 1) * width) for band in range(NUM_BANDS)]
    return [replace(problem, constraints=[Constraint(COST, upper=b, lower=a)]) for a, b in bounds]


def table_of(by_sampler: dict[str, npt.NDArray[np.float64]], budgets: Sequence[int]) -> pd.DataFrame:
    """Median and quartiles by sampler and budget."""
    rows = {}
    for name, values in by_sampler.items():
        quartiles = np.percentile(values, (25, 50, 75), axis=0)
        rows[name] = {
            budget: "{1:.4f} ({0:.4f} … {2:.4f})".format(*quartiles[:, budget - 1]) for budget in budgets
        }
    return pd.DataFrame(rows).T


def draw(path: Path, by_sampler: dict[str, npt.NDArray[np.float64]]) -> None:
    figure, axes = plt.subplots(figsize=(8, 5))
    for name, values in by_sampler.items():
        low, middle, high = np.percentile(values, (25, 50, 75), axis=0)
        evaluations = np.arange(1, len(middle) + 1)
        (line,) = axes.plot(evaluations, middle, label=name)
        axes.fill_between(evaluations, low, high, color=line.get_color(), alpha=0.15)
    axes.set_xlabel("evaluations")
    axes.set_ylabel("hypervolume, share of the whole space's")
    axes.set_ylim(0.9, 1.002)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    assert TABLES.is_dir(), "record the table first: see search_table.py"
    main()
