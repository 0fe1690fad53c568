"""Searches replayed on the table that the sampler benchmark ships: every vector of a real supernet."""

import numpy as np

from tests.benchmarks.samplers import run
from tests.benchmarks.search_table import load_table

TABLE = "swin_nano_coco"


def test_the_table_holds_the_whole_space() -> None:
    space, values = load_table(TABLE)
    assert space.size >= 4000
    assert set(values) == {vector.ratios for vector in space}
    assert all(np.isfinite(list(row.values())).all() for row in values.values())
    assert values[space.sparsest.ratios]["latency_ms"] < values[space.dense.ratios]["latency_ms"]


def test_nsga2_finds_the_front_with_a_fraction_of_what_random_takes() -> None:
    ours, chance = (
        run(name, 0, table=TABLE, population=8, num_evaluations=40) for name in ("nsga2", "random")
    )
    assert (np.diff(ours) >= 0).all()
    assert ours[-1] > 0.97
    assert ours[-1] > chance[-1]
