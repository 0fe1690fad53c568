"""Mutation testing: change a file in many ways, and tell which changes no test notices.

    python -m tests.mutation sparsevit/sparsity.py search/ --sample 100

It works in a copy of the checkout, remembers what it found (a killed mutant stays killed while its file
is the same; a survivor is tried again when tests change), and continues where it was stopped.
"""

import argparse
import json
import os
import random
import shutil
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path

import pytest
from filelock import FileLock, Timeout

from tests.mutation.isolation import copy_checkout, mutated, preload, run_in_fork
from tests.mutation.mutants import Mutant, mutants_of
from tests.mutation.reach import Reach, hash_of, is_current, measure, python_files

OUTCOMES = ("killed", "timed out", "survived", "not reached")
DETECTED = ("killed", "timed out")
LONGEST = 1800.0
"""Seconds for a test file without a mutant."""


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="tests.mutation", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("files", nargs="+", type=Path, help="files and folders to mutate")
    parser.add_argument(
        "--tests", nargs="+", type=Path, help="files and folders; default: tests/PACKAGE_tests"
    )
    parser.add_argument("--sample", type=int, help="so many mutants of every file, at random; default: all")
    parser.add_argument("--seed", type=int, default=0, help="of the sample; a larger one holds a smaller one")
    parser.add_argument("--budget", type=float, default=30.0, help="seconds of tests that a mutant may face")
    parser.add_argument(
        "--work", type=Path, default=Path(".mutants"), help="folder of the copy and the report"
    )
    return parser.parse_args()


def main() -> int:
    arguments = parse_arguments()
    work = arguments.work.resolve()
    tree = work / "tree"
    tree.mkdir(parents=True, exist_ok=True)
    if Path.cwd() != tree:
        with FileLock(work / "lock", timeout=0):
            copy_checkout(Path.cwd(), tree)
        environment = {
            "PYTHONPATH": str(tree),
            "PYTHONDONTWRITEBYTECODE": "",
            "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
            "CUDA_VISIBLE_DEVICES": "",  # which does not survive a fork
        }
        options = [*sys.argv[1:], "--work", str(work)]
        os.chdir(tree)
        os.execve(
            sys.executable, [sys.executable, "-m", "tests.mutation", *options], os.environ | environment
        )
    with FileLock(work / "lock", timeout=0):
        files = sorted({str(file) for path in arguments.files for file in python_files(path)})
        if outside := [file for file in files if not Path(file).resolve().is_relative_to(tree)]:
            raise SystemExit(f"{outside[0]}: name files by their paths from the root of the checkout")
        folders = arguments.tests or sorted({Path(f"tests/{file.split('/')[0]}_tests") for file in files})
        reach = reach_of(files, folders, work)
        preload(reach.libraries)
        tests_hash = hash_of(path if path.is_dir() else path.parent for path in folders)
        results = run(files, reach, tests_hash, arguments, work)
        report(results, work)
    return 0


def reach_of(files: Sequence[str], folders: Iterable[Path], work: Path) -> Reach:
    """Measure the test files that changed, or that reach a file which changed, since they were measured."""
    records = []
    for test_file in (file for folder in folders for file in python_files(folder) if file.match("test_*.py")):
        helpers = [file for file in python_files(test_file.parent) if not file.match("test_*.py")]
        record = work / "reach" / f"{hash_of([test_file, *helpers])}.json"
        if not is_current(record, files):
            print(f"measuring {test_file}", flush=True)
            record.unlink(missing_ok=True)
            run_in_fork(partial(measure, str(test_file), record), LONGEST, work)
            if not record.exists():
                raise SystemExit(f"{test_file} could not be measured; see {work / 'output'}")
            for test in json.loads(record.read_text())["unfit"]:
                print(f"  not used, as it fails or is skipped: {test}")
        records.append(record)
    return Reach(records)


def run_tests(tests: Iterable[str], seconds: Mapping[str, float], work: Path) -> int:
    """Run file after file, the quickest first, until a test fails: to collect them takes time too."""
    batches = defaultdict(list)
    for test in tests:
        batches[test.split("::")[0]].append(test)
    options = ["-q", "-x", "-p", "no:cacheprovider", "--basetemp", str(work / "tmp")]
    for batch in sorted(batches.values(), key=lambda batch: sum(map(seconds.__getitem__, batch))):
        if status := pytest.main([*options, *batch]):
            return int(status)
    return 0


def run(
    files: Iterable[str], reach: Reach, tests_hash: str, arguments: argparse.Namespace, work: Path
) -> list[tuple[Mutant, str]]:
    """The outcome of every mutant, from the journal or from its tests."""
    journal = work / "results.jsonl"
    known = {}
    for line in journal.read_text().splitlines() if journal.exists() else ():
        entry = json.loads(line)
        if entry["outcome"] in DETECTED or entry["tests"] == tests_hash:
            known[entry["mutant"]] = entry["outcome"]
    results = []
    for file in files:
        mutants = mutants_of(file, Path(file).read_text())
        random.Random(arguments.seed).shuffle(mutants)
        mutants = mutants[: arguments.sample]
        unknown = [mutant for mutant in mutants if mutant.key not in known]
        if unknown:
            check_clean(unknown, reach, arguments.budget, work)
        for number, mutant in enumerate(unknown, start=1):
            outcome = outcome_of(mutant, reach, arguments.budget, work)
            known[mutant.key] = outcome
            print(f"{file} {number}/{len(unknown)}: {outcome}", flush=True)
            with journal.open("a") as lines:
                entry = {"mutant": mutant.key, "outcome": outcome, "tests": tests_hash}
                lines.write(json.dumps(entry) + "\n")
        results += [(mutant, known[mutant.key]) for mutant in mutants]
    return results


def check_clean(mutants: Iterable[Mutant], reach: Reach, budget: float, work: Path) -> None:
    """The tests must pass without a mutant, in the order in which they will run."""
    tests = {test: None for mutant in mutants for test in reach.tests(mutant.path, mutant.lines, budget)[0]}
    if tests and run_in_fork(partial(run_tests, tests, reach.seconds, work), LONGEST, work) != 0:
        raise SystemExit(f"the tests fail without a mutant; see {work / 'output'}")


def outcome_of(mutant: Mutant, reach: Reach, budget: float, work: Path) -> str:
    tests, is_reached = reach.tests(mutant.path, mutant.lines, budget)
    if not tests:
        return "not reached"
    seconds = sum(reach.seconds[test] for test in tests)
    with mutated(mutant):
        status = run_in_fork(partial(run_tests, tests, reach.seconds, work), 30 + 5 * seconds, work)
    if status is None:
        return "timed out"
    return "killed" if status != 0 else "survived" if is_reached else "not reached"


def report(results: Iterable[tuple[Mutant, str]], work: Path) -> None:
    """Print the share of detected mutants by file, and write it and the survivors' changes."""
    by_file: dict[str, list[tuple[Mutant, str]]] = defaultdict(list)
    for mutant, outcome in results:
        by_file[mutant.path].append((mutant, outcome))
    table = ["| file | mutants | " + " | ".join(OUTCOMES) + " | detected |", "|---" * 7 + "|"]
    survivors = work / "survivors"
    shutil.rmtree(survivors, ignore_errors=True)
    survivors.mkdir()
    for file, found in by_file.items():
        counts = Counter(outcome for _, outcome in found)
        share = sum(counts[outcome] for outcome in DETECTED) / len(found)
        numbers = [len(found), *(counts[outcome] for outcome in OUTCOMES)]
        table.append(f"| {file} | {' | '.join(map(str, numbers))} | {share:.1%} |")
        alive = sorted(
            (m.lines.start, f"# {outcome}\n{m.diff}\n\n") for m, outcome in found if outcome not in DETECTED
        )
        if alive:
            (survivors / f"{file.replace('/', '-')}.diff").write_text("".join(diff for _, diff in alive))
    (work / "report.md").write_text("\n".join(table) + "\n")
    print("\n".join(table), f"\nsurvivors: {survivors}", sep="\n")


if __name__ == "__main__":
    try:
        sys.exit(main())
    except Timeout:
        sys.exit("another run works in this folder; name another one: --work FOLDER")
