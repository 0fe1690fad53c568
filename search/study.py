"""The Optuna study on disk: the one truth about which vectors were tried and what came out.

One process writes it. It is a journal file: a killed writer leaves at most one broken last line
and a stale lock, and both are mended at the next opening.
"""

import warnings
from collections.abc import Sequence
from pathlib import Path

import optuna
from optuna import Study
from optuna.exceptions import ExperimentalWarning
from optuna.samplers import BaseSampler
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState

from search.encoding import encode, vector_of
from search.objectives import Objective
from sparsevit.sparsity import SparsitySpace, SparsityVector

STUDY_NAME = "sparsity"
REASON = "reason"
INTERRUPTED = "interrupted"


def open_study(path: Path, objectives: Sequence[Objective], sampler: BaseSampler) -> Study:
    """Create the study, or open it as the last process left it.

    Trials that were in flight are closed as interrupted and their vectors enqueued again.

    Raises:
        ValueError: if the study on disk has other objectives.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    path.parent.mkdir(parents=True, exist_ok=True)
    _mend_journal(path)
    names = [objective.name for objective in objectives]
    study = optuna.create_study(
        storage=JournalStorage(JournalFileBackend(str(path))),
        study_name=STUDY_NAME,
        directions=[objective.direction for objective in objectives],
        sampler=sampler,
        load_if_exists=True,
    )
    if study.metric_names is None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ExperimentalWarning)
            study.set_metric_names(names)
    elif study.metric_names != names:
        raise ValueError(
            f"{path} holds a study of {study.metric_names}, not of {names}: use another run folder"
        )
    return study


def read_study(path: Path) -> Study:
    """A study that only reads."""
    return optuna.load_study(study_name=STUDY_NAME, storage=JournalStorage(JournalFileBackend(str(path))))


def requeue_interrupted(study: Study, space: SparsitySpace) -> int:
    """Close the trials that a killed process left in flight and enqueue their vectors again."""
    interrupted = study.get_trials(deepcopy=False, states=[TrialState.RUNNING])
    waiting = [vector_of(trial, space) for trial in study.get_trials(False, [TrialState.WAITING])]
    for trial in interrupted:
        vector = vector_of(trial, space)
        if vector is not None and vector not in waiting:
            study.enqueue_trial(encode(vector, space))
        study._storage.set_trial_user_attr(trial._trial_id, REASON, INTERRUPTED)
        study.tell(trial.number, state=TrialState.FAIL)
    return len(interrupted)


def enqueue(study: Study, vectors: Sequence[SparsityVector], space: SparsitySpace) -> None:
    """Put vectors that the study has not seen at the head of the search."""
    seen = seen_vectors(study, space)
    for vector in dict.fromkeys(vectors):
        if vector not in seen:
            study.enqueue_trial(encode(vector, space))


def counted_trials(study: Study) -> list[FrozenTrial]:
    """Trials that used up budget: complete ones and failures, not interruptions."""
    return [
        trial
        for trial in study.get_trials(deepcopy=False, states=[TrialState.COMPLETE, TrialState.FAIL])
        if trial.user_attrs.get(REASON) != INTERRUPTED
    ]


def seen_vectors(study: Study, space: SparsitySpace) -> set[SparsityVector]:
    """Every vector that is evaluated, failed, in flight or enqueued."""
    vectors = (
        vector_of(trial, space)
        for trial in study.get_trials(deepcopy=False)
        if trial.user_attrs.get(REASON) != INTERRUPTED
    )
    return {vector for vector in vectors if vector is not None}


def _mend_journal(path: Path) -> None:
    path.with_name(path.name + ".lock").unlink(missing_ok=True)
    if not path.exists():
        return
    content = path.read_bytes()
    complete = content[: content.rfind(b"\n") + 1]
    if len(complete) < len(content):
        with path.open("r+b") as journal:
            journal.truncate(len(complete))
