"""A small search problem with a known answer, for tests without a network."""

from collections.abc import Mapping
from typing import Any

from search.dispatch import Dispatcher
from search.problem import Constraint, Objective, SearchProblem
from sparsevit.sparsity import SparsitySpace, SparsityVector

SPACE = SparsitySpace((2, 2, 4, 2))
OBJECTIVES = (Objective("ap", "maximize"), Objective("latency_ms", "minimize"))


def latency(vector: SparsityVector) -> float:
    return 10 - 2 * sum(vector)


def accuracy(vector: SparsityVector) -> float:
    return 1 - sum((gene + 1) * ratio**2 for gene, ratio in enumerate(vector)) / 20


def problem(*constraints: Constraint, space: SparsitySpace = SPACE) -> SearchProblem:
    return SearchProblem(space, OBJECTIVES, {"latency_ms": latency}, ("ap",), constraints)


def evaluate(vector: Any) -> Mapping[str, float]:
    return {"ap": accuracy(vector)}


def run_alone(dispatcher: Dispatcher, max_trials: int | None = None) -> None:
    """Run the trials of a search one after the other, in this process."""
    num_told = 0
    while dispatcher.stopped_by is None and num_told != max_trials:
        trial = dispatcher.next_trial()
        if trial is None:
            break
        dispatcher.tell(trial.number, evaluate(dispatcher.vector_of(trial)))
        num_told += 1
