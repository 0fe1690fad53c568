"""What a run logs: an outbox on disk, which a process of its own sends to MLflow.

A run waits for no server, and survives one that is down: what could not be sent stays in the outbox
and is sent at the end, or by the next run of the same output folder (`pipelines.tracking_sender`).
"""

import json
import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pipelines.artifacts import acquire_lock
from pipelines.progress import progress_bar
from pipelines.tracking_sender import OUTBOX_FILE, Position, read_records

logger = logging.getLogger(__name__)

PARENT = "run"
POLL_S = 0.05
PATIENCE_S = 0.5  # longer waits show a progress bar
ROOT = Path(__file__).parents[1]


class Tracker:
    """Logs one run: a parent, a child per stage, nested runs for trials.

    Args:
        folder: of the run; holds the outbox.
        uri: MLflow's tracking URI.
        artifact_root: where a local store keeps its artifacts; a server chooses its own.
        experiment: MLflow's experiment.
    """

    def __init__(self, folder: Path, *, uri: str, artifact_root: Path, experiment: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._uri = uri
        self._lock = acquire_lock(folder / ".tracking.lock", "the same run")
        outbox = folder / OUTBOX_FILE
        outbox.touch()
        records, size = read_records(outbox)
        os.truncate(outbox, size)  # a kill may have cut off the last line
        self._outbox = outbox.open("a")
        self._num_records = len(records)
        self._started = {record["key"] for record in records if record["op"] == "start"}
        self._ended = {
            record["key"] for record in records if record["op"] == "end" and record["status"] == "FINISHED"
        }
        self._sender = _start_sender(folder, uri, artifact_root, experiment)
        self._relay = threading.Thread(target=self._relay_warnings, daemon=True)
        self._relay.start()

    @property
    def num_unsent(self) -> int:
        return self._num_records - Position.read(self._folder, self._uri).num_sent

    def start(
        self, key: str, name: str, *, parent: str | None = None, params: Mapping[str, Any] | None = None
    ) -> bool:
        """Open a run under a key of ours; False if an earlier process already did."""
        if key in self._started:
            return False
        self._started.add(key)
        self._append("start", key, name=name, parent=parent, params=dict(params or {}))
        return True

    def log_metrics(self, key: str, metrics: Mapping[str, float], step: int = 0) -> None:
        self._append("metrics", key, metrics=dict(metrics), step=step)

    def log_artifact(self, key: str, path: Path) -> None:
        self._append("artifact", key, path=str(path.resolve()))

    def end(self, key: str, *, is_success: bool = True) -> None:
        if is_success:
            self._ended.add(key)
        self._append("end", key, status="FINISHED" if is_success else "FAILED")

    def is_ended(self, key: str) -> bool:
        """Whether a run was logged to its end by this process or an earlier one."""
        return key in self._ended

    def flush(self) -> None:
        """Wait until everything is sent, or the server cannot be reached: what follows is undisturbed."""
        self._wait(lambda: self.num_unsent == 0 or Position.read(self._folder, self._uri).is_offline)

    def close(self) -> None:
        """Have the sender try once more, also what earlier runs beside this one could not send."""
        assert self._sender.stdin is not None
        self._sender.stdin.close()
        self._wait(lambda: False)
        self._relay.join()
        self._outbox.close()
        self._lock.release()

    def _wait(self, is_done: Callable[[], bool]) -> None:
        """Until something is so, or the sender has ended; with a progress bar if it takes long."""
        start, total = time.monotonic(), self.num_unsent
        while not is_done():
            if self._has_ended():
                return
            if time.monotonic() - start > PATIENCE_S:
                with progress_bar(total, "send to MLflow", unit="record") as advance:
                    shown = 0
                    while not (is_done() or self._has_ended()):
                        sent = total - self.num_unsent
                        advance(sent - shown)
                        shown = sent
                return

    def _has_ended(self) -> bool:
        try:
            return self._sender.wait(POLL_S) is not None
        except subprocess.TimeoutExpired:
            return False

    def _relay_warnings(self) -> None:
        assert self._sender.stdout is not None
        for line in self._sender.stdout:
            logger.warning("%s", line.rstrip())

    def _append(self, op: str, key: str, **fields: Any) -> None:
        record = {"op": op, "key": key, "time_ms": int(1000 * time.time()), **fields}
        self._outbox.write(json.dumps(record) + "\n")
        self._outbox.flush()
        self._num_records += 1


class NoTracker:
    """Takes everything and logs nothing."""

    num_unsent = 0

    def start(
        self, key: str, name: str, *, parent: str | None = None, params: Mapping[str, Any] | None = None
    ) -> bool:
        return False

    def log_metrics(self, key: str, metrics: Mapping[str, float], step: int = 0) -> None:
        return None

    def log_artifact(self, key: str, path: Path) -> None:
        return None

    def end(self, key: str, *, is_success: bool = True) -> None:
        return None

    def is_ended(self, key: str) -> bool:
        return True

    def flush(self) -> None:
        return None

    def close(self) -> None:
        return None


def _start_sender(folder: Path, uri: str, artifact_root: Path, experiment: str) -> subprocess.Popen[str]:
    """A process that ends by itself once our end of its input is closed, by us or by our death."""
    command = [sys.executable, "-P", "-m", "pipelines.tracking_sender", str(folder), uri, str(artifact_root)]
    search_path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    return subprocess.Popen(
        [*command, experiment], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": search_path},
        start_new_session=True,  # an interrupt from the keyboard is for us
    )  # fmt: skip
