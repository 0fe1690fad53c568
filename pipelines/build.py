"""Configuration to objects: the only place that knows both."""

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf

from pipelines.errors import ConfigurationError
from pipelines.schema import ConfigSchema, OwnTaskSchema, TrainingSchema
from pipelines.search_log import TRIALS
from search.dispatch import Budget
from search.engine import EngineConfig
from search.problem import CheapQuantity, Constraint, Objective, SearchProblem
from search.samplers import SAMPLERS, SamplerConfig, create_sampler
from search.selection import RULES
from search.warm_start import warm_start
from sparsevit.adaptation import sampling_law
from sparsevit.backbone import BACKBONES, SparseSwin, create_backbone
from sparsevit.data.drives import DrivesConfig, write_drives
from sparsevit.data.errors import DataError
from sparsevit.data.generated import MARKER
from sparsevit.data.shapes import ShapesConfig, write_shapes
from sparsevit.data.split import DataSplit, open_split
from sparsevit.data.streets import StreetsConfig, write_streets
from sparsevit.latency import LatencyPredictor
from sparsevit.latency.calibration import CalibrationConfig
from sparsevit.latency.subject import check_runtime
from sparsevit.latency.timing import TimingLimits
from sparsevit.precision import check_precision
from sparsevit.sparsity import SparsitySpace, SparsityVector
from sparsevit.tasks import Task, create_task
from sparsevit.training import TrainingConfig

GENERATORS = ("shapes", "streets", "drives")
SHIPPED_WEIGHTS = Path(__file__).parent / "weights"
CHEAP_QUANTITIES = ("latency_ms", "macs_g")


def check(config: ConfigSchema) -> None:
    """Build everything that needs no data, so that a bad value fails before any work.

    Raises:
        ValueError: naming the value, the bound and the remedy.
    """
    space(config)
    for name, seed in (("seed", config.seed), ("search.seed", config.search.seed)):
        if not 0 <= seed < 2**32:
            raise ConfigurationError(f"{name} must be between 0 and 2**32 - 1, got {seed}")
    for name, bound in (
        ("search.latency_budget_ms", config.search.latency_budget_ms),
        ("finetune.latency_budget_ms", config.finetune.latency_budget_ms),
    ):
        if bound is not None and not 0 < bound < math.inf:
            raise ConfigurationError(f"{name} must be positive and finite, got {bound:g}")
    drop = config.finetune.max_accuracy_drop
    if not 0 <= drop < math.inf:
        raise ConfigurationError(f"finetune.max_accuracy_drop must be finite and at least 0, got {drop}")
    for stage in (config.train, config.adapt, config.finetune):
        training(stage, num_images=stage.batch_size)
    sampling_law(config.adapt.law)
    check_precision(config.evaluation.precision)
    check_latency(config)
    engine(config)
    _one_of("sampler.name", config.sampler.name, tuple(SAMPLERS))
    _one_of("finetune.rule", config.finetune.rule, RULES)
    _one_of("tracking.trials", config.tracking.trials, TRIALS)
    _one_of("data.verify", config.data.verify, ("decode", "header", "none"))
    _one_of("init_classifier", config.init_classifier, ("load", "random"))
    _one_of("init_heads", config.init_heads, ("load", "random"))
    _one_of("init_settings", config.init_settings, ("checkpoint", "recipe"))
    if is_generated(config):
        generator(config)
    finetuned_vector(config)
    if config.finetune.rule == "latency_budget" and config.finetune.latency_budget_ms is None:
        raise ConfigurationError("finetune.rule=latency_budget needs finetune.latency_budget_ms")
    for name, value in (
        ("evaluation.batch_size", config.evaluation.batch_size),
        ("search.num_images", config.search.num_images),
        ("search.num_evaluations", config.search.num_evaluations),
        ("search.plateau", config.search.plateau),
        ("search.max_failures", config.search.max_failures),
        ("search.measure_every", config.search.measure_every),
        ("report.num_pictures", config.report.num_pictures),
        ("report.max_members", config.report.max_members),
        ("data.limit", config.data.limit),
    ):
        if value is not None and value < 1:
            raise ConfigurationError(f"{name} must be at least 1, got {value}")
    budget(config)
    create_sampler(problem(config, dict.fromkeys(CHEAP_QUANTITIES, lambda vector: 0.0)), sampler(config))
    warm_start(list(config.search.warm_start), space(config))
    if config.backbone.choices[0] != 0:
        raise ConfigurationError(
            f"backbone.choices must begin with 0, the dense model, got {list(config.backbone.choices)}"
        )
    initial_weights(config)
    device(config)


def device(config: ConfigSchema) -> torch.device:
    if config.device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(config.device)
    except RuntimeError as error:
        raise ConfigurationError(f"device={config.device}: {str(error).splitlines()[0]}") from error
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise ConfigurationError(
            f"device={config.device}, but torch finds no CUDA device here; use device=cpu"
        )
    return chosen


def finetuned_vector(config: ConfigSchema) -> SparsityVector | None:
    """The vector that the user wants finetuned, if any."""
    if config.finetune.vector is None:
        return None
    return space(config).validate(SparsityVector(tuple(config.finetune.vector)))


def initial_weights(config: ConfigSchema) -> Path | None:
    """The file or folder that training starts from; None for scratch."""
    if config.init == "scratch":
        return None
    if config.init != "shipped":
        path = Path(config.init)
        if not path.exists():
            raise ConfigurationError(
                f"init={config.init}: no such file or folder; use shipped, scratch, or a checkpoint's path"
            )
        return path
    path = SHIPPED_WEIGHTS / f"{config.experiment}_{config.scale}.safetensors"
    if not path.is_file():
        raise ConfigurationError(
            f"no weights are shipped for experiment {config.experiment} at scale {config.scale}: "
            "use init=scratch, or init=/path/to/a/checkpoint"
        )
    return path


def space(config: ConfigSchema) -> SparsitySpace:
    _one_of("backbone.name", config.backbone.name, tuple(BACKBONES))
    return SparsitySpace(BACKBONES[config.backbone.name].depths, tuple(config.backbone.choices))


def backbone(config: ConfigSchema) -> SparseSwin:
    fields = config.backbone
    return create_backbone(fields.name, drop_path_rate=fields.drop_path_rate, checkpoints=fields.checkpoints)


def task(config: ConfigSchema, num_classes: int) -> Task:
    fields = plain(config.task)
    name, options = fields.pop("name"), fields.pop("options", fields)
    is_own = ":" in name
    if is_own != (OmegaConf.get_type(config.task) is OwnTaskSchema):
        raise ConfigurationError(
            f"task.name={name}: a task of your own is module:callable with task=own, one of ours comes with "
            "its file in conf/task (docs/own-detector.md)"
        )
    return create_task(name, {"num_classes": num_classes, **options})


def training(stage: TrainingSchema, num_images: int) -> TrainingConfig:
    """Epochs over `num_images` become steps."""
    fields = plain(stage)
    for name in ("law", "rule", "vector", "max_accuracy_drop", "latency_budget_ms"):
        fields.pop(name, None)
    epochs = fields.pop("epochs")
    if epochs < 0 or not math.isfinite(epochs):
        raise ConfigurationError(f"epochs must be finite and at least 0, got {epochs}")
    num_steps = math.ceil(epochs * num_images / stage.batch_size) if stage.batch_size > 0 else 0
    fields["milestones"] = tuple(fields["milestones"])
    return TrainingConfig(num_steps=num_steps, **fields)


def calibration(config: ConfigSchema) -> CalibrationConfig:
    latency = config.latency
    return CalibrationConfig(
        num_vectors=latency.num_vectors,
        num_held_out=latency.num_held_out,
        limits=TimingLimits(
            max_half_width=latency.max_half_width,
            min_rounds=latency.min_rounds,
            max_rounds=latency.max_rounds,
            max_seconds=None if latency.max_minutes is None else 60 * latency.max_minutes,
        ),
    )


def report_limits(config: ConfigSchema) -> TimingLimits:
    """How often the report times every member."""
    limits = calibration(config).limits
    return replace(
        limits,
        max_half_width=config.report.max_half_width,
        max_rounds=max(limits.min_rounds, config.report.max_rounds),
    )


def check_latency(config: ConfigSchema) -> None:
    """Raise `ValueError` unless what is to be measured can be."""
    latency = config.latency
    calibration(config), report_limits(config)
    _one_of("latency.measure", latency.measure, ("backbone", "model"))
    check_runtime(latency.runtime, latency.dtype, device(config))
    if latency.measure == "model" and latency.runtime != "eager":
        raise ConfigurationError(
            f"latency.measure=model is measured in eager mode, got latency.runtime={latency.runtime}; "
            "latency.measure=backbone takes every runtime"
        )
    if len(latency.image_size) != 2 or min(latency.image_size) < 1:
        raise ConfigurationError(f"latency.image_size must be [height, width], got {latency.image_size}")
    if latency.batch_size < 1:
        raise ConfigurationError(f"latency.batch_size must be at least 1, got {latency.batch_size}")
    latency_table(config)
    prior_table(config)


def prior_table(config: ConfigSchema) -> LatencyPredictor | None:
    """The table of another device, dtype, batch or size that calibration starts from.

    Raises:
        ConfigurationError: if it is of another space.
    """
    if config.latency.prior is None:
        return None
    table, asked = LatencyPredictor.load(Path(config.latency.prior)), space(config)
    if table.space != asked:
        raise ConfigurationError(
            f"the latency table {config.latency.prior} has depths {list(table.space.depths)} and choices "
            f"{list(table.space.choices)}, the backbone has {list(asked.depths)} and {list(asked.choices)}"
        )
    return table


def latency_table(config: ConfigSchema) -> LatencyPredictor | None:
    """The user's own latency table; None where this device is to be calibrated.

    Raises:
        ConfigurationError: if it is about something else than the configuration, naming what, and how to
            make one that fits.
    """
    if config.latency.path is None:
        return None
    if not config.latency.path:
        raise ConfigurationError(
            "latency=table needs latency.path=/path/to/latency.json, which `python -m sparsevit.latency "
            "calibrate` writes on the device"
        )
    path, wanted = Path(config.latency.path), config.latency
    table = LatencyPredictor.load(path)
    known, asked = table.setting, space(config)
    measures = "backbone" if wanted.measure == "backbone" else "model"
    differences = [
        f"{name}={theirs} instead of {ours}"
        for name, theirs, ours in (
            ("backbone", known.backbone, config.backbone.name),
            ("measure", "backbone" if known.measures == "backbone" else "model", measures),
            ("runtime", known.runtime, wanted.runtime),
            ("image_size", list(known.image_size), list(wanted.image_size)),
            ("batch_size", known.batch_size, wanted.batch_size),
            ("dtype", known.dtype, wanted.dtype),
            ("choices", list(table.space.choices), list(asked.choices)),
        )
        if theirs != ours
    ]
    if differences:
        height, width = wanted.image_size
        what = config.backbone.name if measures == "backbone" else "/path/to/export"
        raise ConfigurationError(
            f"the latency table {path} is about {', '.join(differences)}. On the device: python -m "
            f"sparsevit.latency calibrate {what} latency.json --measure {measures} "
            f"--image-size {height} {width} --batch-size {wanted.batch_size} --dtype {wanted.dtype} "
            f"--runtime {wanted.runtime} "
            f"--choices {' '.join(f'{choice:g}' for choice in asked.choices)}"
        )
    return table


def engine(config: ConfigSchema) -> EngineConfig:
    fields = plain(config.cluster)
    cluster = EngineConfig(**fields)
    is_here = cluster.address is None and "RAY_ADDRESS" not in os.environ
    num_gpus = torch.cuda.device_count()
    if is_here and cluster.gpus_per_worker > num_gpus:
        raise ConfigurationError(
            f"cluster.gpus_per_worker={cluster.gpus_per_worker:g}, but torch finds {num_gpus} CUDA devices "
            "here; use at most so many, 0 for none"
        )
    if cluster.gpus_per_worker == 0 and device(config).type == "cuda":
        return replace(cluster, gpus_per_worker=1 / (cluster.num_workers or 1))
    return cluster


def objectives(config: ConfigSchema) -> list[Objective]:
    return [Objective(**plain(objective)) for objective in config.search.objectives]


def constraints(config: ConfigSchema) -> list[Constraint]:
    bounds = [
        Constraint(
            constraint.name,
            upper=math.inf if constraint.upper is None else constraint.upper,
            lower=-math.inf if constraint.lower is None else constraint.lower,
        )
        for constraint in config.search.constraints
    ]
    if config.search.latency_budget_ms is not None:
        bounds.append(Constraint("latency_ms", upper=config.search.latency_budget_ms))
    return bounds


def problem(config: ConfigSchema, quantities: Mapping[str, CheapQuantity]) -> SearchProblem:
    """What the search is about, given how its cheap quantities are computed."""
    evaluated = task(config, num_classes=1).metrics
    return SearchProblem(space(config), objectives(config), quantities, evaluated, constraints(config))


def budget(config: ConfigSchema) -> Budget:
    search = config.search
    if search.max_hours is not None and not 0 < search.max_hours < math.inf:
        raise ConfigurationError(f"search.max_hours must be positive and finite, got {search.max_hours}")
    if search.num_evaluations is search.max_hours is search.plateau is None:
        raise ConfigurationError(
            "set search.num_evaluations, search.max_hours or search.plateau: nothing ends the search"
        )
    return Budget(
        num_evaluations=search.num_evaluations,
        seconds=None if search.max_hours is None else 3600 * search.max_hours,
        plateau=search.plateau,
        plateau_gain=search.plateau_gain,
        max_failures=search.max_failures,
    )


def sampler(config: ConfigSchema) -> SamplerConfig:
    return SamplerConfig(seed=config.search.seed, **plain(config.sampler))


def data_splits(config: ConfigSchema, on_image: Any) -> tuple[DataSplit, DataSplit, DataSplit]:
    """Training, search and report split; the generated data set is written if it is needed.

    Raises:
        DataError: if the user's data cannot be used.
    """
    root = Path(config.data.root)
    if is_generated(config):
        generator(config)(root, on_image)
    data = task(config, num_classes=1).data

    def opened(split: str) -> DataSplit:
        whole = open_split(data, root, split, config.data.images)
        limit = config.data.limit
        return whole if limit is None else whole.subset(whole.sample_ids[:limit])

    train = opened(config.data.train or _find_split(data, root, "train"))
    report = opened(config.data.val or _find_split(data, root, "report", "val"))
    search_split = config.data.search or _find_split(data, root, "search", is_optional=True)
    if search_split is None:
        train, search = train.hold_out(config.data.num_search, config.seed)
    else:
        search = opened(search_split)
    for split in (search, report):
        if split.class_names != train.class_names:
            raise DataError(
                f"split {split.split!r} has other categories ({len(split.class_names)}) than "
                f"{train.split!r} ({len(train.class_names)})"
            )
    return train, search, report


def is_generated(config: ConfigSchema) -> bool:
    """Whether the data is the project's own, not the user's."""
    generated = config.data.generated
    return generated is not None and Path(config.data.root).resolve() == Path(generated.root).resolve()


def has_data(config: ConfigSchema) -> bool:
    """Whether the data set is there already; the project's own is drawn when it is first needed."""
    return not is_generated(config) or (Path(config.data.root) / MARKER).is_file()


def loads_classifier(config: ConfigSchema) -> bool:
    """Whether the initial weights give the layers that depend on the classes too.

    The shipped ones know the generated classes alone, even where the user has as many.
    """
    is_foreign = config.init == "shipped" and not is_generated(config)
    return config.init_classifier == "load" and not is_foreign


def loads_heads(config: ConfigSchema) -> bool:
    """Whether the initial weights give anything but the backbone."""
    return config.init_heads == "load"


def generator(config: ConfigSchema) -> Callable[[Path, Callable[[], None]], None]:
    """What draws the data set: called with its root and a function to call at every image.

    Raises:
        ValueError: for an unknown generator or an image size that it cannot draw.
    """
    assert config.data.generated is not None
    fields = plain(config.data.generated)
    name, size = fields.pop("generator"), fields.pop("image_size")
    _one_of("data.generated.generator", name, GENERATORS)
    del fields["root"]
    if len(size) != 2 or min(size) < 32 or (name == "shapes" and size[0] != size[1]):
        raise ConfigurationError(
            "data.generated.image_size is [height, width], at least 32 each and for shapes a square; "
            f"got {size}"
        )
    if name == "shapes":
        shapes = ShapesConfig(image_size=size[0], **fields)
        return lambda root, on_image: write_shapes(root, shapes, on_image)
    if name == "streets":
        streets = StreetsConfig(image_size=tuple(size), **fields)
        return lambda root, on_image: write_streets(root, streets, on_image)
    drives = DrivesConfig(image_size=tuple(size), **fields)
    return lambda root, on_image: write_drives(root, drives, on_image)


def plain(node: Any) -> dict[str, Any]:
    """A node of the configuration as dictionaries, lists and numbers."""
    container = OmegaConf.to_container(node, resolve=True, throw_on_missing=True)
    assert isinstance(container, dict)
    return {str(key): value for key, value in container.items()}


def flat(node: Any, prefix: str = "") -> Mapping[str, Any]:
    """Dotted names of all values below a node."""
    values: dict[str, Any] = {}
    for key, value in plain(node).items():
        if isinstance(value, dict):
            values |= flat(OmegaConf.create(value), f"{prefix}{key}.")
        else:
            values[prefix + key] = value
    return values


def _find_split(data: type[DataSplit], root: Path, *names: str, is_optional: bool = False) -> Any:
    """The split of that name, or the only one whose name begins or ends with it."""
    known = data.known_splits(root)
    for name in names:
        matching = [split for split in known if split == name] or [
            split for split in known if split.startswith(name) or split.endswith(f"_{name}")
        ]
        if len(matching) == 1:
            return matching[0]
    if is_optional:
        return None
    if not known:
        data(root, names[0])  # says what is missing
    raise DataError(f"{root} has the splits {known}: say which to use with data.{names[-1]}")


def _one_of(name: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ConfigurationError(f"{name} is {value!r}; choose one of {', '.join(choices)}")
