"""Stage 5: finetune the vector that a stated rule chooses."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from pipelines import build
from pipelines.artifacts import write_json
from pipelines.context import WEIGHTS_FILE, Run
from pipelines.schema import ConfigSchema
from pipelines.search_log import FRONT_FILE
from pipelines.stages.search import search_problem
from pipelines.stages.training import train_stage, training_key
from search.pareto import FrontMember
from search.selection import Rule, choose
from sparsevit.checkpoints import read_weights, write_weights
from sparsevit.sparsity import SparsityVector

CHOICE_FILE = "chosen.json"
REVERTED_FILE = "reverted.json"
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
        is_better = self._keep_better(run, chosen.vector, folder)
        return {
            "num_steps": num_steps,
            "is_kept": float(is_better),
            "predicted_ms": chosen.values["latency_ms"],
            f"search_{run.task.metric}_before": chosen.values[run.task.metric],
        }

    def score(self, run: Run) -> Mapping[str, float]:
        """Accuracy on the search split, to compare with the one before."""
        after = run.accuracy(self.name, run.search_set, chosen_member(run).vector, "of the subnet")
        return {f"search_{name}": value for name, value in after.items()}

    def remark(self, run: Run) -> str | None:
        if run.results[self.name].metrics["is_kept"]:
            return None
        return "finetuning made the subnet worse on the search split: the adapted weights are kept"

    def _keep_better(self, run: Run, vector: SparsityVector, folder: Path) -> bool:
        """Put the adapted weights back where finetuning lost accuracy; whether its own are kept.

        A file says so before anything is replaced, so that a kill in between changes nothing.
        """
        marker = folder / REVERTED_FILE
        if not marker.is_file():
            metric, split = run.task.metric, run.search_set
            before = run.scores("adapt", split, vector, "before finetuning")[metric]
            after = run.scores_in(folder, split, vector, f"{self.name}: accuracy after finetuning")[metric]
            if after >= before:
                return True
            write_json(marker, {f"{metric}_before": before, f"{metric}_after": after})
        run.forget_scores(folder)
        write_weights(folder / WEIGHTS_FILE, read_weights(run.results["adapt"].folder / WEIGHTS_FILE))
        return False

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
