"""The Optuna study on disk: the one truth about which vectors were tried and what came out.

One process writes it, and holds a lock while it does. It is a journal file: a killed writer leaves
at most one broken last line and a stale lock of the journal's own, and both are mended at the next
opening. A trial that was in flight stays so in the study; `in_flight` finds it again.
"""

import json
import logging
import os
import warnings
from collections.abc import Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import optuna
from filelock import FileLock, Timeout
from optuna import Study
from optuna.exceptions import ExperimentalWarning
from optuna.samplers import BaseSampler
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, Trial, TrialState

from search.encoding import encode, vector_of
from search.problem import REASON, SearchProblem
from search.space import SearchSpace, Vector
from search.variation import SearchExhausted

logger = logging.getLogger(__name__)
STUDY_NAME = "sparsity"
INTERRUPTED = "interrupted before its vector was drawn"
IDENTITY = "search"


@contextmanager
def open_study(
    path: Path, problem: SearchProblem, sampler: BaseSampler, *, about: Mapping[str, Any] | None = None
) -> Iterator[Study]:
    """Create the study, or open it as the last process left it; no other process can until it is closed.

    Args:
        about: what else its results are a function of, by name, as JSON-like values: the model, the
            images, … A study that was opened with other values is refused.

    Raises:
        ValueError: if another process has it open, it is damaged or cannot be written, or it was made
            for another space, other objectives or constraints, or is about something else.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    lock = _lock(path)
    try:
        with _naming_damage(path):
            _mend_journal(path)
            study = _create_or_load(path, problem, sampler)
        _identify(study, path, _identity(problem, about or {}))
        yield study
    finally:
        lock.release()


def read_study(path: Path) -> Study:
    """A study that only reads.

    Raises:
        ValueError: if there is none.
    """
    if not path.is_file():
        raise ValueError(f"there is no study at {path}")
    with _naming_damage(path):
        storage = JournalStorage(JournalFileBackend(str(path)))
        if STUDY_NAME in optuna.get_all_study_names(storage):
            return optuna.load_study(study_name=STUDY_NAME, storage=storage)
    raise ValueError(f"{path} holds no study of this package")


def in_flight(study: Study, space: SearchSpace) -> list[Trial]:
    """The trials that a killed process left running, in order, to be evaluated again.

    Where it was killed while it drew a vector, the rest is drawn now; what comes out is the same.
    """
    trials = []
    for frozen in study.get_trials(deepcopy=False, states=[TrialState.RUNNING]):
        trial = Trial(study, frozen._trial_id)
        try:
            values = tuple(
                trial.suggest_categorical(name, choices)
                for name, choices in zip(space.gene_names, space.gene_choices, strict=True)
            )
        except SearchExhausted:
            values = ()
        if values and tuple(space.canonicalize(values)) == values:
            trials.append(trial)
        else:  # drawn half by another sampler
            close_undrawn(study, trial)
    return trials


def close_undrawn(study: Study, trial: Trial) -> None:
    """Close a trial that has no vector; it uses up no budget."""
    trial.set_user_attr(REASON, INTERRUPTED)
    study.tell(trial, state=TrialState.FAIL)


def enqueue(study: Study, vectors: Sequence[Vector], problem: SearchProblem) -> None:
    """Put vectors that the study has not seen at the head of the search.

    Those that the cheap constraints forbid are left out, with a warning.
    """
    seen = seen_vectors(study, problem.space)
    for vector in dict.fromkeys(vectors):
        if not problem.admits(vector):
            logger.warning(
                "%s is left out of the search: it breaks %s", list(vector), problem.described_constraints
            )
        elif vector not in seen:
            study.enqueue_trial(encode(vector, problem.space))


def counted_trials(study: Study) -> list[FrozenTrial]:
    """Trials that used up budget: complete ones and failures."""
    return [
        trial
        for trial in study.get_trials(deepcopy=False, states=[TrialState.COMPLETE, TrialState.FAIL])
        if trial.user_attrs.get(REASON) != INTERRUPTED
    ]


def seen_vectors(study: Study, space: SearchSpace) -> set[Vector]:
    """Every vector that is evaluated, failed, in flight or enqueued."""
    vectors = (
        vector_of(trial, space)
        for trial in study.get_trials(deepcopy=False)
        if trial.user_attrs.get(REASON) != INTERRUPTED
    )
    return {vector for vector in vectors if vector is not None}


class _Journal(JournalStorage):
    """Before every new trial Optuna looks for waiting ones; here it passes over those that no longer wait.

    For one process and one study: a trial that has begun never waits again.
    """

    _num_begun = 0

    def get_all_trials(
        self, study_id: int, deepcopy: bool = True, states: Container[TrialState] | None = None
    ) -> list[FrozenTrial]:
        if deepcopy or states != (TrialState.WAITING,):
            return super().get_all_trials(study_id, deepcopy, states)
        trials = super().get_all_trials(study_id, deepcopy=False)
        while self._num_begun < len(trials) and trials[self._num_begun].state != TrialState.WAITING:
            self._num_begun += 1
        return [trial for trial in trials[self._num_begun :] if trial.state == TrialState.WAITING]


@contextmanager
def _naming_damage(path: Path) -> Iterator[None]:
    """What Optuna raises over a journal that it cannot read says neither which nor what to do."""
    try:
        yield
    except _NotOurs:
        raise
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise ValueError(
            f"{path} is damaged or not the journal of a study ({reason}): use another file, or remove it"
        ) from error


class _NotOurs(ValueError):
    """The file is whole, but not for us."""


def _lock(path: Path) -> FileLock:
    if path.is_dir():
        raise ValueError(f"the study {path} cannot be written: it is a folder; name a file")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        TemporaryFile(dir=path.parent).close()
        lock = FileLock(path.with_name(path.name + ".owner"))
        lock.acquire(timeout=0)
    except Timeout:
        raise ValueError(
            f"another process has the study {path} open: wait for it, or search into another file"
        ) from None
    except OSError as error:
        raise ValueError(f"the study {path} cannot be written: {error.strerror or error}") from error
    if path.exists() and not os.access(path, os.W_OK):
        lock.release()
        raise ValueError(f"the study {path} cannot be written: it is read-only")
    return lock


def _create_or_load(path: Path, problem: SearchProblem, sampler: BaseSampler) -> Study:
    storage = _Journal(JournalFileBackend(str(path)))
    names = optuna.get_all_study_names(storage)
    if STUDY_NAME in names:
        return optuna.load_study(study_name=STUDY_NAME, storage=storage, sampler=sampler)
    if names:
        raise _NotOurs(f"{path} holds the study {names[0]!r} of somebody else: use another file")
    return optuna.create_study(
        storage=storage,
        study_name=STUDY_NAME,
        directions=[objective.direction for objective in problem.objectives],
        sampler=sampler,
    )


def _identity(problem: SearchProblem, about: Mapping[str, Any]) -> dict[str, Any]:
    space = problem.space
    identity = {
        "genes": dict(zip(space.gene_names, map(list, space.gene_choices), strict=True)),
        "groups": list(space.group_sizes),
        "objectives": [f"{objective.direction} {objective.name}" for objective in problem.objectives],
        "constraints": [str(constraint) for constraint in problem.constraints],
        **about,
    }
    as_read: dict[str, Any] = json.loads(json.dumps(identity))
    return as_read


def _identify(study: Study, path: Path, identity: Mapping[str, Any]) -> None:
    """Write into a new study what it is about; compare it with an old one."""
    known = study.user_attrs.get(IDENTITY)
    if known is None:
        if study.get_trials(deepcopy=False):
            raise ValueError(f"{path} holds a study of somebody else: use another file")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ExperimentalWarning)
            study.set_metric_names([text.split(maxsplit=1)[1] for text in identity["objectives"]])
        study.set_user_attr(IDENTITY, identity)
        return
    for name in {**dict.fromkeys(("experiment",)), **known, **identity}:  # what tells most comes first
        if known.get(name) != identity.get(name):
            raise ValueError(
                f"{path} holds a study with other {name}: {_compact(known.get(name))}, not "
                f"{_compact(identity.get(name))}; search into another file, or remove this one"
            )


def _compact(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _mend_journal(path: Path) -> None:
    path.with_name(path.name + ".lock").unlink(missing_ok=True)
    if not path.exists():
        return
    content = path.read_bytes()
    if content and not content.startswith(b'{"op_code"'):
        raise _NotOurs(f"{path} is not the journal of a study: use another file")
    complete = content[: content.rfind(b"\n") + 1]
    if len(complete) < len(content):
        with path.open("r+b") as journal:
            journal.truncate(len(complete))
