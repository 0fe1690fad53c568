"""Every choice in ``conf/`` composes and builds; what is wrong is said."""

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pipelines import build
from pipelines.artifacts import content_key
from pipelines.run import CONF
from sparsevit.data.order import seeded
from sparsevit.latency import LatencyPredictor
from sparsevit.latency.predictor import LatencySetting
from sparsevit.sparsity import SparsitySpace
from sparsevit.training import TrainingConfig
from tests.pipelines_tests.configuration import composed

EXPERIMENTS = sorted(path.stem for path in (CONF / "experiment").glob("*.yaml"))
SCALES = sorted(path.stem for path in (CONF / "scale").glob("*.yaml"))


def choices(group: str) -> list[str]:
    return [f"{group}={path.stem}" for path in sorted((CONF / group).glob("*.yaml"))]


@pytest.mark.parametrize(("experiment", "scale"), list(itertools.product(EXPERIMENTS, SCALES)))
def test_every_experiment_composes_and_builds_at_every_scale(experiment: str, scale: str) -> None:
    config = composed(f"scale={scale}", "data.root=/data", experiment=experiment)
    build.check(config)
    with torch.device("meta"):
        model = build.task(config, num_classes=80).build_model(build.backbone(config))
    assert sum(parameter.numel() for parameter in model.parameters()) > 1e6


@pytest.mark.parametrize(
    "choice",
    [
        choice
        for group in ("task", "data", "backbone", "latency", "sampler", "cluster", "tracking")
        for choice in choices(group)
        if choice not in ("task=own", "latency=table")  # they need files of the user's, in tests of their own
    ],
)
def test_every_choice_of_every_group_composes_and_builds(choice: str) -> None:
    words = {
        "cityscapes": ("mask2former", "cityscapes", "streets"),
        "nuscenes": ("bevdet", "nuscenes", "drives"),
        "coco": ("",),
    }
    experiment = next(name for name, known in words.items() if any(word in choice for word in known))
    config = composed(choice, "data.root=/data", experiment=experiment)
    build.check(config)
    assert build.space(config).num_genes > 0


def test_full_scale_is_the_papers_recipe() -> None:
    config = composed("scale=full", "data.root=/data")
    assert config.backbone.name == "swin_t"
    assert build.space(config).size == 120_285
    adapt = build.training(config.adapt, num_images=118_287)
    assert isinstance(adapt, TrainingConfig)
    assert (adapt.learning_rate, adapt.schedule) == (1e-5, "step")
    assert (config.adapt.epochs, config.finetune.epochs, config.train.epochs) == (12, 36, 36)
    assert (config.sampler.population_size, config.search.num_evaluations) == (100, 10_000)
    assert config.sampler.mutation_probability == 0.1


def test_the_papers_search_has_its_population_at_every_scale() -> None:
    for scale in SCALES:
        config = composed(f"scale={scale}", "data.root=/data", "sampler=evolution")
        sampler = build.sampler(config)
        assert (sampler.population_size, sampler.num_parents) == (100, 25)


def test_full_scale_steps_on_a_few_images() -> None:
    """Swin-T at 672×672: one training step and one evaluation of the real model."""
    config = composed("scale=full", "data.root=/data")
    task = build.task(config, num_classes=80)
    torch.manual_seed(0)
    model = task.build_model(build.backbone(config)).train()
    images = [torch.from_numpy(np.asarray(Image.new("RGB", (672, 672), "grey")).copy()).permute(2, 0, 1)]
    mask = torch.zeros(1, 672, 672, dtype=torch.uint8)
    mask[0, 100:300, 200:400] = 1
    target = {
        "boxes": torch.tensor([[200.0, 100.0, 400.0, 300.0]]),
        "labels": torch.tensor([17]),
        "masks": mask,
        "image_id": 1,
    }
    vector = SparsitySpace((2, 2, 6, 2)).draw(seeded(3))
    loss = sum(task.losses(model, (images, [target]), vector).values())
    assert isinstance(loss, torch.Tensor)
    loss.backward()  # type: ignore[no-untyped-call]
    gradient = task.backbone_of(model).get_parameter("stages.3.blocks.1.attn.qkv.weight").grad
    assert gradient is not None
    assert bool(gradient.isfinite().all())
    with torch.inference_mode():
        detections = model.eval()([images[0] / 255], sparsity=vector)
    assert detections[0]["masks"].shape[-2:] == (672, 672)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("backbone.choices=[0.5,0.2]", r"choices must be increasing"),
        ("backbone.choices=[0.0,1.2]", r"ratios lie in \[0, 1\)"),
        ("backbone.name=swin_x", "backbone.name is 'swin_x'; choose one of swin_nano"),
        ("adapt.law=never", "unknown sampling law 'never'; choose one of sorted_genes"),
        ("finetune.rule=best", "finetune.rule is 'best'; choose one of latency_budget"),
        ("finetune.rule=latency_budget", "needs finetune.latency_budget_ms"),
        ("train.epochs=-1", "epochs must be finite and at least 0, got -1"),
        ("train.schedule=linear", "schedule must be one of cosine, polynomial, step"),
        ("latency.dtype=int8", "dtype must be one of"),
        ("latency=table", "latency=table needs latency.path=/path/to/latency.json, which `python -m"),
        ("latency=table latency.path=/no/table.json", "there is no latency table /no/table.json"),
        ("latency.image_size=[1,2,3]", r"must be \[height, width\]"),
        ("data.verify=maybe", "data.verify is 'maybe'"),
        ("init_classifier=perhaps", "init_classifier is 'perhaps'; choose one of load, random"),
        (
            "data.generated.generator=cats",
            "generator is 'cats'; choose one of shapes, streets",
        ),
        ("data.generated.image_size=[64,96]", r"for shapes a square; got \[64, 96\]"),
        ("report.num_pictures=0", "report.num_pictures must be at least 1, got 0"),
        ("task=mask2former_nano task.crop_size=[0,64]", r"crop_size is height and width, at least 32 each"),
        ("task=mask2former_nano task.scale_range=[2,0.5]", "a lower and an upper factor above 0"),
        ("task=mask2former_nano task.num_heads=5", "must be a multiple of 32 and of num_heads, got 64 and 5"),
        ("task=mask2former_nano task.num_points=0", "num_points must be at least 1, got 0"),
        ("task.name=mine:Task", "a task of your own is module:callable with task=own"),
        ("init=/no/such/file.pth", "no such file or folder; use shipped, scratch, or a"),
        ("device=gpu", "device=gpu"),
        ("cluster.num_workers=0", "cluster.num_workers must be an integer, at least 1, got 0"),
        ("cluster.gpus_per_worker=1.5", "a share of one GPU, or a whole number, got 1.5"),
        ("cluster.gpus_per_worker=64", "cluster.gpus_per_worker=64, but torch finds"),
        ("seed=-1", r"seed must be between 0 and 2\*\*32 - 1, got -1"),
        ("search.seed=99999999999", r"search.seed must be between 0 and 2\*\*32 - 1"),
        ("search.num_evaluations=0", "search.num_evaluations must be at least 1, got 0"),
        ("search.max_failures=0", "search.max_failures must be at least 1"),
        ("search.max_hours=-1", "search.max_hours must be positive and finite, got -1"),
        ("search.max_hours=inf", "search.max_hours must be positive and finite, got inf"),
        ("search.plateau_gain=nan", "plateau_gain must be finite and at least 0, got nan"),
        ("search.latency_budget_ms=-5", "search.latency_budget_ms must be positive and finite, got -5"),
        ("finetune.latency_budget_ms=nan", "finetune.latency_budget_ms must be positive and finite, got nan"),
        ("finetune.max_accuracy_drop=nan", "finetune.max_accuracy_drop must be finite and at least 0"),
        (
            "search.constraints=[{name:latency_ms,lower:10.1}] search.latency_budget_ms=10",
            "the constraints latency_ms ≥ 10.1 and latency_ms ≤ 10 contradict each other",
        ),
        ("search.num_evaluations=null", "set search.num_evaluations, search.max_hours or search.plateau"),
        (
            "search.constraints=[{name:latency_ms,upper:3,lower:9}]",
            "its lower bound 9 is above its upper bound 3",
        ),
        ("search.warm_start=[nowhere.json]", "no such file, and not one of the published coco_41ms"),
        ("sampler.population_size=1000000", "larger than the space, which has 120285 vectors"),
        ("sampler.spread=watts sampler=random", "unknown sampler.spread 'watts'"),
        (
            "search.objectives=[{name:speed,direction:maximize}]",
            "nothing gives the objective 'speed'; the quantities are .*mask_ap",
        ),
        ("search.objectives=[{name:mask_ap,direction:up}]", "must be maximize or minimize, got 'up'"),
        ("search.constraints=[{name:watts,upper:3}]", "the constraint on 'watts' can never be checked"),
    ],
)
def test_bad_value_names_value_bound_and_remedy(override: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build.check(composed(*override.split()))


def test_fractions_of_an_epoch_become_steps() -> None:
    config = composed("adapt.epochs=0.5", "adapt.batch_size=4")
    assert build.training(config.adapt, num_images=30).num_steps == 4


def test_content_key_changes_with_any_value() -> None:
    base = {"a": 1, "b": [1, 2]}
    assert content_key(base) == content_key({"b": [1, 2], "a": 1})
    assert (
        len({content_key(base), content_key({"a": 1, "b": [2, 1]}), content_key({"a": 2, "b": [1, 2]})}) == 3
    )


def test_users_data_is_found_by_its_root_alone(tmp_path: Path) -> None:
    from sparsevit.data.shapes import ShapesConfig, write_shapes

    write_shapes(tmp_path / "mine", ShapesConfig(image_size=64, num_images={"train2017": 20, "val2017": 5}))
    (tmp_path / "mine" / "provenance.json").unlink()
    config = composed(f"data.root={tmp_path / 'mine'}", "data.num_search=4")
    train, search, report = build.data_splits(config, lambda: None)
    assert (len(train), len(search), len(report)) == (16, 4, 5)
    assert not set(train.sample_ids) & set(search.sample_ids)
    assert report.split == "val2017"


@pytest.mark.parametrize(
    ("override", "difference"),
    [
        (
            "latency.image_size=[64,96]",
            r"image_size=\[256, 256\] instead of \[64, 96\]\. .*--image-size 64 96",
        ),
        ("latency.batch_size=1", "batch_size=4 instead of 1. On the device: .* --batch-size 1"),
        ("latency.dtype=bf16", "dtype=fp32 instead of bf16"),
        ("latency.runtime=compiled", "runtime=eager instead of compiled. .* --runtime compiled"),
        ("latency.measure=model", "measure=backbone instead of model. .*calibrate /path/to/export"),
        ("backbone=swin_t", "backbone=swin_nano instead of swin_t. .*calibrate swin_t"),
        ("backbone.choices=[0,0.5]", r"choices=.* instead of \[0.0, 0.5\]\. .*--choices 0 0.5"),
    ],
)
def test_a_latency_table_of_something_else_is_refused(tmp_path: Path, override: str, difference: str) -> None:
    space = SparsitySpace((2, 2, 6, 2))
    terms = tuple((0.0, *(-float(step) for step in range(1, 9))) for _ in range(6))
    setting = LatencySetting("a board", 4, "2.11", "eager", "fp32", 4, (256, 256), "swin_nano", "backbone")
    path = tmp_path / "latency.json"
    LatencyPredictor(space, 100.0, terms, setting).save(path)
    of_table = ["latency=table", f"latency.path={path}"]
    assert build.latency_table(composed(*of_table)) is not None
    with pytest.raises(ValueError, match=f"latency.json is about {difference}"):
        build.check(composed(*of_table, override))
