"""A random generator whose draws are written down, for deterministic tables of operators."""

import numpy as np


class Scripted(np.random.Generator):
    """A generator whose draws are written down."""

    def __init__(self, uniforms: list[object], integers: list[object]) -> None:
        super().__init__(np.random.PCG64(0))
        self.uniforms, self.draws = iter(uniforms), iter(integers)

    def random(self, *args: object, **kwargs: object) -> object:  # type: ignore[override]
        value = next(self.uniforms)
        return np.array(value) if isinstance(value, list) else value

    def integers(self, *args: object, **kwargs: object) -> object:  # type: ignore[override]
        value = next(self.draws)
        return np.array(value) if isinstance(value, list) else value
