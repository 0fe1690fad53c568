"""What an evaluator may give."""

from typing import Any

import numpy as np
import pytest
import torch

from search.evaluator import as_numbers


def test_scalars_of_other_libraries_are_numbers() -> None:
    given = {"a": np.float32(0.5), "b": torch.tensor(2), "c": np.array(3.0), "d": True, "e": 5}
    numbers = as_numbers(given)
    assert numbers == {"a": 0.5, "b": 2.0, "c": 3.0, "d": 1.0, "e": 5.0}
    assert {type(value) for value in numbers.values()} == {float}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (None, "the evaluation gave None, not a mapping of names to numbers"),
        (0.5, "the evaluation gave 0.5, not a mapping"),
        ({"ap": "0.5"}, "the evaluation gave ap='0.5', which is not a finite number"),
        ({"ap": None}, "ap=None, which is not a finite number"),
        ({"ap": float("nan")}, "ap=nan, which"),
        ({"ap": 1.0, "note": [1]}, r"note=\[1\], which"),
        ({"ap": torch.ones(2)}, "which is not a finite number"),
    ],
)
def test_anything_else_is_named(given: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        as_numbers(given)
