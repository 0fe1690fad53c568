"""Vectors to begin with: published ones, a file of the user's, or the front of a former search."""

import json
from pathlib import Path

from search.encoding import vector_of
from search.space import SearchSpace, Vector, validate
from search.study import read_study

PUBLISHED = {
    "coco_41ms": (0.3, 0.0, 0.1, 0.2, 0.2, 0.0),
    "coco_34ms": (0.6, 0.0, 0.2, 0.4, 0.5, 0.0),
    "coco_33ms": (0.7, 0.0, 0.2, 0.4, 0.5, 0.0),
}
"""Swin-T vectors of SparseViT (table 1), by task and latency on an RTX A6000 (dense: 48 ms)."""


def warm_start(sources: list[str], space: SearchSpace) -> list[Vector]:
    """The vectors of all sources, in order, each once.

    Args:
        sources: each a name in `PUBLISHED`; a JSON file that holds a list of vectors or a front; or the
            journal of a former study, of which the best trials are taken.

    Raises:
        ValueError: for a source that is none of these, or a vector that is not in the space.
    """
    vectors: dict[Vector, None] = {}
    for source in sources:
        for values in _read(source, space):
            try:
                vectors[validate(values, space)] = None
            except ValueError as error:
                raise ValueError(f"search.warm_start={source}: {error}") from error
    return list(vectors)


def _read(source: str, space: SearchSpace) -> list[tuple[float, ...]]:
    if source in PUBLISHED:
        return [PUBLISHED[source]]
    path = Path(source)
    if not path.is_file():
        raise ValueError(
            f"search.warm_start={source}: no such file, and not one of the published {', '.join(PUBLISHED)}"
        )
    if path.suffix != ".json":
        trials = read_study(path).best_trials
        for trial in trials:
            if set(trial.params) != set(space.gene_names):
                raise ValueError(
                    f"search.warm_start={source}: its genes are {', '.join(trial.params)}, not "
                    f"{', '.join(space.gene_names)}"
                )
        return [tuple(vector_of(trial, space)) for trial in trials]
    try:
        content = json.loads(path.read_text())
        if isinstance(content, dict):
            content = [member["vector"] for member in content["members"]]
        return [tuple(float(value) for value in values) for values in content]
    except (json.JSONDecodeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"search.warm_start={source}: neither a list of vectors nor a front ({error!r})"
        ) from error
