"""What a search optimises, and what it forbids."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from sparsevit.sparsity import SparsitySpace, SparsityVector

CheapQuantity = Callable[[SparsityVector], float]
"""A quantity of a vector that costs next to nothing, such as predicted latency."""


@dataclass(frozen=True)
class Objective:
    """A named quantity and the direction in which it is better."""

    name: str
    direction: Literal["maximize", "minimize"]

    def __post_init__(self) -> None:
        if self.direction not in ("maximize", "minimize"):
            raise ValueError(
                f"direction of objective {self.name!r} must be maximize or minimize, got {self.direction!r}"
            )


@dataclass(frozen=True)
class Constraint:
    """A cheap quantity that must stay within bounds; checked before anything expensive runs."""

    name: str
    upper: float = math.inf
    lower: float = -math.inf

    def allows(self, value: float) -> bool:
        return self.lower <= value <= self.upper


@dataclass(frozen=True)
class Admission:
    """Decides from cheap quantities alone whether a vector may be evaluated.

    Raises:
        ValueError: if a constraint names a quantity that nothing produces.
    """

    quantities: Mapping[str, CheapQuantity]
    constraints: Sequence[Constraint] = ()

    def __post_init__(self) -> None:
        for constraint in self.constraints:
            if constraint.name not in self.quantities:
                raise ValueError(
                    f"the constraint on {constraint.name!r} can never be checked: "
                    f"the cheap quantities are {sorted(self.quantities)}"
                )

    def measure(self, vector: SparsityVector) -> dict[str, float]:
        return {name: quantity(vector) for name, quantity in self.quantities.items()}

    def admits(self, vector: SparsityVector) -> bool:
        return all(
            constraint.allows(self.quantities[constraint.name](vector)) for constraint in self.constraints
        )

    def require_feasible(self, space: SparsitySpace) -> None:
        """Check that some vector meets every constraint, for quantities that fall with sparsity.

        Raises:
            ValueError: naming the constraint and the reachable range.
        """
        for constraint in self.constraints:
            quantity = self.quantities[constraint.name]
            low, high = quantity(space.sparsest), quantity(space.dense)
            if low > constraint.upper or high < constraint.lower:
                raise ValueError(
                    f"no sparsity vector has {constraint.name} between {constraint.lower:g} and "
                    f"{constraint.upper:g}: reachable is {low:.4g} (sparsest) to {high:.4g} (dense)"
                )
