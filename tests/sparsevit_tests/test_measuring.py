"""Measuring: warm, interleaved, repeated until sure; energy and memory beside it; what cannot be measured."""

import itertools
import statistics
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

from sparsevit import SparseSwin, SparsityVector, SwinConfig, create_backbone
from sparsevit.latency import machine, memory, timing
from sparsevit.latency.calibration import measure
from sparsevit.latency.energy import EnergyMeter
from sparsevit.latency.memory import peak_mib, require_memory
from sparsevit.latency.subject import backbone_subject, check_runtime, model_name, model_subject, num_samples
from sparsevit.latency.timing import Timing, TimingLimits, Timings, time_interleaved, warm_up
from tests.sparsevit_tests.known_device import Clock
from tests.sparsevit_tests.test_checkpoints import small_task

CPU = torch.device("cpu")
VECTOR = SparsityVector((0.5, 0.3, 0.2, 0.4, 0.6, 0.0))


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def interleaved(calls: list[Callable[[], None]], reference: Callable[[], None], **limits: float) -> Timings:
    return time_interleaved(
        calls, reference, device=CPU, limits=TimingLimits(**limits),  # type: ignore[arg-type]
        generator=torch.Generator().manual_seed(0),
    )  # fmt: skip


def test_a_call_that_repeats_is_timed_no_more_than_it_must(clock: Clock) -> None:
    steady, noisy = clock.call(0.010), clock.call(0.020, 0.030, 0.024, 0.026, 0.021)
    found = interleaved([steady, steady, steady, steady, noisy], clock.call(0.040), max_rounds=12)
    counts = [len(each.times_ms) for each in found.calls]
    assert counts[0] < counts[-1] == 12
    assert found.calls[0].median_ms == pytest.approx(10)
    assert found.calls[-1].half_width > 0.02
    assert found.calls[0].half_width <= 0.02


def test_the_time_limit_ends_a_run_after_a_whole_round(clock: Clock) -> None:
    noisy = clock.call(0.5, 1.0, 0.7)
    found = interleaved([noisy, clock.call(1.0, 0.4)], clock.call(1.0), max_rounds=50, max_seconds=20.0)
    counts = {len(each.times_ms) for each in found.calls}
    assert len(counts) == 1
    assert 3 <= counts.pop() < 50


def at_speed(clock: Clock, speed: Callable[[], float]) -> Callable[[float], Callable[[], None]]:
    """Calls on a machine whose speed changes from call to call."""

    def lasting(seconds: float) -> Callable[[], None]:
        def take() -> None:
            clock.now += seconds / speed()

        return take

    return lasting


@pytest.mark.parametrize("becomes", ["slower", "faster"])
def test_drift_is_divided_out_and_told(clock: Clock, becomes: str) -> None:
    """On the clock times spread by half and more; told are their shares of the reference."""
    number = itertools.count()
    power = -1 if becomes == "slower" else 1
    lasting = at_speed(clock, lambda: (1 + next(number) / 60) ** power)
    found = interleaved([lasting(0.01), lasting(0.02)], lasting(0.04), min_rounds=12)
    for each, share in zip(found.calls, (0.25, 0.5), strict=True):
        expected = [share * found.reference_ms] * 12
        assert each.times_ms == pytest.approx(expected, rel=0.1)
        assert each.median_ms == pytest.approx(expected[0], rel=0.03)
        assert each.spread < 0.03
    assert abs(found.drift) > 0.2
    (warning,) = found.warnings
    assert f"{becomes} while it was measured: it is throttled, or busy" in warning


def test_a_sudden_throttling_leaves_the_medians_exact(clock: Clock) -> None:
    """Half as fast from one call to the next: all but the times about the step are right to the digit."""
    speeds = itertools.chain([1.0] * 24, itertools.repeat(0.5))
    lasting = at_speed(clock, lambda: next(speeds))
    found = interleaved([lasting(0.003), lasting(0.02)], lasting(0.04), min_rounds=12)
    assert found.references_ms[0] == pytest.approx(40)
    assert found.references_ms[-1] == pytest.approx(80)
    for each, share in zip(found.calls, (0.075, 0.5), strict=True):
        assert each.median_ms == pytest.approx(share * found.reference_ms)


def test_a_steady_device_is_told_as_it_is(clock: Clock) -> None:
    found = interleaved([clock.call(0.003), clock.call(0.02)], clock.call(0.04), min_rounds=4)
    assert [each.median_ms for each in found.calls] == pytest.approx([3, 20])
    assert [found.reference_ms, found.drift] == pytest.approx([40, 0])
    assert found.outlier_share == found.noise == 0
    assert found.warnings == []


def test_a_disturbed_reference_disturbs_nothing_near_it(clock: Clock) -> None:
    """Warm-up takes 6 of its calls; of what is timed, every seventh takes ten times as long."""
    reference = clock.call(*[0.04] * 6, *[0.4, *[0.04] * 6] * 9)
    found = interleaved([clock.call(0.01 * k) for k in range(1, 8)], reference, min_rounds=9)
    assert max(found.references_ms) == pytest.approx(400)
    for k, each in enumerate(found.calls, start=1):
        assert each.times_ms == pytest.approx([10 * k] * len(each.times_ms))


def test_the_reference_is_warm_and_timed_among_the_calls(clock: Clock) -> None:
    """Slow at first, as everything is that was never called; once more for every three calls."""
    reference = iter([0.4, 0.3, 0.2, 0.1, *[0.04] * 99])

    def take() -> None:
        clock.now += next(reference)

    found = interleaved([clock.call(0.01)] * 7, take, min_rounds=4, max_rounds=4)
    assert found.references_ms == pytest.approx([40] * 3 * 4)


def test_every_round_has_an_order_of_its_own(clock: Clock) -> None:
    """What a call leaves behind (heat, a full cache) must not always fall on the same one."""

    def orders(seed: int) -> list[tuple[int, ...]]:
        called: list[int] = []

        def note(index: int) -> None:
            clock.now += 0.01
            called.append(index)

        time_interleaved(
            [partial(note, index) for index in range(6)], clock.call(0.01), device=CPU,
            limits=TimingLimits.exactly(60), generator=torch.Generator().manual_seed(seed),
        )  # fmt: skip
        return [tuple(called[start : start + 6]) for start in range(0, 360, 6)]

    found = orders(0)
    assert all(sorted(order) == [0, 1, 2, 3, 4, 5] for order in found)
    assert len(set(found)) > 40
    assert {order.index(0) for order in found} == {0, 1, 2, 3, 4, 5}
    assert found == orders(0) != orders(1)


def test_outliers_are_counted_and_do_not_move_the_median() -> None:
    times = (10.0, 10.1, 9.9, 10.05, 9.95, 30.0)
    found = Timing(times, timing._relative_mad(times))
    assert found.num_outliers == 1
    assert found.median_ms == pytest.approx(10, rel=0.01)
    assert found.spread < 0.03
    steady = Timing((10.0,) * 6, 0.0)
    assert Timings((found, steady), (1.0,)).outlier_share == pytest.approx(1 / 12)


def test_the_interval_holds_the_truth_as_often_as_it_says() -> None:
    generator = torch.Generator().manual_seed(0)
    times = (100 + 4 * torch.randn(500, 6, generator=generator)).tolist()
    found = timing._timings([[timing._Sample(each, 0, None) for each in row] for row in times], [1.0])
    inside = sum(abs(each.median_ms - 100) <= each.half_width * each.median_ms for each in found)
    assert 0.92 <= inside / 500 <= 0.98


def test_warm_up_ends_when_the_call_is_stable(clock: Clock) -> None:
    falling = iter([0.1 * 0.8**k for k in range(9)] + [0.01] * 50)

    def call() -> None:
        clock.now += next(falling)

    times = warm_up(call, CPU)
    assert 9 < len(times) < timing.MAX_WARM_UP
    assert statistics.mean(times[-3:]) == pytest.approx(10)


def rapl(folder: Path, *packages: int) -> Path:
    for number, value in enumerate(packages):
        zone = folder / f"intel-rapl:{number}"
        zone.mkdir(exist_ok=True)
        (zone / "energy_uj").write_text(str(value))
        (zone / "max_energy_range_uj").write_text("999999")
        core = folder / f"intel-rapl:{number}:0"
        core.mkdir(exist_ok=True)
        (core / "energy_uj").write_text("1")
    return folder


def test_energy_of_all_packages_without_their_parts(tmp_path: Path) -> None:
    meter = EnergyMeter(CPU, rapl(tmp_path, 2000, 5000))
    assert meter.read_mj() == pytest.approx(7)
    rapl(tmp_path, 4000, 100)  # the second wrapped around
    assert meter.read_mj() == pytest.approx(4 + 1000.1, abs=1e-3)


def test_no_energy_where_nobody_tells(tmp_path: Path) -> None:
    assert EnergyMeter(CPU, tmp_path).read_mj() is None
    (tmp_path / "intel-rapl:0").mkdir()  # a counter that cannot be read
    assert EnergyMeter(CPU, tmp_path).read_mj() is None


def test_energy_is_that_of_a_call(clock: Clock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "EnergyMeter", lambda device: EnergyMeter(device, rapl(tmp_path, 0)))
    counter = tmp_path / "intel-rapl:0" / "energy_uj"

    def call() -> None:
        clock.now += 0.01
        counter.write_text(str(int(counter.read_text()) + 3000))

    found = interleaved([call], clock.call(0.01))
    assert found.calls[0].energy_mj == pytest.approx(3)


def test_energy_of_a_call_that_is_short_against_the_counter(
    clock: Clock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on GPUs, whose counter moves ten times a second: around a call it stands still, or jumps."""
    meter = EnergyMeter(CPU, rapl(tmp_path, 0))
    meter.step_s = 0.1
    monkeypatch.setattr(timing, "EnergyMeter", lambda device: meter)
    counter = tmp_path / "intel-rapl:0" / "energy_uj"

    def call() -> None:
        clock.now += 0.0107
        counter.write_text(str(int(clock.now / meter.step_s) * 30_000))  # 0.3 W

    found = interleaved([call], clock.call(0.01))
    assert found.calls[0].energy_mj == pytest.approx(0.3 * 10.7, rel=0.04)
    counter_stands = EnergyMeter(CPU, rapl(tmp_path, 0))
    assert counter_stands.measure_mj(clock.call(0.01)) is None


@pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="only Linux tells the memory of a call"
)
def test_memory_of_a_call() -> None:
    found = peak_mib(lambda: torch.ones(64 * 2**20), CPU)
    assert found == pytest.approx(256, rel=0.1)


def test_a_batch_that_does_not_fit_names_one_that_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "peak_mib", lambda call, device: 100.0)
    monkeypatch.setattr(memory, "_free_mib", lambda device: 750.0)
    require_memory(lambda: None, CPU, 7)
    with pytest.raises(ValueError, match=r"a batch of 8 does not fit .* an image takes 100 MiB, .* 7 fit"):
        require_memory(lambda: None, CPU, 8)


def test_not_even_one_image_fits() -> None:
    def call() -> None:
        torch.empty(2**50)

    with pytest.raises(ValueError, match="not even one image fits into the memory of cpu"):
        require_memory(call, CPU, 1)


def test_a_device_that_goes_away() -> None:
    def call() -> None:
        raise torch.AcceleratorError("CUDA error: unspecified launch failure\nmore")

    with (
        pytest.raises(ValueError, match="cuda:0 stopped answering while it was measured: CUDA error: unspec"),
        machine.naming_lost_device(torch.device("cuda:0")),
    ):
        call()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_backbone_is_measured_as_a_cuda_graph() -> None:
    backbone = create_backbone("swin_nano").cuda()
    with backbone_subject(
        backbone, batch_size=2, image_size=(64, 96), dtype="bf16", runtime="cuda_graph"
    ) as subject:
        found = measure(subject, [backbone.space.dense, VECTOR], TimingLimits.exactly(3))
    assert all(latency > 0 for latency in found.latencies_ms)


@pytest.mark.parametrize("runtime", ["compiled", "onnxruntime"])
def test_what_is_timed_compiled_or_exported_computes_what_the_backbone_does(runtime: str) -> None:
    if runtime == "onnxruntime":
        pytest.importorskip("onnxruntime")
    torch.manual_seed(0)
    backbone = SparseSwin(SwinConfig(embed_dim=8, depths=(2,), num_heads=(1,), window_size=4))
    vector, found = SparsityVector((0.5,)), []
    for each in ("eager", runtime):
        with (
            backbone_subject(backbone, batch_size=1, image_size=(64, 64), runtime=each) as subject,
            torch.inference_mode(),
        ):
            assert subject.runtime == each
            found.append([torch.as_tensor(feature) for feature in subject.call_of(vector)()])  # type: ignore[attr-defined]
    for expected, feature in zip(*found, strict=True):
        torch.testing.assert_close(feature, expected, rtol=1e-4, atol=1e-4)


def test_of_a_whole_model_everything_up_to_its_predictions_is_timed() -> None:
    task = small_task()
    torch.manual_seed(0)
    model = task.build_model(create_backbone("swin_nano")).train()
    photos = [torch.rand(3, 90, 128) for _ in range(2)]
    with (
        model_subject(model, task.backbone_of(model), [photos], name="small") as subject,
        torch.inference_mode(),
    ):
        assert (subject.measures, subject.batch_size, subject.image_size) == ("small", 2, (64, 64))
        found, expected = subject.call_of(VECTOR)(), model(photos, sparsity=VECTOR)
    assert model.training
    assert isinstance(found, list)
    for mine, theirs in zip(found, expected, strict=True):
        assert set(mine) == {"boxes", "labels", "scores", "masks"}
        assert all(torch.equal(mine[name], theirs[name]) for name in mine)


def test_a_batch_is_counted_in_images_that_the_backbone_sees() -> None:
    assert num_samples([torch.zeros(3, 8, 8)], 4) == 4
    assert num_samples([torch.zeros(6, 3, 8, 8)], 12) == 2
    with pytest.raises(ValueError, match="a sample has 6: give a multiple of that, got 4"):
        num_samples([torch.zeros(6, 3, 8, 8)], 4)


def test_models_are_told_apart_by_all_that_they_are_built_from() -> None:
    names = {model_name("detection", {"num_classes": n, "size": 64}) for n in (3, 4)}
    assert len(names) == 2
    assert all(name.startswith("detection ") for name in names)
    assert model_name("detection", {"size": 64, "num_classes": 3}) in names


@pytest.mark.parametrize(
    ("runtime", "dtype", "message"),
    [
        (
            "tensorrt",
            "fp32",
            "runtime must be one of eager, cuda_graph, compiled, onnxruntime, got 'tensorrt'",
        ),
        ("eager", "int8", r"dtype must be one of \['bf16', 'fp16', 'fp32'\], got 'int8'"),
        ("cuda_graph", "bf16", "runtime=cuda_graph needs a CUDA device, got cpu: take runtime=eager"),
        ("onnxruntime", "bf16", "onnxruntime has no bf16 kernels: take dtype=fp32 or fp16"),
    ],
)
def test_what_cannot_be_measured(runtime: str, dtype: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_runtime(runtime, dtype, CPU)


def test_a_runtime_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ValueError, match="runtime=onnxruntime needs `pip install onnxruntime onnxscript`"):
        check_runtime("onnxruntime", "fp32", CPU)


def test_a_whole_model_is_not_compiled() -> None:
    with (
        pytest.raises(ValueError, match="a whole model is measured in eager mode, got runtime=compiled"),
        model_subject(nn.Linear(1, 1), create_backbone("swin_nano"), [[]], name="m", runtime="compiled"),
    ):
        pass
