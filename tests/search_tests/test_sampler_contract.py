"""What Optuna demands of a sampler: its own tests, and the same demands where the parameters are genes."""

from collections.abc import Callable

import optuna
import pytest
from optuna.samplers import BaseSampler, PartialFixedSampler
from optuna.testing.pytest_samplers import (
    BasicSamplerTestCase,
    MultiObjectiveSamplerTestCase,
    RelativeSamplerTestCase,
)
from optuna.trial import Trial, TrialState

from search.encoding import distributions, encode, vector_of
from search.samplers import SAMPLERS, SamplerConfig, create_sampler
from sparsevit.sparsity import SparsitySpace
from tests.search_tests.problems import SPACE, accuracy, latency, problem

GENES = distributions(SPACE)


class SamplerFixture:
    @pytest.fixture(params=sorted(SAMPLERS))
    def sampler(self, request: pytest.FixtureRequest) -> Callable[[], BaseSampler]:
        return lambda: create_sampler(
            problem(), SamplerConfig(request.param, population_size=4, num_parents=2)
        )


class TestOptunasContract(
    SamplerFixture, BasicSamplerTestCase, RelativeSamplerTestCase, MultiObjectiveSamplerTestCase
):
    """Optuna's own tests, in studies whose parameters are no genes."""


def suggest_vector(trial: Trial) -> tuple[float, ...]:
    values = [trial.suggest_categorical(name, SPACE.choices) for name in SPACE.gene_names]
    return tuple(SPACE.canonicalize(values))


def both(trial: Trial) -> tuple[float, float]:
    vector = SPACE.canonicalize(suggest_vector(trial))
    return accuracy(vector), latency(vector)


def new_study(sampler: BaseSampler) -> optuna.Study:
    return optuna.create_study(directions=["maximize", "minimize"], sampler=sampler)


class TestContractOnGenes(SamplerFixture):
    """No more than nine vectors each: there are no more uniform ones."""

    def test_values_are_plain_choices(self, sampler: Callable[[], BaseSampler]) -> None:
        study = new_study(sampler())
        study.optimize(both, n_trials=9)
        for trial in study.trials:
            assert trial.state == TrialState.COMPLETE
            assert trial.distributions == GENES
            for name, value in trial.params.items():
                assert type(value) is float
                assert GENES[name]._contains(GENES[name].to_internal_repr(value))

    def test_all_genes_are_drawn_together(self, sampler: Callable[[], BaseSampler]) -> None:
        study = new_study(sampler())
        for _ in range(6):
            trial = study.ask()
            drawn = study.sampler.infer_relative_search_space(
                study, study._storage.get_trial(trial._trial_id)
            )
            assert drawn == GENES
            study.tell(trial, both(trial))
            assert trial.relative_params == trial.params

    def test_one_objective_is_enough(self, sampler: Callable[[], BaseSampler]) -> None:
        study = optuna.create_study(direction="maximize", sampler=sampler())
        study.optimize(lambda trial: both(trial)[0], n_trials=9)
        assert len({vector_of(trial, SPACE) for trial in study.trials}) == 9

    def test_failed_and_running_trials_are_no_trouble(self, sampler: Callable[[], BaseSampler]) -> None:
        """Not a number, an exception, pruned, never told: all of them are known, none is repeated."""

        def objective(trial: Trial) -> tuple[float, float]:
            values = both(trial)
            if trial.number % 5 == 1:
                return float("nan"), 1.0
            if trial.number % 5 == 2:
                raise RuntimeError("by intention")
            if trial.number % 5 == 3:
                raise optuna.TrialPruned
            return values

        study = new_study(sampler())
        running = study.ask(GENES)
        study.optimize(objective, n_trials=8, catch=RuntimeError)
        states = [trial.state for trial in study.trials]
        assert states.count(TrialState.FAIL) == 4
        assert states.count(TrialState.COMPLETE) == 2
        assert study.trials[running.number].state == TrialState.RUNNING
        assert len({vector_of(trial, SPACE) for trial in study.trials}) == 9

    @pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")
    def test_some_genes_may_be_given(self, sampler: Callable[[], BaseSampler]) -> None:
        study = new_study(sampler())
        study.enqueue_trial(encode(SPACE.uniform(0.3), SPACE))
        study.enqueue_trial({"stage4.pair1": 0.2})
        study.optimize(both, n_trials=6)
        assert vector_of(study.trials[0], SPACE) == SPACE.uniform(0.3)
        assert study.trials[1].params["stage4.pair1"] == 0.2
        study.sampler = PartialFixedSampler({"stage2.pair1": 0.5}, study.sampler)
        study.optimize(both, n_trials=2)
        assert [trial.params["stage2.pair1"] for trial in study.trials[-2:]] == [0.5, 0.5]

    @pytest.mark.parametrize("num_threads", [2, 4])
    def test_threads_may_share_it(self, sampler: Callable[[], BaseSampler], num_threads: int) -> None:
        study = new_study(sampler())
        study.optimize(both, n_trials=9, n_jobs=num_threads)
        assert [trial.state for trial in study.trials] == 9 * [TrialState.COMPLETE]

    def test_the_same_seed_gives_the_same_vectors(self, sampler: Callable[[], BaseSampler]) -> None:
        runs = []
        for _ in range(2):
            study = new_study(sampler())
            study.optimize(both, n_trials=9)
            runs.append([trial.params for trial in study.trials])
        assert runs[0] == runs[1]

    def test_a_reseeded_sampler_goes_on(self, sampler: Callable[[], BaseSampler]) -> None:
        study = new_study(sampler())
        study.optimize(both, n_trials=4)
        study.sampler.reseed_rng()
        study.optimize(both, n_trials=5)
        assert len({vector_of(trial, SPACE) for trial in study.trials}) == 9


def test_a_space_of_one_vector() -> None:
    """A gene may have a single choice; samplers of populations refuse so small a space by name."""
    space = SparsitySpace((2, 2), choices=(0.5,))
    for name in ("random", "uniform", "exhaustive", "tpe"):
        sampler = create_sampler(problem(space=space), SamplerConfig(name))
        study = new_study(sampler)
        trial = study.ask(distributions(space))
        assert vector_of(study._storage.get_trial(trial._trial_id), space) == space.dense
