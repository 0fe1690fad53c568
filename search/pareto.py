"""Pareto fronts: who is on them, and how much they dominate."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from search.problem import Objective


@dataclass(frozen=True)
class FrontMember:
    """A vector and its quantities, by name."""

    vector: Any  # of the space that was searched
    values: Mapping[str, float]


@dataclass(frozen=True)
class ParetoFront:
    """The members that no other member dominates, ordered by the last objective, best first."""

    objectives: tuple[Objective, ...]
    members: tuple[FrontMember, ...]

    @classmethod
    def of(cls, candidates: Sequence[FrontMember], objectives: Sequence[Objective]) -> "ParetoFront":
        """Keep the non-dominated candidates; of several with equal values, the first."""
        costs = [_costs(candidate, objectives) for candidate in candidates]
        members = [
            candidate
            for index, candidate in enumerate(candidates)
            if not any(
                _dominates(other, costs[index]) or (other == costs[index] and position < index)
                for position, other in enumerate(costs)
            )
        ]
        members.sort(key=lambda member: _costs(member, objectives)[::-1])
        return cls(tuple(objectives), tuple(members))

    def with_candidate(self, candidate: FrontMember) -> "ParetoFront":
        """The front of the members and one more; itself if the candidate adds nothing."""
        point = _costs(candidate, self.objectives)
        costs = [_costs(member, self.objectives) for member in self.members]
        if any(other == point or _dominates(other, point) for other in costs):
            return self
        kept = [
            member for member, cost in zip(self.members, costs, strict=True) if not _dominates(point, cost)
        ]
        members = sorted([*kept, candidate], key=lambda member: _costs(member, self.objectives)[::-1])
        return ParetoFront(self.objectives, tuple(members))

    def hypervolume(self, reference: Mapping[str, float]) -> float:
        """Volume that the members dominate, up to `reference` (a value per objective).

        Members that do not beat the reference in every objective count for nothing.
        """
        bound = tuple(
            -reference[objective.name] if objective.direction == "maximize" else reference[objective.name]
            for objective in self.objectives
        )
        points = {_costs(member, self.objectives) for member in self.members}
        return _hypervolume(
            [point for point in points if all(p < b for p, b in zip(point, bound, strict=True))], bound
        )

    def to_json(self) -> str:
        """Objectives and members, readable by anything."""
        return json.dumps(
            {
                "objectives": [
                    {"name": objective.name, "direction": objective.direction}
                    for objective in self.objectives
                ],
                "members": [{"vector": list(member.vector), **member.values} for member in self.members],
            },
            indent=2,
        )


Point = tuple[float, ...]


def _costs(member: FrontMember, objectives: Sequence[Objective]) -> Point:
    """All objectives as quantities to minimise."""
    return tuple(
        -member.values[objective.name] if objective.direction == "maximize" else member.values[objective.name]
        for objective in objectives
    )


def _dominates(first: Point, second: Point) -> bool:
    return first != second and all(a <= b for a, b in zip(first, second, strict=True))


def _hypervolume(points: Sequence[Point], bound: Point) -> float:
    """Sweep the last axis; in between, the volume is that of the other axes (HSO, While et al. 2006)."""
    if not points:
        return 0.0
    if len(bound) == 1:
        return bound[0] - min(point[0] for point in points)
    ordered = sorted(points, key=lambda point: point[-1])
    levels = [point[-1] for point in ordered[1:]] + [bound[-1]]
    volume = 0.0
    for index, (point, upper) in enumerate(zip(ordered, levels, strict=True)):
        if upper > point[-1]:
            below = [other[:-1] for other in ordered[: index + 1]]
            volume += (upper - point[-1]) * _hypervolume(below, bound[:-1])
    return volume
