"""What every sampler of this package shares: whole vectors, legal, never proposed before, admitted.

What a sampler draws depends on its seed, on how many vectors are known, and on the finished trials
that it looks at, and on nothing that lives in a process alone: a search that is opened again goes on
as it would have.
"""

import copy
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
from optuna import Study
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseGASampler, BaseSampler, RandomSampler
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from search.encoding import distributions, encode, vector_of
from search.problem import SearchProblem
from search.space import SearchSpace, Vector
from search.variation import Propose, first_new, uniform_vector


@dataclass(frozen=True)
class SamplerConfig:
    """Which sampler, and its settings; each sampler uses what it knows.

    Attributes:
        population_size: vectors of a generation.
        num_parents: of the next generation (`evolution`); None for a quarter of the population.
        crossover_share: of the children; the others are mutants (`nsga2`).
        mutation_probability: per gene (0.1 in SparseViT).
        spread: what random vectors are uniform over: ``space``, ``genes`` (as adaptation draws them)
            or the name of a cheap quantity such as ``latency_ms`` (`random`).
        num_attempts: tries to find a new vector within the constraints before the search is exhausted.
    """

    name: str = "nsga2"
    seed: int = 0
    population_size: int = 50
    num_parents: int | None = None
    crossover_share: float = 0.5
    mutation_probability: float = 0.1
    spread: str = "space"
    num_attempts: int = 1000

    def __post_init__(self) -> None:
        if self.population_size < 2:
            raise ValueError(f"sampler.population_size must be at least 2, got {self.population_size}")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"search.seed must be between 0 and 2**32 - 1, got {self.seed}")
        if self.num_parents is None:
            object.__setattr__(self, "num_parents", max(2, self.population_size // 4))
        elif not 2 <= self.num_parents <= self.population_size:
            raise ValueError(
                f"sampler.num_parents lies between 2 and sampler.population_size, got {self.num_parents} of "
                f"{self.population_size}"
            )
        for name in ("crossover_share", "mutation_probability"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ValueError(f"sampler.{name} lies in [0, 1], got {getattr(self, name)}")
        if self.num_attempts < 1:
            raise ValueError(f"sampler.num_attempts must be at least 1, got {self.num_attempts}")


class VectorSampler(BaseSampler):
    """An Optuna sampler that proposes vectors of a space; subclasses say how in `propose`.

    Parameters that are no genes are drawn at random, so that it serves any study.
    """

    def __init__(self, problem: SearchProblem, config: SamplerConfig) -> None:
        self.problem = problem
        self.config = config
        self.is_revised = False
        self._genes = distributions(problem.space)
        self._others = RandomSampler(config.seed)
        self._known: WeakKeyDictionary[Study, KnownVectors] = WeakKeyDictionary()

    def propose(
        self, study: Study, trial: FrozenTrial, known: set[Vector], rng: np.random.Generator
    ) -> Vector:
        """A vector that is not `known`, drawn with `rng`."""
        raise NotImplementedError

    def first_vectors(self) -> list[Vector]:
        """Vectors to begin with, whatever comes out."""
        return []

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        return dict(self._genes)  # PartialFixedSampler takes out what it fixes

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        if search_space != self._genes:
            return {
                name: self._others.sample_independent(study, trial, name, distribution)
                for name, distribution in search_space.items()
            }
        known = self.known_vectors(study, trial)
        rng = np.random.default_rng([self.config.seed, len(known.vectors)])
        return encode(self.propose(study, trial, known.vectors, rng), self.problem.space)

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        return self._others.sample_independent(study, trial, param_name, param_distribution)

    def revise(self) -> None:
        """Note that cheap quantities have changed: those of finished trials are computed anew."""
        self.is_revised = True

    def as_now(self, trial: FrozenTrial) -> FrozenTrial:
        """A finished trial with the cheap quantities of its vector as they are by now."""
        vector = vector_of(trial, self.problem.space) if self.is_revised else None
        if vector is None:
            return trial
        known = {**trial.user_attrs, **self.problem.measure(vector)}
        now = copy.copy(trial)
        now.values = [known[objective.name] for objective in self.problem.objectives]
        now.system_attrs = {
            key: value for key, value in trial.system_attrs.items() if not key.startswith("constraints")
        }
        for constraint in self.problem.constraints:
            now.set_constraint(constraint.name, constraint.violation(known[constraint.name]))
        return now

    def reseed_rng(self) -> None:
        """Nothing to do for vectors: processes that share a study know different numbers of them."""
        self._others.reseed_rng()

    def known_vectors(self, study: Study, trial: FrozenTrial) -> "KnownVectors":
        """The vectors of every earlier trial: finished, failed, in flight or enqueued."""
        known = self._known.setdefault(study, KnownVectors(self.problem.space))
        known.read_until(study, trial.number)
        return known

    def first_new(self, known: set[Vector], *propose: Propose) -> Vector:
        """The first proposal that is new and admitted; at last one from the whole space.

        Raises:
            SearchExhausted: if there was none.
        """
        return first_new(
            propose, known, self.problem.admits,
            num_attempts=self.config.num_attempts, constraints=self.problem.described_constraints,
        )  # fmt: skip

    def anything(self, rng: np.random.Generator) -> Callable[[], Vector]:
        """Draws from the whole space."""
        return lambda: uniform_vector(self.problem.space, rng)


class KnownVectors:
    """The vectors of a study's trials up to a number, each read once."""

    def __init__(self, space: SearchSpace) -> None:
        self.vectors: set[Vector] = set()
        self._space = space
        self._num_read = 0

    def read_until(self, study: Study, number: int) -> None:
        """Read the trials before `number` that were not read yet."""
        if self._num_read == number - 1:  # as always but at the start; all trials take time to list
            storage = study._storage
            trial_id = storage.get_trial_id_from_study_id_trial_number(study._study_id, self._num_read)
            self._read([storage.get_trial(trial_id)])
        elif self._num_read < number:
            self._read(study.get_trials(deepcopy=False)[self._num_read : number])

    def _read(self, trials: list[FrozenTrial]) -> None:
        vectors = (vector_of(trial, self._space) for trial in trials)
        self.vectors.update(vector for vector in vectors if vector is not None)
        self._num_read += len(trials)


@dataclass(frozen=True)
class Parent:
    """A vector, and all that it costs: violations of constraints first, then every objective."""

    vector: Vector
    costs: tuple[float, ...]

    def dominates(self, other: "Parent") -> bool:
        """Constrained domination (Deb et al. 2002, section VI): feasibility before objectives."""
        if self.costs[0] != other.costs[0]:
            return self.costs[0] < other.costs[0]
        pairs = list(zip(self.costs, other.costs, strict=True))
        return self.costs != other.costs and all(mine <= yours for mine, yours in pairs)


def costs_of(trial: FrozenTrial, study: Study) -> tuple[float, ...]:
    """The sum of a finished trial's violations, and its objectives as quantities to minimise."""
    signs = (-1 if direction == StudyDirection.MAXIMIZE else 1 for direction in study.directions)
    violation = sum(max(0.0, value) for value in trial.constraints.values())
    return violation, *(sign * value for sign, value in zip(signs, trial.values, strict=True))


class GenerationSampler(VectorSampler, BaseGASampler):
    """A sampler whose vectors have parents: those that its `select_parent` takes from a generation.

    Generations are counted as `BaseGASampler` counts them, but one trial at a time.
    """

    def __init__(self, problem: SearchProblem, config: SamplerConfig) -> None:
        VectorSampler.__init__(self, problem, config)
        self._counts: WeakKeyDictionary[Study, Counter[int]] = WeakKeyDictionary()
        self._generations: WeakKeyDictionary[Study, dict[int, int]] = WeakKeyDictionary()
        self._parents: WeakKeyDictionary[Study, dict[int, list[Parent]]] = WeakKeyDictionary()

    def revise(self) -> None:
        super().revise()
        self._parents.clear()

    def get_population(self, study: Study, generation: int) -> list[FrozenTrial]:
        return [self.as_now(trial) for trial in super().get_population(study, generation)]

    def get_parent_population(self, study: Study, generation: int) -> list[FrozenTrial]:
        return [self.as_now(trial) for trial in super().get_parent_population(study, generation)]

    def before_trial(self, study: Study, trial: FrozenTrial) -> None:
        super().before_trial(study, trial)
        # Optuna asks for parameters only where some are not fixed, so an enqueued trial would
        # belong to no generation.
        self.get_trial_generation(study, trial)

    def after_trial(
        self, study: Study, trial: FrozenTrial, state: TrialState, values: Sequence[float] | None
    ) -> None:
        super().after_trial(study, trial, state, values)
        if study in self._counts and state == TrialState.COMPLETE:
            self._counts[study][self.get_trial_generation(study, trial)] += 1

    def get_trial_generation(self, study: Study, trial: FrozenTrial) -> int:
        generation = trial.system_attrs.get(self._get_generation_key())
        generations = self._generations.setdefault(study, {})
        if generation is None:
            generation = generations.get(trial.number)
        if generation is not None:
            return int(generation)
        if study not in self._counts:
            complete = study.get_trials(deepcopy=False, states=[TrialState.COMPLETE])
            known = (each.system_attrs.get(self._get_generation_key()) for each in complete)
            self._counts[study] = Counter(number for number in known if number is not None)
        last = max(self._counts[study], default=0)
        generations[trial.number] = last + (self._counts[study][last] >= self.config.population_size)
        study._storage.set_trial_system_attr(
            trial._trial_id, self._get_generation_key(), generations[trial.number]
        )
        return generations[trial.number]

    def parents_of(self, study: Study, trial: FrozenTrial) -> list[Parent]:
        """The parents of a trial's generation, in order of number; none for the first.

        Optuna's own order depends on who asks first.
        """
        generation = self.get_trial_generation(study, trial)
        known = self._parents.setdefault(study, {})
        if generation not in known:
            trials = self.get_parent_population(study, generation)
            known[generation] = [
                Parent(vector, costs_of(each, study))
                for each in sorted(trials, key=lambda each: each.number)
                if (vector := vector_of(each, self.problem.space)) is not None
            ]
        return known[generation]
