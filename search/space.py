"""What a search chooses from: genes, the choices of each, and the rule that orders them."""

import itertools
import math
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable


@runtime_checkable
class Vector(Hashable, Protocol):
    """One value per gene; immutable. A `SparsityVector`, or a tuple."""

    def __iter__(self) -> Iterator[float]: ...

    def __len__(self) -> int: ...


class SearchSpace(Protocol):
    """Genes that fall into groups; inside a group the values may not decrease.

    `SparsitySpace` is one, with a group per stage; `GeneSpace` is for everything else.
    """

    @property
    def gene_names(self) -> tuple[str, ...]: ...

    @property
    def gene_choices(self) -> tuple[tuple[float, ...], ...]:
        """The values that every gene may take, in increasing order."""

    @property
    def group_sizes(self) -> tuple[int, ...]:
        """Consecutive genes that belong together; they share their choices."""

    @property
    def size(self) -> int:
        """Number of legal vectors."""

    def canonicalize(self, values: Iterable[float]) -> Vector:
        """The legal vector of these values: every group sorted."""

    def __iter__(self) -> Iterator[Vector]:
        """Every legal vector, in lexicographic order."""


@dataclass(frozen=True)
class GeneSpace:
    """A space of the user's own: named genes and the numbers that each may take.

    Args:
        choices: for every gene its values, in increasing order. Whatever the values stand for
            (widths, bits, an index into a list), the evaluator says what they do.
        ordered: groups of genes, consecutive and with the same choices, whose values may not decrease.

    Raises:
        ValueError: if there are no genes, choices are empty or not increasing, or a group cannot be
            ordered.
    """

    choices: Mapping[str, Sequence[float]]
    ordered: Sequence[Sequence[str]] = ()
    group_sizes: tuple[int, ...] = field(init=False)

    def __post_init__(self) -> None:
        if not self.choices:
            raise ValueError("a space needs at least one gene")
        choices = {name: tuple(map(_plain_number, values)) for name, values in self.choices.items()}
        for name, values in choices.items():
            if not values or not all(a < b for a, b in itertools.pairwise((-math.inf, *values, math.inf))):
                raise ValueError(
                    f"the choices of gene {name!r} must be finite and increasing, got {list(values)}"
                )
        object.__setattr__(self, "choices", choices)
        object.__setattr__(self, "group_sizes", self._sizes_of_groups())

    @property
    def gene_names(self) -> tuple[str, ...]:
        return tuple(self.choices)

    @property
    def gene_choices(self) -> tuple[tuple[float, ...], ...]:
        return tuple(tuple(values) for values in self.choices.values())

    @property
    def size(self) -> int:
        return count_vectors(self)

    def canonicalize(self, values: Iterable[float]) -> tuple[float, ...]:
        groups = split(tuple(values), self.group_sizes)
        return tuple(itertools.chain.from_iterable(sorted(group) for group in groups))

    def __iter__(self) -> Iterator[tuple[float, ...]]:
        groups = [
            itertools.combinations_with_replacement(choices, size)
            for choices, size in zip(group_choices(self), self.group_sizes, strict=True)
        ]
        for parts in itertools.product(*groups):
            yield tuple(itertools.chain.from_iterable(parts))

    def _sizes_of_groups(self) -> tuple[int, ...]:
        names = list(self.choices)
        starts: dict[int, int] = {}
        for group in self.ordered:
            if isinstance(group, str):
                raise ValueError(f"ordered is a list of groups of genes, but {group!r} is no group: [[…], …]")
            if not group or group[0] not in names:
                raise ValueError(f"the ordered group {list(group)} names no gene; the genes are {names}")
            first = names.index(group[0])
            if names[first : first + len(group)] != list(group):
                raise ValueError(f"the genes of {list(group)} do not follow each other in {names}")
            if len({tuple(self.choices[name]) for name in group}) > 1:
                raise ValueError(f"the genes of {list(group)} are ordered but have different choices")
            starts[first] = len(group)
        sizes, position = [], 0
        while position < len(names):
            sizes.append(starts.pop(position, 1))
            position += sizes[-1]
        if starts:
            raise ValueError(f"the ordered groups overlap: {[list(group) for group in self.ordered]}")
        return tuple(sizes)


def _plain_number(value: Any) -> float:
    """NumPy's scalars as Python's, which a study can hold."""
    number: float = value.item() if hasattr(value, "item") else value
    return number


def split(values: tuple[float, ...], group_sizes: Sequence[int]) -> list[tuple[float, ...]]:
    """Cut the values of all genes into one tuple per group."""
    bounds = [0, *itertools.accumulate(group_sizes)]
    return [values[start:end] for start, end in itertools.pairwise(bounds)]


def group_choices(space: SearchSpace) -> list[tuple[float, ...]]:
    """The choices of every group."""
    first_genes = itertools.accumulate(space.group_sizes[:-1], initial=0)
    return [space.gene_choices[gene] for gene in first_genes]


def count_vectors(space: SearchSpace) -> int:
    """Number of legal vectors: a product of multiset coefficients."""
    return math.prod(
        math.comb(len(choices) + size - 1, size)
        for choices, size in zip(group_choices(space), space.group_sizes, strict=True)
    )


def at_level(space: SearchSpace, level: float) -> Vector:
    """Every gene at the same place of its choices: 0 is the first of them, 1 the last."""
    return space.canonicalize(choices[round(level * (len(choices) - 1))] for choices in space.gene_choices)


def validate(values: Iterable[float], space: SearchSpace) -> Vector:
    """The vector of these values, if the space holds it.

    Raises:
        ValueError: naming the gene, its value and the rule it breaks.
    """
    values = tuple(values)
    if len(values) != len(space.gene_names):
        raise ValueError(
            f"{list(values)} has {len(values)} values, but there are {len(space.gene_names)} genes"
        )
    for name, value, choices in zip(space.gene_names, values, space.gene_choices, strict=True):
        if value not in choices:
            raise ValueError(f"{name} is {value}, which is not one of the choices {list(choices)}")
    vector = space.canonicalize(values)
    if tuple(vector) != values:
        raise ValueError(
            f"values may not decrease inside a group, but {list(values)} would be {list(vector)} in order"
        )
    return vector
