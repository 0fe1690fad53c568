"""Single stages on what those before them left: weights that only say how often they were trained, a made-up
front, and the latency table of a board."""

import copy
import itertools
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from pipelines import build
from pipelines.artifacts import ArtifactStore, StageResult
from pipelines.context import SCORES_FILE, WEIGHTS_FILE, Run
from pipelines.errors import RunStopped
from pipelines.schema import ConfigSchema
from pipelines.search_log import FRONT_FILE
from pipelines.stages.adapt import Adapt
from pipelines.stages.calibrate import PREDICTOR_FILE, Calibrate
from pipelines.stages.finetune import CHOICE_FILE, REVERTED_FILE, Finetune, chosen_member
from pipelines.stages.report import _header, _resources, _thin, class_table, draw_samples, measured_front
from pipelines.stages.search import (
    STUDY_FILE,
    Search,
    cheap_quantities,
    evaluator_factory,
    has_too_many_failures,
    search_problem,
    study_file,
)
from pipelines.stages.train import Train
from pipelines.tracking import NoTracker
from search.dispatch import Dispatcher
from search.pareto import FrontMember, ParetoFront
from search.problem import Objective
from search.progress import SearchProgress
from search.samplers import create_sampler
from search.study import open_study
from sparsevit.backbone import BACKBONES
from sparsevit.checkpoints import read_weights, write_weights
from sparsevit.latency import LatencyPredictor
from sparsevit.latency.macs import count_macs
from sparsevit.latency.predictor import Measurement
from sparsevit.sparsity import SparsityVector
from tests.pipelines_tests.configuration import composed, telling_run
from tests.pipelines_tests.telling import NUM_STEPS, OF_CLASS, Counted, told
from tests.pipelines_tests.test_provenance import DENSE, DENSE_MS, SPACE, SPARSEST, board, predicted_ms

OBJECTIVES = (Objective("score", "maximize"), Objective("latency_ms", "minimize"))
MEMBERS = [SPACE.uniform(ratio) for ratio in (0.5, 0.3, 0.1)]


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> ConfigSchema:
    folder = tmp_path_factory.mktemp("alone")
    board().save(folder / "board.json")
    return composed(
        *telling_run(
            folder, "latency=table", f"latency.path={folder / 'board.json'}", "search.num_evaluations=4",
            "finetune.max_accuracy_drop=0.01",
        )
    )  # fmt: skip


@pytest.fixture
def run(config: ConfigSchema, tmp_path: Path) -> Run:
    """With every stage before the report finished."""
    run = Run(copy.deepcopy(config), ArtifactStore(tmp_path), NoTracker())
    for name, num_steps in NUM_STEPS.items():
        leave_weights(finished(run, name, num_steps=num_steps, score=0.9), run, num_steps)
    board().save(finished(run, "calibrate", dense_ms=DENSE_MS) / PREDICTOR_FILE)
    folder = finished(run, "search", num_refits=0)
    board().save(folder / PREDICTOR_FILE)
    leave_front(folder)
    return run


def finished(run: Run, name: str, **metrics: float) -> Path:
    folder = run.store.folder(name, "key")
    folder.mkdir()
    run.results[name] = StageResult(name, f"key of {name}", folder, metrics, 1.0, was_reused=False)
    return folder


def leave_weights(folder: Path, run: Run, num_steps: int) -> None:
    model = run.build_model()
    assert isinstance(model, Counted)
    model.num_steps.fill_(num_steps)
    write_weights(folder / WEIGHTS_FILE, model.state_dict())


def num_steps_of(folder: Path) -> int:
    return int(read_weights(folder / WEIGHTS_FILE)["num_steps"])


def leave_front(folder: Path, measured_ms: Sequence[float] = ()) -> None:
    """Three members, the fastest first; some of them measured."""
    members: list[FrontMember] = []
    for number, vector in enumerate(MEMBERS):
        values = {"score": told("search", "adapt", vector.ratios), "latency_ms": predicted_ms(vector.ratios)}
        if number < len(measured_ms):
            values["measured_ms"] = measured_ms[number]
        members.append(FrontMember(vector, values))
    (folder / FRONT_FILE).write_text(ParetoFront.of(members, OBJECTIVES).to_json())


def test_training_and_adaptation_are_scored_at_both_ends_of_the_space(run: Run) -> None:
    assert Train().score(run) == {
        "score": pytest.approx(told("report", "train", DENSE)),
        "sparsest_score": pytest.approx(told("report", "train", SPARSEST)),
    }
    assert Adapt().score(run) == {
        "search_score": pytest.approx(told("search", "adapt", DENSE)),
        "search_sparsest_score": pytest.approx(told("search", "adapt", SPARSEST)),
    }
    assert Adapt().remark(run) is Calibrate().remark(run) is Search().remark(run) is None


def test_a_table_of_another_device_is_taken_with_a_warning(
    run: Run, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    metrics = Calibrate().execute(run, tmp_path)
    assert metrics == {
        "dense_ms": pytest.approx(DENSE_MS),
        "sparsest_ms": pytest.approx(predicted_ms(SPARSEST)),
        "error_bar": board().error_bar,
    }
    assert LatencyPredictor.load(tmp_path / PREDICTOR_FILE) == board()
    here = run.machine()["device"]
    assert f"the latency table is of a board; the report measures here, on {here}" in caplog.text
    caplog.clear()
    own = replace(board(), setting=replace(board().setting, device=here), scores={"rmspe": 0.5})
    own.save(tmp_path / "own.json")
    run.config.latency.path = str(tmp_path / "own.json")
    assert Calibrate().execute(run, tmp_path)["rmspe"] == 0.5
    assert caplog.text == ""


def test_the_chosen_member_is_finetuned_and_kept(run: Run) -> None:
    """The one in the middle is the fastest that loses at most 0.01 against the trained weights."""
    folder, chosen = run.results["finetune"].folder, MEMBERS[1]
    before = told("search", "adapt", chosen.ratios)
    assert Finetune().execute(run, folder) == {
        "num_steps": 3,
        "is_kept": 1.0,
        "predicted_ms": pytest.approx(predicted_ms(chosen.ratios)),
        "search_score_before": pytest.approx(before),
    }
    assert json.loads((folder / CHOICE_FILE).read_text()) == {
        "rule": "accuracy_drop",
        "vector": list(chosen.ratios),
        "score": pytest.approx(before),
        "latency_ms": pytest.approx(predicted_ms(chosen.ratios)),
    }
    assert num_steps_of(folder) == NUM_STEPS["finetune"]
    assert not (folder / REVERTED_FILE).exists()
    assert chosen_member(run).vector == chosen
    assert set(chosen_member(run).values) == {"score", "latency_ms"}
    expected = told("search", "finetune", chosen.ratios)
    assert Finetune().score(run) == {"search_score": pytest.approx(expected)}


def test_finetuned_weights_that_are_as_good_as_the_adapted_are_kept(run: Run) -> None:
    folder = run.results["finetune"].folder
    leave_weights(folder, run, NUM_STEPS["adapt"])
    assert Finetune().execute(run, folder)["is_kept"] == 1.0
    assert not (folder / REVERTED_FILE).exists()


def test_the_adapted_weights_come_back_where_finetuning_made_them_worse(run: Run) -> None:
    folder, vector = run.results["finetune"].folder, MEMBERS[1].ratios
    leave_weights(run.results["adapt"].folder, run, NUM_STEPS["finetune"])
    leave_weights(folder, run, NUM_STEPS["adapt"])
    metrics = Finetune().execute(run, folder)
    assert metrics["is_kept"] == 0.0
    assert num_steps_of(folder) == NUM_STEPS["finetune"]
    assert json.loads((folder / REVERTED_FILE).read_text()) == {
        "score_before": pytest.approx(told("search", "finetune", vector)),
        "score_after": pytest.approx(told("search", "adapt", vector)),
    }
    assert not (folder / SCORES_FILE).exists()
    expected = told("search", "finetune", vector)
    assert Finetune().score(run) == {"search_score": pytest.approx(expected)}
    run.results["finetune"] = replace(run.results["finetune"], metrics=metrics)
    assert Finetune().remark(run) == (
        "finetuning made the subnet worse on the search split: the adapted weights are kept"
    )
    run.results["finetune"] = replace(run.results["finetune"], metrics={"is_kept": 1.0})
    assert Finetune().remark(run) is None


def test_a_given_vector_is_finetuned_whatever_the_front_holds(run: Run) -> None:
    given = (0.0, 0.0, 0.0, 0.0, 0.0, 0.2)
    run.config.finetune.vector = list(given)
    folder = run.results["finetune"].folder
    Finetune().execute(run, folder)
    shape = BACKBONES["swin_nano"]
    assert json.loads((folder / CHOICE_FILE).read_text()) == {
        "rule": "given",
        "vector": list(given),
        "score": pytest.approx(told("search", "adapt", given)),
        "latency_ms": pytest.approx(predicted_ms(given)),
        "macs_g": pytest.approx(count_macs(shape, (64, 64), SparsityVector(given)) / 1e9),
    }


@pytest.mark.parametrize(
    ("measured_ms", "number"), [((3.0, 2.0, 1.0), 2), ((3.0, 2.0), 1), ((1.0, 2.0, 3.0), 1)]
)
def test_the_rule_takes_measured_latencies_where_every_member_has_one(
    run: Run, measured_ms: Sequence[float], number: int
) -> None:
    leave_front(run.results["search"].folder, measured_ms)
    folder = run.results["finetune"].folder
    Finetune().execute(run, folder)
    assert chosen_member(run).vector == MEMBERS[number]


def test_a_latency_budget_chooses_the_most_accurate_within_it(run: Run) -> None:
    run.config.finetune.rule = "latency_budget"
    run.config.finetune.latency_budget_ms = predicted_ms(MEMBERS[0].ratios) + 1
    Finetune().execute(run, run.results["finetune"].folder)
    assert chosen_member(run).vector == MEMBERS[0]


def searched(run: Run, folder: Path, scores: Sequence[float | None]) -> None:
    """A study in which so many trials are finished; None stands for a failure."""
    problem = build.problem(run.config, cheap_quantities(run, board().predict))
    sampler = create_sampler(problem, build.sampler(run.config))
    keys = {name: run.results[name].key for name in ("adapt", "calibrate")}
    with open_study(study_file(run, folder), problem, sampler, about=Search().about(run, keys)) as study:
        dispatcher = Dispatcher(study, problem, build.budget(run.config))
        for score in scores:
            trial = dispatcher.next_trial()
            assert trial is not None
            if score is None:
                dispatcher.fail(trial.number, "no memory")
            else:
                dispatcher.tell(trial.number, {"score": score})


class Curves(NoTracker):
    """Keeps what the search itself logs."""

    def __init__(self) -> None:
        self.logged: list[tuple[str, dict[str, float]]] = []

    def log_metrics(self, key: str, metrics: Any, step: int = 0) -> None:
        self.logged.append((key, dict(metrics)))


def test_a_search_that_is_over_reports_what_its_study_holds(
    run: Run, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    folder = tmp_path / "again"
    folder.mkdir()
    searched(run, folder, [0.5, None, 0.7, 0.6])
    run.tracker = curves = Curves()
    calibrated = run.results["calibrate"]
    scores = {"rmspe": 0.1, "spearman": 0.9, "dense_ms": DENSE_MS}
    run.results["calibrate"] = replace(calibrated, metrics=scores)
    metrics = Search().execute(run, folder)
    members = json.loads((folder / FRONT_FILE).read_text())["members"]
    assert 0 < metrics.pop("final_hypervolume") < 1.1 * DENSE_MS  # type: ignore[attr-defined]
    assert metrics == {
        "num_evaluations": 4,
        "num_failed": 1,
        "num_front_members": len(members),
        "num_refits": 0,
        "error_bar": board().error_bar,
    }
    assert max(member["score"] for member in members) == 0.7
    assert "the search ends: 4 evaluations are done" in caplog.text
    assert curves.logged[0] == ("search", {"predictor_rmspe": 0.1, "predictor_spearman": 0.9})
    assert LatencyPredictor.load(folder / PREDICTOR_FILE) == board()


def test_too_many_failures_stop_the_run_and_the_front_so_far_is_named(run: Run, tmp_path: Path) -> None:
    run.config.search.max_failures = 2
    folder = tmp_path / "again"
    folder.mkdir()
    searched(run, folder, [0.5, None, None])
    message = (
        r"the search stopped: 2 trials failed for good \(max_failures=2\): no memory. Its front so far "
        rf"\(1 vectors\) is in {folder / FRONT_FILE}; .* a larger search.max_failures"
    )
    with pytest.raises(RunStopped, match=message):
        Search().execute(run, folder)


def test_a_search_without_a_front_stops_the_run_and_says_why(run: Run, tmp_path: Path) -> None:
    folder = tmp_path / "again"
    folder.mkdir()
    searched(run, folder, [None, None, None, None])
    message = (
        r"the search found no vector \(4 evaluations are done\): 4 trials failed, 0 break a constraint "
        r"\(the space\). Loosen"
    )
    with pytest.raises(RunStopped, match=message):
        Search().execute(run, folder)


def test_too_many_failures_are_as_many_as_are_put_up_with(run: Run) -> None:
    progress = SearchProgress(search_problem(run), failures=["no memory"])
    assert [has_too_many_failures(progress, bound) for bound in (None, 1, 2)] == [False, True, False]


def test_what_a_worker_makes_its_evaluator_of(run: Run) -> None:
    model = run.build_model()
    run.config.cluster.cpus_per_worker = 2.5
    factory = evaluator_factory(run, model)
    assert (factory.backbone, factory.task) == ("swin_nano", "tests.pipelines_tests.telling:Telling")
    assert factory.task_config == {"num_classes": run.task.config.num_classes}
    assert factory.data_root == run.search_set.root.resolve()
    assert (factory.split, factory.image_folder) == ("search", None)
    assert factory.sample_ids == tuple(run.search_set.sample_ids)
    assert (factory.batch_size, factory.precision) == (run.config.evaluation.batch_size, "fp32")
    assert (factory.device, factory.num_threads) == ("cpu", 2)
    weights = {name: shared.tensor() for name, shared in factory.weights.items()}
    assert weights.keys() == model.state_dict().keys()
    assert all(torch.equal(weights[name], value) for name, value in model.state_dict().items())
    run.config.cluster.address = "10.0.0.1:6379"
    run.config.cluster.gpus_per_worker, run.config.cluster.cpus_per_worker = 0.5, 0.5
    factory = evaluator_factory(run, model)
    assert (factory.device, factory.num_threads) == ("cuda", 1)


def test_the_cheap_quantities_of_a_vector(run: Run) -> None:
    run.config.latency.image_size = [64, 96]
    quantities = cheap_quantities(run, lambda vector: 7.0)
    assert set(quantities) == {"latency_ms", "macs_g"}
    assert quantities["latency_ms"](MEMBERS[0]) == 7.0
    expected = count_macs(BACKBONES["swin_nano"], (64, 96), MEMBERS[0]) / 1e9
    assert quantities["macs_g"](MEMBERS[0]) == pytest.approx(expected)


def test_a_storage_of_the_users_is_opened_before_any_work(
    run: Run, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    keys, path = {"adapt": "a", "calibrate": "c"}, tmp_path / "mine.journal"
    assert study_file(run, tmp_path) == tmp_path / STUDY_FILE
    Search().check_storage(run, keys)
    run.config.search.storage = str(path)
    assert study_file(run, tmp_path) == path
    run.config.search.dry_run = True
    Search().check_storage(run, keys)
    assert not path.exists()
    run.config.search.dry_run = False
    Search().check_storage(run, keys)
    assert path.exists()
    assert f"the search goes into the study {path}" in caplog.text
    run.config.search.dry_run = True
    for name, known in (("adapt", "supernet"), ("calibrate", "calibration")):
        with pytest.raises(ValueError, match=f'holds a study with other {known}: .*, not "other"'):
            Search().check_storage(run, {**keys, name: "other"})


def test_a_thin_front_keeps_its_ends_and_the_chosen_member() -> None:
    front = [FrontMember(vector, {}) for vector in itertools.islice(SPACE, 9)]

    def kept(chosen: int, limit: int | None) -> list[int]:
        thin = _thin(front, front[chosen].vector, limit)
        return [front.index(member) for member in thin]

    assert kept(4, None) == kept(4, 9) == kept(4, 10) == list(range(9))
    assert kept(4, 3) == [0, 4, 8]
    assert kept(3, 4) == [0, 3, 4, 8]
    assert kept(3, 2) == [0, 3]
    assert kept(3, 1) == [3]
    assert kept(0, 8) == [0, 1, 3, 4, 5, 7, 8]


def test_only_measured_and_undominated_members_are_on_the_measured_front() -> None:
    """The second is both slower and less accurate than the first, whatever was predicted."""
    members = [FrontMember(vector, {"latency_ms": 9.0 - number}) for number, vector in enumerate(MEMBERS)]
    scores = {str(vector): score for vector, score in zip(MEMBERS, (0.7, 0.6, 0.8), strict=True)}
    front = measured_front(members, [2.0, 3.0, 4.0], scores, "score")
    assert [(member.vector, dict(member.values)) for member in front.members] == [
        (MEMBERS[0], {"score": 0.7, "latency_ms": 2.0, "predicted_ms": 9.0}),
        (MEMBERS[2], {"score": 0.8, "latency_ms": 4.0, "predicted_ms": 7.0}),
    ]
    assert [str(objective) for objective in front.objectives] == list(
        map(str, (Objective("score", "maximize"), Objective("latency_ms", "minimize")))
    )


def test_parts_of_metrics_are_a_table_of_their_own() -> None:
    table = class_table({"dense": {"score": 0.5, "score/disc": 0.5 + OF_CLASS}, "[0.1]": {"score/disc": 0.1}})
    assert list(table.columns) == ["dense", "[0.1]"]
    assert list(table.index) == ["score/disc"]
    assert table.index.name == "class"


def test_resources_are_told_as_far_as_the_device_tells() -> None:
    measured = Measurement(MEMBERS[0], 1.0, 0.01, 5)
    assert _resources(measured) == {}
    assert _resources(replace(measured, energy_mj=7.0, peak_mib=9.0)) == {"energy mJ": 7.0, "peak MiB": 9.0}


def test_pictures_are_of_samples_that_are_spread_over_the_split(run: Run) -> None:
    """Three of six; of a stage that is dense all windows are kept, of the last a fifth is not."""
    run.config.report.num_pictures = 3
    vector = SparsityVector((0.0, 0.0, 0.0, 0.0, 0.0, 0.8))
    rows = draw_samples(run, run.build_model(), vector)
    images = [run.report_set[index][0] for index in (0, 2, 4)]
    assert [list(row) for row in rows] == 3 * [
        ["ground truth", "stage 1: 100%", "stage 2: 100%", "stage 3: 100%", list(rows[0])[-1]]
    ]
    assert list(rows[0])[-1].startswith("stage 4: ")
    for row, image in zip(rows, images, strict=True):
        assert torch.equal(row["ground truth"], image)
    run.config.report.num_pictures = 100
    assert len(draw_samples(run, run.build_model(), vector)) == 6


def test_the_head_of_the_report_says_what_its_numbers_are_of(run: Run) -> None:
    here = run.machine()
    header = _header(run)
    assert header == {
        "experiment": "coco",
        "scale": run.config.scale,
        "backbone": "swin_nano",
        "latency of": board().setting.description,
        "predicted for": "a board, 4 threads",
        "predictions": "95 % within ±0.0%; the table was refitted 0 times",
        "device": here["device"],
        "threads": here["threads"],
        "torch": torch.__version__,
        "accuracy on": "6 images of 'report', fp32",
    }
    run.config.cluster.latency_lane = "measure"
    assert _header(run)["device"] == "a board"
    assert "predicted for" not in _header(run)
    run.results["train"] = replace(run.results["train"], metrics={"score": 0.0, "num_steps": 3.0})
    assert _header(run)["warning"].startswith("the dense model is no better than chance")
