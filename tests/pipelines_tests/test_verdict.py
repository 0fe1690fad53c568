"""What the run says of its numbers, and weights that finetuning made worse."""

from pathlib import Path

import pytest
import torch

from pipelines.artifacts import RESULT_FILE, ArtifactStore, StageResult
from pipelines.context import WEIGHTS_FILE, Run
from pipelines.stages.finetune import REVERTED_FILE, Finetune
from pipelines.stages.train import Train
from pipelines.tracking import NoTracker
from pipelines.verdict import compared, enough_epochs, steps_remark
from pipelines.workflow import run_pipeline
from sparsevit.checkpoints import read_weights, write_weights
from sparsevit.sparsity import SparsityVector
from tests.pipelines_tests.configuration import MACS_FOR_LATENCY, composed, tiny_run


@pytest.mark.parametrize(
    ("speedup", "words"),
    [
        (1.52, "1.52× faster than dense"),
        (0.79, "1.27× slower than dense"),
        (1.003, "as fast as dense"),
        (0.996, "as fast as dense"),
    ],
)
def test_slower_is_not_faster(speedup: float, words: str) -> None:
    assert compared(speedup) == words


def run_with(folder: Path, experiment: str, metrics: dict[str, float], *overrides: str) -> Run:
    """A run whose train stage is finished with these metrics."""
    config = composed(*tiny_run(folder, *overrides, experiment=experiment), experiment=experiment)
    run = Run(config, ArtifactStore(folder / "stages"), NoTracker())
    run.results["train"] = StageResult("train", "", folder, metrics, 1.0, was_reused=False)
    return run


@pytest.mark.parametrize(
    ("experiment", "metric", "chance"), [("coco", "mask_ap", 0.01), ("cityscapes", "miou", 1 / 19)]
)
def test_chance_is_said_and_how_to_get_beyond(
    tmp_path: Path, experiment: str, metric: str, chance: float
) -> None:
    at_chance = run_with(tmp_path, experiment, {metric: 0.9 * chance, "num_steps": 99})
    remark = Train().remark(at_chance)
    assert remark is not None
    assert remark.startswith(f"the dense model is no better than chance: its {metric} on ")
    assert f"is {0.9 * chance:.3f}, at most {chance:.2g}" in remark
    assert remark.endswith("after 99 steps: raise train.epochs")
    imported = run_with(tmp_path, experiment, {metric: 0.0, "num_steps": 0}, "init=shipped")
    assert "do the weights of init=shipped belong to these classes" in str(Train().remark(imported))
    assert Train().remark(run_with(tmp_path, experiment, {metric: 1.1 * chance, "num_steps": 9})) is None


def test_epochs_are_proposed_for_data_of_another_size(tmp_path: Path) -> None:
    """12 images of the user's, where the recipe draws 600: fifty times its epochs."""
    drawn = run_with(tmp_path, "coco", {})
    assert len(drawn.train_set) == 12
    assert enough_epochs(drawn, drawn.config.train) is None
    mine = run_with(
        tmp_path, "coco", {"mask_ap": 0.0, "num_steps": 3}, f"data.root={tmp_path / 'data'}",
        "data.generated.root=elsewhere", "data.generated.num_images.train=600", "train.epochs=2",
    )  # fmt: skip
    assert steps_remark(mine, "train", mine.config.train) == (
        "train.epochs=2 are 6 steps on these 12 images; the recipe has 300 on its own data: train.epochs=100 "
        "would be as many"
    )
    assert "raise train.epochs (to 100 for as many steps as the recipe has" in str(Train().remark(mine))
    enough = run_with(
        tmp_path, "coco", {}, f"data.root={tmp_path / 'data'}", "data.generated.root=elsewhere",
        "data.generated.num_images.train=20",
    )  # fmt: skip
    assert steps_remark(enough, "train", enough.config.train) is None


def test_finetuning_that_makes_it_worse_is_undone(tmp_path: Path) -> None:
    """Steps of a size that ruins the shipped model: the adapted weights come back, whenever it is killed."""
    overrides = [
        f"output={tmp_path / 'out'}", f"data.generated.root={tmp_path / 'data'}", "tracking=none",
        "data.generated.num_images={train:8,search:4,report:2}", "adapt.epochs=0", "finetune.epochs=1",
        "finetune.learning_rate=1", "finetune.warmup_steps=0", "finetune.vector=[0,0,0,0,0,0.2]",
        "latency.num_vectors=10", "latency.num_held_out=4", "latency.min_rounds=2", "latency.max_rounds=2",
        "latency.image_size=[64,64]", "search.num_evaluations=2", "cluster.num_workers=1",
        "sampler.population_size=4", "search.num_images=1", MACS_FOR_LATENCY, "until=finetune",
    ]  # fmt: skip
    results = run_pipeline(composed(*overrides))
    finetuned, adapted = results["finetune"].folder, results["adapt"].folder
    assert results["finetune"].metrics["is_kept"] == 0

    def weights_are_the_adapted() -> bool:
        expected, found = (read_weights(folder / WEIGHTS_FILE) for folder in (adapted, finetuned))
        return all(torch.equal(value, found[name]) for name, value in expected.items())

    assert weights_are_the_adapted()
    run = Run(composed(*overrides), ArtifactStore(tmp_path), NoTracker(), results=results)
    assert "the adapted weights are kept" in str(Finetune().remark(run))
    assert results["finetune"].metrics["search_mask_ap"] == pytest.approx(
        run.accuracy("adapt", run.search_set, SparsityVector((0, 0, 0, 0, 0, 0.2)), "")["mask_ap"]
    )

    # Killed between saying that they are worse and putting the others in their place.
    assert (finetuned / REVERTED_FILE).is_file()
    (finetuned / RESULT_FILE).unlink()
    ruined = {name: torch.zeros_like(value) for name, value in read_weights(adapted / WEIGHTS_FILE).items()}
    write_weights(finetuned / WEIGHTS_FILE, ruined)
    again = run_pipeline(composed(*overrides))
    assert again["finetune"].metrics["is_kept"] == 0
    assert weights_are_the_adapted()
