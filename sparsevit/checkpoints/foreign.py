"""Whole models of other libraries in our own terms: names, order of rows, settings."""

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from sparsevit.checkpoints.files import Checkpoint, CheckpointError, Weights, read_checkpoint


@dataclass(frozen=True)
class Imported:
    """A checkpoint as a task can use it.

    Attributes:
        weights: by our names; the backbone's by those of any library that is known.
        format: who wrote it.
        config: the task's configuration with what these weights are only right with.
        tested_config: the same, with the sizes, thresholds and numbers that the checkpoint was tested with,
            as far as the file tells; `notes` say what it does not.
        notes: what to tell the user, a sentence each.
    """

    path: Path
    weights: Weights
    format: str
    config: Any
    tested_config: Any
    notes: tuple[str, ...] = ()


class ForeignFormat(Protocol):
    """How another library writes a model that computes what one of ours does."""

    @property
    def name(self) -> str: ...

    def recognises(self, names: Collection[str]) -> bool:
        """Whether a file with these names is one of the library's."""

    def convert(self, checkpoint: Checkpoint, config: Any, class_names: Sequence[str] | None) -> Imported:
        """Put a file into our terms.

        Args:
            config: of the task, as the user set it.
            class_names: of the user's data; None to take those of the file as they are.

        Raises:
            CheckpointError: if the file is of a model that ours cannot be.
        """


@dataclass(frozen=True)
class Renamed:
    """A format whose tensors are ours under other names.

    Attributes:
        names: regular expressions of theirs, and what ours have instead; the first that is found counts.
    """

    name: str
    names: Sequence[tuple[str, str]]

    def recognises(self, names: Collection[str]) -> bool:
        return any(re.search(theirs, name) for name in names for theirs, _ in self.names)

    def convert(self, checkpoint: Checkpoint, config: Any, class_names: Sequence[str] | None) -> Imported:
        weights = {self._ours(name): value for name, value in checkpoint.weights.items()}
        return Imported(checkpoint.path, weights, self.name, config, config)

    def _ours(self, name: str) -> str:
        renamed = (re.subn(theirs, ours, name) for theirs, ours in self.names)
        return next((new for new, count in renamed if count), name)


@dataclass(frozen=True)
class Refused:
    """A format that looks like one of those above and computes something else.

    Attributes:
        marks: regular expressions of names that it alone has.
        reason: a sentence that follows the names that were found.
    """

    name: str
    marks: Sequence[str]
    reason: str

    def recognises(self, names: Collection[str]) -> bool:
        return bool(self._found(names))

    def convert(self, checkpoint: Checkpoint, config: Any, class_names: Sequence[str] | None) -> Imported:
        found = ", ".join(self._found(checkpoint.weights))
        raise CheckpointError(f"{checkpoint.path} is {self.name}, as {found} in it tell: {self.reason}")

    def _found(self, names: Collection[str]) -> list[str]:
        matching = (next((name for name in names if re.search(mark, name)), None) for mark in self.marks)
        return [name for name in matching if name is not None]


def import_checkpoint(
    path: Path, formats: Sequence[ForeignFormat], config: Any, class_names: Sequence[str] | None = None
) -> Imported:
    """Read a file and put it into the terms of a task, whoever wrote it.

    Raises:
        CheckpointError: if the file cannot be used.
    """
    checkpoint = read_checkpoint(path)
    for weights in without_common_prefix(checkpoint.weights):
        for each in formats:
            if each.recognises(weights.keys()):
                inner = Checkpoint(checkpoint.path, weights, checkpoint.meta)
                return each.convert(inner, config, class_names)
    return Imported(path, checkpoint.weights, "sparsevit", config, config)


def without_common_prefix(weights: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """The weights as they are, then without what most names begin with: ``model.`` of Lightning, say."""
    current = dict(weights)
    yield current
    for _ in range(3):
        first = [name.partition(".")[0] for name in current]
        most = max(set(first), key=lambda each: (first.count(each), each), default="")
        if 2 * first.count(most) <= len(first):
            return
        current = {name.removeprefix(f"{most}."): value for name, value in current.items()}
        yield current
