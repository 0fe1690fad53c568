"""How far a search is: its front, its hypervolume, what failed; kept up to date trial by trial."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from optuna.trial import FrozenTrial, TrialState

from search.encoding import vector_of
from search.pareto import FrontMember, ParetoFront
from search.problem import NOTES, REASON, SearchProblem


@dataclass
class SearchProgress:
    """What is known after the finished trials.

    Attributes:
        hypervolumes: after each finished trial.
        failures: the reason of each failed trial.
    """

    problem: SearchProblem
    front: ParetoFront = field(init=False)
    hypervolumes: list[float] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    num_complete: int = 0
    num_infeasible: int = 0
    elapsed_before_s: float = 0.0
    _started: float = field(default_factory=lambda: time.monotonic())

    def __post_init__(self) -> None:
        self.front = ParetoFront.of([], self.problem.objectives)

    @property
    def num_counted(self) -> int:
        """Trials that used up budget."""
        return self.num_complete + len(self.failures)

    @property
    def hypervolume(self) -> float:
        return self.hypervolumes[-1] if self.hypervolumes else 0.0

    @property
    def elapsed_s(self) -> float:
        """Time spent searching, by this process and those before it."""
        return self.elapsed_before_s + time.monotonic() - self._started

    def add(self, trial: FrozenTrial) -> None:
        """Count a finished trial."""
        if trial.state != TrialState.COMPLETE:
            self.failures.append(str(trial.user_attrs.get(REASON, "no reason is recorded")))
            self.hypervolumes.append(self.hypervolume)
            return
        self.num_complete += 1
        member = member_of(trial, self.problem)
        if member is None:
            self.num_infeasible += 1
            self.hypervolumes.append(self.hypervolume)
            return
        front = self.front.with_candidate(member)
        if front is self.front:
            self.hypervolumes.append(self.hypervolume)
        else:
            self.front = front
            self.hypervolumes.append(front.hypervolume(self.problem.reference))

    def recount(self, trials: Sequence[FrozenTrial]) -> None:
        """Begin anew with these finished trials, in order."""
        self.front = ParetoFront.of([], self.problem.objectives)
        self.hypervolumes.clear()
        self.failures.clear()
        self.num_complete = self.num_infeasible = 0
        for trial in trials:
            self.add(trial)

    def has_levelled_off(self, num_evaluations: int, gain: float) -> bool:
        """Whether the last evaluations raised the hypervolume by no more than a share of it."""
        if len(self.hypervolumes) <= num_evaluations:
            return False
        before = self.hypervolumes[-1 - num_evaluations]
        return before > 0 and self.hypervolume <= before * (1 + gain)


def member_of(trial: FrozenTrial, problem: SearchProblem) -> FrontMember | None:
    """A complete trial as a candidate of the front; None if a constraint rules it out.

    Its cheap quantities are those of now, which need not be those that it was told with.
    """
    vector = vector_of(trial, problem.space)
    if vector is None:
        return None
    values = {name: value for name, value in trial.user_attrs.items() if name not in NOTES}
    values |= problem.measure(vector)
    if any(constraint.violation(values[constraint.name]) for constraint in problem.constraints):
        return None
    return FrontMember(vector, values)


def front_of(trials: Sequence[FrozenTrial], problem: SearchProblem) -> ParetoFront:
    """The Pareto front of the complete, feasible trials."""
    complete = [trial for trial in trials if trial.state == TrialState.COMPLETE]
    members = [member for trial in complete if (member := member_of(trial, problem)) is not None]
    return ParetoFront.of(members, problem.objectives)
