"""A device on which every call takes as long as it is told."""

import itertools
import time
from collections.abc import Callable

import pytest
import torch

from sparsevit import SparsityVector, SwinConfig
from sparsevit.latency.subject import Subject

Law = Callable[[SparsityVector], float]
"""Milliseconds of a forward pass at a vector."""


class Clock:
    """Calls that take as long as they are told, on a clock of their own."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        monkeypatch.setattr(time, "perf_counter", lambda: self.now)
        monkeypatch.setattr(time, "monotonic", lambda: self.now)

    def call(self, *seconds: float) -> Callable[[], None]:
        each = itertools.cycle(seconds)

        def take() -> None:
            self.now += next(each)

        return take

    def subject(self, config: SwinConfig, law: Law) -> Subject:
        """A backbone of this shape, whose latency is given by a law."""
        return Subject(
            "backbone", config, 1, (64, 64), "fp32", "eager", torch.device("cpu"),
            lambda vector: self.call(law(vector) / 1000),
        )  # fmt: skip
