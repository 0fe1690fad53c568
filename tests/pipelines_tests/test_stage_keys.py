"""What the key of every stage covers: each value of the configuration is changed once.

A key that covers too little hands out a stale result; one that covers too much throws away hours.
"""

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

from pipelines import build, workflow
from pipelines.artifacts import ArtifactStore
from pipelines.context import Run
from pipelines.schema import ConfigSchema
from pipelines.tracking import NoTracker
from pipelines.workflow import STAGES, stage_keys
from sparsevit.latency import LatencyPredictor
from sparsevit.latency.predictor import LatencySetting
from sparsevit.sparsity import SparsitySpace
from tests.pipelines_tests.configuration import composed, tiny_run

EVERYTHING = frozenset(stage.name for stage in STAGES)
FROM_TRAIN = EVERYTHING - {"calibrate"}
FROM_ADAPT = FROM_TRAIN - {"train"}
FROM_CALIBRATE = frozenset({"calibrate", "search", "finetune", "report"})
FROM_SEARCH = frozenset({"search", "finetune", "report"})
FROM_FINETUNE = frozenset({"finetune", "report"})
EVALUATION = frozenset({"search", "finetune", "report"})
REPORT = frozenset({"report"})
NOTHING: frozenset[str] = frozenset()

TRAINING = {
    "epochs": 2.0, "batch_size": 3, "learning_rate": 0.5, "weight_decay": 0.5, "warmup_steps": 7,
    "schedule": "step", "milestones": [0.5], "precision": "bf16", "clip_norm": 0.5, "backbone_rate": 0.5,
}  # fmt: skip
FIRST_STAGE: Mapping[str, tuple[Mapping[str, Any], frozenset[str]]] = {
    "train": (TRAINING, FROM_TRAIN),
    "adapt": ({**TRAINING, "law": "sandwich"}, FROM_ADAPT),
    "finetune": (
        {
            **TRAINING, "rule": "knee", "vector": [0.0] * 6, "max_accuracy_drop": 0.5,
            "latency_budget_ms": 5.0,
        },
        FROM_FINETUNE,
    ),
}  # fmt: skip
CHANGES: dict[str, tuple[Any, frozenset[str]]] = {
    "experiment": ("other", NOTHING),  # a folder of its own
    "scale": ("other", NOTHING),  # a name; what it stands for is in the others
    "seed": (1, FROM_TRAIN),  # search.seed follows
    "output": ("elsewhere", NOTHING),
    "device": ("cpu", NOTHING),  # which auto is here; another device is another machine
    "init_classifier": ("random", NOTHING),  # of an init that is a file
    "init_heads": ("random", NOTHING),
    "init_settings": ("recipe", NOTHING),
    "until": ("train", NOTHING),
    "data.num_search": (3, NOTHING),  # where there is no search split
    "data.verify": ("none", NOTHING),
    "data.train": ("search", FROM_TRAIN),
    "data.search": ("report", FROM_SEARCH),
    "data.val": ("search", REPORT),
    "data.limit": (5, FROM_TRAIN),
    "backbone.name": ("swin_t", EVERYTHING),
    "backbone.drop_path_rate": (0.1, FROM_TRAIN),
    "backbone.checkpoints": (True, FROM_TRAIN),
    "backbone.choices": ([0.0, 0.5], FROM_ADAPT | FROM_CALIBRATE),
    "latency.runtime": ("compiled", FROM_CALIBRATE),
    "latency.batch_size": (3, FROM_CALIBRATE),
    "latency.image_size": ([64, 96], FROM_CALIBRATE),
    "latency.dtype": ("bf16", FROM_CALIBRATE),
    "latency.num_vectors": (11, FROM_CALIBRATE),
    "latency.num_held_out": (5, FROM_CALIBRATE),
    "latency.max_half_width": (0.5, FROM_CALIBRATE),
    "latency.min_rounds": (3, FROM_CALIBRATE),
    "latency.max_rounds": (3, FROM_CALIBRATE),
    "latency.max_minutes": (1.0, FROM_CALIBRATE),
    "evaluation.batch_size": (3, EVALUATION),
    "evaluation.precision": ("bf16", EVALUATION),
    "search.num_evaluations": (7, FROM_SEARCH),
    "search.max_hours": (1.0, FROM_SEARCH),
    "search.plateau": (50, FROM_SEARCH),
    "search.plateau_gain": (0.5, FROM_SEARCH),
    "search.max_failures": (3, NOTHING),  # how much is put up with
    "search.deterministic": (True, FROM_SEARCH),
    "search.dry_run": (True, NOTHING),
    "search.warm_start": (["coco_34ms"], FROM_SEARCH),
    "search.storage": ("mine.journal", NOTHING),  # which says itself what it is about
    "search.population_size": (5, NOTHING),  # a default of the sampler's
    "search.seed": (1, FROM_SEARCH),
    "search.objectives": (
        [{"name": "box_ap", "direction": "maximize"}, {"name": "latency_ms", "direction": "minimize"}],
        FROM_SEARCH,
    ),
    "search.constraints": ([{"name": "latency_ms", "upper": 5.0}], FROM_SEARCH),
    "search.latency_budget_ms": (5.0, FROM_SEARCH),
    "search.num_images": (2, FROM_SEARCH),
    "search.measure_every": (5, FROM_SEARCH),
    "sampler.name": ("random", FROM_SEARCH),
    "sampler.population_size": (5, FROM_SEARCH),
    "sampler.num_parents": (2, FROM_SEARCH),
    "sampler.crossover_share": (0.25, FROM_SEARCH),
    "sampler.mutation_probability": (0.25, FROM_SEARCH),
    "sampler.spread": ("genes", FROM_SEARCH),
    "sampler.num_attempts": (10, FROM_SEARCH),
    "cluster.address": ("auto", NOTHING),
    "cluster.num_workers": (3, NOTHING),
    "cluster.cpus_per_worker": (2.0, NOTHING),
    "cluster.gpus_per_worker": (0.5, NOTHING),
    "cluster.num_retries": (3, NOTHING),
    "cluster.trial_timeout_s": (5.0, NOTHING),
    "cluster.object_store_mib": (300, NOTHING),
    "cluster.latency_lane": ("measure", FROM_CALIBRATE),
    "report.max_half_width": (0.5, REPORT),
    "report.max_rounds": (3, REPORT),
    "report.num_pictures": (1, REPORT),
    "report.max_members": (3, REPORT),
    "tracking.enabled": (False, NOTHING),
    "tracking.uri": ("http://localhost", NOTHING),
    "tracking.experiment": ("other", NOTHING),
    "tracking.trials": ("none", NOTHING),
    **{
        f"{stage}.{name}": (value, affected)
        for stage, (values, affected) in FIRST_STAGE.items()
        for name, value in values.items()
    },
    **{
        f"{stage}.{name}": (value, NOTHING)
        for stage in FIRST_STAGE
        for name, value in (("num_workers", 2), ("checkpoint_every_s", 9.0))
    },
}
FILES = {"init", "latency.path", "latency.prior", "latency.measure", "data.root", "data.images"}
"""Values that stand for what is behind them: tests of their own, below."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("keys")


@pytest.fixture(scope="module")
def config(folder: Path) -> ConfigSchema:
    return composed(*tiny_run(folder))


@pytest.fixture(scope="module")
def keys(config: ConfigSchema) -> dict[str, str]:
    return keys_of(config)


def keys_of(config: ConfigSchema) -> dict[str, str]:
    return stage_keys(Run(config, ArtifactStore(Path(config.output)), NoTracker()), STAGES)


def changed(config: ConfigSchema, **changes: Any) -> ConfigSchema:
    """The configuration with other values, by dotted name with ``__`` for the dot."""
    other = copy.deepcopy(config)
    for name, value in changes.items():
        OmegaConf.update(other, name.replace("__", "."), value)  # type: ignore[arg-type]
    return other


def affected(before: Mapping[str, str], after: Mapping[str, str]) -> set[str]:
    return {name for name, key in before.items() if after[name] != key}


def test_every_value_of_the_configuration_is_in_the_table(config: ConfigSchema) -> None:
    """Also those to come: decide whether a stage depends on them."""
    names = {name for name in build.flat(config) if not name.startswith(("task.", "data.generated."))}
    assert names == {*CHANGES, *FILES}


@pytest.mark.parametrize("name", CHANGES)
def test_a_value_changes_the_keys_of_what_depends_on_it(
    name: str, config: ConfigSchema, keys: Mapping[str, str]
) -> None:
    value, expected = CHANGES[name]
    assert build.flat(config)[name] != value
    assert affected(keys, keys_of(changed(config, **{name: value}))) == expected


def test_every_setting_of_the_task_is_one_of_training(config: ConfigSchema, keys: Mapping[str, str]) -> None:
    others = {
        "task.input.resize": "uint8", "task.input.shortest_side": 32,
        "task.conventions.mask_pasting": "integer",
    }  # fmt: skip
    names = [name for name in build.flat(config) if name.startswith("task.") and name != "task.name"]
    assert len(names) > 20
    for name in names:
        value = OmegaConf.select(config, name)  # type: ignore[arg-type]
        if name in others:
            value = others[name]
        elif OmegaConf.is_list(value):
            value = [2 * each for each in value]
        elif isinstance(value, bool):
            value = not value
        else:
            value = [64, 64] if value is None else value / 2 if isinstance(value, float) else 2 * value
        assert affected(keys, keys_of(changed(config, **{name: value}))) == FROM_TRAIN, name


def test_the_release_and_the_machine_are_in_the_keys(
    config: ConfigSchema, keys: Mapping[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(workflow, "__version__", "0.0.0")
        assert affected(keys, keys_of(config)) == EVERYTHING
    for module, function in (("platform", "node"), ("torch", "get_num_threads")):
        with monkeypatch.context() as patch:
            patch.setattr(f"{module}.{function}", lambda: 77)
            assert affected(keys, keys_of(config)) == FROM_CALIBRATE
    with monkeypatch.context() as patch:
        patch.setattr(torch, "__version__", "0.0.0")
        assert affected(keys, keys_of(config)) == FROM_CALIBRATE
    with monkeypatch.context() as patch:
        patch.setattr("pipelines.context.device_name", lambda device: "another")
        assert affected(keys, keys_of(config)) == FROM_CALIBRATE


@pytest.mark.parametrize(
    ("split", "expected"), [("train", FROM_TRAIN), ("search", FROM_SEARCH), ("report", REPORT)]
)
def test_annotations_are_in_the_keys_of_what_reads_them(
    split: str, expected: frozenset[str], folder: Path, config: ConfigSchema, keys: Mapping[str, str]
) -> None:
    path = folder / "data" / "annotations" / f"instances_{split}.json"
    before = path.read_text()
    dataset = json.loads(before)
    dataset["annotations"][0]["bbox"][2] += 1
    path.write_text(json.dumps(dataset))
    try:
        assert affected(keys, keys_of(config)) == expected
    finally:
        path.write_text(before)


def test_initial_weights_are_known_by_their_content(folder: Path, config: ConfigSchema) -> None:
    path = folder / "weights.pth"
    torch.save({"a": torch.zeros(1)}, path)
    initial = changed(config, init=str(path))
    keys = keys_of_parts(initial)
    moved = path.rename(folder / "moved.pth")
    assert keys_of_parts(changed(config, init=str(moved))) == keys
    torch.save({"a": torch.ones(1)}, moved)
    assert keys_of_parts(changed(config, init=str(moved))) != keys
    moved.rename(path)
    for name, value in (("init_classifier", "random"), ("init_heads", "random"), ("init_settings", "recipe")):
        torch.save({"a": torch.zeros(1)}, path)
        assert keys_of_parts(changed(initial, **{name: value})) != keys


def keys_of_parts(config: ConfigSchema) -> Any:
    """What the train stage's key is made of: the file need not be one that a model can start from."""
    return STAGES[0].depends_on(Run(config, ArtifactStore(Path(config.output)), NoTracker()))


def test_latency_tables_are_known_by_their_content(
    folder: Path, config: ConfigSchema, keys: Mapping[str, str]
) -> None:
    space = SparsitySpace((2, 2, 6, 2))
    terms = tuple((0.0, *(-float(step) for step in range(1, 9))) for _ in range(6))
    setting = LatencySetting("a board", 4, "2.11", "eager", "fp32", 4, (64, 64), "swin_nano", "backbone")
    for name in ("latency.path", "latency.prior"):
        path = folder / f"{name}.json"
        LatencyPredictor(space, 100.0, terms, setting).save(path)
        given = keys_of(changed(config, **{name: str(path)}))
        assert affected(keys, given) == FROM_CALIBRATE
        moved = path.rename(folder / f"moved_{name}.json")
        assert keys_of(changed(config, **{name: str(moved)})) == given
        LatencyPredictor(space, 101.0, terms, setting).save(moved)
        assert affected(given, keys_of(changed(config, **{name: str(moved)}))) == FROM_CALIBRATE


def test_a_whole_models_latency_is_of_its_weights_and_photos(folder: Path, config: ConfigSchema) -> None:
    whole = changed(config, latency__measure="model")
    keys = keys_of(whole)
    assert affected(keys, keys_of(changed(whole, train__epochs=2.0))) == EVERYTHING
    assert affected(keys, keys_of(changed(whole, data__search="report"))) == FROM_CALIBRATE
    assert affected(keys_of(config), keys) == FROM_CALIBRATE


def test_data_is_known_by_its_content_not_its_place(
    folder: Path, config: ConfigSchema, keys: Mapping[str, str]
) -> None:
    moved = folder / "moved"
    (folder / "data").rename(moved)
    try:
        assert keys_of(changed(config, data__root=str(moved))) == keys
    finally:
        moved.rename(folder / "data")


def test_another_image_folder_is_other_data(folder: Path, config: ConfigSchema) -> None:
    """The same annotations, on images that were made in another way."""
    (folder / "data" / "compressed").mkdir(exist_ok=True)
    own = changed(config, data__root=str(folder / "data"), data__generated__root=str(folder / "elsewhere"))
    for split in ("train", "search", "report"):
        source, link = folder / "data" / split, folder / "data" / "compressed" / split
        if not link.exists():
            link.symlink_to(source)
    named = changed(own, data__images="compressed/train", data__search="train", data__val="train")
    found = changed(own, data__images="train", data__search="train", data__val="train")
    assert affected(keys_of(found), keys_of(named)) == FROM_TRAIN
