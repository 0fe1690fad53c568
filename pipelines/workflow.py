"""The whole way: every stage in order, each skipped when its finished result is on disk."""

import logging
import os
import time
from dataclasses import replace
from pathlib import Path

import pandas as pd
from omegaconf import OmegaConf

from pipelines import build, schema
from pipelines.artifacts import METRICS_FILE, ArtifactStore, StageResult, content_key, write_json, write_text
from pipelines.context import Run, Stage
from pipelines.errors import ConfigurationError
from pipelines.inspection import print_findings
from pipelines.plan import print_plan
from pipelines.plots import HTML_FILE
from pipelines.stages.adapt import Adapt
from pipelines.stages.calibrate import PREDICTOR_FILE, Calibrate
from pipelines.stages.finetune import Finetune
from pipelines.stages.report import EXPORT_FOLDER, TABLE_FILE, Report
from pipelines.stages.search import Search, cheap_quantities
from pipelines.stages.train import Train
from pipelines.tracking import PARENT, NoTracker, Tracker
from pipelines.verdict import compared
from search.engine import check_cluster
from search.problem import Constraint
from sparsevit import __version__
from sparsevit.allocator import keep_freed_memory
from sparsevit.latency import LatencyPredictor

STAGES: tuple[Stage, ...] = (Train(), Adapt(), Calibrate(), Search(), Finetune(), Report())
CHECK = "check"
"""In place of a stage: look at data and weights, and do nothing."""
logger = logging.getLogger(__name__)


def run_pipeline(config: schema.ConfigSchema) -> dict[str, StageResult]:
    """Run every stage up to `config.until` that is not finished on disk.

    Raises:
        ValueError: for bad input, before any long work.
    """
    build.check(config)
    keep_freed_memory()
    stages = _until(config.until)
    start = time.monotonic()
    logger.info(
        "%s at scale %s: %s, %s", config.experiment, config.scale, config.backbone.name, build.device(config)
    )
    output = Path(config.output) / config.experiment
    if config.search.dry_run and not build.has_data(config):
        print_plan(Run(config, ArtifactStore(output / "stages"), NoTracker()), stages, {})
        return {}
    run = Run(config, ArtifactStore(output / "stages"), NoTracker())
    if config.until == CHECK:
        print_findings(run)
        return {}
    keys = stage_keys(run, stages)
    if "search" in keys:
        check_cluster(config.cluster.address)
        Search().check_storage(run, keys)
    if config.search.dry_run:
        print_plan(run, stages, keys)
        return {}
    run_folder = output / "runs" / content_key(keys)
    run_folder.mkdir(parents=True, exist_ok=True)
    write_text(run_folder / "config.yaml", OmegaConf.to_yaml(config, resolve=True))
    run.tracker = _tracker(config, run_folder)
    if any(run.store.find(stage.name, keys[stage.name]) is None for stage in stages):
        run.initial_model()  # a checkpoint that does not fit fails here
        run.verify_images()
    run.tracker.start(PARENT, config.experiment, params=build.flat(config))
    try:
        for stage in _in_order(stages, config):
            _run_stage(run, stage, keys[stage.name])
        if not run.tracker.is_ended(PARENT):
            run.tracker.log_metrics(PARENT, run.results[stages[-1].name].metrics)  # to compare runs by
            run.tracker.end(PARENT)
    except BaseException:
        run.tracker.end(PARENT, is_success=False)
        raise
    finally:
        run.tracker.close()
    link_results(run_folder, run.results)
    write_json(
        run_folder / METRICS_FILE, {name: dict(result.metrics) for name, result in run.results.items()}
    )
    if "report" in run.results:
        print_summary(run, time.monotonic() - start)
    return run.results


def stage_keys(run: Run, stages: tuple[Stage, ...]) -> dict[str, str]:
    """The key of every stage: a hash of what it depends on and of the keys of the stages it needs."""
    keys: dict[str, str] = {}
    for stage in stages:
        depends_on = {
            "stage": stage.name,
            "version": __version__,
            "needs": [keys[name] for name in stage.needs(run.config)],
            **stage.depends_on(run),
        }
        keys[stage.name] = content_key(depends_on)
    return keys


def link_results(run_folder: Path, results: dict[str, StageResult]) -> None:
    """Give the run's folder a link to every stage it used."""
    for name, result in results.items():
        link = run_folder / name
        if not link.is_symlink():
            link.symlink_to(os.path.relpath(result.folder, run_folder))


def print_summary(run: Run, seconds: float) -> None:
    """The table, and where to find and how to use what came out."""
    report = run.results["report"].folder
    metric = run.task.metric
    table = pd.read_csv(report / TABLE_FILE, keep_default_na=True).fillna({"chosen": ""})
    remarks = [remark for stage in STAGES if (remark := stage.remark(run)) is not None]
    for remark in remarks:
        print(f"\nwarning: {remark}")
    print("\nPareto front, measured (* chosen and finetuned)")
    print(table.to_string(index=False, float_format="{:.3f}".format, na_rep="-"))
    values = run.results["report"].metrics
    print(
        f"\nchosen: {compared(values['chosen_speedup'])}, {metric} "
        f"{values[f'chosen_{metric}']:.3f} against {values[f'dense_{metric}']:.3f}"
    )
    print(f"report:  {report / HTML_FILE}")
    if isinstance(run.tracker, Tracker):
        print(f"mlflow:  mlflow ui --backend-store-uri {_tracking_uri(run.config)}")
        if run.tracker.num_unsent:
            print(f"         {run.tracker.num_unsent} records could not be sent; the next run sends them")
    print("load the subnet:")
    print("    from sparsevit import load_exported")
    trust = ", trusted=True" if ":" in run.config.task.name else ""
    print(f"    model = load_exported({str(report / EXPORT_FOLDER)!r}{trust})")
    print(f"    {run.task.example}")
    print(f"finished in {seconds:.0f} s")


def _run_stage(run: Run, stage: Stage, key: str) -> None:
    """Execute or find one stage, score it, log it, and add it to the run's results."""
    number = [each.name for each in STAGES].index(stage.name) + 1
    label = f"[{number}/{len(STAGES)}] {stage.name}"
    if run.store.find(stage.name, key) is None:
        logger.info("%s …", label)
    run.tracker.start(stage.name, stage.name, parent=PARENT, params={"key": key})
    depends_on = stage.depends_on(run)
    try:
        result = run.store.run(stage.name, key, depends_on, lambda folder: stage.execute(run, folder))
        run.results[stage.name] = result
        result = replace(result, metrics={**result.metrics, **stage.score(run)})
        run.results[stage.name] = result
    except BaseException:
        run.tracker.end(stage.name, is_success=False)
        raise
    figures = ", ".join(f"{name} {value:.4g}" for name, value in result.metrics.items())
    how = "skipped, finished before" if result.was_reused else f"done in {result.seconds:.0f} s"
    remark = stage.remark(run)
    logger.info("%s: %s (%s)%s", label, how, figures, "" if remark is None else f" – {remark}")
    if not run.tracker.is_ended(stage.name):
        run.tracker.log_metrics(stage.name, {**result.metrics, "seconds": result.seconds})
        for path in sorted(result.folder.iterdir()):
            if path.suffix in (".json", ".html", ".png", ".csv"):
                run.tracker.log_artifact(stage.name, path)
        run.tracker.end(stage.name)
    run.tracker.flush()
    if stage.name == "calibrate":
        _require_feasible_budget(run, result)


def _require_feasible_budget(run: Run, calibration: StageResult) -> None:
    """Fail as soon as the device is known, if no vector can meet the budget."""
    predictor = LatencyPredictor.load(calibration.folder / PREDICTOR_FILE)
    problem = build.problem(run.config, cheap_quantities(run, predictor.predict))
    problem.require_feasible()
    budget_ms = run.config.finetune.latency_budget_ms
    if budget_ms is not None:
        replace(problem, constraints=[Constraint("latency_ms", upper=budget_ms)]).require_feasible()


def _in_order(stages: tuple[Stage, ...], config: schema.ConfigSchema) -> list[Stage]:
    """Calibration comes early where a latency budget is set: one that nothing meets fails at once."""
    budgets = (config.search.latency_budget_ms, config.finetune.latency_budget_ms)
    has_budget = any(budget is not None for budget in budgets) or bool(config.search.constraints)
    if not has_budget:
        return list(stages)
    ordered = [stage for stage in stages if stage.name != "calibrate"]
    names = [stage.name for stage in ordered]
    for stage in stages:
        if stage.name == "calibrate":
            ordered.insert(max((names.index(name) + 1 for name in stage.needs(config)), default=0), stage)
    return ordered


def _until(name: str) -> tuple[Stage, ...]:
    names = [CHECK, *(stage.name for stage in STAGES)]
    if name not in names:
        raise ConfigurationError(f"until={name}: choose one of {', '.join(names)}")
    if name == CHECK:
        return ()
    return STAGES[: names.index(name)]


def _tracking_uri(config: schema.ConfigSchema) -> str:
    if config.tracking.uri is not None:
        return str(config.tracking.uri)
    return f"sqlite:///{(Path(config.output) / 'mlflow.db').resolve()}"


def _tracker(config: schema.ConfigSchema, run_folder: Path) -> Tracker | NoTracker:
    if not config.tracking.enabled:
        return NoTracker()
    return Tracker(
        run_folder,
        uri=_tracking_uri(config),
        artifact_root=Path(config.output) / "mlartifacts",
        experiment=config.tracking.experiment,
    )
