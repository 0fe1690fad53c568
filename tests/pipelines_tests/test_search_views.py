"""What people look at: the live view, the files of the front, and the comparison of searches."""

import io
import json
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from rich.console import Console

from pipelines.search_log import SearchLog, sortable
from pipelines.terminal import SearchView
from pipelines.tracking import NoTracker
from search.dispatch import Budget, Dispatcher
from search.history import SearchHistory, common_reference
from search.problem import Objective, SearchProblem
from search.samplers import SamplerConfig, create_sampler
from search.study import counted_trials, open_study
from sparsevit.sparsity import SparsityVector
from tests.ray_cluster import BIN, free_port, wait_until
from tests.search_tests.problems import SPACE, evaluate, latency, problem, run_alone


def searched(folder: Path, name: str = "nsga2", num_trials: int = 24) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    sampler = create_sampler(problem(), SamplerConfig(name, population_size=8, num_parents=2))
    with open_study(folder / "study.journal", problem(), sampler) as study:
        run_alone(Dispatcher(study, problem(), Budget(num_trials)))
    return folder


def test_the_view_says_what_matters_and_degrades_to_lines(tmp_path: Path) -> None:
    sampler = create_sampler(problem(), SamplerConfig(population_size=8, num_parents=2))
    out = io.StringIO()
    with open_study(tmp_path / "study.journal", problem(), sampler) as study:
        dispatcher = Dispatcher(study, problem(), Budget(30))
        with SearchView(
            dispatcher.progress, dispatcher.budget, lambda: dispatcher.num_running,
            accuracy="ap", cost="latency_ms", console=Console(file=out, width=100),
        ) as view:  # fmt: skip
            run_alone(dispatcher, max_trials=20)
            view.update()
            assert view.seconds_left() is None  # one result says nothing about the pace
            trial, broken = dispatcher.next_trial(), dispatcher.next_trial()
            assert trial is not None and broken is not None
            dispatcher.fail(broken.number, "no memory")
            view.update()
            bands = view.bands()
        page = Console(file=io.StringIO(), width=100, record=True)
        page.print(view.render())
    text = page.export_text()
    front = dispatcher.progress.front.members
    assert f"21/30 vectors, 1 running, 1 failed, hypervolume {dispatcher.progress.hypervolume:.4g}" in text
    assert f"{len(front)} on the front" in text
    assert "left" in text
    assert [line.split()[1] for line in out.getvalue().splitlines()] == [
        "20/30",
        "21/30",
    ]  # the first and the last
    assert bands[0][0] == pytest.approx(latency(SPACE.sparsest))
    assert bands[-1][1] == pytest.approx(latency(SPACE.dense))
    best = [member for _, _, member in bands if member is not None]
    assert max(front, key=lambda member: member.values["ap"]) in best
    assert all(str(member.vector) in text for member in best)


def test_the_front_is_written_every_generation(tmp_path: Path) -> None:
    sampler = create_sampler(problem(), SamplerConfig(population_size=8, num_parents=2))
    log = SearchLog(
        NoTracker(), "search", tmp_path, problem(), trials="all", every=8,
        details=lambda vector: {"measured_ms": 2.0 * sum(vector)},
    )  # fmt: skip
    with open_study(tmp_path / "study.journal", problem(), sampler) as study:
        dispatcher = Dispatcher(study, problem(), Budget(20), on_trial=log.on_trial)
        run_alone(dispatcher, max_trials=7)
        assert not (tmp_path / "front.json").exists()
        run_alone(dispatcher)
        first = pd.read_csv(tmp_path / "front.csv")
        log.finish(counted_trials(study), dispatcher.progress)
    table = pd.read_csv(tmp_path / "front.csv")
    assert len(first) <= len(table) == len(dispatcher.progress.front.members)
    assert list(table["ap"]) == sorted(table["ap"])
    sums = [sum(map(float, vector.strip("[]").split())) for vector in table["vector"]]
    assert list(table["measured_ms"]) == pytest.approx([2 * total for total in sums])
    assert "plotly" in (tmp_path / "front.html").read_text().lower()
    assert (tmp_path / "front.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("choices", "texts"),
    [
        ((0.0, 0.5, 0.8), ["0.0", "0.5", "0.8"]),
        ((0.0, 0.25, 0.5), ["0.00", "0.25", "0.50"]),
        ((4, 8, 16, 128), ["004", "008", "016", "128"]),
    ],
)
def test_parameters_sort_as_text_as_they_do_as_numbers(choices: tuple[float, ...], texts: list[str]) -> None:
    assert [sortable(choice, choices) for choice in choices] == texts == sorted(texts)


def test_compare_tells_which_search_wins_where(tmp_path: Path) -> None:
    long, short = searched(tmp_path / "long", num_trials=64), searched(tmp_path / "short", "uniform")
    page = tmp_path / "compare.html"
    result = subprocess.run(
        [sys.executable, "pipelines/compare.py", str(long), str(short), "--output", str(page)],
        capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2],
    )  # fmt: skip
    histories = [SearchHistory.read(folder / "study.journal", folder.name) for folder in (long, short)]
    reference = common_reference(histories)
    volumes = [history.hypervolumes(reference)[-1] for history in histories]
    assert volumes[0] > volumes[1] > 0
    for volume in volumes:
        assert f"{volume:.4g}" in result.stdout
    assert "64" in result.stdout and "*" in result.stdout
    assert "hypervolume" in page.read_text()


def test_optuna_dashboard_opens_the_study_as_it_is(tmp_path: Path) -> None:
    """The command, and what its page asks the server for."""
    study = searched(tmp_path, num_trials=24) / "study.journal"
    port = free_port()
    server = subprocess.Popen(
        [BIN / "optuna-dashboard", str(study), "--port", str(port)],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip

    def answer(path: str) -> Any:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=30) as reply:
            return json.loads(reply.read())

    def is_up() -> bool:
        try:
            return bool(answer("/api/studies"))
        except urllib.error.URLError:
            return False

    try:
        wait_until(is_up, 60, "answer of optuna-dashboard")
        (summary,) = answer("/api/studies")["study_summaries"]
        assert summary["directions"] == ["maximize", "minimize"]
        shown = answer(f"/api/studies/{summary['study_id']}?after=0")
        assert len(shown["trials"]) == 24
        assert {each["name"] for each in shown["union_search_space"]} == {*SPACE.gene_names}
        assert all(trial["state"] == "Complete" and len(trial["values"]) == 2 for trial in shown["trials"])
    finally:
        server.kill()
        server.wait()


def test_history_is_what_the_search_saw(tmp_path: Path) -> None:
    sampler = create_sampler(problem(), SamplerConfig(population_size=8, num_parents=2))
    with open_study(tmp_path / "study.journal", problem(), sampler) as study:
        dispatcher = Dispatcher(study, problem(), Budget(16))
        run_alone(dispatcher)
    history = SearchHistory.read(tmp_path / "study.journal", "it")
    assert history.hypervolumes(problem().reference) == pytest.approx(dispatcher.progress.hypervolumes)


def test_what_cannot_be_compared_is_named(tmp_path: Path) -> None:
    good = searched(tmp_path / "good", num_trials=2)
    other_problem = SearchProblem(
        SPACE, [Objective("miou", "maximize"), problem().objectives[1]], problem().quantities, ("miou",)
    )
    sampler = create_sampler(other_problem, SamplerConfig("random"))
    (tmp_path / "other").mkdir()
    with open_study(tmp_path / "other" / "study.journal", other_problem, sampler) as study:
        dispatcher = Dispatcher(study, other_problem, Budget(1))
        trial = dispatcher.next_trial()
        assert trial is not None
        vector = dispatcher.vector_of(trial)
        assert isinstance(vector, SparsityVector)
        dispatcher.tell(trial.number, {"miou": evaluate(vector)["ap"]})
    for paths, message in (
        ((good, tmp_path / "nowhere"), "nowhere holds no search: name a folder below outputs"),
        ((good, tmp_path / "other"), "has other objectives"),
    ):
        result = subprocess.run(
            [sys.executable, "pipelines/compare.py", *map(str, paths)],
            capture_output=True, text=True, check=False, cwd=Path(__file__).parents[2],
        )  # fmt: skip
        assert result.returncode == 2
        assert message in result.stderr
        assert "Traceback" not in result.stderr
