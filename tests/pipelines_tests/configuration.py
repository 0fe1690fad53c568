"""Compose configurations in tests, as the command line does."""

import sys
from pathlib import Path
from typing import cast

from hydra import compose, initialize_config_dir

from pipelines import schema
from pipelines.run import CONF

ROOT = Path(__file__).parents[2]


def composed(*overrides: str, experiment: str = "coco") -> schema.ConfigSchema:
    schema.register()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = compose("config", [f"+experiment={experiment}", *overrides])
    return cast(schema.ConfigSchema, config)


# An untrained model has no accuracy to trade for latency; work has.
MACS_FOR_LATENCY = "search.objectives=[{name:macs_g,direction:maximize},{name:latency_ms,direction:minimize}]"
SMALL_MODELS = {
    "coco": [
        "data.generated.num_images={train:12,search:6,report:6}",
        "data.generated.image_size=[64,64]",
        "task.image_size=64",
        "task.num_proposals=30",
        "task.num_rois_per_image=16",
        "latency.image_size=[64,64]",
    ],
    "nuscenes": [
        "data.generated.num_images={train:6,search:3,val:3}",
        "data.generated.image_size=[64,128]",
        "task.input_size=[64,128]",
        "task.neck_channels=16",
        "task.view_channels=8",
        "task.bev_channels=16",
        "latency.image_size=[64,128]",
    ],
    "cityscapes": [
        "data.generated.num_images={train:12,search:6,val:6}",
        "data.generated.image_size=[64,128]",
        "task.crop_size=[64,64]",
        "task.feature_channels=32",
        "task.num_points=64",
        "latency.image_size=[64,128]",
    ],
}


def tiny_run(folder: Path, *overrides: str, experiment: str = "coco") -> list[str]:
    """Overrides that shrink an experiment to seconds: the real stages on a dozen small images."""
    return [
        f"output={folder / 'out'}",
        f"data.generated.root={folder / 'data'}",
        *SMALL_MODELS[experiment],
        "init=scratch",
        "train.epochs=1",
        "adapt.epochs=0.5",
        "finetune.epochs=0.5",
        "finetune.max_accuracy_drop=1",
        "latency.num_vectors=10",
        "latency.num_held_out=4",
        "latency.min_rounds=2",
        "latency.max_rounds=2",
        "search.num_evaluations=6",
        "cluster.num_workers=1",
        "sampler.population_size=4",
        "report.max_rounds=2",
        "train.checkpoint_every_s=0",
        "adapt.checkpoint_every_s=0",
        "finetune.checkpoint_every_s=0",
        *overrides,
    ]


def arguments(folder: Path, *overrides: str, experiment: str = "coco") -> list[str]:
    """What ``pipelines/run.py`` is called with for a tiny run in `folder`."""
    return [f"+experiment={experiment}", *tiny_run(folder, *overrides, experiment=experiment)]


def command(folder: Path, *overrides: str, experiment: str = "coco") -> list[str]:
    """The command line of a tiny run in `folder`."""
    run = str(ROOT / "pipelines" / "run.py")
    return [sys.executable, run, *arguments(folder, *overrides, experiment=experiment)]


def telling_run(folder: Path, *overrides: str) -> list[str]:
    """Overrides of a tiny run with the task of `telling`, whose scores tell where they come from."""
    own = [
        "task=own",
        "task.name=tests.pipelines_tests.telling:Telling",
        "search.objectives=[{name:score,direction:maximize},{name:latency_ms,direction:minimize}]",
        "evaluation.precision=fp32",
        "train.precision=fp32",
        "adapt.precision=fp32",
        "finetune.precision=fp32",
        "finetune.epochs=1",
    ]
    return [
        *(each for each in tiny_run(folder) if not each.startswith(("task.", "finetune.epochs"))),
        *own,
        *overrides,
    ]
