"""Searches read from their journals alone: a written-down search, and staircases in closed form."""

from pathlib import Path

import pytest

from search.dispatch import Budget, Dispatcher
from search.history import SearchHistory, common_reference
from search.pareto import FrontMember
from search.problem import Constraint, Objective, SearchProblem
from search.samplers import SamplerConfig, create_sampler
from search.space import GeneSpace
from search.study import enqueue, open_study

SPACE = GeneSpace({"early": (0.0, 0.5), "late": (0.0, 0.5)})
AP, MS = Objective("ap", "maximize", reference=0.0), Objective("ms", "minimize", reference=12.0)
MEASURED = {  # of ap and watts; None fails
    (0.0, 0.0): (0.5, 8.0),
    (0.0, 0.5): (0.9, 11.0),
    (0.5, 0.0): None,
    (0.5, 0.5): (0.2, 5.0),
}
MILLISECONDS = {(0.0, 0.0): 10.0, (0.0, 0.5): 7.0, (0.5, 0.0): 7.0, (0.5, 0.5): 4.0}
CORNER = {"ap": 0.0, "ms": 12.0}


def search(journal: Path, *objectives: Objective) -> None:
    """Four vectors in order: the second draws too much power, the third fails."""
    problem = SearchProblem(
        SPACE, objectives, {"ms": lambda vector: MILLISECONDS[tuple(vector)]}, ("ap", "watts"),
        [Constraint("watts", upper=10.0)],
    )  # fmt: skip
    with open_study(journal, problem, create_sampler(problem, SamplerConfig("random"))) as study:
        enqueue(study, list(MEASURED), problem)
        dispatcher = Dispatcher(study, problem, Budget(len(MEASURED)))
        for outcome in MEASURED.values():
            trial = dispatcher.next_trial()
            assert trial is not None
            if outcome is None:
                dispatcher.fail(trial.number, "no memory")
            else:
                dispatcher.tell(trial.number, dict(zip(("ap", "watts"), outcome, strict=True)), "worker")


def test_a_search_is_read_in_order_with_what_was_forbidden_or_failed_left_out(tmp_path: Path) -> None:
    search(tmp_path / "study.journal", AP, MS)
    history = SearchHistory.read(tmp_path / "study.journal", "mine")
    dense = FrontMember((0.0, 0.0), {"ap": 0.5, "watts": 8.0, "ms": 10.0})
    sparse = FrontMember((0.5, 0.5), {"ap": 0.2, "watts": 5.0, "ms": 4.0})
    assert history.name == "mine"
    assert history.objectives == (Objective("ap", "maximize"), Objective("ms", "minimize"))
    assert history.trials == (dense, None, None, sparse)
    assert history.front.members == (sparse, dense)


def test_hypervolumes_grow_trial_by_trial(tmp_path: Path) -> None:
    """Up to 12 ms: 2 ms at an accuracy of 0.5, then 6 ms more at 0.2."""
    search(tmp_path / "study.journal", AP, MS)
    volumes = SearchHistory.read(tmp_path / "study.journal", "mine").hypervolumes(CORNER)
    assert volumes == pytest.approx([2 * 0.5, 2 * 0.5, 2 * 0.5, 2 * 0.5 + 6 * 0.2])


def test_what_is_known_better_by_now_replaces_what_was_told(tmp_path: Path) -> None:
    """The dense vector turns out to take half of the time that was predicted, and is alone on the front."""
    search(tmp_path / "study.journal", AP, MS)
    now: dict[tuple[float, ...], float] = {(0.0, 0.0): 3.0, (0.5, 0.5): 6.0}
    history = SearchHistory.read(
        tmp_path / "study.journal", "mine", lambda vector: {"ms": now[tuple(vector)]}
    )
    (member,) = history.front.members
    assert member == FrontMember((0.0, 0.0), {"ap": 0.5, "watts": 8.0, "ms": 3.0})
    assert history.hypervolumes(CORNER) == pytest.approx([9 * 0.5] * 4)


def history_of(
    name: str, *values: tuple[float, float], directions: str = "maximize minimize"
) -> SearchHistory:
    one, other = directions.split()
    objectives = (Objective("ap", one, 0.0), Objective("ms", other, 12.0))  # type: ignore[arg-type]
    members = [FrontMember((0.0, 0.0), {"ap": ap, "ms": ms}) for ap, ms in values]
    return SearchHistory(name, objectives, (None, *members, None))


def test_the_common_corner_is_the_worst_of_all_searches() -> None:
    histories = [history_of("a", (0.4, 9.0), (0.7, 8.0)), history_of("b", (0.5, 11.0)), history_of("c")]
    assert common_reference(histories) == {"ap": 0.4, "ms": 11.0}


def test_nothing_on_the_front_is_a_hypervolume_of_nothing() -> None:
    assert history_of("a").hypervolumes(CORNER) == [0.0, 0.0]
    with pytest.raises(ValueError, match="none of the searches has a finished trial yet"):
        common_reference([history_of("a"), history_of("b")])


def test_searches_for_something_else_are_not_compared() -> None:
    other = history_of("theirs", (0.5, 11.0), directions="minimize minimize")
    with pytest.raises(
        ValueError,
        match=r"theirs .* \(minimize ap, minimize ms\) than mine \(maximize ap, minimize ms\)",
    ):
        common_reference([history_of("mine", (0.4, 9.0)), history_of("too", (0.4, 9.0)), other])


def test_a_search_that_never_began_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"there is no study at {tmp_path}/study.journal"):
        SearchHistory.read(tmp_path / "study.journal", "mine")
