"""Stage 4: search for sparsity vectors on the adapted supernet."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from optuna.trial import FrozenTrial, TrialState

from pipelines import build
from pipelines.artifacts import write_text
from pipelines.context import Run
from pipelines.evaluation import SupernetEvaluatorFactory
from pipelines.progress import progress_bar
from pipelines.stages.calibrate import PREDICTOR_FILE
from search.encoding import vector_of
from search.engine import run_search
from search.objectives import Admission, CheapQuantity, Objective
from search.pareto import FrontMember, ParetoFront
from search.study import REASON, counted_trials, enqueue, open_study, requeue_interrupted
from search.variation import first_generation
from sparsevit.backbone import BACKBONES
from sparsevit.latency import LatencyPredictor
from sparsevit.latency.macs import count_macs
from sparsevit.sparsity import SparsitySpace, SparsityVector

FRONT_FILE = "front.json"
STUDY_FILE = "study.journal"


class Search:
    """Accuracy from the supernet on the search split, latency from the predictor."""

    name = "search"
    needs = ("adapt", "calibrate")

    def depends_on(self, run: Run) -> Mapping[str, Any]:
        return {
            "search": build.plain(run.config.search),
            "sampler": build.plain(run.config.sampler),
            "data": run.data_fingerprint(run.search_set),
            "evaluation": build.plain(run.config.evaluation),
        }

    def execute(self, run: Run, folder: Path) -> Mapping[str, float]:
        config = run.config.search
        objectives = build.objectives(run.config)
        admission = Admission(
            cheap_quantities(run, run.results["calibrate"].folder), build.constraints(run.config)
        )
        admission.require_feasible(run.space)
        sampler, source = build.sampler(run.config.sampler, run.space, admission, config.seed)
        study = open_study(folder / STUDY_FILE, objectives, sampler)
        requeue_interrupted(study, run.space)
        if run.config.sampler.name == "nsga2":  # vectors that an earlier process enqueued are skipped
            first = first_generation(
                admission.quantities["latency_ms"], run.space, admission.admits, source.rng,
                num_vectors=run.config.sampler.population_size, num_candidates=2000,
            )  # fmt: skip
            enqueue(study, first, run.space)
        reference = hypervolume_reference(objectives, admission.quantities, run.space)
        done = counted_trials(study)
        history = [trial for trial in done if trial.state == TrialState.COMPLETE]
        for trial in done:
            _log_trial(run, trial)
        with progress_bar(
            config.num_evaluations, "search: evaluations", unit="vector", initial=len(done)
        ) as advance:

            def on_trial(trial: FrozenTrial) -> None:
                _log_trial(run, trial)
                if trial.state == TrialState.COMPLETE:
                    history.append(trial)
                volume = front_of(history, objectives, run.space).hypervolume(reference)
                run.tracker.log_metrics(self.name, {"hypervolume": volume}, trial.number)
                advance(1, hypervolume=f"{volume:.3f}")

            run_search(
                study, run.space, admission, self._factory(run), build.engine(run.config),
                num_evaluations=config.num_evaluations, sample_budget=config.num_images, on_trial=on_trial,
            )  # fmt: skip
        trials = counted_trials(study)
        front = front_of(trials, objectives, run.space)
        write_text(folder / FRONT_FILE, front.to_json())
        return {
            "num_evaluations": len(trials),
            "num_failed": sum(trial.state == TrialState.FAIL for trial in trials),
            "num_front_members": len(front.members),
            "final_hypervolume": front.hypervolume(reference),
        }

    def score(self, run: Run) -> Mapping[str, float]:
        return {}

    def _factory(self, run: Run) -> SupernetEvaluatorFactory:
        cluster = build.engine(run.config)
        split = run.search_set
        return SupernetEvaluatorFactory(
            backbone=run.config.backbone.name,
            task=run.config.task.name,
            task_config=asdict(run.task.config),
            weights={name: value.cpu() for name, value in run.model_of("adapt").state_dict().items()},
            data_root=split.root.resolve(),
            split=split.split,
            image_ids=tuple(split.image_ids),
            batch_size=run.config.evaluation.batch_size,
            precision=run.config.evaluation.precision,
            device="cuda" if cluster.gpus_per_worker > 0 else "cpu",
            num_threads=max(1, int(cluster.cpus_per_worker)),
        )


def cheap_quantities(run: Run, calibration: Path) -> dict[str, CheapQuantity]:
    """Predicted latency and MACs (in 10⁹) of a vector, by name."""
    predictor = LatencyPredictor.load(calibration / PREDICTOR_FILE)
    height, width = run.config.latency.image_size
    shape = BACKBONES[run.config.backbone.name]

    def macs_g(vector: SparsityVector) -> float:
        return count_macs(shape, (height, width), vector) / 1e9

    return {"latency_ms": predictor.predict, "macs_g": macs_g}


def front_of(
    trials: Sequence[FrozenTrial], objectives: Sequence[Objective], space: SparsitySpace
) -> ParetoFront:
    """The Pareto front of the complete trials."""
    members = [
        FrontMember(vector, {name: v for name, v in trial.user_attrs.items() if name != REASON})
        for trial in trials
        if trial.state == TrialState.COMPLETE and (vector := vector_of(trial, space)) is not None
    ]
    return ParetoFront.of(members, objectives)


def hypervolume_reference(
    objectives: Sequence[Objective], quantities: Mapping[str, CheapQuantity], space: SparsitySpace
) -> dict[str, float]:
    """The corner that a front is measured from: no accuracy, a tenth above the dense cost."""
    return {
        objective.name: 1.1 * quantities[objective.name](space.dense) if objective.name in quantities else 0.0
        for objective in objectives
    }


def _log_trial(run: Run, trial: FrozenTrial) -> None:
    key = f"trial-{trial.number}"
    vector = vector_of(trial, run.space)
    params = {"vector": str(vector), **trial.params}
    if REASON in trial.user_attrs:
        params["failure"] = trial.user_attrs[REASON]
    if run.tracker.start(key, f"trial {trial.number}", parent="search", params=params):
        run.tracker.log_metrics(key, {k: v for k, v in trial.user_attrs.items() if isinstance(v, float)})
        run.tracker.end(key, is_success=trial.state == TrialState.COMPLETE)
        run.tracker.flush()
