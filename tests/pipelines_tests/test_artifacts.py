"""Finished stages on disk: found again, executed by one process at a time."""

import logging
import threading
from dataclasses import replace
from pathlib import Path

import pytest
from filelock import Timeout

from pipelines.artifacts import (
    RESULT_FILE,
    ArtifactStore,
    StageResult,
    acquire_lock,
    content_key,
    read_json,
)


def test_a_finished_stage_is_found_and_not_executed_again(tmp_path: Path) -> None:
    store = ArtifactStore(tmp_path)
    first = store.run("adapt", "k", {"seed": 7}, lambda _: {"loss": 1.0})
    again = store.run("adapt", "k", {}, lambda _: {"loss": 2.0})
    assert first == StageResult(
        "adapt", "k", tmp_path / "adapt-k", {"loss": 1.0}, first.seconds, was_reused=False
    )
    assert again == replace(first, was_reused=True)
    assert read_json(first.folder / RESULT_FILE) == {
        "stage": "adapt",
        "key": "k",
        "metrics": {"loss": 1.0},
        "seconds": first.seconds,
        "depends_on": {"seed": 7},
    }


def test_a_stage_that_raises_is_not_finished_and_can_be_tried_again(tmp_path: Path) -> None:
    store = ArtifactStore(tmp_path)

    def fail(folder: Path) -> dict[str, float]:
        (folder / "half.txt").write_text("half")
        raise RuntimeError("power cut")

    with pytest.raises(RuntimeError, match="power cut"):
        store.run("adapt", "k", {}, fail)
    assert store.find("adapt", "k") is None
    result = store.run("adapt", "k", {}, lambda folder: {"left": float((folder / "half.txt").exists())})
    assert result.metrics == {"left": 1.0}


def test_who_waits_for_another_process_is_told_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    held = acquire_lock(tmp_path / ".lock", "stage adapt")
    with pytest.raises(Timeout):
        acquire_lock(tmp_path / ".lock", "stage adapt", waits=False)
    waiting = threading.Thread(target=lambda: acquire_lock(tmp_path / ".lock", "stage adapt").release())
    waiting.start()
    waiting.join(1.5)
    assert waiting.is_alive()
    held.release()
    waiting.join(10)
    assert not waiting.is_alive()
    assert "another process is at work on stage adapt: waiting for it" in caplog.text


def test_a_key_changes_with_any_value_and_not_with_the_order_of_keys() -> None:
    assert content_key({"a": 1, "b": [0.1]}) == content_key({"b": [0.1], "a": 1})
    assert content_key({"a": 1, "b": [0.1]}) != content_key({"a": 1, "b": [0.2]})
