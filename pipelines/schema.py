"""Every key of the configuration, with its type. Hydra rejects what is not here.

The values live in ``conf/``; a ``???`` there must be set by the user or by an experiment.
"""

from dataclasses import dataclass, field
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING


@dataclass
class TaskSchema:
    """``name`` chooses the task; what else there is to set is up to each."""

    name: str = MISSING


@dataclass
class PhotoInputSchema:
    """As `sparsevit.tasks.mask_rcnn.PhotoInput`."""

    longest_side: int = MISSING
    shortest_side: int = MISSING
    fixed_size: list[int] | None = None
    divisor: int = MISSING
    resize: str = MISSING


@dataclass
class ConventionsSchema:
    """As `sparsevit.tasks.mask_rcnn.Conventions`."""

    roi_aligned: bool = MISSING
    roi_sampling_ratio: int = MISSING
    rounded_anchors: bool = MISSING
    anchor_strides: list[int] = MISSING
    anchor_ratios: list[float] = MISSING
    proposal_weights: list[float] = MISSING
    box_weights: list[float] = MISSING
    mask_pasting: str = MISSING


@dataclass
class InstanceSegmentationSchema(TaskSchema):
    """As `sparsevit.tasks.mask_rcnn.MaskRCNNConfig`."""

    image_size: int = MISSING
    scale_range: list[float] = MISSING
    fpn_channels: int = MISSING
    box_channels: int = MISSING
    mask_channels: int = MISSING
    smallest_anchor: int = MISSING
    num_rois_per_image: int = MISSING
    num_proposals: int = MISSING
    num_proposals_per_level: int = MISSING
    num_detections: int = MISSING
    proposal_overlap: float = MISSING
    detection_overlap: float = MISSING
    score_threshold: float = MISSING
    mask_threshold: float = MISSING
    input: PhotoInputSchema = field(default_factory=PhotoInputSchema)
    conventions: ConventionsSchema = field(default_factory=ConventionsSchema)


@dataclass
class SemanticSegmentationSchema(TaskSchema):
    """As `sparsevit.tasks.mask2former.Mask2FormerConfig`."""

    crop_size: list[int] = MISSING
    scale_range: list[float] = MISSING
    feature_channels: int = MISSING
    hidden_channels: int = MISSING
    encoder_hidden_channels: int = MISSING
    encoder_layers: int = MISSING
    decoder_layers: int = MISSING
    num_heads: int = MISSING
    num_queries: int = MISSING
    num_points: int = MISSING


@dataclass
class Detection3DSchema(TaskSchema):
    """As `sparsevit.tasks.bevdet.BEVDetConfig`."""

    input_size: list[int] = MISSING
    neck_channels: int = MISSING
    view_channels: int = MISSING
    bev_channels: int = MISSING
    head_channels: int = MISSING
    depth_range: list[float] = MISSING
    extent: float = MISSING
    cell: float = MISSING
    resize_range: list[float] = MISSING
    rotation: float = MISSING
    flips: bool = MISSING
    bev_rotation: float = MISSING
    bev_scale_range: list[float] = MISSING
    min_score: float = MISSING


@dataclass
class OwnTaskSchema(TaskSchema):
    """A task of the user's own, ``module:callable``, takes whatever `options` it wants."""

    options: dict[str, Any] = field(default_factory=dict)


@dataclass
class GeneratedSchema:
    """The data set that the project draws, used where `data.root` is its `root`."""

    generator: str = MISSING
    root: str = MISSING
    image_size: list[int] = MISSING
    num_images: dict[str, int] = MISSING
    seed: int = 0


@dataclass
class DataSchema:
    root: str = MISSING
    images: str | None = None  # folder of the images, below the root, where they are not found by themselves
    train: str | None = None
    search: str | None = None
    val: str | None = None
    num_search: int = MISSING
    limit: int | None = None
    verify: str = "decode"
    generated: GeneratedSchema | None = None


@dataclass
class BackboneSchema:
    name: str = MISSING
    drop_path_rate: float = 0.0
    checkpoints: bool = False  # in training, less memory for a quarter more time
    choices: list[float] = MISSING


@dataclass
class TrainingSchema:
    """One training stage; `epochs` may be a fraction."""

    epochs: float = MISSING
    batch_size: int = MISSING
    learning_rate: float = MISSING
    weight_decay: float = 0.05
    warmup_steps: int = 0
    schedule: str = "cosine"
    milestones: list[float] = field(default_factory=lambda: [8 / 12, 11 / 12])
    precision: str = "auto"
    clip_norm: float = 1.0
    backbone_rate: float = 1.0
    num_workers: int = 0
    checkpoint_every_s: float = 20.0


@dataclass
class AdaptSchema(TrainingSchema):
    law: str = "sorted_genes"


@dataclass
class FinetuneSchema(TrainingSchema):
    """`rule` chooses the front member: ``latency_budget``, ``accuracy_drop`` or ``knee``.

    `max_accuracy_drop` counts from the dense model to the member before finetuning, on the search
    split. A `vector` is finetuned instead, if one is given.
    """

    rule: str = MISSING
    vector: list[float] | None = None
    max_accuracy_drop: float = MISSING
    latency_budget_ms: float | None = None


@dataclass
class LatencySchema:
    """What a latency is of, and how much is measured for it.

    Where `path` names a table, only the front is measured. `measure` is ``backbone`` or ``model``, `runtime`
    ``eager``, ``cuda_graph``, ``compiled`` or ``onnxruntime`` (docs/latency.md).
    """

    path: str | None = None
    prior: str | None = None
    measure: str = "backbone"
    runtime: str = "eager"
    batch_size: int = MISSING
    image_size: list[int] = MISSING
    dtype: str = MISSING
    num_vectors: int = MISSING
    num_held_out: int = MISSING
    max_half_width: float = MISSING
    min_rounds: int = MISSING
    max_rounds: int = MISSING
    max_minutes: float | None = None


@dataclass
class ObjectiveSchema:
    """`reference` is the worst value of interest, where hypervolume begins; null finds one."""

    name: str = MISSING
    direction: str = MISSING
    reference: float | None = None


@dataclass
class ConstraintSchema:
    name: str = MISSING
    upper: float | None = None
    lower: float | None = None


@dataclass
class SearchSchema:
    """The search ends with the first budget that is spent; null leaves one out.

    With `deterministic` the same seed evaluates the same vectors however many workers there are, at
    the price of waiting for the slowest trial of every generation.
    """

    num_evaluations: int | None = MISSING
    population_size: int = MISSING
    max_hours: float | None = None
    plateau: int | None = None
    plateau_gain: float = MISSING
    max_failures: int | None = None
    deterministic: bool = False
    dry_run: bool = False
    warm_start: list[str] = field(default_factory=list)
    storage: str | None = None
    seed: int = MISSING
    objectives: list[ObjectiveSchema] = MISSING
    constraints: list[ConstraintSchema] = field(default_factory=list)
    latency_budget_ms: float | None = None
    num_images: int | None = None
    measure_every: int | None = MISSING  # evaluations between two measurements of the front; null: at the end


@dataclass
class EvaluationSchema:
    """How accuracy is computed, in the search and everywhere else."""

    batch_size: int = MISSING
    precision: str = MISSING


@dataclass
class SamplerSchema:
    name: str = MISSING
    population_size: int = MISSING
    num_parents: int | None = None  # None: a quarter of the population
    crossover_share: float = MISSING
    mutation_probability: float = MISSING
    spread: str = MISSING
    num_attempts: int = MISSING


@dataclass
class ReportSchema:
    max_half_width: float = MISSING  # of a member's latency, as latency.max_half_width
    max_rounds: int = MISSING
    num_pictures: int = MISSING
    max_members: int | None = None  # None: every member of the front


@dataclass
class ClusterSchema:
    address: str | None = None
    num_workers: int | None = MISSING
    cpus_per_worker: float = 1.0
    gpus_per_worker: float = 0.0
    num_retries: int = 1
    trial_timeout_s: float | None = None
    object_store_mib: int = 256
    latency_lane: str | None = None  # custom resource of the node that latency is measured on


@dataclass
class TrackingSchema:
    enabled: bool = True
    uri: str | None = None
    experiment: str = MISSING
    trials: str = "all"  # which trials of the search get a run of their own: all, front or none


@dataclass
class ConfigSchema:
    experiment: str = MISSING
    scale: str = MISSING
    seed: int = MISSING
    output: str = MISSING
    device: str = MISSING
    init: str = MISSING
    init_classifier: str = MISSING  # load: weights of as many classes; random: all but the classifier
    init_heads: str = MISSING  # load: all of the file; random: the backbone alone
    init_settings: str = MISSING  # sizes and thresholds: checkpoint or recipe
    until: str = MISSING
    task: TaskSchema = MISSING
    data: DataSchema = MISSING
    backbone: BackboneSchema = MISSING
    train: TrainingSchema = MISSING
    adapt: AdaptSchema = MISSING
    latency: LatencySchema = MISSING
    evaluation: EvaluationSchema = MISSING
    search: SearchSchema = MISSING
    sampler: SamplerSchema = MISSING
    cluster: ClusterSchema = MISSING
    finetune: FinetuneSchema = MISSING
    report: ReportSchema = MISSING
    tracking: TrackingSchema = MISSING


def register() -> None:
    """Make the schema known to Hydra, for ``defaults: [schema]`` in ``conf/config.yaml``."""
    store = ConfigStore.instance()
    store.store(name="schema", node=ConfigSchema)
    for name, node in (
        ("instance_segmentation", InstanceSegmentationSchema),
        ("semantic_segmentation", SemanticSegmentationSchema),
        ("detection_3d", Detection3DSchema),
        ("own", OwnTaskSchema),
    ):
        store.store(group="task_schema", name=name, node=node)
