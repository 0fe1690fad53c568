"""Every number that a run reports is of the split, weights, vector, precision and kind that its name says.

The task's score is a closed form of all of these (`telling`), and the latency table is of a board that takes
a hundred times as long as any machine that this runs on: so what is predicted and what is measured are apart.
"""

import base64
import html
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from mlflow.entities import Run as MlflowRun
from mlflow.tracking import MlflowClient

from pipelines.artifacts import StageResult
from pipelines.workflow import run_pipeline
from search.study import counted_trials, read_study
from sparsevit import load_exported
from sparsevit.latency import LatencyPredictor
from sparsevit.latency.predictor import LatencySetting
from sparsevit.sparsity import SparsitySpace
from tests.pipelines_tests.configuration import composed, telling_run
from tests.pipelines_tests.telling import NUM_STEPS, OF_CLASS, told

SPACE = SparsitySpace((2, 2, 6, 2))
DENSE, SPARSEST = SPACE.dense.ratios, SPACE.sparsest.ratios
DENSE_MS = 100_000.0
MS_OF_GENE = (30_000.0, 20_000.0, 15_000.0, 5_000.0, 10_000.0, 4_000.0)
MAX_DROP = 0.01
NUM_SCORED = 4  # images of the six that a vector of the search is scored on


def predicted_ms(vector: Sequence[float]) -> float:
    return DENSE_MS - sum(cost * ratio for cost, ratio in zip(MS_OF_GENE, vector, strict=True))


def board() -> LatencyPredictor:
    terms = tuple(tuple(-cost * choice for choice in SPACE.choices) for cost in MS_OF_GENE)
    setting = LatencySetting("a board", 4, "2.11", "eager", "fp32", 4, (64, 64), "swin_nano", "backbone")
    return LatencyPredictor(SPACE, DENSE_MS, terms, setting)


def numbers(text: str) -> tuple[float, ...]:
    """A vector as it is written: ``[0.1 0.2 …]``."""
    vector = SPACE.dense.ratios if text == "dense" else tuple(map(float, text.strip("[]").split()))
    assert len(vector) == SPACE.num_genes
    return vector


@dataclass(frozen=True)
class Told:
    """A finished run."""

    folder: Path
    results: Mapping[str, StageResult]
    printed: str

    @property
    def table(self) -> pd.DataFrame:
        return pd.read_csv(self.results["report"].folder / "pareto.csv")

    @property
    def chosen(self) -> tuple[float, ...]:
        return tuple(self.json("finetune", "chosen.json")["vector"])

    def json(self, stage: str, name: str) -> Any:
        return json.loads((self.results[stage].folder / name).read_text())


@pytest.fixture(scope="module")
def overrides(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("told")
    board().save(folder / "board.json")
    return telling_run(
        folder, "latency=table", f"latency.path={folder / 'board.json'}", "search.num_evaluations=24",
        "sampler.population_size=8", f"search.num_images={NUM_SCORED}", "search.deterministic=true",
        f"finetune.max_accuracy_drop={MAX_DROP}",
    )  # fmt: skip


@pytest.fixture(scope="module")
def run(overrides: list[str], tmp_path_factory: pytest.TempPathFactory) -> Told:
    with pytest.MonkeyPatch.context() as patch:
        lines: list[str] = []
        patch.setattr("builtins.print", lambda *texts, **_: lines.append(" ".join(map(str, texts))))
        results = run_pipeline(composed(*overrides))
    return Told(Path(overrides[0].removeprefix("output=")), results, "\n".join(lines))


def test_every_stage_scores_its_own_weights_on_its_own_split(run: Told) -> None:
    metrics = {name: result.metrics for name, result in run.results.items()}
    assert metrics["train"]["score"] == pytest.approx(told("report", "train", DENSE))
    assert metrics["train"]["sparsest_score"] == pytest.approx(told("report", "train", SPARSEST))
    assert metrics["adapt"]["search_score"] == pytest.approx(told("search", "adapt", DENSE))
    assert metrics["adapt"]["search_sparsest_score"] == pytest.approx(told("search", "adapt", SPARSEST))
    before = told("search", "adapt", run.chosen, num_images=NUM_SCORED)
    assert metrics["finetune"]["search_score_before"] == pytest.approx(before)
    assert metrics["finetune"]["search_score"] == pytest.approx(told("search", "finetune", run.chosen))
    assert metrics["finetune"]["predicted_ms"] == pytest.approx(predicted_ms(run.chosen))
    assert metrics["calibrate"]["dense_ms"] == pytest.approx(DENSE_MS)
    assert metrics["calibrate"]["sparsest_ms"] == pytest.approx(predicted_ms(SPARSEST))


def test_the_search_scores_the_adapted_weights_on_the_search_split(run: Told) -> None:
    trials = counted_trials(read_study(run.results["search"].folder / "study.journal"))
    assert len(trials) == 24
    for trial in trials:
        vector = tuple(trial.params.values())
        expected = told("search", "adapt", vector, num_images=NUM_SCORED)
        assert trial.user_attrs["score"] == pytest.approx(expected)
        assert trial.user_attrs["latency_ms"] == pytest.approx(predicted_ms(vector))
        assert trial.values == pytest.approx([expected, predicted_ms(vector)])


def test_the_rule_compares_with_the_trained_weights_on_the_search_split(run: Told) -> None:
    members = [tuple(each["vector"]) for each in run.json("search", "front.json")["members"]]

    def fastest(split: str, stage: str) -> tuple[float, ...] | None:
        floor = told(split, stage, DENSE) - MAX_DROP
        of_search = {v: told("search", "adapt", v, num_images=NUM_SCORED) for v in members}
        return min((v for v in members if of_search[v] >= floor), key=predicted_ms, default=None)

    assert fastest("search", "train") == run.chosen
    others = {fastest(*other) for other in (("search", "adapt"), ("search", "finetune"), ("report", "train"))}
    assert run.chosen not in others  # or the line above would show nothing


def test_the_rule_takes_measured_latencies_where_there_are_some(run: Told, overrides: list[str]) -> None:
    """Measured in the opposite order: the fastest of those that are accurate enough is another."""
    path = run.results["search"].folder / "front.json"
    content = path.read_text()
    front = json.loads(content)
    for member in front["members"]:
        member["measured_ms"] = 1e6 - member["latency_ms"]
    floor = told("search", "train", DENSE) - MAX_DROP
    accurate = [each for each in front["members"] if each["score"] >= floor]
    path.write_text(json.dumps(front))
    try:
        again = run_pipeline(
            composed(*overrides, "finetune.learning_rate=1e-5", "until=finetune", "tracking=none")
        )
    finally:
        path.write_text(content)
    chosen = json.loads((again["finetune"].folder / "chosen.json").read_text())
    assert chosen["vector"] == min(accurate, key=lambda each: each["measured_ms"])["vector"]
    assert tuple(chosen["vector"]) != run.chosen
    assert again["finetune"].metrics["predicted_ms"] == pytest.approx(predicted_ms(chosen["vector"]))


def test_the_table_says_predicted_and_measured_before_and_after(run: Told) -> None:
    table = run.table
    members = {tuple(each["vector"]) for each in run.json("search", "front.json")["members"]}
    assert {numbers(text) for text in table["vector"][1:]} == members
    assert len(members) >= 3
    dense, *rows = table.to_dict("records")
    assert dense["vector"] == "dense"
    of_dense = told("report", "train", DENSE)
    assert dense["score before"] == dense["score after"] == pytest.approx(of_dense)
    for row in (dense, *rows):
        vector = numbers(row["vector"])
        assert row["predicted ms"] == pytest.approx(predicted_ms(vector))
        assert 0 < row["measured ms"] < DENSE_MS / 50
        assert row["speed-up"] == pytest.approx(dense["measured ms"] / row["measured ms"])
    for row in rows:
        vector = numbers(row["vector"])
        assert row["score before"] == pytest.approx(told("report", "adapt", vector))
        if vector == run.chosen:
            assert row["chosen"] == "*"
            assert row["score after"] == pytest.approx(told("report", "finetune", vector))
        else:
            assert pd.isna(row["chosen"])
            assert pd.isna(row["score after"])


def test_the_measured_front_is_of_measured_latencies_and_report_scores(run: Told) -> None:
    points = {
        numbers(row["vector"]): (row["measured ms"], row["score before"])
        for row in run.table.to_dict("records")[1:]
    }
    best = {
        vector
        for vector, (ms, score) in points.items()
        if not any(
            other_ms <= ms and other >= score and (other_ms, other) != (ms, score)
            for other_ms, other in points.values()
        )
    }
    members = run.json("report", "front.json")["members"]
    assert {tuple(each["vector"]) for each in members} == best
    for each in members:
        vector = tuple(each["vector"])
        assert (each["latency_ms"], each["score"]) == pytest.approx(points[vector])
        assert each["predicted_ms"] == pytest.approx(predicted_ms(vector))


def test_the_results_are_of_the_chosen_row(run: Told) -> None:
    (row,) = (row for row in run.table.to_dict("records") if row["chosen"] == "*")
    after, of_dense = told("report", "finetune", run.chosen), told("report", "train", DENSE)
    metrics = run.results["report"].metrics
    assert metrics["chosen_speedup"] == pytest.approx(row["speed-up"])
    assert metrics["chosen_score"] == pytest.approx(after)
    assert metrics["dense_score"] == pytest.approx(of_dense)
    assert metrics["chosen_score_drop"] == pytest.approx(of_dense - after)
    assert metrics["num_members"] == len(run.table) - 1
    assert metrics["num_measured_front_members"] == len(run.json("report", "front.json")["members"])
    (line,) = re.findall(r"^chosen: .*, score ([\d.]+) against ([\d.]+)$", run.printed, flags=re.MULTILINE)
    assert line == (f"{after:.3f}", f"{of_dense:.3f}")


def test_the_classes_are_of_dense_and_finetuned_weights(run: Told) -> None:
    table = pd.read_csv(run.results["report"].folder / "classes.csv", index_col="class")
    assert list(table.index) == ["score/disc"]
    dense, chosen = table.columns
    assert (dense, numbers(chosen)) == ("dense", run.chosen)
    assert table[dense].item() == pytest.approx(OF_CLASS + told("report", "train", DENSE))
    assert table[chosen].item() == pytest.approx(OF_CLASS + told("report", "finetune", run.chosen))


def test_the_export_is_the_finetuned_subnet_with_its_own_figures(run: Told) -> None:
    model = load_exported(run.results["report"].folder / "export", trusted=True)
    assert model.sparsity.ratios == run.chosen
    assert model.model.get_buffer("num_steps") == NUM_STEPS["finetune"]
    (row,) = (row for row in run.table.to_dict("records") if row["chosen"] == "*")
    measured = model.config["measured"]
    assert set(measured) == {name for name, value in row.items() if name != "chosen" and not pd.isna(value)}
    assert all(value == pytest.approx(row[name]) for name, value in measured.items() if name != "vector")
    assert numbers(measured["vector"]) == run.chosen
    dense = model.config["dense"]
    assert dense["measured ms"] == pytest.approx(run.table["measured ms"][0])
    assert dense["score"] == pytest.approx(told("report", "train", DENSE))


def numbers_of(values: Any) -> list[float]:
    """What plotly writes of an array: a list, or its bytes."""
    if isinstance(values, list):
        return [float(value) for value in values]
    return [float(value) for value in np.frombuffer(base64.b64decode(values["bdata"]), values["dtype"])]


def test_the_plots_show_what_their_legends_say(run: Told) -> None:
    page = (run.results["report"].folder / "report.html").read_text()
    begin = page.index("[", page.index("Plotly.newPlot(", page.index("<h1>Pareto front</h1>")))
    traces, _ = json.JSONDecoder().raw_decode(page[begin:])
    shown = {
        trace["name"]: (trace.get("text"), numbers_of(trace["x"]), numbers_of(trace["y"])) for trace in traces
    }
    table = run.table
    members = table[1:].sort_values("measured ms")
    chosen = table[table["chosen"] == "*"]
    on_front = {tuple(each["vector"]) for each in run.json("report", "front.json")["members"]}
    front = members[[numbers(text) in on_front for text in members["vector"]]]
    for name, rows, x, y in (
        ("dense", table[:1], "measured ms", "score before"),
        ("members of the search", members, "measured ms", "score before"),
        ("measured front", front, "measured ms", "score before"),
        ("finetuned", chosen, "measured ms", "score after"),
        ("latency", table, "predicted ms", "measured ms"),
    ):
        texts, xs, ys = shown[name]
        assert list(texts) == list(rows["vector"]), name
        assert xs == pytest.approx(list(rows[x])), name
        assert ys == pytest.approx(list(rows[y])), name
    assert shown["hypervolume"][1] == list(range(1, 25))
    assert shown["hypervolume"][2] == pytest.approx(hypervolumes(run))
    for text in (
        "a board, 4 threads",
        "the backbone, eager, batch 4, 64×64, fp32",
        "6 images of 'report', fp32",
    ):
        assert text in html.unescape(page)


def hypervolumes(run: Told) -> list[float]:
    """Of the trials so far: the area of the steps below them, to a corner at 1.1 times the dense latency."""
    trials = counted_trials(read_study(run.results["search"].folder / "study.journal"))
    found = []
    for count in range(1, len(trials) + 1):
        area, best = 0.0, 0.0
        for score, ms in sorted((trial.values for trial in trials[:count]), key=lambda point: -point[0]):
            width = 1.1 * DENSE_MS - ms
            if width > best:  # the best score that reaches so far
                area += (width - best) * score
                best = width
        found.append(area)
    return found


def test_a_report_of_fewer_members_keeps_the_ends_and_the_chosen_one(run: Told, overrides: list[str]) -> None:
    members = [tuple(each["vector"]) for each in run.json("search", "front.json")["members"]]
    for limit in (3, 4):
        few = run_pipeline(composed(*overrides, f"report.max_members={limit}", "tracking=none"))
        table = pd.read_csv(few["report"].folder / "pareto.csv")
        kept = {numbers(text) for text in table["vector"][1:]}
        assert {members[0], members[-1], run.chosen} <= kept <= set(members)
        assert len(kept) <= limit < len(members)


def mlflow_runs(run: Told) -> dict[str, MlflowRun]:
    client = MlflowClient(tracking_uri=f"sqlite:///{run.folder / 'mlflow.db'}")
    (experiment,) = (each for each in client.search_experiments() if each.name == "coco")
    return {each.info.run_name: each for each in client.search_runs([experiment.experiment_id])}


def test_mlflow_has_the_same_numbers(run: Told) -> None:
    logged = mlflow_runs(run)
    for name, result in run.results.items():
        metrics = logged[name].data.metrics
        assert {key: metrics[key] for key in result.metrics} == pytest.approx(dict(result.metrics))
    assert logged["coco"].data.metrics == pytest.approx(dict(run.results["report"].metrics))
    trials = [each for name, each in logged.items() if name.startswith("trial")]
    assert len(trials) == 24
    for trial in trials:
        vector = numbers(trial.data.params["vector"])
        assert tuple(float(trial.data.params[name]) for name in SPACE.gene_names) == vector
        assert trial.data.metrics["latency_ms"] == pytest.approx(predicted_ms(vector))
        expected = told("search", "adapt", vector, num_images=NUM_SCORED)
        assert trial.data.metrics["score"] == pytest.approx(expected)


def test_scores_of_another_precision_are_not_those_that_were_kept(run: Told, overrides: list[str]) -> None:
    other = run_pipeline(composed(*overrides, "evaluation.precision=bf16", "until=adapt", "tracking=none"))
    assert all(result.was_reused for result in other.values())
    expected = told("report", "train", DENSE, precision="bf16")
    assert other["train"].metrics["score"] == pytest.approx(expected)
    expected = told("search", "adapt", SPARSEST, precision="bf16")
    assert other["adapt"].metrics["search_sparsest_score"] == pytest.approx(expected)


def test_scores_of_other_images_are_not_those_that_were_kept(run: Told, overrides: list[str]) -> None:
    """The same weights, with the search split in the place of the report split."""
    other = run_pipeline(composed(*overrides, "data.val=search", "until=train", "tracking=none"))
    assert other["train"].was_reused
    assert other["train"].metrics["score"] == pytest.approx(told("search", "train", DENSE))
