"""The outbox: nothing is lost when the server is down, nothing is sent twice."""

import json
import logging
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from mlflow.tracking import MlflowClient

from pipelines.tracking import PARENT, Tracker
from pipelines.tracking_sender import Position, Sender
from tests.ray_cluster import ROOT, free_port, wait_until


def tracker_at(folder: Path, uri: str) -> Tracker:
    return Tracker(folder / "run", uri=uri, artifact_root=folder / "artifacts", experiment="test")


def log_something(tracker: Tracker, folder: Path) -> None:
    (folder / "front.json").write_text("{}")
    tracker.start(PARENT, "coco", params={"seed": 0})
    tracker.start("search", "search", parent=PARENT)
    tracker.log_metrics("search", {"hypervolume": 0.5}, step=3)
    tracker.start("trial-0", "trial 0", parent="search", params={"vector": "[0 0]"})
    tracker.end("trial-0")
    tracker.log_artifact("search", folder / "front.json")
    tracker.end("search", is_success=False)


def runs_of(uri: str) -> dict[str, dict[str, object]]:
    client = MlflowClient(tracking_uri=uri)
    experiment = client.get_experiment_by_name("test")
    assert experiment is not None
    found = client.search_runs([experiment.experiment_id])
    assert len({run.info.run_name for run in found}) == len(found)
    return {
        run.info.run_name: {
            "id": run.info.run_id,
            "parent": run.data.tags.get("mlflow.parentRunId"),
            "status": run.info.status,
            "metrics": run.data.metrics,
            "params": run.data.params,
            "artifacts": [file.path for file in client.list_artifacts(run.info.run_id)],
        }
        for run in found
    }


def check(uri: str) -> None:
    runs = runs_of(uri)
    assert set(runs) == {"coco", "search", "trial 0"}
    assert runs["search"]["parent"] == runs["coco"]["id"]
    assert runs["trial 0"]["parent"] == runs["search"]["id"]
    assert runs["search"]["metrics"] == {"hypervolume": 0.5}
    assert runs["search"]["status"] == "FAILED"
    assert runs["search"]["artifacts"] == ["front.json"]
    assert runs["trial 0"]["params"] == {"vector": "[0 0]"}


def test_nested_runs_reach_a_local_store(tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    tracker = tracker_at(tmp_path, uri)
    log_something(tracker, tmp_path)
    tracker.close()
    assert tracker.num_unsent == 0
    check(uri)


def test_a_later_process_goes_on_and_sends_nothing_twice(tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    first = tracker_at(tmp_path, uri)
    first.start(PARENT, "coco", params={"seed": 0})
    first.close()
    second = tracker_at(tmp_path, uri)
    log_something(second, tmp_path)
    second.close()
    third = tracker_at(tmp_path, uri)
    assert third.num_unsent == 0
    third.close()
    check(uri)


def test_server_that_is_down_costs_a_warning_and_no_record(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    tracker = tracker_at(tmp_path, f"http://127.0.0.1:{free_port()}")
    with caplog.at_level(logging.WARNING, logger="pipelines"):
        log_something(tracker, tmp_path)
        tracker.flush()
        tracker.flush()
        wait_until(lambda: "cannot be reached" in caplog.text, 5, "warning")
    assert caplog.text.count("cannot be reached") == 1
    tracker.close()
    assert tracker.num_unsent == 7
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    tracker_at(tmp_path, uri).close()
    check(uri)


def test_next_run_of_another_configuration_sends_what_waits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    store: dict[str, Any] = {
        "uri": f"sqlite:///{tmp_path / 'mlflow.db'}",
        "artifact_root": tmp_path / "artifacts",
        "experiment": "test",
    }
    tracker = tracker_at(tmp_path, store["uri"])
    kill(tracker)
    log_something(tracker, tmp_path)
    with monkeypatch.context() as outage:
        outage.setattr(Sender, "_connect", unreachable)
        sender = Sender(tmp_path / "run", **store)
        sender.send()
        sender.close()
    assert "(no route)" in capsys.readouterr().out
    assert tracker.num_unsent == 7
    Tracker(tmp_path / "other", **store).close()
    assert tracker.num_unsent == 0
    check(store["uri"])


def unreachable(sender: Sender) -> None:
    raise ConnectionError("no route")


def kill(tracker: Tracker) -> None:
    tracker._sender.kill()
    tracker._sender.wait()


def test_killed_senders_send_everything_once(tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    tracker = tracker_at(tmp_path, uri)
    log_something(tracker, tmp_path)
    for number in range(1, 30):
        tracker.start(f"trial-{number}", f"trial {number}", parent="search", params={"vector": "[0 0]"})
    wait_until(lambda: tracker.num_unsent < 25, 30, "first records", every=0.01)
    kill(tracker)
    assert tracker.num_unsent > 0
    tracker.close()
    tracker_at(tmp_path, uri).close()
    runs = runs_of(uri)  # which asserts that no name comes twice
    assert set(runs) == {"coco", "search", *(f"trial {number}" for number in range(30))}


def test_sender_outlives_a_killed_run(tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    program = (
        "import os, signal, sys\nfrom pathlib import Path\n"
        "from tests.pipelines_tests.test_tracking import log_something, tracker_at\n"
        "folder = Path(sys.argv[1])\nlog_something(tracker_at(folder, sys.argv[2]), folder)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    result = subprocess.run([sys.executable, "-c", program, str(tmp_path), uri], cwd=ROOT, check=False)
    assert result.returncode == -signal.SIGKILL
    wait_until(lambda: Position.read(tmp_path / "run", uri).num_sent == 7, 30, "end of the sender")
    check(uri)


def test_refused_record_is_named_and_passed_over(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    tracker = tracker_at(tmp_path, uri)
    tracker.start(PARENT, "coco")
    tracker.log_metrics(PARENT, {"no such/name!": 1.0})
    tracker.log_metrics(PARENT, {"hypervolume": 0.5})
    with caplog.at_level(logging.WARNING, logger="pipelines"):
        tracker.close()
    assert "refuses a record of run" in caplog.text
    assert runs_of(uri)["coco"]["metrics"] == {"hypervolume": 0.5}


def test_other_server_gets_the_whole_run(tmp_path: Path) -> None:
    first = tracker_at(tmp_path, f"sqlite:///{tmp_path / 'first.db'}")
    log_something(first, tmp_path)
    first.close()
    uri = f"sqlite:///{tmp_path / 'second.db'}"
    tracker_at(tmp_path, uri).close()
    check(uri)


def test_torn_outbox_line_is_cut_off(tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    tracker = tracker_at(tmp_path, uri)
    tracker.start(PARENT, "coco")
    outbox = tmp_path / "run" / "tracking.jsonl"
    with outbox.open("a") as file:
        file.write('{"op": "metr')
    kill(tracker)
    tracker._lock.release()  # as the end of the process does
    reopened = tracker_at(tmp_path, uri)
    reopened.end(PARENT)
    reopened.close()
    assert reopened.num_unsent == 0
    assert [json.loads(line)["op"] for line in outbox.read_text().splitlines()] == ["start", "end"]
