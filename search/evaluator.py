"""The evaluator of a vector: one call, vector in, named values out."""

import math
from collections.abc import Mapping
from typing import Any, Protocol


class Evaluator(Protocol):
    """Scores vectors; lives in a worker and keeps what is expensive to build."""

    def __call__(self, vector: Any, budget: int | None) -> Mapping[str, float]:
        """Named values, finite numbers all; `budget` limits the samples to score on, None for all."""


class EvaluatorFactory(Protocol):
    """Builds an evaluator inside a worker; picklable, weights included."""

    def __call__(self) -> Evaluator: ...


def as_numbers(values: Any) -> dict[str, float]:
    """What an evaluator gave, as plain numbers; NumPy's and PyTorch's scalars are numbers too.

    Raises:
        ValueError: naming what is no mapping or no finite number.
    """
    if not isinstance(values, Mapping):
        raise ValueError(f"the evaluation gave {values!r}, not a mapping of names to numbers")
    numbers: dict[str, float] = {}
    for name, value in values.items():
        try:
            numbers[str(name)] = math.nan if isinstance(value, str) else float(value)
        except (TypeError, ValueError, RuntimeError):  # RuntimeError: a tensor of several elements
            numbers[str(name)] = math.nan
        if not math.isfinite(numbers[str(name)]):
            raise ValueError(f"the evaluation gave {name}={value!r}, which is not a finite number")
    return numbers
