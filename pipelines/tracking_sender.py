"""The one writer of MLflow: a process that sends what a run puts into its outbox.

    python -m pipelines.tracking_sender RUN_FOLDER URI ARTIFACT_ROOT EXPERIMENT

It follows the outbox until its standard input is closed, then sends what is left, also of earlier
runs beside this one, and ends. Records go out in order. How far it came is written beside the
outbox, so that nothing is sent twice. Warnings go to standard output, a line each.
"""

import json
import logging
import os
import select
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

KEY_TAG = "sparsevit.key"
EXPERIMENT_TAGS = {"mlflow.experimentKind": "custom_model_development"}  # how the UI shows it
OUTBOX_FILE = "tracking.jsonl"
SENT_FILE = "tracking.sent.jsonl"
MAX_RECORDS_PER_BATCH = 50  # MLflow takes 1,000 metrics at a time
FOLLOW_S = 0.3


@dataclass
class Position:
    """How far an outbox was sent to a server.

    Attributes:
        run_ids: MLflow's, by our keys.
        is_offline: the server could not be reached at the last attempt.
    """

    num_sent: int = 0
    run_ids: dict[str, str] = field(default_factory=dict)
    is_offline: bool = False

    @classmethod
    def read(cls, folder: Path, uri: str) -> "Position":
        """Another server knows nothing of this run: there it begins from nothing."""
        lines, _ = read_records(folder / SENT_FILE)
        position = cls()
        if not lines or lines[0]["uri"] != uri:
            return position
        for line in lines[1:]:
            position.num_sent, position.is_offline = line["num_sent"], line["is_offline"]
            position.run_ids.update(line["run_ids"])
        return position


def read_records(path: Path, offset: int = 0) -> tuple[list[dict[str, Any]], int]:
    """The whole lines from an offset, and the offset behind them; the last may still be written."""
    if not path.is_file():
        return [], offset
    with path.open("rb") as file:
        file.seek(offset)
        content = file.read()
    whole = content[: content.rfind(b"\n") + 1]
    return [json.loads(line) for line in whole.splitlines()], offset + len(whole)


class Sender:
    """Sends one outbox.

    Raises:
        Timeout: if another sender is at work on it, unless it `waits`.
    """

    def __init__(
        self, folder: Path, *, uri: str, artifact_root: Path, experiment: str, waits: bool = True
    ) -> None:
        self._uri = uri
        self._artifact_root = artifact_root
        self._experiment = experiment
        self._folder = folder
        self._lock = FileLock(folder / ".sender.lock")
        self._lock.acquire(timeout=-1 if waits else 0)
        self._position = Position.read(folder, uri)
        records, self._offset = read_records(folder / OUTBOX_FILE)
        self._waiting = records[self._position.num_sent :]
        self._sent = _open_position(folder / SENT_FILE, uri)
        self._alone_until = 0  # records up to here are sent one by one
        self._client: Any = None
        self._note()

    @property
    def is_offline(self) -> bool:
        return self._position.is_offline

    def send(self) -> None:
        """Send what is in the outbox by now, as far as the server can be reached."""
        records, self._offset = read_records(self._folder / OUTBOX_FILE, self._offset)
        self._waiting += records
        first = 0
        try:
            while first < len(self._waiting):
                first += self._send_next(first)
        except Exception as error:  # noqa: BLE001  (MLflow raises whatever its transport raises)
            self._note(is_offline=True)
            warn(
                f"MLflow at {self._uri} cannot be reached ({_first_line(error)}); what is logged waits in "
                f"{self._folder / OUTBOX_FILE} and is sent at the end or on the next run"
            )
        finally:
            del self._waiting[:first]

    def close(self) -> None:
        self._sent.close()
        self._lock.release()

    def _send_next(self, first: int) -> int:
        """Send the record at an index, with those that can go along; returns how many went."""
        group = self._group(first)
        try:
            self._send_group(group)
        except Exception as error:
            if group[0]["op"] == "start" or not _is_refusal(error):
                raise
            if len(group) > 1:  # find the one that is refused
                self._alone_until = self._position.num_sent + len(group)
                return 0
            warn(f"MLflow refuses a record of {group[0]['key']}: {_first_line(error)}")
        self._note(len(group))
        return len(group)

    def _group(self, first: int) -> list[dict[str, Any]]:
        """What to send next: metrics of one run go together."""
        group = [self._waiting[first]]
        limit = 1 if self._position.num_sent < self._alone_until else MAX_RECORDS_PER_BATCH
        for record in self._waiting[first + 1 : first + limit]:
            if not record["op"] == group[0]["op"] == "metrics" or record["key"] != group[0]["key"]:
                break
            group.append(record)
        return group

    def _send_group(self, group: list[dict[str, Any]]) -> None:
        if self._client is None:
            self._client = self._connect()
        from mlflow.entities import Metric, Param

        record = group[0]
        key = record["key"]
        if record["op"] == "start":
            if key not in self._position.run_ids:
                self._note(run_ids={key: self._create_run(record)})
            params = [Param(name, str(value)[:6000]) for name, value in record["params"].items()]
            for first in range(0, len(params), 100):
                self._client.log_batch(self._position.run_ids[key], params=params[first : first + 100])
            return
        run_id = self._position.run_ids[key]
        if record["op"] == "metrics":
            metrics = [
                Metric(name, value, each["time_ms"], each["step"])
                for each in group
                for name, value in each["metrics"].items()
            ]
            self._client.log_batch(run_id, metrics=metrics)
        elif record["op"] == "artifact":
            if Path(record["path"]).exists():
                self._client.log_artifact(run_id, record["path"])
        else:
            self._client.set_terminated(run_id, record["status"], record["time_ms"])

    def _create_run(self, record: Mapping[str, Any]) -> str:
        tags = {KEY_TAG: f"{self._folder.name}/{record['key']}"}
        if record["parent"] is not None:
            tags["mlflow.parentRunId"] = self._position.run_ids[record["parent"]]
        run = self._client.create_run(
            self._experiment_id, start_time=record["time_ms"], tags=tags, run_name=record["name"]
        )
        run_id: str = run.info.run_id
        return run_id

    def _note(
        self, num_sent: int = 0, run_ids: Mapping[str, str] | None = None, *, is_offline: bool = False
    ) -> None:
        """Write down at once how far it is, so that a kill sends nothing twice."""
        position = self._position
        position.num_sent += num_sent
        position.run_ids.update(run_ids or {})
        position.is_offline = is_offline
        line = {"num_sent": position.num_sent, "run_ids": run_ids or {}, "is_offline": is_offline}
        self._sent.write(json.dumps(line) + "\n")
        self._sent.flush()

    def _connect(self) -> Any:
        """The client; imported here because MLflow takes seconds to import."""
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
        os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")
        from mlflow.tracking import MlflowClient

        logging.getLogger("alembic").setLevel(logging.WARNING)
        logging.getLogger("mlflow").setLevel(logging.WARNING)
        client = MlflowClient(tracking_uri=self._uri)  # creates the tables of a new database
        experiment = client.get_experiment_by_name(self._experiment)
        if experiment is None:
            is_local = not self._uri.startswith(("http://", "https://"))
            location = self._artifact_root.resolve().as_uri() if is_local else None
            self._experiment_id = client.create_experiment(
                self._experiment, artifact_location=location, tags=EXPERIMENT_TAGS
            )
        else:
            self._experiment_id = experiment.experiment_id
        return client


def follow(sender: Sender) -> None:
    """Send what comes until standard input is closed. After a failure nothing is tried until then."""
    is_last = False
    while not is_last:
        is_last = bool(select.select([sys.stdin], [], [], FOLLOW_S)[0])
        if is_last or not sender.is_offline:
            sender.send()


def send_leftovers(folder: Path, *, uri: str, artifact_root: Path, experiment: str) -> None:
    """Send what earlier runs beside this one could not, unless they are still going."""
    for sent_file in sorted(folder.parent.glob(f"*/{SENT_FILE}")):
        lines, _ = read_records(sent_file)
        if sent_file.parent == folder or not lines or lines[0]["uri"] != uri:
            continue
        try:
            earlier = Sender(
                sent_file.parent, uri=uri, artifact_root=artifact_root, experiment=experiment, waits=False
            )
        except Timeout:
            continue
        earlier.send()
        earlier.close()


def warn(message: str) -> None:
    print(f"warning: {message}", flush=True)


def main() -> None:
    folder, uri, artifact_root, experiment = sys.argv[1:]
    store: dict[str, Any] = {
        "uri": uri, "artifact_root": Path(artifact_root), "experiment": experiment
    }  # fmt: skip
    sender = Sender(Path(folder), **store)
    follow(sender)
    is_offline = sender.is_offline
    sender.close()
    if not is_offline:
        send_leftovers(Path(folder), **store)


def _open_position(path: Path, uri: str) -> Any:
    """To be appended to; begun anew for another server. A torn last line is cut off."""
    lines, size = read_records(path)
    if lines and lines[0]["uri"] == uri:
        os.truncate(path, size)
        return path.open("a")
    file = path.open("w")
    file.write(json.dumps({"uri": uri}) + "\n")
    file.flush()
    return file


def _is_refusal(error: Exception) -> bool:
    """Whether the server understood and said no, so that sending again would not help."""
    from mlflow.exceptions import MlflowException

    if not isinstance(error, MlflowException):
        return False
    status: int = error.get_http_status_code()  # type: ignore[no-untyped-call]
    return status in (400, 404)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


if __name__ == "__main__":
    main()
