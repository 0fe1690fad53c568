"""The rules that choose from a front: by hand, at their bounds, and against the geometry of a knee."""

import math
from collections.abc import Sequence

import numpy as np
import pytest

from search import FrontMember
from search.selection import choose


def member(ap: float, ms: float) -> FrontMember:
    return FrontMember((0.0,), {"ap": ap, "ms": ms})


FRONT = [member(0.30, 4), member(0.45, 5), member(0.48, 8), member(0.50, 10)]


def pick(
    members: Sequence[FrontMember], rule: str, *, drop: float = 0.03, budget: float | None = None
) -> FrontMember:
    return choose(
        members, rule, accuracy="ap", latency="ms", dense_accuracy=0.5,  # type: ignore[arg-type]
        max_accuracy_drop=drop, latency_budget_ms=budget,
    )  # fmt: skip


def chosen(rule: str, drop: float = 0.03, budget: float | None = None) -> float:
    return pick(FRONT, rule, drop=drop, budget=budget).values["ms"]


def test_rules() -> None:
    assert chosen("accuracy_drop") == 8
    assert chosen("accuracy_drop", drop=0.05) == 5
    assert chosen("latency_budget", budget=9.0) == 8
    assert chosen("knee") == 5


def test_rules_that_nothing_satisfies() -> None:
    with pytest.raises(ValueError, match=r"no front member has ms ≤ 3; the fastest has 4"):
        chosen("latency_budget", budget=3.0)
    assert chosen("accuracy_drop", drop=-0.1) == 10
    with pytest.raises(ValueError, match="needs finetune.latency_budget_ms"):
        chosen("latency_budget")
    with pytest.raises(ValueError, match="choose one of latency_budget, accuracy_drop, knee"):
        chosen("best")


def test_rules_hold_at_their_bounds_and_break_ties_by_the_other_quantity() -> None:
    at_budget, faster_as_good, slower = member(0.25, 8), member(0.25, 7), member(0.375, 8.5)
    assert pick([at_budget, slower], "latency_budget", budget=8.0) is at_budget
    assert pick([at_budget, faster_as_good, slower], "latency_budget", budget=8.0) is faster_as_good
    assert pick([slower, at_budget], "accuracy_drop", drop=0.25) is at_budget
    as_fast_but_better = member(0.375, 8)
    assert pick([at_budget, as_fast_but_better], "accuracy_drop", drop=0.25) is as_fast_but_better


def test_a_drop_that_nothing_keeps_to_is_reported(caplog: pytest.LogCaptureFixture) -> None:
    best = member(0.375, 9)
    assert pick([member(0.25, 8), best, member(0.125, 7)], "accuracy_drop", drop=0.0625) is best
    assert [(record.name, record.levelname) for record in caplog.records] == [("search.selection", "WARNING")]
    assert caplog.messages == [
        "warning: no front member has ap ≥ 0.438 (dense 0.500 less 0.0625); the most accurate, with 0.375, "
        "is taken: raise finetune.max_accuracy_drop or search longer"
    ]


def test_nothing_to_choose_from() -> None:
    with pytest.raises(ValueError, match="no complete evaluation, so there is nothing to choose from"):
        pick([], "knee")


@pytest.mark.parametrize("seed", range(5))
def test_the_knee_is_farthest_from_the_line_between_the_ends(seed: int) -> None:
    """By the distance of a point from a line, in axes scaled to [0, 1]; on the side of the better."""
    rng = np.random.default_rng(seed)
    accuracies, latencies = np.sort(rng.uniform(0.2, 0.4, 7)), np.sort(rng.uniform(5, 50, 7))
    x = (latencies - latencies[0]) / (latencies[-1] - latencies[0])
    y = (accuracies - accuracies[0]) / (accuracies[-1] - accuracies[0])
    distances = (y - x) / math.sqrt(2)  # from the line x = y, through the fastest and the most accurate
    members = [member(float(ap), float(ms)) for ap, ms in zip(accuracies, latencies, strict=True)]
    assert pick(members, "knee") is members[int(distances.argmax())]


def test_the_knee_of_a_single_member_and_of_equals() -> None:
    alone = member(0.3, 7)
    assert pick([alone], "knee") is alone
    assert pick([member(0.3, 9), alone, member(0.3, 8)], "knee") is alone
