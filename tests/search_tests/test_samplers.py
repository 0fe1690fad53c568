"""Every sampler: legal and new vectors, the same ones from the same seed, and better ones than chance."""

import itertools
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import optuna
import pytest

from search.dispatch import Budget, Dispatcher
from search.encoding import vector_of
from search.problem import Constraint
from search.progress import front_of
from search.samplers import SAMPLERS, SamplerConfig, create_sampler
from search.study import counted_trials, enqueue, open_study
from search.variation import SearchExhausted
from sparsevit.sparsity import SparsitySpace, SparsityVector
from tests.search_tests.problems import SPACE, accuracy, latency, problem, run_alone

LEARNING = ("nsga2", "evolution", "tpe", "nsga2_stock")
OPEN_ENDED = (*LEARNING, "random", "exhaustive")


def searched(
    folder: Path, name: str, num_trials: int, *constraints: Constraint, seed: int = 0
) -> optuna.Study:
    the_problem = problem(*constraints)
    sampler = create_sampler(the_problem, SamplerConfig(name, seed, population_size=8, num_parents=2))
    with open_study(folder / f"{name}-{seed}.journal", the_problem, sampler) as study:
        enqueue(study, sampler.first_vectors(), the_problem)
        run_alone(Dispatcher(study, the_problem, Budget(num_trials)))
    return study


@pytest.mark.parametrize("name", OPEN_ENDED)
def test_vectors_are_legal_new_and_within_the_constraints(tmp_path: Path, name: str) -> None:
    study = searched(tmp_path, name, 40, Constraint("latency_ms", upper=8.0, lower=3.0))
    vectors = [vector_of(trial, SPACE) for trial in study.trials]
    assert len(set(vectors)) == 40
    assert all(isinstance(vector, SparsityVector) and vector in SPACE for vector in vectors)
    assert all(3.0 <= trial.values[1] <= 8.0 for trial in study.trials)


@pytest.mark.parametrize("name", sorted(SAMPLERS))
def test_the_seed_decides(tmp_path: Path, name: str) -> None:
    runs = [
        searched(tmp_path / folder, name, 24, seed=seed) for folder, seed in (("a", 1), ("b", 1), ("c", 2))
    ]
    first, same, other = ([vector_of(trial, SPACE) for trial in study.trials] for study in runs)
    assert first == same
    assert (first != other) == (name != "uniform")


@pytest.mark.parametrize("name", OPEN_ENDED)
def test_a_small_space_is_exhausted_without_repeats(tmp_path: Path, name: str) -> None:
    space = SparsitySpace((2, 2), choices=(0.0, 0.4, 0.8))
    the_problem = problem(space=space)
    sampler = create_sampler(the_problem, SamplerConfig(name, population_size=4, num_parents=2))
    with open_study(tmp_path / "study.journal", the_problem, sampler) as study:
        dispatcher = Dispatcher(study, the_problem, Budget(100))
        run_alone(dispatcher)
        assert {vector_of(trial, space) for trial in counted_trials(study)} == set(space)
        assert len(counted_trials(study)) == space.size
        assert isinstance(dispatcher.exhausted, SearchExhausted)
        assert dispatcher.stopped_by == str(dispatcher.exhausted)


def test_nsga2_advances_through_generations(tmp_path: Path) -> None:
    study = searched(tmp_path, "nsga2", 64)
    generations = [trial.system_attrs["VectorNSGAIISampler:generation"] for trial in study.trials]
    assert generations == [generation for generation in range(8) for _ in range(8)]


def test_evolution_finds_more_accurate_vectors_of_a_band_than_chance(tmp_path: Path) -> None:
    band = Constraint("latency_ms", upper=6.5, lower=6.0)
    best = {
        name: [
            max(trial.values[0] for trial in searched(tmp_path, name, 60, band, seed=seed).trials)
            for seed in range(3)
        ]
        for name in ("evolution", "random")
    }
    assert sum(best["evolution"]) > sum(best["random"])


def test_nsga2_finds_a_larger_front_than_chance_and_optunas_own(tmp_path: Path) -> None:
    volumes = {
        name: sum(
            front_of(counted_trials(searched(tmp_path, name, 80, seed=seed)), problem()).hypervolume(
                problem().reference
            )
            for seed in range(3)
        )
        for name in ("nsga2", "random", "nsga2_stock")
    }
    assert volumes["nsga2"] > max(volumes["random"], volumes["nsga2_stock"])


def test_evolution_breeds_the_best_of_all_generations(tmp_path: Path) -> None:
    study = searched(tmp_path, "evolution", 25)
    sampler = study.sampler
    assert isinstance(sampler, optuna.samplers.BaseGASampler)
    parents = sampler.get_parent_population(study, 3)
    accuracies = sorted(trial.values[0] for trial in study.trials[:24])
    assert sorted(trial.values[0] for trial in parents) == accuracies[-2:]


def test_uniform_takes_one_ratio_everywhere(tmp_path: Path) -> None:
    study = searched(tmp_path, "uniform", 100)
    vectors = [vector_of(trial, SPACE) for trial in counted_trials(study)]
    assert vectors == [SPACE.uniform(ratio) for ratio in SPACE.choices]


def test_random_spreads_over_what_it_is_told(tmp_path: Path) -> None:
    spreads = {}
    for spread in ("space", "genes", "latency_ms"):
        the_problem = problem()
        sampler = create_sampler(the_problem, SamplerConfig("random", spread=spread))
        with open_study(tmp_path / f"{spread}.journal", the_problem, sampler) as study, ExitStack():
            run_alone(Dispatcher(study, the_problem, Budget(100)))
            latencies = sorted(trial.values[1] for trial in study.trials)
        spreads[spread] = latencies[90] - latencies[10]
    low, high = latency(SPACE.sparsest), latency(SPACE.dense)
    assert spreads["latency_ms"] > 0.6 * (high - low) > spreads["space"] > spreads["genes"] * 0.8


def test_infeasible_results_are_never_on_the_front(tmp_path: Path) -> None:
    """A constraint on what only an evaluation gives."""
    the_problem = problem(Constraint("ap", lower=0.7))
    study = searched(tmp_path, "nsga2", 64, Constraint("ap", lower=0.7))
    front = front_of(counted_trials(study), the_problem)
    assert front.members
    assert all(member.values["ap"] >= 0.7 for member in front.members)
    assert any(accuracy(vector) < 0.7 for vector in (vector_of(t, SPACE) for t in study.trials) if vector)
    late = study.trials[32:]
    assert sum(trial.values[0] >= 0.7 for trial in late) > len(late) * 0.6


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"name": "annealing"}, "unknown sampler 'annealing'; choose one of nsga2, evolution"),
        ({"population_size": 10**6}, "sampler.population_size=1000000 is larger than the space"),
        ({"num_parents": 60}, "lies between 2 and sampler.population_size, got 60 of 50"),
        ({"mutation_probability": 1.5}, r"mutation_probability lies in \[0, 1\], got 1.5"),
        ({"name": "random", "spread": "watts"}, "unknown sampler.spread 'watts'; choose one of space, genes"),
    ],
)
def test_bad_settings_are_named(config: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        create_sampler(problem(), SamplerConfig(**config))  # type: ignore[arg-type]


def test_a_space_too_large_to_list_is_refused() -> None:
    large = problem(space=SparsitySpace((2, 2, 18, 2)))
    with pytest.raises(ValueError, match="sampler=exhaustive lists every vector"):
        create_sampler(large, SamplerConfig("exhaustive"))


def test_a_small_population_begins_with_uniform_and_spread_vectors_too() -> None:
    """As the embedded recipes': dense, sparsest and what each stage is worth are not all."""
    sampler = create_sampler(problem(), SamplerConfig("nsga2", population_size=8, num_parents=2))
    vectors = sampler.first_vectors()
    assert len(set(vectors)) == 16
    assert {SPACE.dense, SPACE.sparsest} <= set(vectors)
    assert sum(len(set(vector)) == 1 for vector in vectors) >= 4
    values = sorted(sum(vector) for vector in vectors)
    assert max(b - a for a, b in itertools.pairwise(values)) < 1.2


def test_random_over_latency_reaches_both_ends(tmp_path: Path) -> None:
    the_problem = problem()
    config = SamplerConfig("random", population_size=8, num_parents=2, spread="latency_ms")
    with open_study(tmp_path / "study.journal", the_problem, create_sampler(the_problem, config)) as study:
        run_alone(Dispatcher(study, the_problem, Budget(300)))
        latencies = [trial.values[1] for trial in study.trials]
    low, high = the_problem.reachable("latency_ms")
    tenths, _ = np.histogram(latencies, bins=10, range=(low, high))
    assert min(tenths) >= 12  # of 30
