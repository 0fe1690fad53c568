"""Bad input: exit status 2 and a message that names it, before long work starts."""

from pathlib import Path

import pytest

from pipelines.workflow import run_pipeline
from tests.pipelines_tests.command_line import run_command
from tests.pipelines_tests.configuration import arguments, composed, tiny_run


def test_unreachable_budget_fails_before_training_and_names_the_range(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no vector has latency_ms ≤ 0.001: reachable is "):
        run_pipeline(composed(*tiny_run(tmp_path, "search.latency_budget_ms=0.001", "tracking=none")))
    assert not list((tmp_path / "out").glob("coco/stages/train-*/result.json"))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("cluster.address=127.0.0.1:1", "no Ray cluster answers at '127.0.0.1:1'"),
        ("search.storage=/", "the study / cannot be written: it is a folder"),
        ("search.storage=/proc/x/study.journal", "the study /proc/x/study.journal cannot be written"),
    ],
)
def test_where_a_search_cannot_run_or_write_it_fails_before_training(
    tmp_path: Path, override: str, message: str
) -> None:
    result = run_command(arguments(tmp_path, override, "tracking=none"), tmp_path)
    assert result.returncode == 2, result.stderr[-2000:]
    assert f"error: {message}" in result.stderr
    assert not list((tmp_path / "out").rglob("*.safetensors"))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["+experiment=nothing"], "Available options in 'experiment':\n\tcityscapes\n\tcoco\n\tnuscenes"),
        ([], "choose an experiment: +experiment=cityscapes, +experiment=coco, +experiment=nuscenes"),
        (["+experiment=coco", "sampler=x"], "Available options in 'sampler':\n\tevolution"),
        (["+experiment=coco", "train.epochz=1"], "valid keys here: epochs, batch_size"),
        (["+experiment=coco", "train.epochs=many"], "'many' of type 'str' could not be converted to Float"),
        (["+experiment=coco", "data.root=/no/such/folder"], "is not a folder: set data.root"),
        (["+experiment=coco", "finetune.vector=[0.1,0.2]"], "has 2 ratios, but depths [2, 2, 6, 2] need 6"),
        (["+experiment=coco", "finetune.vector=[0.1,0.2,0.5,0.3,0.5,0]"], "may not decrease inside a stage"),
        (["+experiment=coco", "finetune.vector=[0.1,1.2,0.5,0.5,0.5,0]"], "ratios lie in [0, 1)"),
    ],
)  # fmt: skip
def test_bad_input_is_exit_status_2_and_a_message(tmp_path: Path, overrides: list[str], message: str) -> None:
    result = run_command(overrides, tmp_path)
    assert result.returncode == 2, result.stderr[-2000:]
    assert message in result.stderr
    assert "Traceback" not in result.stderr
