"""Choose one member of a front by a stated rule."""

import logging
from collections.abc import Sequence
from typing import Literal

import numpy as np

from search.pareto import FrontMember

logger = logging.getLogger(__name__)
Rule = Literal["latency_budget", "accuracy_drop", "knee"]
RULES: tuple[Rule, ...] = ("latency_budget", "accuracy_drop", "knee")


def choose(
    members: Sequence[FrontMember],
    rule: Rule,
    *,
    accuracy: str,
    latency: str,
    dense_accuracy: float,
    max_accuracy_drop: float,
    latency_budget_ms: float | None,
) -> FrontMember:
    """The member to finetune. Where nothing keeps to the accuracy drop, the most accurate, with a warning.

    ``latency_budget`` takes the most accurate within the budget; ``accuracy_drop`` the fastest that
    loses at most `max_accuracy_drop` against dense; ``knee`` the one farthest from the line between
    the front's ends, both axes scaled to [0, 1].

    Raises:
        ValueError: if no member keeps to the latency budget, naming what the front reaches.
    """
    if rule not in RULES:
        raise ValueError(f"unknown rule {rule!r}; choose one of {', '.join(RULES)}")
    if not members:
        raise ValueError("the search found no complete evaluation, so there is nothing to choose from")
    if rule == "knee":
        return _knee(members, accuracy, latency)
    if rule == "latency_budget":
        if latency_budget_ms is None:
            raise ValueError("finetune.rule=latency_budget needs finetune.latency_budget_ms")
        fitting = [member for member in members if member.values[latency] <= latency_budget_ms]
        if not fitting:
            fastest = min(member.values[latency] for member in members)
            raise ValueError(
                f"no front member has {latency} ≤ {latency_budget_ms:g}; the fastest has {fastest:.4g}"
            )
        return max(fitting, key=lambda member: (member.values[accuracy], -member.values[latency]))
    floor = dense_accuracy - max_accuracy_drop
    accurate = [member for member in members if member.values[accuracy] >= floor]
    if not accurate:
        best = max(members, key=lambda member: member.values[accuracy])
        logger.warning(
            "warning: no front member has %s ≥ %.3f (dense %.3f less %g); the most accurate, with %.3f, is "
            "taken: raise finetune.max_accuracy_drop or search longer",
            accuracy, floor, dense_accuracy, max_accuracy_drop, best.values[accuracy],
        )  # fmt: skip
        return best
    return min(accurate, key=lambda member: (member.values[latency], -member.values[accuracy]))


def _knee(members: Sequence[FrontMember], accuracy: str, latency: str) -> FrontMember:
    points = np.array([[member.values[latency], -member.values[accuracy]] for member in members])
    span = np.ptp(points, axis=0)
    scaled = (points - points.min(axis=0)) / np.where(span > 0, span, 1.0)
    return members[int(np.argmin(scaled.sum(axis=1)))]
