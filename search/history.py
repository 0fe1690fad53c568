"""A search that is over (or still going), read from its journal alone."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from optuna.study import StudyDirection
from optuna.trial import TrialState

from search.pareto import FrontMember, ParetoFront
from search.problem import NOTES, Objective
from search.space import Vector
from search.study import counted_trials, read_study


@dataclass(frozen=True)
class SearchHistory:
    """The finished trials of a study, in order; None for one that failed or broke a constraint."""

    name: str
    objectives: tuple[Objective, ...]
    trials: tuple[FrontMember | None, ...]

    @classmethod
    def read(
        cls, journal: Path, name: str, by_now: Callable[[Vector], Mapping[str, float]] = lambda vector: {}
    ) -> "SearchHistory":
        """Read a study.

        Args:
            by_now: what is known better of a vector than when it was told, by name. What was feasible
                then counts as feasible.

        Raises:
            ValueError: if there is none.
        """
        study = read_study(journal)
        assert study.metric_names is not None
        objectives = tuple(
            Objective(metric, "maximize" if direction == StudyDirection.MAXIMIZE else "minimize")
            for metric, direction in zip(study.metric_names, study.directions, strict=True)
        )
        trials: list[FrontMember | None] = []
        for trial in counted_trials(study):
            is_feasible = all(violation <= 0 for violation in trial.constraints.values())
            if trial.state == TrialState.COMPLETE and is_feasible:
                values = {key: value for key, value in trial.user_attrs.items() if key not in NOTES}
                vector = tuple(trial.params.values())
                trials.append(FrontMember(vector, {**values, **by_now(vector)}))
            else:
                trials.append(None)
        return cls(name, objectives, tuple(trials))

    @property
    def front(self) -> ParetoFront:
        return ParetoFront.of([trial for trial in self.trials if trial is not None], self.objectives)

    def hypervolumes(self, reference: Mapping[str, float]) -> list[float]:
        """After each trial."""
        front = ParetoFront.of([], self.objectives)
        volumes: list[float] = []
        volume = 0.0
        for trial in self.trials:
            grown = front if trial is None else front.with_candidate(trial)
            if grown is not front:
                front, volume = grown, grown.hypervolume(reference)
            volumes.append(volume)
        return volumes


def common_reference(histories: Sequence[SearchHistory]) -> dict[str, float]:
    """A corner behind every trial of all searches: the worst value of each objective.

    Raises:
        ValueError: if the searches have different objectives, or nothing to compare.
    """
    first = histories[0]
    for history in histories[1:]:
        if history.objectives != first.objectives:
            raise ValueError(
                f"{history.name} has other objectives ({_names(history)}) than {first.name} ({_names(first)})"
            )
    trials = [trial for history in histories for trial in history.trials if trial is not None]
    if not trials:
        raise ValueError("none of the searches has a finished trial yet")
    return {
        objective.name: (min if objective.direction == "maximize" else max)(
            trial.values[objective.name] for trial in trials
        )
        for objective in first.objectives
    }


def _names(history: SearchHistory) -> str:
    return ", ".join(f"{o.direction} {o.name}" for o in history.objectives)
