"""The latency table of a device: additive in the genes, with error bars and where it comes from."""

import itertools
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sparsevit.latency.fitting import AdditiveFit, StepPrior, fit_additive
from sparsevit.latency.scores import error_bar
from sparsevit.latency.timing import Z_95
from sparsevit.sparsity import SparsitySpace, SparsityVector

SCHEMA_VERSION = 3
MIN_NOISE = 0.01  # of a latency that repeats better than the additive model fits it
Array = NDArray[np.float64]


@dataclass(frozen=True)
class LatencySetting:
    """What was measured, and on what. A prediction holds for the same setting only.

    Attributes:
        measures: ``backbone``, or the name of a whole model.
        batch_size, image_size: what the backbone sees.
    """

    device: str
    num_threads: int
    torch_version: str
    runtime: str
    dtype: str
    batch_size: int
    image_size: tuple[int, int]
    backbone: str
    measures: str

    @property
    def description(self) -> str:
        """What was measured, in a few words, for tables and plots."""
        what = "the backbone" if self.measures == "backbone" else f"the whole model ({self.measures})"
        size = "×".join(map(str, self.image_size))
        return f"{what}, {self.runtime}, batch {self.batch_size}, {size}, {self.dtype}"


@dataclass(frozen=True)
class Measurement:
    """The measured latency of a vector.

    Attributes:
        half_width: of the 95 % confidence interval, relative.
        num_repeats, num_outliers: timed forward passes, and how many of them lie far off.
        is_held_out: whether no fit may see it.
        energy_mj: of a forward pass, where the device tells.
        peak_mib: memory of a forward pass on top of what was there before, where the device tells.
    """

    vector: SparsityVector
    latency_ms: float
    half_width: float
    num_repeats: int
    num_outliers: int = 0
    is_held_out: bool = False
    energy_mj: float | None = None
    peak_mib: float | None = None

    def __post_init__(self) -> None:
        if not 0 < self.latency_ms < np.inf or not 0 <= self.half_width < np.inf:
            raise ValueError(
                f"a latency must be positive and finite, got {self.latency_ms} ms at {self.vector}"
            )


@dataclass(frozen=True)
class LatencyPredictor:
    """Milliseconds of a forward pass at any vector of a space.

    Attributes:
        base_ms: the dense forward pass.
        terms_ms: what a gene at a choice adds to the base (≤ 0): one row per gene, one entry per
            choice of the space.
        setting: what was measured.
        error_bar: the relative error that 95 % of the predictions keep below; 0 if it is not known.
        prior: what a new fit starts from.
        measurements: what the table was fitted to, and what it was scored on.
        scores: how well it predicts vectors that were held out of the fit.
        date: when it was calibrated, ISO 8601.
        provenance: more about the machine, for people.
    """

    space: SparsitySpace
    base_ms: float
    terms_ms: tuple[tuple[float, ...], ...]
    setting: LatencySetting
    error_bar: float = 0.0
    prior: StepPrior | None = None
    measurements: tuple[Measurement, ...] = ()
    scores: Mapping[str, float] = field(default_factory=dict)
    date: str = ""
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        terms = np.array([term for row in self.terms_ms for term in row])
        if not np.isfinite([self.base_ms, *terms]).all() or self.base_ms <= 0:
            raise ValueError(f"latencies must be finite and the base positive, got base {self.base_ms} ms")
        shape = (self.space.num_genes, len(self.space.choices))
        if len(self.terms_ms) != shape[0] or any(len(row) != shape[1] for row in self.terms_ms):
            raise ValueError(
                f"the table must have {shape[0]} rows of {shape[1]} terms, one per gene and choice"
            )
        for name, row in zip(self.space.gene_names, self.terms_ms, strict=True):
            if row[0] != 0 or any(later > earlier for earlier, later in itertools.pairwise(row)):
                raise ValueError(
                    f"the terms of {name} must begin at 0 and never grow with the ratio, got {list(row)}"
                )
        fastest = self.base_ms + sum(row[-1] for row in self.terms_ms)
        if fastest <= 0:
            raise ValueError(f"the sparsest vector would take {fastest:.4g} ms; latencies are positive")
        if not 0 <= self.error_bar < np.inf:
            raise ValueError(f"the error bar must be finite and at least 0, got {self.error_bar}")

    def predict(self, sparsity: SparsityVector) -> float:
        """Milliseconds of one forward pass.

        Raises:
            ValueError: if the vector is not in the calibrated space.
        """
        self.space.validate(sparsity)
        return AdditiveFit(self.base_ms, self.terms_ms).predict(self.space, sparsity)

    def predict_all(self) -> tuple[Array, Array]:
        """Every vector of the space with its milliseconds: [V, genes] in lexicographic order, and [V]."""
        terms, choices = np.array(self.terms_ms), np.array(self.space.choices)
        ratios, latencies = np.empty((1, 0)), np.array([self.base_ms])
        first = 0
        for size in self.space.group_sizes:
            index = np.array([*itertools.combinations_with_replacement(range(len(choices)), size)])
            added = terms[np.arange(first, first + size), index].sum(axis=1)
            latencies = (latencies[:, None] + added).ravel()
            ratios = np.hstack(
                (np.repeat(ratios, len(index), axis=0), np.tile(choices[index], (len(ratios), 1)))
            )
            first += size
        return ratios, latencies

    def refitted(self, measurements: Sequence[Measurement]) -> "LatencyPredictor":
        """The table fitted to its own measurements and to new ones.

        The error bar stays that of vectors which no fit has seen, where there are such.

        Raises:
            ValueError: if the table came without measurements or prior.
        """
        if self.prior is None or not self.measurements:
            raise ValueError("the table has no measurements of its own, so it cannot be refitted; calibrate")
        everything = (*self.measurements, *measurements)
        seen = [each for each in everything if not each.is_held_out]
        noise = max(MIN_NOISE, float(np.median([each.half_width for each in seen])) / Z_95)
        fit = fit_additive(
            self.space, [each.vector for each in seen], [each.latency_ms for each in seen], self.prior, noise
        )
        unseen = [each for each in everything if each.is_held_out]
        bar = self.error_bar
        if unseen:
            predicted = [fit.predict(self.space, each.vector) for each in unseen]
            bar = error_bar(predicted, [each.latency_ms for each in unseen])
        return replace(
            self, base_ms=fit.base_ms, terms_ms=fit.terms_ms, error_bar=bar, measurements=everything
        )

    def save(self, path: Path) -> None:
        """Write JSON, all or nothing."""
        content = {
            "schema_version": SCHEMA_VERSION,
            "date": self.date,
            "setting": asdict(self.setting),
            "provenance": dict(self.provenance),
            "scores": dict(self.scores),
            "error_bar": self.error_bar,
            "depths": list(self.space.depths),
            "choices": list(self.space.choices),
            "base_ms": self.base_ms,
            "terms_ms": {
                name: list(row) for name, row in zip(self.space.gene_names, self.terms_ms, strict=True)
            },
            "prior": asdict(self.prior) if self.prior else None,
            "measurements": [
                {**asdict(each), "vector": list(each.vector.ratios)} for each in self.measurements
            ],
        }
        partial = path.with_name(path.name + ".partial")
        partial.write_text(json.dumps(content, indent=1))
        os.replace(partial, path)

    @classmethod
    def load(cls, path: Path) -> "LatencyPredictor":
        """Read what `save` wrote.

        Raises:
            ValueError: if the file is broken, of another schema version, or holds a latency that is not
                finite and positive.
        """
        if not path.is_file():
            raise ValueError(
                f"there is no latency table {path}: `python -m sparsevit.latency calibrate` writes one"
            )
        try:
            content: dict[str, Any] = json.loads(path.read_text())
            if content["schema_version"] != SCHEMA_VERSION:
                raise ValueError(
                    f"schema version {content['schema_version']}, this release reads {SCHEMA_VERSION}"
                )
            setting = content["setting"] | {"image_size": tuple(content["setting"]["image_size"])}
            space = SparsitySpace(tuple(content["depths"]), tuple(content["choices"]))
            prior = content["prior"]
            return cls(
                space,
                content["base_ms"],
                tuple(tuple(content["terms_ms"][name]) for name in space.gene_names),
                LatencySetting(**setting),
                content["error_bar"],
                StepPrior(tuple(prior["savings_ms"]), tuple(prior["spread_ms"])) if prior else None,
                tuple(
                    Measurement(**each | {"vector": SparsityVector(tuple(each["vector"]))})
                    for each in content["measurements"]
                ),
                content["scores"],
                content["date"],
                content["provenance"],
            )
        except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, ValueError) as error:
            reason = f"{error} is missing" if isinstance(error, KeyError) else str(error)
            raise ValueError(f"{path} is not a usable latency table: {reason}; calibrate again") from error
