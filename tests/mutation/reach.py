"""Which tests run which line: measured with coverage.py, once per test file, and kept until it changes."""

import hashlib
import json
import shutil
import sys
from collections import defaultdict
from collections.abc import Collection, Generator, Iterable
from pathlib import Path
from typing import Any

import coverage
import pytest

PACKAGES = ("sparsevit", "search", "pipelines")


def python_files(path: Path) -> list[Path]:
    if not path.exists():
        raise SystemExit(f"{path}: no such file or folder")
    return [path] if path.is_file() else sorted(path.rglob("*.py"))


def hash_of(paths: Iterable[Path]) -> str:
    digest = hashlib.sha256()
    for file in sorted({file for path in paths for file in python_files(path)}):
        digest.update(f"{file}\0{file.read_text()}\0".encode())
    return digest.hexdigest()[:16]


class Recorder:
    """A plugin of pytest that tells coverage.py which test runs, and takes the time."""

    def __init__(self, measured: coverage.Coverage) -> None:
        self.measured = measured
        self.test = ""
        self.seconds: dict[str, float] = defaultdict(float)
        self.unfit: set[str] = set()  # failed or skipped

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Generator[None, object, object]:
        self.test = item.nodeid
        self.measured.switch_context(self.test)
        result = yield
        self.measured.switch_context("")
        return result

    @pytest.hookimpl(wrapper=True)
    def pytest_fixture_setup(self, fixturedef: pytest.FixtureDef[Any]) -> Generator[None, object, object]:
        """What several tests share is of all tests of the file, not of the first."""
        if fixturedef.scope == "function":
            return (yield)
        self.measured.switch_context("")
        try:
            return (yield)
        finally:
            self.measured.switch_context(self.test)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.seconds[report.nodeid] += report.duration
        if report.outcome != "passed":
            self.unfit.add(report.nodeid)


def measure(test_file: str, record: Path) -> int:
    """Run a test file; write its tests' seconds, the lines that each reaches, and the libraries they use.

    Lines that no single test owns are those of "": of imports, of shared fixtures, and of the processes
    that the tests start.
    """
    folder = record.with_suffix("")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    measured = coverage.Coverage(data_file=str(folder / "coverage"), source=list(PACKAGES))
    recorder = Recorder(measured)
    measured.start()
    pytest.main(["-q", "-p", "no:cacheprovider", test_file], plugins=[recorder])
    measured.stop()
    measured.save()
    measured.combine()
    data = measured.get_data()
    lines: dict[str, dict[str, list[int]]] = {}
    for name in data.measured_files():
        of_test = lines.setdefault(str(Path(name).relative_to(Path.cwd())), defaultdict(list))
        for line, tests in data.contexts_by_lineno(name).items():
            for test in tests:
                of_test[test].append(line)
    seconds = {test: time for test, time in recorder.seconds.items() if test not in recorder.unfit}
    libraries = [name for name in sys.modules if name.split(".")[0] not in (*PACKAGES, "tests", "__main__")]
    found = {
        "seconds": seconds, "unfit": sorted(recorder.unfit), "libraries": libraries, "lines": lines,
        "hashes": {path: hash_of([Path(path)]) for path in lines},
    }  # fmt: skip
    record.write_text(json.dumps(found))
    return 0


def is_current(record: Path, files: Iterable[str]) -> bool:
    """Whether a record of this test file is there, and the files that it reaches are as they were."""
    if not record.exists():
        return False
    hashes = json.loads(record.read_text())["hashes"]
    return all(hashes[file] == hash_of([Path(file)]) for file in files if file in hashes)


class Reach:
    """Which tests run which line.

    Args:
        records: of `measure`, one per test file.
    """

    def __init__(self, records: Iterable[Path]) -> None:
        self._records = [json.loads(record.read_text()) for record in records]
        self.libraries = dict.fromkeys(name for record in self._records for name in record["libraries"])
        self.seconds: dict[str, float] = {
            t: s for record in self._records for t, s in record["seconds"].items()
        }

    def tests(self, path: str, span: Collection[int], budget: float) -> tuple[list[str], bool]:
        """Tests that may notice a change of these lines, and whether any is known to run them.

        First the tests that run a line themselves, then those that share it with others; where it is not
        known to run (Ray ends its workers without a report), those of the test files that use the file.
        The fastest come first, and no more than take `budget` seconds together, but always one.
        """
        places: dict[str, tuple[int, bool, float]] = {}
        for record in self._records:
            own = {test: set(lines) for test, lines in record["lines"].get(path, {}).items()}
            shared = own.pop("", set())
            if own or shared:
                elsewhere = 2 if shared.isdisjoint(span) else 1
                for test, seconds in record["seconds"].items():
                    lines = own.get(test, set())
                    places[test] = (elsewhere if lines.isdisjoint(span) else 0, not lines, seconds)
        is_reached = any(place[0] < 2 for place in places.values())
        chosen: list[str] = []
        spent = 0.0
        for test in sorted(places, key=places.__getitem__):
            place, _, seconds = places[test]
            if (place == 2 and is_reached) or (chosen and spent + seconds > budget):
                break
            chosen.append(test)
            spent += seconds
        return chosen, is_reached
