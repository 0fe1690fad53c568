"""The command line in a process of its own, forked from one in which everything is imported already.

That the command also starts from nothing, with a Ray of its own, is tested once, in `test_run`.
"""

import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import ray

ROOT = Path(__file__).parents[2]
RUN = str(ROOT / "pipelines" / "run.py")
PRELOADED = ["tests.pipelines_tests.preloaded"]


class Command:
    """A running ``python pipelines/run.py …``; `output` takes what it prints."""

    def __init__(
        self,
        arguments: Sequence[str],
        folder: Path,
        output: Path,
        errors: Path,
        environment: Mapping[str, str],
    ) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOADED)
        for path in (output, errors):
            path.write_text("")
        self._process: ForkServerProcess = context.Process(
            target=_serve, args=(list(arguments), folder, output, errors, dict(environment))
        )
        self._process.start()
        assert self._process.pid is not None
        self.pid = self._process.pid

    def poll(self) -> int | None:
        """The exit status if it has ended; the negative number of the signal that ended it."""
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired("pipelines/run.py", timeout or 0.0)
        return self._process.exitcode

    def kill(self) -> None:
        self._process.kill()


def run_command(
    arguments: Sequence[str], folder: Path, *, python_path: str = ""
) -> subprocess.CompletedProcess[str]:
    """Run ``pipelines/run.py`` with these arguments in a folder, to its end, on the Ray that tests share."""
    address = ray.get_runtime_context().gcs_address
    environment = {**os.environ, "RAY_ADDRESS": address, "PYTHONPATH": python_path}
    with tempfile.TemporaryDirectory() as logs:
        output, errors = Path(logs) / "output", Path(logs) / "errors"
        status = Command(arguments, folder, output, errors, environment).wait()
        return subprocess.CompletedProcess([RUN, *arguments], status, output.read_text(), errors.read_text())


def _serve(
    arguments: list[str], folder: Path, output: Path, errors: Path, environment: dict[str, str]
) -> None:
    """In the new process: become the command."""
    for path, stream in ((output, 1), (errors, 2)):
        opened = os.open(path, os.O_WRONLY | os.O_APPEND)
        os.dup2(opened, stream)
        os.close(opened)
    sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115  (until the process ends)
    sys.stderr = open(2, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
    multiprocessing.set_start_method(None, force=True)  # that of a process which was not forked
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    sys.path[:0] = [path for path in environment.get("PYTHONPATH", "").split(os.pathsep) if path]
    sys.argv = [RUN, *arguments]
    runpy.run_path(RUN, run_name="__main__")
