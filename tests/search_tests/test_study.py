"""The study on disk survives a killed writer, has one writer, and refuses what it was not made for."""

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from optuna import create_study, load_study
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState

from search.dispatch import Budget, Dispatcher
from search.encoding import decode, distributions, encode, vector_of
from search.problem import REASON, Constraint, Objective, SearchProblem
from search.samplers import SamplerConfig, create_sampler
from search.study import counted_trials, enqueue, in_flight, open_study, read_study, seen_vectors
from sparsevit.sparsity import SparsitySpace, SparsityVector
from tests.search_tests.problems import SPACE, evaluate, problem, run_alone

SAMPLER = create_sampler(problem(), SamplerConfig("nsga2", population_size=8, num_parents=2))


def run(path: Path, num_trials: int) -> None:
    with open_study(path, problem(), SAMPLER) as study:
        run_alone(Dispatcher(study, problem(), Budget(num_trials)))


def test_enqueued_vectors_come_first_and_once(tmp_path: Path) -> None:
    with open_study(tmp_path / "study.journal", problem(), SAMPLER) as study:
        enqueue(study, [SPACE.sparsest, SPACE.uniform(0.5), SPACE.sparsest], problem())
        enqueue(study, [SPACE.sparsest], problem())
        run_alone(Dispatcher(study, problem(), Budget(3)))
        vectors = [vector_of(trial, SPACE) for trial in study.trials]
    assert vectors[:2] == [SPACE.sparsest, SPACE.uniform(0.5)]
    assert len(set(vectors)) == len(vectors) == 3


def test_enqueued_vectors_belong_to_the_first_generation(tmp_path: Path) -> None:
    with open_study(tmp_path / "study.journal", problem(), SAMPLER) as study:
        enqueue(study, list(SPACE)[:8], problem())
        run_alone(Dispatcher(study, problem(), Budget(16)))
        generations = [trial.system_attrs["VectorNSGAIISampler:generation"] for trial in study.trials]
    assert generations == [0] * 8 + [1] * 8


def test_trials_in_flight_are_found_again_as_they_were(tmp_path: Path) -> None:
    path = tmp_path / "study.journal"
    run(path, 5)
    with open_study(path, problem(), SAMPLER) as study:
        asked = [study.ask(distributions(SPACE)) for _ in range(2)]
        vectors = [decode(trial.params, SPACE) for trial in asked]
    with open_study(path, problem(), SAMPLER) as study:
        assert len(counted_trials(study)) == 5
        again = in_flight(study, SPACE)
        assert [trial.number for trial in again] == [trial.number for trial in asked]
        assert [decode(trial.params, SPACE) for trial in again] == vectors
        assert set(vectors) <= seen_vectors(study, SPACE)
        run_alone(Dispatcher(study, problem(), Budget(8)))
        trials = study.get_trials(states=(TrialState.COMPLETE,))
        assert [vector_of(trial, SPACE) for trial in trials[5:7]] == vectors
        assert len({vector_of(trial, SPACE) for trial in trials}) == len(trials) == 8


def test_a_trial_killed_before_its_vector_was_drawn_costs_nothing(tmp_path: Path) -> None:
    path = tmp_path / "study.journal"
    with open_study(path, problem(), SAMPLER) as study:
        enqueue(study, [SPACE.uniform(0.4)], problem())
        study.ask()  # the enqueued one, no gene of it written
        study.ask()  # nothing drawn at all
    with open_study(path, problem(), SAMPLER) as study:
        run_alone(Dispatcher(study, problem(), Budget(4)))
        counted = counted_trials(study)
    assert len(counted) == 4
    assert [vector_of(trial, SPACE) for trial in counted].count(SPACE.uniform(0.4)) == 1


def test_a_trial_whose_vector_another_sampler_drew_half_is_closed_and_its_vector_is_still_to_come(
    tmp_path: Path,
) -> None:
    """The genes of its third stage are in an order that no vector has."""
    path = tmp_path / "study.journal"
    drawn = SparsityVector((0.1, 0.2, 0.3, 0.8, 0.5))
    values = {**encode(drawn, SPACE), "stage3.pair1": 0.8, "stage3.pair2": 0.3}
    with open_study(path, problem(), SAMPLER) as study:
        study.enqueue_trial(values)
        study.ask(distributions(SPACE))
    with open_study(path, problem(), SAMPLER) as study:
        assert seen_vectors(study, SPACE) == {drawn}
        assert in_flight(study, SPACE) == []
        assert study.trials[0].state == TrialState.FAIL
        assert counted_trials(study) == []
        assert seen_vectors(study, SPACE) == set()


def test_the_study_has_the_name_by_which_other_programs_open_it(tmp_path: Path) -> None:
    path = tmp_path / "study.journal"
    run(path, 1)
    storage = JournalStorage(JournalFileBackend(str(path)))
    assert len(load_study(study_name="sparsity", storage=storage).trials) == 1


def test_torn_last_line_and_stale_lock_are_mended(tmp_path: Path) -> None:
    path = tmp_path / "study.journal"
    run(path, 4)
    before = path.read_bytes()
    with path.open("ab") as journal:
        journal.write(b'{"op_code": 5, "wor')
    path.with_name(path.name + ".lock").symlink_to(path)
    run(path, 6)
    assert len(counted_trials(read_study(path))) == 6
    assert path.read_bytes().startswith(before + b'{"op_code"')


def test_another_process_is_kept_out(tmp_path: Path) -> None:
    path = tmp_path / "study.journal"
    program = (
        "from tests.search_tests.test_study import *\n"
        f"with open_study(Path({str(path)!r}), problem(), SAMPLER):\n"
        "    print('open', flush=True)\n"
        "    input()\n"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert other.stdin is not None and other.stdout is not None
    assert other.stdout.readline() == "open\n"
    with pytest.raises(ValueError, match="another process has the study .* open"):
        run(path, 1)
    other.kill()
    other.wait()
    run(path, 1)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (replace(problem(), space=SparsitySpace((2, 2))), "other genes: .*stage4"),
        (replace(problem(), space=SparsitySpace((2, 2, 4, 2), (0.0, 0.5))), "other genes: .*not"),
        (
            SearchProblem(
                SPACE,
                [Objective("miou", "maximize"), problem().objectives[1]],
                problem().quantities,
                ("miou",),
            ),
            r'other objectives: \["maximize ap", .*not \["maximize miou"',
        ),
        (problem(Constraint("latency_ms", upper=5.0)), r'other constraints: \[\], not \["latency_ms ≤ 5"\]'),
    ],
)
def test_a_study_of_something_else_is_refused(tmp_path: Path, changed: SearchProblem, message: str) -> None:
    path = tmp_path / "study.journal"
    run(path, 1)
    before = path.read_bytes()
    with (
        pytest.raises(ValueError, match=message),
        open_study(path, changed, create_sampler(changed, SamplerConfig(population_size=2, num_parents=2))),
    ):
        raise AssertionError("opened")
    assert path.read_bytes() == before


def test_a_study_of_another_experiment_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "study.journal"
    run(path, 1)
    with (
        pytest.raises(ValueError, match='other experiment: null, not "cityscapes"'),
        open_study(path, problem(), SAMPLER, about={"experiment": "cityscapes"}),
    ):
        raise AssertionError("opened")


def test_what_cannot_be_a_study_is_refused(tmp_path: Path) -> None:
    foreign = tmp_path / "notes.txt"
    foreign.write_text("not a journal\n")
    (tmp_path / "file").write_text("")
    for path, message in (
        (foreign, "is not the journal of a study"),
        (tmp_path / "file" / "study.journal", "cannot be written"),
        (tmp_path, "cannot be written: it is a folder; name a file"),
        (Path("/proc/study.journal"), "cannot be written"),
    ):
        with pytest.raises(ValueError, match=message):
            run(path, 1)
    assert foreign.read_text() == "not a journal\n"
    with pytest.raises(ValueError, match="there is no study at"):
        read_study(tmp_path / "nothing")


@pytest.mark.parametrize(
    "damage",
    [
        lambda lines: [*lines[:3], b"{}\n", *lines[3:]],
        lambda lines: [*lines[:3], b"\xff\xfe\n", *lines[3:]],
        lambda lines: [*lines, b"\0\0\0\0\n"],
    ],
)
def test_a_damaged_journal_is_named(tmp_path: Path, damage: Callable[[list[bytes]], list[bytes]]) -> None:
    path = tmp_path / "study.journal"
    run(path, 3)
    path.write_bytes(b"".join(damage(path.read_bytes().splitlines(keepends=True))))
    for use in (lambda: run(path, 4), lambda: read_study(path)):
        with pytest.raises(ValueError, match=f"{path} is damaged or not the journal of a study"):
            use()


def test_a_study_of_somebody_else_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "study.journal"
    storage = JournalStorage(JournalFileBackend(str(path)))
    create_study(storage=storage, study_name="theirs").optimize(lambda trial: 0.0, n_trials=1)
    before = path.read_bytes()
    with pytest.raises(ValueError, match="holds the study 'theirs' of somebody else"):
        run(path, 1)
    with pytest.raises(ValueError, match="holds no study of this package"):
        read_study(path)
    assert path.read_bytes() == before


def test_failed_trials_keep_their_reason(tmp_path: Path) -> None:
    path = tmp_path / "study.journal"
    with open_study(path, problem(), SAMPLER) as study:
        dispatcher = Dispatcher(study, problem(), Budget(2))
        trial = dispatcher.next_trial()
        assert trial is not None
        dispatcher.fail(trial.number, "the device fell off the bus")
    (counted,) = counted_trials(read_study(path))
    assert counted.state == TrialState.FAIL
    assert counted.user_attrs[REASON] == "the device fell off the bus"


def test_encoding_round_trip() -> None:
    vector = SparsityVector((0.1, 0.8, 0.3, 0.4, 0.0))
    assert decode(encode(vector, SPACE), SPACE) == vector
    assert list(encode(vector, SPACE)) == list(distributions(SPACE))
    assert evaluate(vector)["ap"] <= 1


def test_a_vector_that_the_cheap_constraints_forbid_is_not_enqueued(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    bounded = problem(Constraint("latency_ms", upper=8))
    sampler = create_sampler(bounded, SamplerConfig("nsga2", population_size=8, num_parents=2))
    with open_study(tmp_path / "study.journal", bounded, sampler) as study:
        enqueue(study, [SPACE.dense, SPACE.sparsest], bounded)
        assert len(study.trials) == 1
        assert "is left out of the search: it breaks latency_ms ≤ 8" in caplog.text
        study.enqueue_trial(encode(SPACE.dense, SPACE))  # by somebody else: evaluated, but not on the front
        dispatcher = Dispatcher(study, bounded, Budget(2))
        run_alone(dispatcher)
    assert dispatcher.progress.num_infeasible == 1
    assert [member.vector for member in dispatcher.progress.front.members] == [SPACE.sparsest]


def test_another_experiment_is_named_first(tmp_path: Path) -> None:
    path = tmp_path / "study.journal"
    with open_study(path, problem(), SAMPLER, about={"experiment": "coco"}):
        pass
    other = SearchProblem(SPACE, [Objective("miou", "maximize")], {}, ("miou",))
    with (
        pytest.raises(ValueError, match='holds a study with other experiment: "coco", not "cityscapes"'),
        open_study(path, other, SAMPLER, about={"experiment": "cityscapes"}),
    ):
        pass
