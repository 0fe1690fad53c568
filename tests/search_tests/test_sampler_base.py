"""What all samplers share: settings in range, who dominates whom, generations, and what is known."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
from optuna.trial import TrialState, create_trial

from search.dispatch import Budget, Dispatcher
from search.encoding import distributions, encode, vector_of
from search.problem import Constraint, Objective, SearchProblem
from search.samplers import POPULATION_SAMPLERS, SamplerConfig, create_sampler
from search.samplers.base import GenerationSampler, Parent, costs_of
from search.samplers.stock import StockSampler, nsga2_stock, tpe
from search.space import GeneSpace, Vector
from search.study import enqueue, open_study
from search.variation import SearchExhausted
from tests.search_tests.scripted import Scripted

SPACE = GeneSpace({"early": (0.0, 1.0, 2.0), "late": (0.0, 1.0)})
MILLISECONDS = {"scale": 1.0}


def problem_of(*constraints: Constraint, space: GeneSpace = SPACE) -> SearchProblem:
    objectives = (Objective("ap", "maximize"), Objective("ms", "minimize"))
    return SearchProblem(
        space, objectives, {"ms": lambda vector: MILLISECONDS["scale"] * sum(vector)}, ("ap",), constraints
    )


@pytest.mark.parametrize(
    ("population_size", "num_parents"), [(2, 2), (8, 2), (11, 2), (12, 3), (50, 12), (100, 25)]
)
def test_a_quarter_of_the_population_are_parents_but_two_at_least(
    population_size: int, num_parents: int
) -> None:
    assert SamplerConfig(population_size=population_size).num_parents == num_parents


def test_the_bounds_of_the_settings_are_settings() -> None:
    SamplerConfig(seed=0, population_size=2, num_parents=2, crossover_share=0.0, mutation_probability=0.0)
    SamplerConfig(seed=2**32 - 1, crossover_share=1.0, mutation_probability=1.0, num_attempts=1)
    assert SamplerConfig(population_size=5, num_parents=5).num_parents == 5


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"population_size": 1}, "sampler.population_size must be at least 2, got 1"),
        ({"seed": -1}, "search.seed must be between 0 and .*, got -1"),
        ({"seed": 2**32}, "search.seed must be between 0 and .*, got 4294967296"),
        ({"num_parents": 1}, "num_parents lies between 2 and sampler.population_size, got 1 of 50"),
        ({"num_parents": 51}, "num_parents lies between 2 and sampler.population_size, got 51 of 50"),
        ({"crossover_share": -0.01}, r"sampler.crossover_share lies in \[0, 1\], got -0.01"),
        ({"crossover_share": 1.01}, r"sampler.crossover_share lies in \[0, 1\], got 1.01"),
        ({"mutation_probability": -0.01}, r"sampler.mutation_probability lies in \[0, 1\], got -0.01"),
        ({"num_attempts": 0}, "sampler.num_attempts must be at least 1, got 0"),
    ],
)
def test_settings_out_of_range_are_named(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SamplerConfig(**fields)


@pytest.mark.parametrize("name", POPULATION_SAMPLERS)
def test_a_population_is_no_larger_than_the_space(name: str) -> None:
    create_sampler(problem_of(), SamplerConfig(name, population_size=6))
    with pytest.raises(
        ValueError, match="population_size=7 is larger than the space, which has 6 vectors: take .*exhaustive"
    ):
        create_sampler(problem_of(), SamplerConfig(name, population_size=7))
    create_sampler(problem_of(), SamplerConfig("random", population_size=7))


@pytest.mark.parametrize(
    ("costs", "other", "dominates"),
    [
        ((0.0, -0.5, 8.0), (0.0, -0.5, 8.0), False),  # equal
        ((0.0, -0.5, 7.0), (0.0, -0.5, 8.0), True),
        ((0.0, -0.6, 8.0), (0.0, -0.5, 8.0), True),
        ((0.0, -0.6, 8.1), (0.0, -0.5, 8.0), False),  # a trade
        ((0.0, -0.4, 7.0), (0.0, -0.5, 8.0), False),
        ((0.0, -0.1, 9.0), (0.1, -0.9, 1.0), True),  # feasible before better
        ((0.2, -0.9, 1.0), (0.1, -0.1, 9.0), False),
        ((0.1, -0.1, 9.0), (0.2, -0.9, 1.0), True),  # less forbidden before better
    ],
)
def test_who_dominates_whom(costs: tuple[float, ...], other: tuple[float, ...], dominates: bool) -> None:
    assert Parent((0.0, 0.0), costs).dominates(Parent((1.0, 0.0), other)) is dominates


def test_costs_are_violations_that_add_up_and_objectives_to_minimise() -> None:
    study = optuna.create_study(directions=["maximize", "minimize", "maximize"])
    trial = create_trial(values=[0.7, 3.0, -2.0])
    for name, value in (("a", 0.5), ("b", -2.0), ("c", 1.0)):  # b has room to spare, which helps nobody
        trial.set_constraint(name, value)
    assert costs_of(trial, study) == (1.5, -0.7, 3.0, 2.0)


def search(study: optuna.Study, problem: SearchProblem, num_trials: int, *failing: int) -> list[int]:
    """Search up to a number of trials and return the generation of each."""
    dispatcher = Dispatcher(study, problem, Budget(num_trials))
    while (trial := dispatcher.next_trial()) is not None:
        if trial.number in failing:
            dispatcher.fail(trial.number, "no memory")
        else:
            dispatcher.tell(trial.number, {"ap": 1.0 - 0.01 * trial.number})
    key = f"{type(study.sampler).__name__}:generation"
    return [trial.system_attrs[key] for trial in study.trials]


NINE = tuple(map(float, range(9)))
WIDE = GeneSpace({"early": NINE, "late": NINE})


@pytest.mark.parametrize("name", ["nsga2", "evolution"])
def test_generations_are_full_when_enough_trials_are_complete(tmp_path: Path, name: str) -> None:
    """A failure makes its generation longer, and a search that is opened again goes on in its own."""
    problem, path = problem_of(space=WIDE), tmp_path / "study.journal"
    expected = [0] * 5 + [1] * 4 + [2] * 5 + [3]
    for num_trials in (3, 7, 9, 15):
        sampler = create_sampler(problem, SamplerConfig(name, population_size=4, num_parents=2))
        with open_study(path, problem, sampler) as study:
            assert search(study, problem, num_trials, 2, 11) == expected[:num_trials]


def test_parents_are_listed_by_number_and_only_from_the_second_generation_on(tmp_path: Path) -> None:
    """Evolution takes the two most accurate: accuracy falls with the number here."""
    problem = problem_of(space=WIDE)
    sampler = create_sampler(problem, SamplerConfig("evolution", population_size=4, num_parents=2))
    assert isinstance(sampler, GenerationSampler)
    with open_study(tmp_path / "study.journal", problem, sampler) as study:
        search(study, problem, 9)
        first, second = study.trials[:2]
        assert sampler.parents_of(study, first) == []
        for trial in study.trials[4:]:
            assert sampler.parents_of(study, trial) == [
                Parent(vector_of(parent, WIDE), (0.0, -parent.values[0], parent.values[1]))
                for parent in (first, second)
            ]


def test_what_trials_are_by_now(monkeypatch: pytest.MonkeyPatch) -> None:
    """Vectors turn out to take twice as long, which one constraint forbids; the trial itself stays."""
    problem = problem_of(Constraint("ms", upper=5.0), Constraint("ap", lower=0.6))
    sampler = create_sampler(problem, SamplerConfig("random"))
    trial = create_trial(
        values=[0.5, 3.0], params=encode((2.0, 1.0), SPACE), distributions=distributions(SPACE),
        user_attrs={"ap": 0.5, "ms": 3.0}, system_attrs={"mine": 1},
    )  # fmt: skip
    trial.set_constraint("ms", 0.0)
    trial.set_constraint("ap", 0.1)
    monkeypatch.setitem(MILLISECONDS, "scale", 2.0)
    assert sampler.as_now(trial) is trial
    sampler.revise()
    now = sampler.as_now(trial)
    assert now.values == [0.5, 6.0]
    assert now.constraints == {"ms": 1.0, "ap": pytest.approx(0.1)}
    assert now.system_attrs["mine"] == 1
    assert (trial.values, trial.constraints["ms"]) == ([0.5, 3.0], 0.0)
    foreign = create_trial(values=[0.5, 3.0])
    assert sampler.as_now(foreign) is foreign


def test_every_earlier_trial_is_known_whatever_became_of_it() -> None:
    """Finished, failed, running, waiting; the sampler of another process reads them all at once."""
    problem = problem_of()
    sampler = create_sampler(problem, SamplerConfig("random"))
    study = optuna.create_study(directions=["maximize", "minimize"], sampler=sampler)
    vectors: list[Vector] = list(SPACE)
    enqueue(study, vectors[:4], problem)
    finished, failed, running = (study.ask(distributions(SPACE)) for _ in range(3))
    study.tell(finished, [0.5, 1.0])
    study.tell(failed, state=TrialState.FAIL)
    assert running.number == 2
    for trial in study.trials:
        other = create_sampler(problem, SamplerConfig("random"))
        for reader in (sampler, other, other):
            assert reader.known_vectors(study, trial).vectors == set(vectors[: trial.number])


def test_attempts_are_as_many_as_are_set() -> None:
    """Every proposal is known: three attempts of each of two sources."""
    drawn: list[Vector] = []
    sampler = create_sampler(problem_of(), SamplerConfig("random", num_attempts=3))

    def propose() -> Vector:
        drawn.append((0.0, 0.0))
        return drawn[-1]

    with pytest.raises(SearchExhausted, match="no new vector within the space in 6 attempts .1 are known"):
        sampler.first_new({(0.0, 0.0)}, propose, propose)
    assert len(drawn) == 6


def test_levels_of_genes_with_different_choices(tmp_path: Path) -> None:
    """Three levels: the first choices, the middle one of three with the first of two, the last ones."""
    problem = problem_of()
    with open_study(
        tmp_path / "study.journal", problem, create_sampler(problem, SamplerConfig("uniform"))
    ) as study:
        dispatcher = Dispatcher(study, problem, Budget(10))
        while (trial := dispatcher.next_trial()) is not None:
            dispatcher.tell(trial.number, {"ap": 0.5})
        assert [vector_of(t, SPACE) for t in study.trials[:3]] == [(0.0, 0.0), (1.0, 0.0), (2.0, 1.0)]
        assert dispatcher.stopped_by == (
            "sampler=uniform has no vector left within the space: all 3 of its vectors were considered"
        )


def test_a_list_skips_what_is_forbidden(tmp_path: Path) -> None:
    problem = problem_of(Constraint("ms", upper=2.0, lower=1.0))
    orders: list[list[Any]] = []
    for seed in (0, 0, 1):
        sampler = create_sampler(problem, SamplerConfig("exhaustive", seed))
        with open_study(tmp_path / f"{len(orders)}.journal", problem, sampler) as study:
            dispatcher = Dispatcher(study, problem, Budget(10))
            while (trial := dispatcher.next_trial()) is not None:
                dispatcher.tell(trial.number, {"ap": 0.5})
            assert dispatcher.stopped_by is not None
            orders.append([vector_of(t, SPACE) for t in study.trials if t.state == TrialState.COMPLETE])
    assert orders[0] == orders[1] != orders[2]
    for order in orders:
        assert sorted(order) == [(0.0, 1.0), (1.0, 0.0), (1.0, 1.0), (2.0, 0.0)]


LINE = GeneSpace({"number": tuple(range(1000))})


@pytest.mark.parametrize(
    ("objectives", "expected"),
    [
        # the first cheap objective is the square: its even levels
        (("ap", "square", "number"), [999 * math.sqrt((level + 0.5) / 10) for level in range(10)]),
        (("number", "square", "ap"), [999 * (level + 0.5) / 10 for level in range(10)]),
        (("ap",), [999 * (level + 0.5) / 10 for level in range(10)]),  # none is cheap: the sum
    ],
)
def test_nsga2_begins_with_a_generation_at_even_levels_of_the_first_cheap_objective(
    objectives: tuple[str, ...], expected: list[float]
) -> None:
    """Of 24 the first three are the ends and one short of the last, and half of the rest is even itself."""
    quantities = {"square": lambda vector: vector[0] ** 2, "number": lambda vector: vector[0]}
    goals = [Objective(name, "minimize", reference=0.0) for name in objectives]
    problem = SearchProblem(LINE, goals, quantities, ("ap",))
    first, same, other = (
        create_sampler(problem, SamplerConfig("nsga2", seed, population_size=24)).first_vectors()
        for seed in (0, 0, 1)
    )
    numbers = [vector[0] for vector in map(tuple, first)]
    assert numbers[:3] == [0, 999, 998]
    assert numbers[3:14] == pytest.approx([999 * (level + 0.5) / 11 for level in range(11)], abs=2)
    assert numbers[14:] == pytest.approx(expected, abs=8)
    assert first == same != other


def test_nsga2_begins_within_the_constraints_and_with_sixteen_at_least() -> None:
    problem = problem_of(Constraint("ms", upper=12.0, lower=2.0), space=WIDE)
    sampler = create_sampler(problem, SamplerConfig("nsga2", population_size=4, num_parents=2))
    vectors = sampler.first_vectors()
    assert len(set(vectors)) == 16
    assert all(2.0 <= sum(vector) <= 12.0 for vector in vectors)
    assert create_sampler(problem, SamplerConfig("random")).first_vectors() == []


@pytest.mark.parametrize("name", ["nsga2", "evolution"])
def test_optuna_is_told_the_size_of_a_population(name: str) -> None:
    sampler = create_sampler(problem_of(), SamplerConfig(name, population_size=4))
    assert isinstance(sampler, GenerationSampler)
    assert sampler.population_size == 4


def test_random_over_the_genes_draws_every_gene_from_its_choices() -> None:
    anything: Any = None
    sampler = create_sampler(problem_of(), SamplerConfig("random", spread="genes"))
    rng = Scripted([], [[2, 1]])
    assert sampler.propose(anything, anything, set(), rng) == (2.0, 1.0)
    rng.assert_used_up()


class Half(optuna.samplers.BaseSampler):
    """Draws the first gene as one of a whole, the second by itself, always the same."""

    def infer_relative_search_space(self, study: Any, trial: Any) -> dict[str, Any]:
        return {"early": distributions(SPACE)["early"], "foreign": distributions(SPACE)["late"]}

    def sample_relative(self, study: Any, trial: Any, search_space: dict[str, Any]) -> dict[str, Any]:
        assert list(search_space) == ["early"]
        return {"early": 2.0}

    def sample_independent(self, study: Any, trial: Any, param_name: str, param_distribution: Any) -> Any:
        assert (param_name, param_distribution) == ("late", distributions(SPACE)["late"])
        return 1.0


def test_a_stock_sampler_draws_what_it_can_as_a_whole_and_anything_where_that_is_known() -> None:
    seeds: list[int] = []

    def make(seed: int) -> optuna.samplers.BaseSampler:
        seeds.append(seed)
        return Half()

    anything: Any = None
    sampler = StockSampler(problem_of(), SamplerConfig("tpe"), make)
    for seed in range(20):
        rng = np.random.default_rng(seed)
        assert sampler.propose(anything, anything, set(), rng) == (2.0, 1.0)
    assert len(set(seeds)) == 20  # every proposal has one of its own
    known = {*SPACE} - {(1.0, 0.0)}
    assert sampler.propose(anything, anything, known, np.random.default_rng(0)) == (1.0, 0.0)


def test_the_samplers_of_optuna_that_are_taken() -> None:
    """Genes drawn all together, and generations of the size that is set."""
    study = optuna.create_study(directions=["maximize", "minimize"])
    enqueue(study, list(SPACE), problem_of())
    for _ in range(4):
        study.tell(study.ask(distributions(SPACE)), [0.5, 1.0])
    sampler = tpe(problem_of(), SamplerConfig("tpe"))
    inner = sampler._make(0)
    assert set(inner.infer_relative_search_space(study, study.trials[-1])) == {"early", "late"}
    stock = nsga2_stock(problem_of(), SamplerConfig("nsga2_stock", population_size=6))._make(0)
    assert isinstance(stock, optuna.samplers.NSGAIISampler)
    assert stock.population_size == 6
