"""What is changed, and which tests a change faces: on files and records that are written down here."""

import json
from pathlib import Path

import pytest

pytest.importorskip("mutmut", reason="make mutants installs it")

from tests.mutation.mutants import mutants_of
from tests.mutation.reach import Reach, hash_of, is_current

SOURCE = """\
from dataclasses import dataclass

Point = tuple[float, ...]

@dataclass(frozen=True)
class Box:
    width: int = 3

    @property
    def is_wide(self) -> bool:
        if self.width < 0:
            raise ValueError("no width")
        return self.width > 4
"""


def changes() -> set[tuple[str, range]]:
    """The line that is new in every mutant, and the lines of its statement."""
    old = set(SOURCE.splitlines())
    return {
        (line.strip(), mutant.lines)
        for mutant in mutants_of("box.py", SOURCE)
        for line in mutant.text.splitlines()
        if line not in old
    }


def test_class_bodies_and_properties_are_changed_but_no_alias_decorator_or_words_of_an_error() -> None:
    assert changes() == {
        ("width: int = 4", range(7, 8)),
        ("width: int = None", range(7, 8)),
        ("if self.width <= 0:", range(11, 12)),
        ("if self.width < 1:", range(11, 12)),
        ("raise ValueError(None)", range(12, 13)),
        ("return self.width >= 4", range(13, 14)),
        ("return self.width > 5", range(13, 14)),
    }


def test_invariants_are_left_alone_but_not_what_is_around_them() -> None:
    source = "def f(a, b):\n    assert a > 1\n    return zip(a, b, strict=True)\n"
    new = {mutant.text.splitlines()[2].strip() for mutant in mutants_of("f.py", source)}
    assert new == {
        "return zip(None, b, strict=True)", "return zip(a, None, strict=True)",
        "return zip(b, strict=True)", "return zip(a, strict=True)",
    }  # fmt: skip


def test_a_default_value_concerns_the_tests_that_run_the_function() -> None:
    mutants = mutants_of("f.py", "def f(a=1):\n    b = a\n    return b\n")
    lines = {mutant.text.splitlines()[0]: mutant.lines for mutant in mutants}
    assert lines["def f(a=2):"] == range(2, 4)


def reach(tmp_path: Path) -> Reach:
    record = {
        "seconds": {"slow": 5.0, "fast": 1.0, "elsewhere": 0.1, "other file": 0.1},
        "lines": {"a.py": {"": [1, 2, 20], "slow": [5, 6], "fast": [5], "elsewhere": [9]}},
        "libraries": [], "hashes": {},
    }  # fmt: skip
    (tmp_path / "record.json").write_text(json.dumps(record))
    return Reach([tmp_path / "record.json"])


@pytest.mark.parametrize(
    ("line", "budget", "tests", "is_reached"),
    [
        (5, 30.0, ["fast", "slow"], True),
        (5, 4.0, ["fast"], True),
        (6, 1.0, ["slow"], True),  # one at least
        (20, 30.0, ["elsewhere", "fast", "slow", "other file"], True),  # shared: all, users of the file first
        (7, 30.0, ["elsewhere", "fast", "slow", "other file"], False),  # seen nowhere
    ],
)
def test_which_tests_a_line_concerns(
    tmp_path: Path, line: int, budget: float, tests: list[str], is_reached: bool
) -> None:
    assert reach(tmp_path).tests("a.py", [line], budget) == (tests, is_reached)
    assert reach(tmp_path).tests("b.py", [line], budget) == ([], False)


def test_a_record_is_kept_while_what_it_reaches_is_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a.py").write_text("a = 1\n")
    record = Path("record.json")
    assert not is_current(record, ["a.py"])
    record.write_text(json.dumps({"hashes": {"a.py": hash_of([Path("a.py")])}}))
    assert is_current(record, ["a.py", "never_reached.py"])
    Path("a.py").write_text("a = 2\n")
    assert not is_current(record, ["a.py"])
