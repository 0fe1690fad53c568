"""What a run would do, without doing it: ``search.dry_run=true``."""

import logging
from collections.abc import Mapping, Sequence

from pipelines import build
from pipelines.artifacts import read_json
from pipelines.context import SCORES_FILE, Run, Stage
from pipelines.stages.calibrate import PREDICTOR_FILE
from pipelines.stages.search import cheap_quantities
from search.warm_start import warm_start
from sparsevit.backbone import BACKBONES
from sparsevit.latency import LatencyPredictor
from sparsevit.latency.macs import count_macs

logger = logging.getLogger(__name__)


def print_plan(run: Run, stages: Sequence[Stage], keys: Mapping[str, str]) -> None:
    """The stages, the space, the reachable latency, the number of evaluations, the expected time.

    Args:
        keys: of the stages; none while the data that they depend on is not drawn yet.
    """
    config = run.config
    finished = {
        stage.name: run.store.find(stage.name, keys[stage.name]) if keys else None for stage in stages
    }
    states = [f"{name} ({'finished' if result else 'to do'})" for name, result in finished.items()]
    print(f"stages:       {', '.join(states)}")
    space, budget = run.space, build.budget(config)
    print(
        f"space:        {space.size:,} vectors of {space.num_genes} genes ({', '.join(space.gene_names)}), "
        f"choices {', '.join(f'{choice:g}' for choice in space.choices)}"
    )
    calibration = finished.get("calibrate")
    if calibration is None:
        height, width = config.latency.image_size
        shape = BACKBONES[config.backbone.name]
        dense, sparsest = (
            count_macs(shape, (height, width), vector) for vector in (space.dense, space.sparsest)
        )
        print(
            "latency:      not calibrated yet (until=calibrate measures this device); the sparsest "
            f"vector has {sparsest / dense:.0%} of the dense one's {dense / 1e9:.3g} GMACs"
        )
    else:
        predictor = LatencyPredictor.load(calibration.folder / PREDICTOR_FILE)
        problem = build.problem(config, cheap_quantities(run, predictor.predict))
        low, high = problem.reachable("latency_ms")
        print(f"latency:      {low:.4g} to {high:.4g} ms, predicted")
        problem.require_feasible()
    print(f"constraints:  {', '.join(map(str, build.constraints(config))) or 'none'}")
    print(f"objectives:   {', '.join(f'{o.direction} {o.name}' for o in build.objectives(config))}")
    known = warm_start(list(config.search.warm_start), space)
    print(f"sampler:      {config.sampler.name}, {len(known)} vectors to start with")
    ends = {
        "evaluations": budget.num_evaluations,
        "hours": config.search.max_hours,
        "evaluations without gain": budget.plateau,
    }
    bounds = [f"{value:g} {name}" for name, value in ends.items() if value is not None]
    print(f"budget:       {' or '.join(bounds)}, {config.cluster.num_workers or 'all possible'} at a time")
    generated = config.data.generated
    if keys or generated is None:
        num_there = len(run.search_set)
    else:
        num_there = int(generated.num_images.get("search", config.data.num_search))
    num_images = min(config.search.num_images or num_there, num_there)
    seconds = seconds_per_image(run, finished)
    if config.search.max_hours is not None:
        print(f"time:         at most {config.search.max_hours:g} h")
    if seconds is None:
        print(f"time:         unknown until a model is evaluated here; {num_images} images per evaluation")
    elif budget.num_evaluations is not None:
        total = budget.num_evaluations * num_images * seconds / (config.cluster.num_workers or 1)
        print(
            f"time:         about {total / 60:.1f} min: {num_images} images per evaluation, "
            f"{seconds:.2g} s each where the dense model was evaluated"
        )


def seconds_per_image(run: Run, finished: Mapping[str, object]) -> float | None:
    """How long an image took when accuracy was computed last, dense; an upper bound for the search."""
    for name in ("adapt", "train"):
        result = finished.get(name)
        path = run.store.root / f"{name}-{getattr(result, 'key', '')}" / SCORES_FILE
        if path.is_file():
            for entry in read_json(path).values():
                if entry["vector"] == str(run.space.dense) and "seconds_per_image" in entry:
                    return float(entry["seconds_per_image"])
    return None
