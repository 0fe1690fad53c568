"""Which trial runs next, and when to stop: everything about a search but where its trials run.

The dispatcher is the one writer of the study. It hands out trials, takes their results, and counts
them against the budget. It knows nothing of workers: Ray Tune (`search.engine`) asks it, or a loop.
"""

import math
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from optuna import Study
from optuna.trial import FrozenTrial, Trial, TrialState

from search.encoding import decode
from search.problem import ELAPSED, NOTES, REASON, WORKER, SearchProblem
from search.progress import SearchProgress
from search.samplers import VectorSampler
from search.space import Vector
from search.study import close_undrawn, counted_trials, in_flight
from search.variation import SearchExhausted

OnTrial = Callable[[FrozenTrial, SearchProgress], None]


@dataclass(frozen=True)
class Budget:
    """When a search ends: as soon as one of these is reached.

    Attributes:
        num_evaluations: finished trials, failures included.
        seconds: time spent searching, that of interrupted processes included.
        plateau: evaluations in a row that raise the hypervolume by at most `plateau_gain` of itself.
        max_failures: trials that failed for good.

    Raises:
        ValueError: if nothing would end the search, or a bound is not a positive, finite number.
    """

    num_evaluations: int | None = None
    seconds: float | None = None
    plateau: int | None = None
    plateau_gain: float = 0.001
    max_failures: int | None = None

    def __post_init__(self) -> None:
        for name in ("num_evaluations", "plateau", "max_failures"):
            value = getattr(self, name)
            if value is not None and not (isinstance(value, int) and value > 0):
                raise ValueError(f"the budget {name} must be a positive integer, got {value!r}")
        if self.seconds is not None and not 0 < self.seconds < math.inf:
            raise ValueError(f"the budget seconds must be positive and finite, got {self.seconds}")
        if not 0 <= self.plateau_gain < math.inf:
            raise ValueError(f"plateau_gain must be finite and at least 0, got {self.plateau_gain}")
        if self.num_evaluations is None and self.seconds is None and self.plateau is None:
            raise ValueError("a search needs a budget: num_evaluations, seconds or plateau")

    def reached(self, progress: SearchProgress, batch_size: int = 1) -> str | None:
        """What has ended the search, in words. A plateau is counted in whole batches."""
        num_failures = len(progress.failures)
        if self.max_failures is not None and num_failures >= self.max_failures:
            reasons = "; ".join(sorted(set(progress.failures)))[:500]
            return f"{num_failures} trials failed for good (max_failures={self.max_failures}): {reasons}"
        if self.num_evaluations is not None and progress.num_counted >= self.num_evaluations:
            return f"{progress.num_counted} evaluations are done"
        if self.seconds is not None and progress.elapsed_s >= self.seconds:
            return f"{self.seconds:g} s are over"
        if self.plateau is not None:
            plateau = math.ceil(self.plateau / batch_size) * batch_size
            if progress.has_levelled_off(plateau, self.plateau_gain):
                return f"{plateau} evaluations raised the hypervolume by at most {self.plateau_gain:.2%}"
        return None


class Dispatcher:
    """Hands out trials and takes their results, each told once or not at all.

    Args:
        study: opened for writing; trials that it holds in flight are handed out first.
        budget: what ends the search.
        batch_size: propose so many trials at once, and no more before all of them are finished, so
            that what is proposed does not depend on the order in which workers finish. None proposes
            whenever somebody asks.
        on_trial: called for every finished trial.
        pause_every: after so many finished trials nothing runs for a while, and `on_pause` is called. It
            returns whether the cheap quantities have changed: then finished trials are taken for what they
            are by now.
    """

    def __init__(
        self,
        study: Study,
        problem: SearchProblem,
        budget: Budget,
        *,
        batch_size: int | None = None,
        on_trial: OnTrial = lambda trial, progress: None,
        pause_every: int | None = None,
        on_pause: Callable[[SearchProgress], bool] = lambda progress: False,
    ) -> None:
        self.study = study
        self.problem = problem
        self.budget = budget
        self.progress = SearchProgress(problem)
        self.exhausted: SearchExhausted | None = None
        self.broken: str | None = None  # why no worker can evaluate anything
        self._batch_size = batch_size
        self._on_trial = on_trial
        self._pause_every = pause_every
        self._on_pause = on_pause
        self._is_pause_due = False
        self._running: dict[int, Trial] = {}
        self._waiting = deque(in_flight(study, problem.space))
        finished = counted_trials(study)
        for trial in finished:
            self.progress.add(trial)
            self.progress.elapsed_before_s = max(
                self.progress.elapsed_before_s, trial.user_attrs.get(ELAPSED, 0.0)
            )
        if batch_size is not None and len(finished) % batch_size == 0:
            # Nothing of a batch runs before all of it is proposed: an interrupted proposal goes on.
            self._propose(-len(self._waiting) % batch_size)

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def is_over(self) -> bool:
        """Whether no further trial will be handed out, though some may still run."""
        if self.stopped_by is not None:
            return True
        is_spent = (
            self.budget.num_evaluations is not None and self._num_proposed >= self.budget.num_evaluations
        )
        return not self._waiting and (is_spent or self.exhausted is not None)

    @property
    def stopped_by(self) -> str | None:
        """What has ended the search, in words; None while there is more to do."""
        if self.broken is not None:
            return self.broken
        if self._batch_size is not None and (self._running or self._waiting):
            return None  # a batch is never cut
        reached = self.budget.reached(self.progress, batch_size=self._batch_size or 1)
        if reached is not None:
            return reached
        if self.exhausted is not None and not self._running and not self._waiting:
            return str(self.exhausted)
        return None

    def next_trial(self) -> Trial | None:
        """A trial to run now; None if there is none, for the moment or for good (`stopped_by`)."""
        if self.stopped_by is not None or (self._is_pause_due and self._running):
            return None
        if self._is_pause_due:
            self._is_pause_due = False
            if self._on_pause(self.progress):
                self.revise()
        if not self._waiting:
            if self._batch_size is None:
                self._propose(1)
            elif not self._running:
                self._propose(self._batch_size - self._num_proposed % self._batch_size)
        if not self._waiting:
            return None
        trial = self._waiting.popleft()
        self._running[trial.number] = trial
        return trial

    def vector_of(self, trial: Trial) -> Vector:
        return decode(trial.params, self.problem.space)

    def tell(self, number: int, values: Mapping[str, float], worker: str = "") -> None:
        """Take the result of a running trial: what the evaluator gave, by name, and who ran it.

        Raises:
            KeyError: if the trial is not running.
        """
        trial = self._running[number]
        known = {**values, **self.problem.measure(self.vector_of(trial))}
        missing = [name for name in self.problem.needed if name not in known]
        if missing:
            self.fail(number, f"the evaluation gave {sorted(values)}, but not {', '.join(missing)}")
            return
        taken = sorted({*NOTES, *self.problem.quantities} & {*values})
        if taken:
            self.fail(number, f"the evaluation gave {', '.join(taken)}, which has that name already")
            return
        for name, value in known.items():
            trial.set_user_attr(name, value)
        for constraint in self.problem.constraints:
            trial.set_constraint(constraint.name, constraint.violation(known[constraint.name]))
        trial.set_user_attr(ELAPSED, round(self.progress.elapsed_s, 3))
        trial.set_user_attr(WORKER, worker)
        objectives = [known[objective.name] for objective in self.problem.objectives]
        self.study.tell(trial, objectives)  # last: what is cut off before is evaluated again
        self._finish(number)

    def requeue(self, number: int) -> None:
        """Hand a running trial out again, next: where it ran is gone, through no fault of its own."""
        self._waiting.appendleft(self._running.pop(number))

    def stop(self, reason: str) -> None:
        """Hand out nothing more; what runs stays in flight, to be evaluated by the next process."""
        self.broken = reason

    def fail(self, number: int, reason: str) -> None:
        """Record that a running trial has failed for good."""
        trial = self._running[number]
        trial.set_user_attr(REASON, reason)
        trial.set_user_attr(ELAPSED, round(self.progress.elapsed_s, 3))
        self.study.tell(trial, state=TrialState.FAIL)
        self._finish(number)

    def revise(self) -> None:
        """Take finished trials anew: their cheap quantities are no longer what they were."""
        self.progress.recount(counted_trials(self.study))
        if isinstance(self.study.sampler, VectorSampler):
            self.study.sampler.revise()

    @property
    def _num_proposed(self) -> int:
        """Trials that use up budget: finished, running or waiting."""
        return self.progress.num_counted + len(self._running) + len(self._waiting)

    def _propose(self, count: int) -> None:
        space = self.problem.space
        if self.budget.num_evaluations is not None:
            count = min(count, self.budget.num_evaluations - self._num_proposed)
        try:
            for _ in range(count):
                trial = self.study.ask()
                for name, choices in zip(space.gene_names, space.gene_choices, strict=True):
                    trial.suggest_categorical(name, choices)
                self._waiting.append(trial)
        except SearchExhausted as error:
            self.exhausted = error
            close_undrawn(self.study, trial)

    def _finish(self, number: int) -> None:
        trial = self._running.pop(number)
        frozen = self.study._storage.get_trial(trial._trial_id)  # all trials take time to list
        self.progress.add(frozen)
        if self._pause_every is not None and self.progress.num_counted % self._pause_every == 0:
            self._is_pause_due = True
        self._on_trial(frozen, self.progress)
