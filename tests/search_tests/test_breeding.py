"""Who breeds with whom: deterministic tables of tournaments and of each sampler's mix of operators."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from optuna import Study
from optuna.trial import FrozenTrial

from search.dispatch import Budget, Dispatcher
from search.encoding import vector_of
from search.problem import Constraint, SearchProblem
from search.samplers import SamplerConfig, create_sampler
from search.samplers.base import GenerationSampler, Parent
from search.samplers.evolution import EvolutionSampler
from search.samplers.nsga2 import VectorNSGAIISampler, _winner
from search.space import Vector
from search.study import open_study
from sparsevit.sparsity import SparsitySpace, SparsityVector
from tests.search_tests.problems import OBJECTIVES, SPACE, evaluate, latency, problem
from tests.search_tests.scripted import Scripted

LOW, HIGH = SPACE.uniform(0.1), SPACE.uniform(0.7)
# Of violations, accuracy (negative) and latency; fewer of each are better.
FEASIBLE = Parent(LOW, (0.0, -0.5, 8.0))
FASTER = Parent(HIGH, (0.0, -0.5, 4.0))
OTHER_TRADE = Parent(HIGH, (0.0, -0.4, 3.0))
FORBIDDEN = Parent(HIGH, (0.1, -0.9, 1.0))


@pytest.mark.parametrize(
    ("first", "second", "winner"),
    [
        (FEASIBLE, FASTER, FASTER),
        (FASTER, FEASIBLE, FASTER),
        (FEASIBLE, OTHER_TRADE, FEASIBLE),  # neither dominates: the first
        (OTHER_TRADE, FEASIBLE, OTHER_TRADE),
        (FORBIDDEN, FEASIBLE, FEASIBLE),  # feasible before better
        (FEASIBLE, FORBIDDEN, FEASIBLE),
        (FEASIBLE, FEASIBLE, FEASIBLE),
    ],
)
def test_tournament_table(first: Parent, second: Parent, winner: Parent) -> None:
    assert _winner([first, second], Scripted([], [[0, 1]])) is winner


SAME = [[0, 0], [0, 0]]  # both tournaments give the first parent
LOW_THEN_HIGH = [[0, 0], [1, 1]]
NO_GENE = [1, 1, 1, 1, 1]


@pytest.mark.parametrize(
    ("uniforms", "integers", "expected"),
    [
        # 0.5 is no crossover: the first winner mutates, its gene 0 to the upper neighbour
        ([0.5, [0.0, 1, 1, 1, 1], 0.4], [*LOW_THEN_HIGH, 0, 1], (0.2, 0.1, 0.1, 0.1, 0.1)),
        # crossover alone
        ([0.49, [0, 1, 0, 1, 0], 0.5], [*LOW_THEN_HIGH], (0.1, 0.7, 0.1, 0.7, 0.1)),
        # crossover, then mutation: its last gene to the lower neighbour
        ([0.49, [0, 1, 0, 1, 0], 0.49, NO_GENE, 0.4], [*LOW_THEN_HIGH, 4, 0], (0.1, 0.7, 0.1, 0.7, 0.0)),
        # a child that is one of its parents mutates whatever the chance says
        ([0.49, [0, 0, 0, 0, 0], 0.9, NO_GENE, 0.4], [*LOW_THEN_HIGH, 1, 1], (0.1, 0.2, 0.1, 0.1, 0.1)),
        ([0.0, [0, 1, 0, 1, 0], 0.9, NO_GENE, 0.4], [*SAME, 1, 1], (0.1, 0.2, 0.1, 0.1, 0.1)),
    ],
)
def test_nsga2_breeding_table(
    uniforms: list[object], integers: list[object], expected: tuple[float, ...]
) -> None:
    sampler = VectorNSGAIISampler(problem(), SamplerConfig(population_size=4, num_parents=2))
    parents = [Parent(LOW, (0.0, -0.5, 8.0)), Parent(HIGH, (0.0, -0.4, 3.0))]
    rng = Scripted(uniforms, integers)
    assert tuple(sampler._breed(parents, rng)) == expected
    rng.assert_used_up()


class EvolutionOf(EvolutionSampler):
    """With parents that the test names."""

    def __init__(self, parents: Sequence[Vector]) -> None:
        super().__init__(problem(), SamplerConfig("evolution", population_size=4, num_parents=2))
        self._named = [Parent(vector, (0.0,)) for vector in parents]

    def parents_of(self, study: Study, trial: FrozenTrial) -> list[Parent]:
        return self._named


@pytest.mark.parametrize(
    ("num_known", "uniforms", "integers", "expected"),
    [
        # an even number of vectors is known: a mutant of the first parent drawn, anywhere
        (0, [[0.0, 1, 1, 1, 1]], [[1, 0], 0, 1], (0.8, 0.7, 0.7, 0.7, 0.7)),
        (2, [NO_GENE], [[0, 1], 4, 8], (0.1, 0.1, 0.1, 0.1, 0.0)),
        # an odd number: uniform crossover
        (1, [[0, 1, 0, 1, 0]], [[0, 1]], (0.1, 0.7, 0.1, 0.7, 0.1)),
        (3, [[0, 1, 0, 1, 0]], [[1, 0]], (0.7, 0.1, 0.1, 0.7, 0.7)),
    ],
)
def test_evolution_breeds_mutants_and_crossings_in_turn(
    num_known: int, uniforms: list[object], integers: list[object], expected: tuple[float, ...]
) -> None:
    known = {SparsityVector((0.0, 0.0, 0.0, 0.0, ratio)) for ratio in (0.1, 0.2, 0.3)[:num_known]}
    anything: Any = None
    rng = Scripted(uniforms, integers)
    child = EvolutionOf([LOW, HIGH]).propose(anything, anything, cast("set[Vector]", known), rng)
    assert tuple(child) == expected
    rng.assert_used_up()


def test_what_an_evaluation_forbids_does_not_breed(tmp_path: Path) -> None:
    """The most accurate vectors turn out to draw too much power: the best of the others are the parents."""
    bound = Constraint("watts", upper=10.0)
    power = SearchProblem(SPACE, OBJECTIVES, {"latency_ms": latency}, ("ap", "watts"), [bound])
    sampler = create_sampler(power, SamplerConfig("evolution", population_size=24, num_parents=4))
    assert isinstance(sampler, GenerationSampler)
    with open_study(tmp_path / "study.journal", power, sampler) as study:
        dispatcher = Dispatcher(study, power, Budget(25))
        while (trial := dispatcher.next_trial()) is not None:
            values = evaluate(dispatcher.vector_of(trial))
            dispatcher.tell(trial.number, {**values, "watts": 20.0 if values["ap"] > 0.8 else 5.0})
        parents = sampler.parents_of(study, study.trials[24])
        allowed = [trial for trial in study.trials[:24] if trial.user_attrs["watts"] <= 10.0]
    assert 4 < len(allowed) < 24
    best = sorted(allowed, key=lambda trial: -trial.values[0])[:4]
    assert {parent.vector for parent in parents} == {vector_of(trial, SPACE) for trial in best}
    assert all(parent.costs[0] == 0.0 for parent in parents)


def test_where_all_are_forbidden_the_least_forbidden_breed(tmp_path: Path) -> None:
    bound = Constraint("watts", upper=10.0)
    power = SearchProblem(SPACE, OBJECTIVES, {"latency_ms": latency}, ("ap", "watts"), [bound])
    sampler = create_sampler(power, SamplerConfig("evolution", population_size=6, num_parents=2))
    assert isinstance(sampler, GenerationSampler)
    with open_study(tmp_path / "study.journal", power, sampler) as study:
        dispatcher = Dispatcher(study, power, Budget(7))
        for excess in (0.5, 3.0, 0.1, 2.0, 1.0, 4.0):
            trial = dispatcher.next_trial()
            assert trial is not None
            values = evaluate(dispatcher.vector_of(trial))
            dispatcher.tell(trial.number, {**values, "watts": 10.0 + excess})
        assert dispatcher.next_trial() is not None
        parents = sampler.parents_of(study, study.trials[6])
        assert [parent.vector for parent in parents] == [vector_of(study.trials[i], SPACE) for i in (0, 2)]
        assert [parent.costs[0] for parent in parents] == pytest.approx([0.5, 0.1])


def test_children_that_are_known_or_forbidden_are_bred_again() -> None:
    """The third child is new: the attempts before it leave no trace."""
    space = SparsitySpace((2, 2), choices=(0.0, 0.4, 0.8))
    sampler = VectorNSGAIISampler(problem(space=space), SamplerConfig(population_size=4, num_parents=2))
    parents = [Parent(space.dense, (0.0, -1.0, 9.0))]
    one_up = [[0, 0], [0, 0], 0, 0]  # gene 0 to its neighbour 0.4, known already
    other = [[0, 0], [0, 0], 1, 0]  # gene 1
    rng = Scripted(2 * [0.9, [1, 1], 0.4] + [0.9, [1, 1], 0.4], [*one_up, *one_up, *other])
    child = sampler.first_new({space.dense, SparsityVector((0.4, 0.0))}, lambda: sampler._breed(parents, rng))
    assert tuple(child) == (0.0, 0.4)


class NSGA2Of(VectorNSGAIISampler):
    """With parents that the test names."""

    def __init__(self, problem: SearchProblem, config: SamplerConfig, parents: Sequence[Vector]) -> None:
        super().__init__(problem, config)
        self._named = [Parent(vector, (0.0,)) for vector in parents]

    def parents_of(self, study: Study, trial: FrozenTrial) -> list[Parent]:
        return self._named


def test_nsga2_proposes_a_child_of_the_parents() -> None:
    anything: Any = None
    sampler = NSGA2Of(problem(), SamplerConfig(population_size=4, num_parents=2), [LOW, HIGH])
    rng = Scripted([0.49, [0, 1, 0, 1, 0], 0.5], LOW_THEN_HIGH)
    assert tuple(sampler.propose(anything, anything, set(), rng)) == (0.1, 0.7, 0.1, 0.7, 0.1)
    rng.assert_used_up()


def test_nsga2_proposes_any_vector_that_is_left_where_parents_breed_nothing_new() -> None:
    """A mutant of the dense vector changes one of its two genes; the only vector left has both changed."""
    anything: Any = None
    space = SparsitySpace((2, 2), choices=(0.0, 0.4, 0.8))
    config = SamplerConfig(population_size=4, crossover_share=0.0, mutation_probability=0.0, num_attempts=100)
    sampler = NSGA2Of(problem(space=space), config, [space.dense])
    known: set[Vector] = {*space} - {space.uniform(0.4)}
    child = sampler.propose(anything, anything, known, np.random.default_rng(0))
    assert child == space.uniform(0.4)
