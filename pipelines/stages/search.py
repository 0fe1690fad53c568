"""Stage 4: search for sparsity vectors on the adapted supernet."""

import logging
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from optuna import Study
from optuna.trial import FrozenTrial
from torch import nn

from pipelines import build
from pipelines.artifacts import content_key
from pipelines.context import Run
from pipelines.errors import RunStopped
from pipelines.evaluation import SharedTensor, SupernetEvaluatorFactory
from pipelines.measured_front import MeasuredFront
from pipelines.schema import ConfigSchema
from pipelines.search_log import FRONT_FILE, SearchLog
from pipelines.stages.calibrate import PREDICTOR_FILE
from pipelines.terminal import SearchView
from search.dispatch import Dispatcher
from search.engine import run_search
from search.problem import CheapQuantity, SearchProblem
from search.progress import SearchProgress
from search.samplers import create_sampler
from search.study import counted_trials, enqueue, open_study
from search.warm_start import warm_start
from sparsevit.backbone import BACKBONES
from sparsevit.latency import LatencyPredictor
from sparsevit.latency.macs import count_macs
from sparsevit.sparsity import SparsityVector

STUDY_FILE = "study.journal"
logger = logging.getLogger(__name__)


class Search:
    """Accuracy from the supernet on the search split, latency from the predictor."""

    name = "search"

    def needs(self, config: ConfigSchema) -> tuple[str, ...]:
        return ("adapt", "calibrate")

    def depends_on(self, run: Run) -> Mapping[str, Any]:
        search = build.plain(run.config.search)
        for name in (
            "dry_run",
            "storage",
            "max_failures",
            "population_size",
        ):  # not of the result, or the sampler's
            del search[name]
        return {
            "search": search,
            "sampler": build.plain(run.config.sampler),
            "data": run.data_fingerprint(run.search_set),
            "evaluation": build.plain(run.config.evaluation),
        }

    def execute(self, run: Run, folder: Path) -> Mapping[str, float]:
        config = run.config.search
        measured = MeasuredFront(run, folder)
        problem = build.problem(run.config, cheap_quantities(run, measured.predict))
        problem.require_feasible()
        sampler = create_sampler(problem, build.sampler(run.config))
        if measured.num_refits:
            sampler.revise()
        first = [*warm_start(list(config.warm_start), run.space), *sampler.first_vectors()]
        keys = {name: run.results[name].key for name in self.needs(run.config)}
        with open_study(study_file(run, folder), problem, sampler, about=self.about(run, keys)) as study:
            enqueue(study, first, problem)  # those that an earlier process enqueued are skipped
            progress, stopped_by = self._search(run, folder, study, problem, measured)
        logger.info("  the search ends: %s", stopped_by)
        if has_too_many_failures(progress, config.max_failures):
            raise RunStopped(
                f"the search stopped: {stopped_by}. Its front so far ({len(progress.front.members)} vectors) "
                f"is in {folder / FRONT_FILE}; after mending the cause, run again with a larger "
                "search.max_failures to go on from there"
            )
        if not progress.front.members:
            raise RunStopped(
                f"the search found no vector ({stopped_by}): {len(progress.failures)} trials failed, "
                f"{progress.num_infeasible} break a constraint ({problem.described_constraints}). Loosen the "
                "constraints, or search longer"
            )
        return {
            "num_evaluations": progress.num_counted,
            "num_failed": len(progress.failures),
            "num_front_members": len(progress.front.members),
            "final_hypervolume": progress.hypervolume,
            "num_refits": measured.num_refits,
            "error_bar": measured.predictor.error_bar,
        }

    def about(self, run: Run, keys: Mapping[str, str]) -> dict[str, Any]:
        """What a trial's result and its vector are a function of: a study is about one of these.

        Args:
            keys: of the stages that the search needs.
        """
        depends_on = self.depends_on(run)
        return {
            "experiment": run.config.experiment,
            "supernet": keys["adapt"],
            "calibration": keys["calibrate"],
            "images": content_key([depends_on["data"], run.config.search.num_images]),
            "evaluation": depends_on["evaluation"],
            "sampler": depends_on["sampler"],
            "seed": run.config.search.seed,
        }

    def check_storage(self, run: Run, keys: Mapping[str, str]) -> None:
        """Open the user's own study, if there is one, and close it again.

        Raises:
            ValueError: if the search could not go on with it.
        """
        path = run.config.search.storage
        if path is not None and (Path(path).exists() or not run.config.search.dry_run):
            problem = build.problem(run.config, dict.fromkeys(build.CHEAP_QUANTITIES, lambda vector: 0.0))
            sampler = create_sampler(problem, build.sampler(run.config))
            with open_study(Path(path), problem, sampler, about=self.about(run, keys)):
                logger.info("the search goes into the study %s", path)

    def _search(
        self, run: Run, folder: Path, study: Study, problem: SearchProblem, measured: MeasuredFront
    ) -> tuple[SearchProgress, str]:
        config, population_size = run.config.search, run.config.sampler.population_size
        log = SearchLog(
            run.tracker, self.name, folder, problem, trials=run.config.tracking.trials, every=population_size,
            details=measured.details,
        )  # fmt: skip
        errors = run.results["calibrate"].metrics
        run.tracker.log_metrics(
            self.name,
            {f"predictor_{name}": errors[name] for name in ("rmspe", "spearman") if name in errors},
        )

        def on_trial(trial: FrozenTrial, progress: SearchProgress) -> None:
            log.on_trial(trial, progress)
            view.update()

        budget = build.budget(run.config)
        dispatcher = Dispatcher(
            study, problem, budget, batch_size=population_size if config.deterministic else None,
            on_trial=on_trial, pause_every=measured.every, on_pause=measured.measure,
        )  # fmt: skip
        progress = dispatcher.progress
        with SearchView(
            progress, budget, lambda: dispatcher.num_running, accuracy=run.task.metric, cost="latency_ms"
        ) as view:
            stopped_by = run_search(
                dispatcher,
                evaluator_factory(run, run.model_of("adapt")),
                build.engine(run.config),
                sample_budget=config.num_images,
            )
        while measured.measure(progress):  # what it changes may bring others to the front
            dispatcher.revise()
        log.finish(counted_trials(study), progress)
        return progress, stopped_by

    def score(self, run: Run) -> Mapping[str, float]:
        return {}

    def remark(self, run: Run) -> str | None:
        return None


def evaluator_factory(run: Run, supernet: nn.Module) -> SupernetEvaluatorFactory:
    """What a worker makes its evaluator of: the supernet, and where the search split is."""
    cluster, split = build.engine(run.config), run.search_set
    return SupernetEvaluatorFactory(
        backbone=run.config.backbone.name,
        task=run.config.task.name,
        task_config=asdict(run.task.config),
        weights={name: SharedTensor.of(value) for name, value in supernet.state_dict().items()},
        data_root=split.root.resolve(),
        image_folder=run.config.data.images,
        split=split.split,
        sample_ids=tuple(split.sample_ids),
        batch_size=run.config.evaluation.batch_size,
        precision=run.config.evaluation.precision,
        device="cuda" if cluster.gpus_per_worker > 0 else "cpu",
        num_threads=max(1, int(cluster.cpus_per_worker)),
    )


def search_problem(run: Run) -> SearchProblem:
    """What the search was about, with the latency table that it ended with."""
    predictor = LatencyPredictor.load(run.results["search"].folder / PREDICTOR_FILE)
    return build.problem(run.config, cheap_quantities(run, predictor.predict))


def has_too_many_failures(progress: SearchProgress, max_failures: int | None) -> bool:
    return max_failures is not None and len(progress.failures) >= max_failures


def study_file(run: Run, folder: Path) -> Path:
    """Where the study is: in the stage's folder, unless the user wants it elsewhere."""
    return Path(run.config.search.storage) if run.config.search.storage else folder / STUDY_FILE


def cheap_quantities(run: Run, latency_ms: Callable[[SparsityVector], float]) -> dict[str, CheapQuantity]:
    """Predicted latency and MACs (in 10⁹) of a vector, by name."""
    height, width = run.config.latency.image_size
    shape = BACKBONES[run.config.backbone.name]

    def macs_g(vector: SparsityVector) -> float:
        return count_macs(shape, (height, width), vector) / 1e9

    return {"latency_ms": latency_ms, "macs_g": macs_g}
