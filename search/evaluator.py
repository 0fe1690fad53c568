"""The evaluator of a vector: one call, vector in, named values out."""

from collections.abc import Mapping
from typing import Any, Protocol


class Evaluator(Protocol):
    """Scores vectors; lives in a worker and keeps what is expensive to build."""

    def __call__(self, vector: Any, budget: int | None) -> Mapping[str, float]:
        """Named objective values; `budget` limits the samples to score on, None for all."""


class EvaluatorFactory(Protocol):
    """Builds an evaluator inside a worker; picklable, weights included."""

    def __call__(self) -> Evaluator: ...
