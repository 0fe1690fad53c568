"""Finished stages on disk: found by what they depend on, written so that a kill loses nothing.

A stage's folder is named after the hash of everything its result is a function of. It is finished
when ``result.json`` is in it; that file is written last, beside and then renamed.
"""

import hashlib
import json
import logging
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

RESULT_FILE = "result.json"
METRICS_FILE = "metrics.json"
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class StageResult:
    """What a finished stage left: numbers by name, and files in its folder."""

    name: str
    key: str
    folder: Path
    metrics: Mapping[str, float]
    seconds: float
    was_reused: bool


class ArtifactStore:
    """The stage folders below one root, shared by all runs that use it."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def folder(self, name: str, key: str) -> Path:
        return self.root / f"{name}-{key}"

    def find(self, name: str, key: str) -> StageResult | None:
        """The result of a finished stage."""
        path = self.folder(name, key) / RESULT_FILE
        if not path.is_file():
            return None
        content = read_json(path)
        return StageResult(name, key, path.parent, content["metrics"], content["seconds"], was_reused=True)

    def run(
        self, name: str, key: str, depends_on: Any, execute: Callable[[Path], Mapping[str, float]]
    ) -> StageResult:
        """Return the finished stage, or execute it in its folder; one process at a time."""
        folder = self.folder(name, key)
        folder.mkdir(parents=True, exist_ok=True)
        lock = acquire_lock(folder / ".lock", f"stage {name}")
        try:
            finished = self.find(name, key)
            if finished is not None:
                return finished
            start = time.monotonic()
            metrics = dict(execute(folder))
            seconds = round(time.monotonic() - start, 1)
            write_json(
                folder / RESULT_FILE,
                {"stage": name, "key": key, "metrics": metrics, "seconds": seconds, "depends_on": depends_on},
            )
        finally:
            lock.release()
        return StageResult(name, key, folder, metrics, seconds, was_reused=False)


def acquire_lock(path: Path, what: str, *, waits: bool = True) -> FileLock:
    """Hold a lock file until it is released, or the process ends.

    Where another process holds it, say so and wait for that one to end.

    Raises:
        Timeout: if another process holds it, unless `waits`.
    """
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0.5)
    except Timeout:
        if not waits:
            raise
        logger.info("another process is at work on %s: waiting for it to end (it holds %s)", what, path)
        lock.acquire()
    return lock


def content_key(depends_on: Any) -> str:
    """Twelve hexadecimal digits that change with any value in `depends_on` (JSON-like)."""
    canonical = json.dumps(depends_on, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()[:12]


def path_digest(path: Path) -> str:
    """SHA-256 of a file's content, or of all files directly in a folder."""
    if path.is_dir():
        files = sorted(each for each in path.iterdir() if each.is_file())
        return content_key([[each.name, path_digest(each)] for each in files])
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_json(path: Path) -> Any:
    return json.loads(path.read_text())


def write_json(path: Path, content: Any) -> None:
    write_text(path, json.dumps(content, indent=2))


def write_text(path: Path, content: str) -> None:
    """Write all or nothing."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(content)
    os.replace(partial, path)
