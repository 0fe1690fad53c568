"""What is measured during a search on a device that is slower than it was: a made one, of known latencies."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from pipelines import measured_front
from pipelines.artifacts import ArtifactStore, StageResult
from pipelines.context import Run
from pipelines.measured_front import MeasuredFront
from pipelines.stages.calibrate import PREDICTOR_FILE
from pipelines.tracking import NoTracker
from search.pareto import FrontMember, ParetoFront
from search.problem import Objective, SearchProblem
from search.progress import SearchProgress
from sparsevit.latency import LatencyPredictor
from sparsevit.latency.calibration import Measured
from sparsevit.latency.fitting import StepPrior
from sparsevit.latency.predictor import LatencySetting, Measurement
from sparsevit.latency.timing import TimingLimits
from sparsevit.sparsity import SparsitySpace, SparsityVector
from tests.pipelines_tests.configuration import composed, tiny_run

SPACE = SparsitySpace((2, 2, 6, 2))
VECTORS = [SPACE.uniform(ratio) for ratio in (0.2, 0.5, 0.8)]
HALF_WIDTH = 0.01


def table(run: Run, **others: object) -> LatencyPredictor:
    """100 ms, and 2 ms less for every tenth of every gene; of the machine that this runs on."""
    terms = tuple(tuple(-20.0 * choice for choice in SPACE.choices) for _ in range(6))
    here = run.machine()
    setting = LatencySetting(
        here["device"], here["threads"], "2.11", "eager", "fp32", 4, (64, 64), "swin_nano", "backbone"
    )
    prior = StepPrior((2.0,) * 48, (1.0,) * 48)
    measurements = (Measurement(SPACE.uniform(0.1), 88.0, HALF_WIDTH, 5),)
    predictor = LatencyPredictor(SPACE, 100.0, terms, setting, 0.05, prior, measurements)
    return replace(predictor, **others)  # type: ignore[arg-type]


class Device:
    """Takes `slowdown` times as long as the table says, and at some vectors longer still."""

    def __init__(self, predictor: LatencyPredictor) -> None:
        self.predictor = predictor
        self.slowdown = 1.0
        self.factor_of: Mapping[SparsityVector, float] = {}
        self.measured: list[SparsityVector] = []
        self.warnings: tuple[str, ...] = ()

    def __call__(
        self, run: Run, stage: str, vectors: Sequence[SparsityVector], limits: TimingLimits, label: str
    ) -> Measured:
        self.measured += vectors
        found = [
            Measurement(
                each, self.slowdown * self.factor_of.get(each, 1.0) * self.predictor.predict(each),
                HALF_WIDTH, 5, energy_mj=7.0,
            )
            for each in vectors
        ]  # fmt: skip
        return Measured(tuple(found), self.slowdown * self.predictor.base_ms, 0.0, 0.0, 0.0, self.warnings)


@pytest.fixture
def run(tmp_path: Path) -> Run:
    run = Run(composed(*tiny_run(tmp_path)), ArtifactStore(tmp_path), NoTracker())
    folder = tmp_path / "calibrate"
    folder.mkdir()
    (tmp_path / "search").mkdir()
    run.results["calibrate"] = StageResult("calibrate", "", folder, {}, 1.0, was_reused=False)
    return run


Start = Callable[..., tuple[MeasuredFront, Device]]


@pytest.fixture
def start(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Start:
    """A measured front that starts from a table, and the device that it measures."""

    def start(**others: object) -> tuple[MeasuredFront, Device]:
        predictor = table(run, **others)
        predictor.save(tmp_path / "calibrate" / PREDICTOR_FILE)
        device = Device(predictor)
        monkeypatch.setattr(measured_front, "measure_vectors", device)
        return MeasuredFront(run, tmp_path / "search"), device

    return start


def progress(vectors: Sequence[SparsityVector]) -> SearchProgress:
    objectives = (Objective("ap", "maximize"), Objective("latency_ms", "minimize"))
    progress = SearchProgress(SearchProblem(SPACE, objectives, {"latency_ms": sum}, ("ap",)))
    values = [{"ap": 1 - sum(vector), "latency_ms": 9 - sum(vector)} for vector in vectors]
    members = [FrontMember(vector, value) for vector, value in zip(vectors, values, strict=True)]
    progress.front = ParetoFront.of(members, objectives)
    return progress


@pytest.mark.parametrize(("slowdown", "words"), [(2.0, "100% more"), (0.5, "50% less"), (1.05, None)])
def test_members_are_compared_with_the_dense_model_of_the_same_minute(
    slowdown: float, words: str | None, start: Start, caplog: pytest.LogCaptureFixture
) -> None:
    front, device = start()
    device.slowdown = slowdown
    assert not front.measure(progress(VECTORS))  # nothing is off, so nothing is refitted
    for vector in VECTORS:
        told = front.details(vector)
        assert told["measured_ms"] == pytest.approx(device.predictor.predict(vector))
        assert (told["measured_half_width"], told["energy_mj"]) == (HALF_WIDTH, 7.0)
        assert "peak_mib" not in told
    assert front.predictor.terms_ms == device.predictor.terms_ms
    assert front.num_refits == 0
    if words is None:
        assert "than when the device was calibrated" not in caplog.text
    else:
        assert f"takes {100 * slowdown:g} ms, {words} than when the device was calibrated" in caplog.text


def test_the_dense_latency_is_the_measured_one_where_it_was(run: Run, start: Start) -> None:
    """The table was fitted to 100 ms at the dense vector, but 104 were measured."""
    dense = Measurement(SPACE.dense, 104.0, HALF_WIDTH, 5)
    front, device = start(measurements=(dense,))
    device.slowdown = 1.1
    assert not front.measure(progress(VECTORS))
    expected = 1.04 * device.predictor.predict(VECTORS[0])
    assert front.details(VECTORS[0])["measured_ms"] == pytest.approx(expected)


@pytest.mark.parametrize(("factor", "is_off"), [(1.055, False), (1.08, True), (0.95, False), (0.92, True)])
def test_a_table_is_refitted_where_a_prediction_is_beyond_its_bar_and_the_noise(
    factor: float, is_off: bool, start: Start
) -> None:
    """The bar is 5 %, the half width 1 %; the device is throttled, which is no error of the table's."""
    front, device = start()
    device.slowdown = 3.0
    vector = VECTORS[1]
    device.factor_of = {vector: factor}
    before = front.predict(vector)
    assert front.measure(progress(VECTORS)) == is_off
    assert front.num_refits == int(is_off)
    truth = factor * before
    assert front.details(vector)["measured_ms"] == pytest.approx(truth)
    if is_off:
        assert abs(front.predict(vector) - truth) < abs(before - truth)
    else:
        assert front.predict(vector) == before


def test_nothing_is_refitted_in_a_deterministic_search_or_without_a_prior(run: Run, start: Start) -> None:
    for is_deterministic, others in ((True, {}), (False, {"prior": None})):
        run.config.search.deterministic = is_deterministic
        front, device = start(**others)
        device.factor_of = dict.fromkeys(VECTORS, 1.5)
        assert not front.measure(progress(VECTORS))
        assert front.num_refits == 0
        assert front.details(VECTORS[0])["measured_ms"] == pytest.approx(1.5 * front.predict(VECTORS[0]))
        (front._path).unlink()


def test_every_member_is_measured_once_also_by_a_later_process(
    run: Run, start: Start, tmp_path: Path
) -> None:
    front, device = start()
    assert front.every == run.config.search.measure_every
    device.factor_of = {VECTORS[0]: 1.5}
    assert front.measure(progress(VECTORS[:2]))
    assert not front.measure(progress(VECTORS[:2]))
    again = MeasuredFront(run, tmp_path / "search")
    assert again.num_refits == 1
    assert again.predictor == front.predictor
    assert again.details(VECTORS[0]) == front.details(VECTORS[0])
    again.measure(progress(VECTORS))
    assert len(device.measured) == len(VECTORS)
    assert set(device.measured) == set(VECTORS)
    of_table = {each.vector for each in again.predictor.measurements}
    assert of_table == {SPACE.uniform(0.1), *VECTORS}


@pytest.mark.parametrize(
    ("change", "can_measure"),
    [({}, True), ({"device": "a board"}, False), ({"num_threads": 77}, False), ({"num_threads": 0}, True)],
)
def test_only_a_table_of_this_machine_is_measured_for(
    change: dict[str, object], can_measure: bool, run: Run, start: Start
) -> None:
    setting = replace(table(run).setting, **change)  # type: ignore[arg-type]
    front, device = start(setting=setting)
    device.factor_of = dict.fromkeys(VECTORS, 2.0)
    assert front.measure(progress(VECTORS)) == can_measure
    assert bool(device.measured) == can_measure
    assert (front.every is not None) == can_measure
    assert bool(front.details(VECTORS[0])) == can_measure


def test_a_lane_measures_for_the_machine_that_it_is_on(run: Run, start: Start) -> None:
    run.config.cluster.latency_lane = "board"
    front, device = start(setting=replace(table(run).setting, device="a board"))
    assert front.every == run.config.search.measure_every
    front.measure(progress(VECTORS))
    assert device.measured


def test_a_deterministic_search_says_that_it_is_measured_at_its_end(
    run: Run, start: Start, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    run.config.search.deterministic = True
    front, _ = start()
    assert front.every is None
    assert "deterministic: the front is measured at the end, no table is refitted" in caplog.text
    caplog.clear()
    run.config.search.measure_every = None  # nor would it be measured otherwise
    assert front.every is None
    assert caplog.text == ""


def test_what_a_measurement_warns_of_and_a_refit_are_told(
    start: Start, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    front, device = start()
    device.warnings = ("the clock rate fell",)
    device.factor_of = {VECTORS[0]: 1.5}
    assert front.measure(progress(VECTORS))
    assert "  warning: the clock rate fell" in caplog.text
    assert (
        "  1 of 3 new front members are off by more than ±5.0%: the latency table is refitted "
        f"(now ±{100 * front.predictor.error_bar:.1f}%)"
    ) in caplog.text
