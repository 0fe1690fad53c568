"""A copy of the checkout, a change in it, and forks in which tests run: nothing of a mutant stays."""

import contextlib
import gc
import importlib
import importlib.util
import os
import resource
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from tests.mutation.mutants import Mutant

MEMORY = 12 * 2**30
"""Address space of a mutant's processes, each."""


def copy_checkout(root: Path, tree: Path) -> None:
    """Make `tree` equal to the checkout, with changes that are not committed, without what git ignores."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listing = subprocess.run(command, cwd=root, check=True, capture_output=True, text=True)
    names = {name for name in listing.stdout.split("\0") if (root / name).is_file()}
    for old in [path for path in tree.rglob("*") if path.is_file() and path.suffix != ".pyc"]:
        if str(old.relative_to(tree)) not in names:
            old.unlink()
    for name in names:
        if not (tree / name).exists() or (tree / name).read_bytes() != (root / name).read_bytes():
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(root / name, tree / name)


def preload(libraries: Iterable[str]) -> None:
    """Import the libraries that tests use, so that no mutant has to: it is run in a fork."""
    importlib.import_module("tests.conftest")
    for name in libraries:
        with contextlib.suppress(ImportError):  # not all that is in sys.modules can be imported by its name
            importlib.import_module(name)
    gc.freeze()  # or every fork walks, and copies, all of them


@contextlib.contextmanager
def mutated(mutant: Mutant) -> Iterator[None]:
    """The change on the disk, where every process finds it."""
    path = Path(mutant.path)
    cached = Path(importlib.util.cache_from_source(path))
    path.write_text(mutant.text)
    cached.unlink(missing_ok=True)
    try:
        yield
    finally:
        path.write_text(mutant.original)
        cached.unlink(missing_ok=True)


def run_in_fork(function: Callable[[], int], seconds: float, work: Path) -> int | None:
    """Its exit status; None if it had to be stopped. What it prints is in `work`/output."""
    pid = os.fork()
    if pid == 0:
        os.setsid()
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
        output = os.open(work / "output", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        for stream in (1, 2):
            os.dup2(output, stream)
        ended = 1
        try:
            ended = function()
        finally:
            os._exit(ended)
    status = None
    for stop, patience in ((None, seconds), (signal.SIGINT, 10.0), (signal.SIGKILL, 10.0)):
        if stop is not None:  # first an interruption, at which a test still ends the processes it started
            os.kill(pid, stop)
        if (ended_with := _wait(pid, patience)) is not None:
            status = ended_with if stop is None else None
            break
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)
    return status


def _wait(pid: int, seconds: float) -> int | None:
    """The exit status of a process that ends within `seconds`."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    return None
