"""What a search is about: the space, what it optimises, and what it forbids."""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import numpy as np

from search.space import SearchSpace, Vector, at_level
from search.variation import uniform_vector

CheapQuantity = Callable[[Any], float]
"""A quantity of a vector that costs next to nothing, such as predicted latency."""
NUM_PROBES = 2000
NUM_DRAWS = 20_000
REASON, WORKER, ELAPSED = NOTES = ("reason", "worker", "elapsed_s")
"""What the study notes of a trial beside its quantities."""


@dataclass(frozen=True)
class Objective:
    """A named quantity and the direction in which it is better.

    Attributes:
        reference: the worst value of interest, where hypervolume begins. None stands for 0 where more
            is better, and for a tenth above the largest reachable value of a cheap quantity.
    """

    name: str
    direction: Literal["maximize", "minimize"]
    reference: float | None = None

    def __post_init__(self) -> None:
        if self.direction not in ("maximize", "minimize"):
            raise ValueError(
                f"direction of objective {self.name!r} must be maximize or minimize, got {self.direction!r}"
            )
        if self.reference is not None and not math.isfinite(self.reference):
            raise ValueError(f"the reference of objective {self.name!r} must be finite, got {self.reference}")


@dataclass(frozen=True)
class Constraint:
    """Bounds of a quantity, inclusive.

    Raises:
        ValueError: if a bound is not a number, or none lies between them.
    """

    name: str
    upper: float = math.inf
    lower: float = -math.inf

    def __post_init__(self) -> None:
        for bound in (self.lower, self.upper):
            if not isinstance(bound, float | int) or math.isnan(bound):
                raise ValueError(f"a bound of the constraint on {self.name!r} is {bound!r}, not a number")
        if self.lower > self.upper:
            raise ValueError(
                f"the constraint on {self.name!r} is empty: its lower bound {self.lower:g} is above its "
                f"upper bound {self.upper:g}"
            )

    def violation(self, value: float) -> float:
        """How far a value is out of bounds; 0 within."""
        return max(value - self.upper, self.lower - value, 0.0)

    def __str__(self) -> str:
        bounds = [
            text
            for text, bound in ((f"≥ {self.lower:.12g}", self.lower), (f"≤ {self.upper:.12g}", self.upper))
            if math.isfinite(bound)
        ]
        return f"{self.name} {' and '.join(bounds) or 'anything'}"


@dataclass(frozen=True)
class SearchProblem:
    """A space with objectives and constraints, and where their quantities come from.

    Args:
        space: what vectors there are.
        objectives: in the order that samplers see.
        quantities: what costs next to nothing, by name. A constraint on one of these is checked
            before anything expensive runs.
        evaluated: names of what the evaluator gives. A constraint on one of these marks a finished
            trial as infeasible: it steers the sampler and is not on the front.
        constraints: on any of both.

    Raises:
        ValueError: if an objective or a constraint names a quantity that nothing gives, a name is
            given twice or is one of `NOTES`, constraints contradict each other, or there is no objective.
    """

    space: SearchSpace
    objectives: Sequence[Objective]
    quantities: Mapping[str, CheapQuantity] = field(default_factory=dict)
    evaluated: Sequence[str] = ()
    constraints: Sequence[Constraint] = ()

    def __post_init__(self) -> None:
        known = sorted({*self.quantities, *self.evaluated})
        for name in NOTES:
            if name in known:
                raise ValueError(f"the quantity {name!r} needs another name: a study notes it of every trial")
        if not self.objectives:
            raise ValueError(f"a search needs an objective; the quantities are {known}")
        names = [objective.name for objective in self.objectives]
        if len(set(names)) < len(names):
            raise ValueError(f"an objective is named twice: {names}")
        for objective in self.objectives:
            if objective.name not in known:
                raise ValueError(
                    f"nothing gives the objective {objective.name!r}; the quantities are {known}"
                )
            if objective.name not in self.quantities and objective == Objective(objective.name, "minimize"):
                raise ValueError(
                    f"the objective {objective.name!r} needs a reference: the worst value of interest"
                )
        for constraint in self.constraints:
            if constraint.name not in known:
                raise ValueError(
                    f"the constraint on {constraint.name!r} can never be checked: the quantities are {known}"
                )
            for other in self.constraints:
                if other.name == constraint.name and other.upper < constraint.lower:
                    raise ValueError(f"the constraints {constraint} and {other} contradict each other")

    def measure(self, vector: Vector) -> dict[str, float]:
        """The cheap quantities of a vector.

        Raises:
            ValueError: if one of them is no finite number.
        """
        return {name: self._quantity(name, vector) for name in self.quantities}

    def admits(self, vector: Vector) -> bool:
        """Whether the cheap constraints allow a vector."""
        return not any(
            constraint.violation(self._quantity(constraint.name, vector)) for constraint in self._cheap
        )

    def reachable(self, quantity: str) -> tuple[float, float]:
        """The smallest and largest value of a cheap quantity: of a small space exactly, else of a sample."""
        values = [self._quantity(quantity, vector) for vector in self._probes]
        return min(values), max(values)

    @cached_property
    def reference(self) -> dict[str, float]:
        """The corner that hypervolume is measured from: a value per objective."""
        corner = {}
        for objective in self.objectives:
            if objective.reference is not None:
                corner[objective.name] = objective.reference
            elif objective.direction == "maximize":
                corner[objective.name] = 0.0
            else:
                corner[objective.name] = 1.1 * self.reachable(objective.name)[1]
        return corner

    def require_feasible(self) -> None:
        """Check that cheap quantities are numbers, and that some vector meets all constraints on them.

        Raises:
            ValueError: naming the quantity and its value, or the constraint and the reachable range.
        """
        for vector in self._probes:
            self.measure(vector)
        for constraint in self._cheap:
            low, high = self.reachable(constraint.name)
            if low > constraint.upper or high < constraint.lower:
                raise ValueError(f"no vector has {constraint}: reachable is {low:.4g} to {high:.4g}")
        rng = np.random.default_rng(1)
        num_draws = NUM_DRAWS if self.space.size > NUM_PROBES else 0
        draws = (uniform_vector(self.space, rng) for _ in range(num_draws))
        if not any(map(self.admits, itertools.chain(self._probes, draws))):
            raise ValueError(
                f"none of {len(self._probes) + num_draws:,} vectors meets {self.described_constraints} at "
                "once: widen the constraints"
            )

    @property
    def evaluated_constraints(self) -> list[Constraint]:
        """Those that only an evaluation can check."""
        return [constraint for constraint in self.constraints if constraint.name not in self.quantities]

    @property
    def needed(self) -> list[str]:
        """What the evaluator has to give."""
        names = [objective.name for objective in self.objectives]
        names += [constraint.name for constraint in self.constraints]
        return [name for name in dict.fromkeys(names) if name not in self.quantities]

    @property
    def described_constraints(self) -> str:
        return ", ".join(map(str, self.constraints)) or "the space"

    @property
    def _cheap(self) -> list[Constraint]:
        return [constraint for constraint in self.constraints if constraint.name in self.quantities]

    def _quantity(self, name: str, vector: Vector) -> float:
        value = self.quantities[name](vector)
        try:
            number = float(value)
        except (TypeError, ValueError):
            number = math.nan
        if not math.isfinite(number):
            raise ValueError(f"the quantity {name!r} of {list(vector)} is {value!r}, not a finite number")
        return number

    @cached_property
    def _probes(self) -> list[Vector]:
        """Every vector of a small space; the ends and a sample of a large one."""
        if self.space.size <= NUM_PROBES:
            return list(self.space)
        rng = np.random.default_rng(0)
        ends = [at_level(self.space, 0.0), at_level(self.space, 1.0)]
        return ends + [uniform_vector(self.space, rng) for _ in range(NUM_PROBES)]
