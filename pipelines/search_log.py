"""What a search leaves for people while it runs: its front as files, its trials and curves in MLflow."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
from optuna.trial import FrozenTrial, TrialState

from pipelines.artifacts import write_text
from pipelines.plots import plot_front
from pipelines.tracking import NoTracker, Tracker
from search.encoding import vector_of
from search.problem import ELAPSED, REASON, SearchProblem
from search.progress import SearchProgress

FRONT_FILE = "front.json"
FRONT_TABLE = "front.csv"
FRONT_HTML = "front.html"
FRONT_PNG = "front.png"
TRIALS = ("all", "front", "none")


class SearchLog:
    """Writes the front every generation and logs trials as nested runs.

    Args:
        key: of the search's run in the tracker.
        trials: which trials get a run of their own: ``all``, ``front`` (at the end) or ``none``.
        every: finished trials between two writings of the front.
        details: what else is known of a vector, such as its measured latency.
    """

    def __init__(
        self,
        tracker: Tracker | NoTracker,
        key: str,
        folder: Path,
        problem: SearchProblem,
        *,
        trials: str,
        every: int,
        details: Callable[[Any], Mapping[str, float]],
    ) -> None:
        self._tracker = tracker
        self._key = key
        self._folder = folder
        self._problem = problem
        self._trials = trials
        self._every = every
        self._details = details

    def on_trial(self, trial: FrozenTrial, progress: SearchProgress) -> None:
        """Take a trial that has just finished."""
        if self._trials == "all":
            self.log_trial(trial)
        curves = {
            "hypervolume": progress.hypervolume,
            "num_failed": len(progress.failures),
            "feasible_share": 1 - progress.num_infeasible / max(1, progress.num_complete),
        }
        self._tracker.log_metrics(self._key, curves, progress.num_counted)
        if progress.num_counted % self._every == 0:
            self.write_front(progress)

    def finish(self, trials: Sequence[FrozenTrial], progress: SearchProgress) -> None:
        """Write the last front; log what is not logged yet."""
        self.write_front(progress)
        on_front = {member.vector for member in progress.front.members}
        for trial in trials:
            is_wanted = self._trials == "all" or (
                self._trials == "front" and vector_of(trial, self._problem.space) in on_front
            )
            if is_wanted:
                self.log_trial(trial)

    def write_front(self, progress: SearchProgress) -> None:
        """The front as JSON, table, page and picture, in the search's folder and in MLflow."""
        members = [
            replace(member, values={**member.values, **self._details(member.vector)})
            for member in progress.front.members
        ]
        front = replace(progress.front, members=tuple(members))
        write_text(self._folder / FRONT_FILE, front.to_json())
        table = pd.DataFrame([{"vector": str(member.vector), **member.values} for member in front.members])
        write_text(self._folder / FRONT_TABLE, table.to_csv(index=False))
        names = [objective.name for objective in front.objectives]
        if len(names) > 1 and len(table):
            plot_front(self._folder / FRONT_HTML, self._folder / FRONT_PNG, table, names[1], names[0])
        for name in (FRONT_FILE, FRONT_TABLE, FRONT_HTML, FRONT_PNG):
            if (self._folder / name).is_file():
                self._tracker.log_artifact(self._key, self._folder / name)

    def log_trial(self, trial: FrozenTrial) -> None:
        """A trial as a nested run; nothing if it has one."""
        key = f"trial-{trial.number}"
        vector = vector_of(trial, self._problem.space)
        params: dict[str, Any] = {"vector": str(vector)}
        for name, choices in zip(
            self._problem.space.gene_names, self._problem.space.gene_choices, strict=True
        ):
            params[name] = sortable(trial.params[name], choices)
        if REASON in trial.user_attrs:
            params["failure"] = trial.user_attrs[REASON]
        if self._tracker.start(key, f"trial {trial.number:05d}", parent=self._key, params=params):
            values = {
                name: value
                for name, value in trial.user_attrs.items()
                if isinstance(value, float) and name != ELAPSED
            }
            self._tracker.log_metrics(key, values)
            self._tracker.end(key, is_success=trial.state == TrialState.COMPLETE)


def sortable(value: float, choices: Sequence[float]) -> str:
    """A number as text that sorts as the number does: all choices with the same digits."""
    texts = [f"{choice:.12g}" for choice in choices]
    decimals = max(len(text.partition(".")[2]) for text in texts)
    width = max(len(f"{choice:.{decimals}f}") for choice in choices)
    return f"{value:0{width}.{decimals}f}"
