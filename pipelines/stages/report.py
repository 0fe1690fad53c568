"""Stage 6: measure the front, write the report, export the chosen subnet."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn
from torchvision.utils import make_grid

from pipelines import build
from pipelines.artifacts import write_text
from pipelines.context import Run
from pipelines.measuring import measure_vectors
from pipelines.plots import write_pictures, write_report
from pipelines.schema import ConfigSchema
from pipelines.stages.calibrate import PREDICTOR_FILE
from pipelines.stages.finetune import chosen_member, front_members
from pipelines.stages.search import search_problem, study_file
from pipelines.verdict import chance_remark
from search.pareto import FrontMember, ParetoFront
from search.problem import Objective
from search.progress import SearchProgress
from search.study import counted_trials, read_study
from sparsevit.data.order import seeded
from sparsevit.export import export_model
from sparsevit.kept_windows import trace_kept_windows
from sparsevit.latency import LatencyPredictor
from sparsevit.latency.predictor import Measurement
from sparsevit.precision import resolve_precision
from sparsevit.sparsity import SparsityVector

logger = logging.getLogger(__name__)
EXPORT_FOLDER = "export"
TABLE_FILE = "pareto.csv"
CLASS_TABLE_FILE = "classes.csv"


class Report:
    """No number in the table is unmeasured: latency on the device, accuracy on the report split."""

    name = "report"

    def needs(self, config: ConfigSchema) -> tuple[str, ...]:
        return ("train", "adapt", "calibrate", "search", "finetune")

    def depends_on(self, run: Run) -> Mapping[str, Any]:
        return {
            "report": build.plain(run.config.report),
            "data": run.data_fingerprint(run.report_set),
            "evaluation": build.plain(run.config.evaluation),
            "machine": run.machine(),
        }

    def execute(self, run: Run, folder: Path) -> Mapping[str, float]:
        metric = run.task.metric
        chosen_one = chosen_member(run)
        chosen = chosen_one.vector
        members = _thin(front_members(run), chosen, run.config.report.max_members)
        if chosen not in [member.vector for member in members]:  # the user's own
            members.append(chosen_one)
        scores = _score(run, [member.vector for member in members])
        dense_scores = run.scores("train", run.report_set, run.space.dense, "of the dense model")
        after_scores = run.scores("finetune", run.report_set, chosen, "of the subnet")
        dense, after = dense_scores[metric], after_scores[metric]
        vectors = [run.space.dense, *(member.vector for member in members)]
        found = measure_vectors(
            run, "adapt", vectors, build.report_limits(run.config), "report: forward passes"
        )
        for warning in found.warnings:
            logger.warning("  warning: %s", warning)
        measured = found.latencies_ms
        rows: list[dict[str, Any]] = [
            {
                "vector": str(member.vector),
                "predicted ms": member.values["latency_ms"],
                "measured ms": each.latency_ms,
                "speed-up": measured[0] / each.latency_ms,
                **_resources(each),
                f"{metric} before": scores[str(member.vector)],
                f"{metric} after": after if member.vector == chosen else float("nan"),
                "chosen": "*" if member.vector == chosen else "",
            }
            for member, each in zip(members, found.measurements[1:], strict=True)
        ]
        dense_row = {
            "vector": "dense",
            "predicted ms": run.results["calibrate"].metrics["dense_ms"],
            "measured ms": measured[0],
            "speed-up": 1.0,
            **_resources(found.measurements[0]),
            f"{metric} before": dense,
            f"{metric} after": dense,
            "chosen": "",
        }
        table = pd.DataFrame([dense_row, *sorted(rows, key=lambda row: -row["measured ms"])])
        table.to_csv(folder / TABLE_FILE, index=False)
        front = measured_front(members, measured[1:], scores, metric)
        write_text(folder / "front.json", front.to_json())
        by_class = class_table({"dense": dense_scores, str(chosen): after_scores})
        by_class.to_csv(folder / CLASS_TABLE_FILE)
        subnet = run.model_of("finetune")
        write_pictures(folder, draw_samples(run, subnet, chosen))
        history = hypervolume_history(run)
        bar = LatencyPredictor.load(run.results["search"].folder / PREDICTOR_FILE).error_bar
        write_report(
            folder, table, metric, [str(member.vector) for member in front.members], history,
            header=_header(run), by_class=by_class, error_bar=bar,
        )  # fmt: skip
        row = next(row for row in rows if row["chosen"])
        export_model(
            folder / EXPORT_FOLDER, subnet, chosen,
            backbone=run.config.backbone.name, task=run.config.task.name, task_config=run.task.config,
            example=run.task.inputs(run.report_set, [0]),
            details={
                "classes": run.train_set.class_names,
                "label_names": dict(enumerate(run.train_set.class_names, start=run.task.first_label)),
                "measured": {key: value for key, value in row.items() if key != "chosen"},
                "dense": {"measured ms": measured[0], metric: dense},
                "machine": run.machine(),
            },
        )  # fmt: skip
        return {
            "num_members": len(members),
            "num_measured_front_members": len(front.members),
            "chosen_speedup": row["speed-up"],
            f"chosen_{metric}": after,
            f"dense_{metric}": dense,
            f"chosen_{metric}_drop": dense - after,
        }

    def score(self, run: Run) -> Mapping[str, float]:
        return {}

    def remark(self, run: Run) -> str | None:
        return None


def class_table(scores: Mapping[str, Mapping[str, float]]) -> pd.DataFrame:
    """Parts of metrics, such as the accuracy of every class: a row each, a column per model."""
    parts = {model: {k: v for k, v in values.items() if "/" in k} for model, values in scores.items()}
    return pd.DataFrame(parts).rename_axis("class")


def draw_samples(run: Run, model: nn.Module, vector: SparsityVector) -> list[dict[str, Tensor]]:
    """A few samples, spread over the report split: ground truth, prediction, and what every stage kept."""
    count = min(run.config.report.num_pictures, len(run.report_set))
    backbone = run.task.backbone_of(model)
    rows = []
    for index in [number * len(run.report_set) // count for number in range(count)]:
        with trace_kept_windows(backbone) as trace:
            row = dict(run.task.draw(model.eval(), run.report_set, index, vector))
        for stage in range(len(trace.shares)):
            share = float(trace.shares[stage].mean())
            row[f"stage {stage + 1}: {share:.0%}"] = make_grid(trace.overlay(stage), nrow=3, padding=4)
        rows.append(row)
    return rows


def measured_front(
    members: Sequence[FrontMember], measured_ms: Sequence[float], scores: Mapping[str, float], metric: str
) -> ParetoFront:
    """The non-dominated members by measured latency and report accuracy."""
    measured = [
        replace(
            member,
            values={
                metric: scores[str(member.vector)],
                "latency_ms": latency,
                "predicted_ms": member.values["latency_ms"],
            },
        )
        for member, latency in zip(members, measured_ms, strict=True)
    ]
    return ParetoFront.of(measured, [Objective(metric, "maximize"), Objective("latency_ms", "minimize")])


def hypervolume_history(run: Run) -> list[float]:
    """Hypervolume of the search front after every evaluation."""
    study = read_study(study_file(run, run.results["search"].folder))
    progress = SearchProgress(search_problem(run))
    for trial in counted_trials(study):
        progress.add(trial)
    return progress.hypervolumes


def _score(run: Run, vectors: Sequence[SparsityVector]) -> dict[str, float]:
    """Accuracy of the adapted supernet on the report split, in random order."""
    scores: dict[str, float] = {}
    order = torch.randperm(len(vectors), generator=seeded(run.config.seed, 5)).tolist()
    for count, index in enumerate(order, start=1):
        label = f"of member {count} of {len(vectors)}"
        scores[str(vectors[index])] = run.accuracy("adapt", run.report_set, vectors[index], label)[
            run.task.metric
        ]
    return scores


def _resources(measurement: Measurement) -> dict[str, float]:
    """Energy and memory of a forward pass, as far as the device tells."""
    known = {"energy mJ": measurement.energy_mj, "peak MiB": measurement.peak_mib}
    return {name: value for name, value in known.items() if value is not None}


def _thin(members: Sequence[FrontMember], chosen: SparsityVector, limit: int | None) -> list[FrontMember]:
    """At most `limit` members, spread over the front, the chosen one among them."""
    if limit is None or len(members) <= limit:
        return list(members)
    picked = {round(index * (len(members) - 1) / max(1, limit - 2)) for index in range(limit - 1)}
    return [member for index, member in enumerate(members) if index in picked or member.vector == chosen]


def _header(run: Run) -> dict[str, Any]:
    predictor = LatencyPredictor.load(run.results["search"].folder / PREDICTOR_FILE)
    setting, here = predictor.setting, run.machine()
    device = setting.device if run.config.cluster.latency_lane is not None else here["device"]
    is_there = setting.device != device
    num_refits = int(run.results["search"].metrics["num_refits"])
    warning = chance_remark(run)
    return {
        **({} if warning is None else {"warning": warning}),
        "experiment": run.config.experiment,
        "scale": run.config.scale,
        "backbone": run.config.backbone.name,
        "latency of": setting.description,
        **({"predicted for": f"{setting.device}, {setting.num_threads} threads"} if is_there else {}),
        "predictions": f"95 % within ±{predictor.error_bar:.1%}; the table was refitted {num_refits} times",
        "device": device,
        "threads": run.machine()["threads"],
        "torch": torch.__version__,
        "accuracy on": f"{len(run.report_set)} images of {run.report_set.split!r}, "
        f"{resolve_precision(run.config.evaluation.precision, run.device)}",
    }
