"""The engine on a real Ray: failures are retried and recorded, the budget is spent once."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from optuna.trial import FrozenTrial, TrialState

from search.encoding import vector_of
from search.engine import EngineConfig, run_search
from search.evaluator import Evaluator
from search.objectives import Admission, Objective
from search.sampler import SparsityNSGAIISampler, VectorSource
from search.study import REASON, counted_trials, enqueue, open_study
from sparsevit.sparsity import SparsitySpace, SparsityVector

SPACE = SparsitySpace((2, 2))
RAISES, GIVES_NAN, LOSES_WORKER, RAISES_ONCE = (SPACE.uniform(ratio) for ratio in (0.1, 0.2, 0.3, 0.4))


@dataclass(frozen=True)
class Treacherous:
    """An evaluator that goes wrong in every way, on vectors that the test enqueues."""

    folder: Path

    def __call__(self) -> Evaluator:
        def evaluate(vector: SparsityVector, budget: int | None) -> Mapping[str, float]:
            if vector == RAISES:
                raise RuntimeError("out of memory, say")
            if vector == GIVES_NAN:
                return {"ap": float("nan")}
            if vector == LOSES_WORKER:
                os._exit(1)
            marker = self.folder / "raised"
            if vector == RAISES_ONCE and not marker.exists():
                marker.touch()
                raise RuntimeError("once")
            return {"ap": 1 - sum(vector) / 4, "extra": float(budget or 0)}

        return evaluate


def test_failures_are_recorded_and_the_search_goes_on(tmp_path: Path) -> None:
    admission = Admission({"latency_ms": lambda vector: 10 - sum(vector)})
    sampler = SparsityNSGAIISampler(VectorSource(SPACE, admission, seed=0), population_size=4)
    objectives = [Objective("ap", "maximize"), Objective("latency_ms", "minimize")]
    study = open_study(tmp_path / "study.journal", objectives, sampler)
    enqueue(study, [RAISES, GIVES_NAN, LOSES_WORKER, RAISES_ONCE], SPACE)
    finished: list[FrozenTrial] = []
    for num_evaluations in (12, 12, 15):  # the second call has nothing left to do
        run_search(
            study, SPACE, admission, Treacherous(tmp_path), EngineConfig(num_workers=2, num_retries=1),
            num_evaluations=num_evaluations, sample_budget=7, on_trial=finished.append,
        )  # fmt: skip
    trials = counted_trials(study)
    assert len(trials) == len(finished) == 15
    assert len({vector_of(trial, SPACE) for trial in trials}) == 15
    failed = {vector_of(trial, SPACE): trial for trial in trials if trial.state == TrialState.FAIL}
    assert set(failed) == {RAISES, GIVES_NAN, LOSES_WORKER}
    assert failed[RAISES].user_attrs[REASON] == "RuntimeError: out of memory, say"
    assert "nan" in failed[GIVES_NAN].user_attrs[REASON]
    assert "ActorDiedError" in failed[LOSES_WORKER].user_attrs[REASON]
    for trial in trials:
        if trial.state == TrialState.COMPLETE:
            vector = vector_of(trial, SPACE)
            assert vector is not None
            assert trial.values == [trial.user_attrs["ap"], 10 - sum(vector)]
            assert trial.user_attrs["extra"] == 7
