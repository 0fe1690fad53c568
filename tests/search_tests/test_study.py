"""The study on disk survives a killed writer; the samplers never repeat themselves."""

from pathlib import Path

import pytest
from optuna import Study
from optuna.trial import TrialState

from pipelines.build import SAMPLERS
from search.encoding import decode, distributions, encode, vector_of
from search.objectives import Admission, Constraint, Objective
from search.sampler import RandomVectorSampler, SparsityNSGAIISampler, VectorSource
from search.study import (
    counted_trials,
    enqueue,
    open_study,
    read_study,
    requeue_interrupted,
    seen_vectors,
)
from search.variation import SearchExhausted
from sparsevit.sparsity import SparsitySpace, SparsityVector

SPACE = SparsitySpace((2, 2, 4, 2))
OBJECTIVES = [Objective("ap", "maximize"), Objective("latency_ms", "minimize")]


def latency(vector: SparsityVector) -> float:
    return 10 - 2 * sum(vector)


def accuracy(vector: SparsityVector) -> float:
    return 1 - sum(ratio**2 for ratio in vector) / 5


ADMISSION = Admission({"latency_ms": latency}, [Constraint("latency_ms", upper=8.0)])


def study_at(
    path: Path, sampler: str = "nsga2", admission: Admission = ADMISSION, space: SparsitySpace = SPACE
) -> Study:
    source = VectorSource(space, admission, seed=0)
    if sampler == "random":
        return open_study(path, OBJECTIVES, RandomVectorSampler(source))
    return open_study(path, OBJECTIVES, SparsityNSGAIISampler(source, population_size=8))


def evaluate(study: Study, num_trials: int, space: SparsitySpace = SPACE) -> None:
    for _ in range(num_trials):
        trial = study.ask(distributions(space))
        vector = decode(trial.params, space)
        study.tell(trial, [accuracy(vector), latency(vector)])


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_vectors_are_legal_new_and_within_the_budget(tmp_path: Path, sampler: str) -> None:
    study = study_at(tmp_path / "study.journal", sampler)
    evaluate(study, 60)
    vectors = [vector_of(trial, SPACE) for trial in study.trials]
    assert len(set(vectors)) == 60
    assert all(vector is not None and vector in SPACE and latency(vector) <= 8.0 for vector in vectors)


def test_nsga2_advances_through_generations_and_beats_its_first(tmp_path: Path) -> None:
    study = study_at(tmp_path / "study.journal", admission=Admission({"latency_ms": latency}))
    evaluate(study, 64)
    generations = {trial.system_attrs["SparsityNSGAIISampler:generation"] for trial in study.trials}
    assert generations == set(range(8))


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_small_space_is_exhausted_without_repeats(tmp_path: Path, sampler: str) -> None:
    space = SparsitySpace((2, 2), choices=(0.0, 0.4, 0.8))
    admission = Admission({"latency_ms": latency})
    study = study_at(tmp_path / "study.journal", sampler, admission, space)
    evaluate(study, space.size, space)
    assert seen_vectors(study, space) == set(space)
    with pytest.raises(SearchExhausted, match="no new sparsity vector within the space"):
        study.ask(distributions(space))


def test_enqueued_vectors_come_first_and_once(tmp_path: Path) -> None:
    study = study_at(tmp_path / "study.journal")
    enqueue(study, [SPACE.sparsest, SPACE.uniform(0.5), SPACE.sparsest], SPACE)
    enqueue(study, [SPACE.sparsest], SPACE)
    evaluate(study, 3)
    vectors = [vector_of(trial, SPACE) for trial in study.trials]
    assert vectors[:2] == [SPACE.sparsest, SPACE.uniform(0.5)]
    assert len(set(vectors)) == len(vectors)


def test_enqueued_vectors_belong_to_the_first_generation(tmp_path: Path) -> None:
    study = study_at(tmp_path / "study.journal", admission=Admission({"latency_ms": latency}))
    enqueue(study, list(SPACE)[:8], SPACE)
    evaluate(study, 16)
    generations = [trial.system_attrs["SparsityNSGAIISampler:generation"] for trial in study.trials]
    assert generations == [0] * 8 + [1] * 8


def test_interrupted_trials_are_evaluated_again(tmp_path: Path) -> None:
    path = tmp_path / "study.journal"
    study = study_at(path)
    evaluate(study, 5)
    in_flight = [decode(study.ask(distributions(SPACE)).params, SPACE) for _ in range(2)]
    reopened = study_at(path)
    assert requeue_interrupted(reopened, SPACE) == 2
    assert len(counted_trials(reopened)) == 5
    assert set(in_flight) <= seen_vectors(reopened, SPACE)
    evaluate(reopened, 2)
    complete = reopened.get_trials(states=(TrialState.COMPLETE,))
    assert [vector_of(trial, SPACE) for trial in complete[-2:]] == in_flight
    assert requeue_interrupted(study_at(path), SPACE) == 0


def test_torn_last_line_and_stale_lock_are_mended(tmp_path: Path) -> None:
    path = tmp_path / "study.journal"
    evaluate(study_at(path), 4)
    with path.open("ab") as journal:
        journal.write(b'{"op_code": 5, "wor')
    path.with_name(path.name + ".lock").symlink_to(path)
    study = study_at(path)
    assert len(counted_trials(study)) == 4
    evaluate(study, 2)
    assert len(counted_trials(read_study(path))) == 6


def test_study_of_other_objectives_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "study.journal"
    study_at(path)
    source = VectorSource(SPACE, ADMISSION, seed=0)
    other = [Objective("miou", "maximize"), Objective("latency_ms", "minimize")]
    with pytest.raises(ValueError, match=r"holds a study of \['ap', 'latency_ms'\], not of \['miou'"):
        open_study(path, other, RandomVectorSampler(source))


def test_encoding_round_trip() -> None:
    vector = SparsityVector((0.1, 0.8, 0.3, 0.4, 0.0))
    assert decode(encode(vector, SPACE), SPACE) == vector
    assert list(encode(vector, SPACE)) == list(distributions(SPACE))
