"""Stage 5: finetune the vector that a stated rule chooses."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from pipelines import build
from pipelines.artifacts import write_json
from pipelines.context import Run
from pipelines.schema import ConfigSchema
from pipelines.search_log import FRONT_FILE
from pipelines.stages.search import search_problem
from pipelines.stages.training import train_stage, training_key
from search.pareto import FrontMember
from search.selection import Rule, choose
from sparsevit.sparsity import SparsityVector

CHOICE_FILE = "chosen.json"
MEASURED = "measured_ms"


class Finetune:
    """From the adapted weights, at the chosen vector."""

    name = "finetune"

    def needs(self, config: ConfigSchema) -> tuple[str, ...]:
        return ("train", "search", "adapt", "calibrate")

    def depends_on(self, run: Run) -> Mapping[str, Any]:
        return training_key(run.config.finetune, run)

    def execute(self, run: Run, folder: Path) -> Mapping[str, float]:
        config = run.config.finetune
        model = run.model_of("adapt")
        chosen = self._choose(run)
        rule = config.rule if config.vector is None else "given"
        write_json(
            folder / CHOICE_FILE, {"rule": rule, "vector": list(chosen.vector.ratios), **chosen.values}
        )
        num_steps = train_stage(run, self.name, model, config, folder, lambda generator: chosen.vector)
        return {
            "num_steps": num_steps,
            "predicted_ms": chosen.values["latency_ms"],
            f"search_{run.task.metric}_before": chosen.values[run.task.metric],
        }

    def score(self, run: Run) -> Mapping[str, float]:
        """Accuracy on the search split, to compare with the one before."""
        after = run.accuracy(self.name, run.search_set, chosen_member(run).vector, "of the subnet")
        return {f"search_{name}": value for name, value in after.items()}

    def _choose(self, run: Run) -> FrontMember:
        config, metric = run.config.finetune, run.task.metric
        given = build.finetuned_vector(run.config)
        if given is not None:
            scores = run.accuracy("adapt", run.search_set, given, "at the given vector")
            return FrontMember(
                given,
                {**scores, **search_problem(run).measure(given)},
            )
        dense = run.accuracy("train", run.search_set, run.space.dense, "of the dense model")
        members = front_members(run)
        is_measured = all(MEASURED in member.values for member in members)
        return choose(
            members, cast(Rule, config.rule),
            accuracy=metric, latency=MEASURED if is_measured else "latency_ms", dense_accuracy=dense[metric],
            max_accuracy_drop=config.max_accuracy_drop, latency_budget_ms=config.latency_budget_ms,
        )  # fmt: skip


def front_members(run: Run) -> list[FrontMember]:
    """The front that the search left, fastest first."""
    content = json.loads((run.results["search"].folder / FRONT_FILE).read_text())
    return [FrontMember(SparsityVector(tuple(entry.pop("vector"))), entry) for entry in content["members"]]


def chosen_member(run: Run) -> FrontMember:
    """The member that was finetuned, with its values before that."""
    content = json.loads((run.results["finetune"].folder / CHOICE_FILE).read_text())
    del content["rule"]
    return FrontMember(SparsityVector(tuple(content.pop("vector"))), content)
