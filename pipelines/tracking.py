"""MLflow, through an outbox: what is to be logged is on disk first, then sent by one writer.

A run survives a tracking server that is down: events wait in the outbox and are sent at the end,
or by the next run of the same output folder. Every event is sent in order and marked as sent.
"""

import json
import logging
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from filelock import Timeout

from pipelines.artifacts import acquire_lock, read_json, write_json
from pipelines.progress import progress_bar

logger = logging.getLogger(__name__)

PARENT = "run"
KEY_TAG = "sparsevit.key"
OUTBOX_FILE = "tracking.jsonl"
SENT_FILE = "tracking.sent.json"
MAX_EVENTS_PER_BATCH = 50  # MLflow takes 1,000 metrics at a time


class Tracker:
    """Logs one run: a parent, a child per stage, nested runs for trials.

    Args:
        folder: of the run; holds the outbox.
        uri: MLflow's tracking URI.
        artifact_root: where a local store keeps its artifacts; a server chooses its own.
        experiment: MLflow's experiment.
        waits: for another process that is at work on the same run; otherwise a Timeout is raised.
    """

    def __init__(
        self, folder: Path, *, uri: str, artifact_root: Path, experiment: str, waits: bool = True
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._uri = uri
        self._artifact_root = artifact_root
        self._experiment = experiment
        self._folder = folder
        self._outbox = folder / OUTBOX_FILE
        self._sent_file = folder / SENT_FILE
        self._lock = acquire_lock(folder / ".tracking.lock", "the same run", waits=waits)
        self._events = _read_events(self._outbox)
        self._started = {event["key"] for event in self._events if event["op"] == "start"}
        self._ended = {
            event["key"] for event in self._events if event["op"] == "end" and event["status"] == "FINISHED"
        }
        sent = read_json(self._sent_file) if self._sent_file.is_file() else {}
        if sent.get("uri", uri) != uri:  # another server knows nothing of this run: it gets all of it
            sent = {}
        self._num_sent: int = sent.get("num_sent", 0)
        self._run_ids: dict[str, str] = sent.get("run_ids", {})
        self._alone_until = 0  # events up to here are sent one by one
        self._client: Any = None
        self._is_offline = False

    @property
    def num_unsent(self) -> int:
        return len(self._events) - self._num_sent

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

    def flush(self) -> None:
        """Send what waits. After a failure nothing more is tried until `close`."""
        if self.num_unsent == 0 or self._is_offline:
            return
        try:
            while self._num_sent < len(self._events):
                event, count = self._next_event()
                try:
                    self._send(event)
                except Exception as error:
                    if event["op"] == "start" or not _is_refusal(error):
                        raise
                    if count > 1:  # find the one that is refused
                        self._alone_until = self._num_sent + count
                        continue
                    logger.warning(
                        "warning: MLflow refuses a record of %s: %s", event["key"], _first_line(error)
                    )
                self._num_sent += count
                if event["op"] == "start":  # so that a kill does not create a run twice
                    self._save_position()
        except Exception as error:  # noqa: BLE001  (MLflow raises whatever its transport raises)
            self._is_offline = True
            logger.warning(
                "warning: MLflow at %s cannot be reached (%s); %d records wait in %s and are sent at the "
                "end or on the next run",
                self._uri, _first_line(error), self.num_unsent, self._outbox,
            )  # fmt: skip
        finally:
            self._save_position()

    def close(self) -> None:
        """Try once more to send everything, and then what earlier runs beside this one could not."""
        self._is_offline = False
        self.flush()
        if not self._is_offline:
            self._send_leftovers()
        self._lock.release()

    def _send_leftovers(self) -> None:
        for outbox in sorted(self._folder.parent.glob(f"*/{OUTBOX_FILE}")):
            sent_file = outbox.with_name(SENT_FILE)
            if (
                outbox == self._outbox
                or not sent_file.is_file()
                or read_json(sent_file).get("uri") != self._uri
            ):
                continue
            try:
                earlier = Tracker(
                    outbox.parent, uri=self._uri, artifact_root=self._artifact_root,
                    experiment=self._experiment, waits=False,
                )  # fmt: skip
            except Timeout:  # the run that it belongs to is still going
                continue
            earlier.flush()
            earlier._lock.release()

    def is_ended(self, key: str) -> bool:
        """Whether a run was logged to its end by this process or an earlier one."""
        return key in self._ended

    def _save_position(self) -> None:
        content = {"uri": self._uri, "num_sent": self._num_sent, "run_ids": self._run_ids}
        write_json(self._sent_file, content)

    def _next_event(self) -> tuple[dict[str, Any], int]:
        """What to send next, and how many events it stands for: metrics of one run go together."""
        first = self._events[self._num_sent]
        if first["op"] != "metrics":
            return first, 1
        points: list[tuple[str, float, int, int]] = []
        count = 0
        limit = 1 if self._num_sent < self._alone_until else MAX_EVENTS_PER_BATCH
        for event in self._events[self._num_sent : self._num_sent + limit]:
            if event["op"] != "metrics" or event["key"] != first["key"]:
                break
            points += [
                (name, value, event["time_ms"], event["step"]) for name, value in event["metrics"].items()
            ]
            count += 1
        return {**first, "points": points}, count

    def _append(self, op: str, key: str, **fields: Any) -> None:
        event = {"op": op, "key": key, "time_ms": int(1000 * time.time()), **fields}
        with self._outbox.open("a") as outbox:
            outbox.write(json.dumps(event) + "\n")
        self._events.append(event)

    def _connect(self) -> Any:
        """The client and the experiment; imported here because MLflow takes seconds to import."""
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
        os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")
        logging.getLogger("alembic").setLevel(logging.WARNING)
        logging.getLogger("mlflow").setLevel(logging.WARNING)
        with progress_bar(2, "connect to MLflow") as advance:
            from mlflow.tracking import MlflowClient

            advance()
            client = MlflowClient(tracking_uri=self._uri)  # creates the tables of a new database
            experiment = client.get_experiment_by_name(self._experiment)
            advance()
        if experiment is None:
            is_local = not self._uri.startswith(("http://", "https://"))
            location = self._artifact_root.resolve().as_uri() if is_local else None
            self._experiment_id = client.create_experiment(self._experiment, artifact_location=location)
        else:
            self._experiment_id = experiment.experiment_id
        return client

    def _send(self, event: Mapping[str, Any]) -> None:
        if self._client is None:
            self._client = self._connect()
        from mlflow.entities import Metric, Param

        key = event["key"]
        if event["op"] == "start":
            tags = {KEY_TAG: f"{self._folder.name}/{key}"}
            if event["parent"] is not None:
                tags["mlflow.parentRunId"] = self._run_ids[event["parent"]]
            run = self._client.create_run(
                self._experiment_id, start_time=event["time_ms"], tags=tags, run_name=event["name"]
            )
            self._run_ids[key] = run.info.run_id
            params = [Param(name, str(value)[:6000]) for name, value in event["params"].items()]
            for first in range(0, len(params), 100):
                self._client.log_batch(run.info.run_id, params=params[first : first + 100])
        elif event["op"] == "metrics":
            metrics = [Metric(*point) for point in event["points"]]
            self._client.log_batch(self._run_ids[key], metrics=metrics)
        elif event["op"] == "artifact":
            if Path(event["path"]).exists():
                self._client.log_artifact(self._run_ids[key], event["path"])
        else:
            self._client.set_terminated(self._run_ids[key], event["status"], event["time_ms"])


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


def _is_refusal(error: Exception) -> bool:
    """Whether the server understood and said no, so that sending again would not help."""
    from mlflow.exceptions import MlflowException

    if not isinstance(error, MlflowException):
        return False
    status: int = error.get_http_status_code()  # type: ignore[no-untyped-call]
    return status in (400, 404)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def _read_events(outbox: Path) -> list[dict[str, Any]]:
    """All whole lines; what a kill cut off is cut off the file too."""
    if not outbox.is_file():
        return []
    content = outbox.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if len(whole) < len(content):
        outbox.write_bytes(whole)
    return [json.loads(line) for line in whole.splitlines()]
