"""A random generator whose draws are written down, for deterministic tables of operators."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np


class Scripted(np.random.Generator):
    """A generator whose draws are written down, and refused where they could not be drawn.

    Args:
        uniforms: results of `random`, each a number or a list; 1 stands for the largest below it.
        integers: results of `integers`.
    """

    def __init__(self, uniforms: Sequence[object], integers: Sequence[object]) -> None:
        super().__init__(np.random.PCG64(0))
        self._uniforms, self._integers = iter(uniforms), iter(integers)

    def random(self, size: int | None = None) -> Any:  # type: ignore[override]
        return _drawn(self._uniforms, () if size is None else (size,), 0.0, 1.0)

    def integers(self, low: Any, high: Any = None, size: int | None = None) -> Any:  # type: ignore[override]
        lowest, end = (0, low) if high is None else (low, high)
        shape = np.shape(end) if size is None else (size,)
        return _drawn(self._integers, shape, lowest, np.asarray(end) - 1)

    def assert_used_up(self) -> None:
        left = [*self._uniforms, *self._integers]
        assert not left, f"never drawn: {left}"


def _drawn(script: Iterator[object], shape: tuple[int, ...], lowest: Any, highest: Any) -> Any:
    value = np.array(next(script))
    assert value.shape == shape, f"{value} is scripted where draws of shape {shape} are asked for"
    assert np.all((lowest <= value) & (value <= highest)), f"{value} is not in {lowest} … {highest}"
    return value if shape else value.item()
