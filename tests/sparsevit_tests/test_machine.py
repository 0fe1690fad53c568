"""What a device tells of itself: its names, how busy it is, its memory and its counters of energy."""

import ctypes
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import sparsevit
from sparsevit.latency import energy, machine, memory
from sparsevit.latency.energy import EnergyMeter
from tests.sparsevit_tests.known_device import Clock

CPU = torch.device("cpu")


def test_a_processor_has_the_name_of_its_first_core(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    info = tmp_path / "cpuinfo"
    info.write_text("processor : 0\nmodel name\t: Fast: CPU @ 2 GHz \nmodel name\t: another\n")
    monkeypatch.setattr(machine, "Path", lambda path: {"/proc/cpuinfo": info}[path])
    assert machine.device_name(CPU) == "Fast: CPU @ 2 GHz"
    monkeypatch.setattr(platform, "machine", lambda: "riscv")
    for name, expected in (("some processor", "some processor"), ("", "riscv")):
        monkeypatch.setattr(platform, "processor", lambda name=name: name)
        info.write_text("processor : 0\n")
        assert machine.device_name(CPU) == expected
    info.unlink()
    assert machine.device_name(CPU) == "riscv"


def test_a_machine_is_described_by_what_can_be_read(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = "/sys/devices/system/cpu/cpu0/cpufreq/scaling_max_freq"
    lines: dict[str, str | None] = {clock: "3400567"}
    monkeypatch.setattr(machine, "_first_line", lambda path: lines.get(str(path)))
    monkeypatch.setattr(machine, "_commit", lambda: "abc")
    monkeypatch.setattr(machine, "keep_freed_memory", lambda: True)
    monkeypatch.setattr(os, "cpu_count", lambda: 5)
    expected = {
        "release": sparsevit.__version__, "system": platform.platform(),
        "python": platform.python_version(), "cores": 5, "processor": machine.device_name(CPU),
    }  # fmt: skip
    told = {"commit": "abc", "max_clock_mhz": 3400}
    assert machine.describe_machine(CPU) == expected | {"keeps_freed_memory": True} | told
    lines.clear()
    monkeypatch.setattr(machine, "_commit", lambda: None)
    assert machine.describe_machine(torch.device("meta")) == expected


def test_a_gpu_is_described_by_its_driver_too(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = {"/proc/driver/nvidia/version": "NVRM version: 580"}
    monkeypatch.setattr(machine, "_first_line", lambda path: driver.get(str(path)))
    found = machine.describe_machine(torch.device("cuda"))
    assert found["driver"] == "NVRM version: 580"
    assert found["cuda"] == torch.version.cuda
    assert "keeps_freed_memory" not in found
    driver.clear()
    assert "driver" not in machine.describe_machine(torch.device("cuda"))


def test_how_busy_a_machine_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of its first eight numbers, which hold all time; the guests' time after them is in the users'."""
    slept: list[float] = []
    monkeypatch.setattr(time, "sleep", slept.append)

    def busy(*stats: str | None) -> float:
        lines = iter(stats)
        monkeypatch.setattr(machine, "_first_line", lambda path: next(lines))
        return machine.busy_share()

    before = "cpu  100 5 20 1000 50 1 2 3 99 98"
    assert busy(before, "cpu  115 5 20 1070 65 1 2 3 9999 0") == pytest.approx(0.15)
    assert busy(before, "cpu  101 6 21 1001 51 2 3 4 0 0") == pytest.approx(6 / 8)
    assert busy(before, before) == 0
    assert busy(None, before) == busy(before, None) == 0
    assert slept == [1.0] * 5


@pytest.mark.parametrize(("share", "is_told"), [(0.0, False), (0.1, False), (0.104, True), (0.5, True)])
def test_a_tenth_of_a_machine_is_left_to_others(
    monkeypatch: pytest.MonkeyPatch, share: float, is_told: bool
) -> None:
    monkeypatch.setattr(machine, "busy_share", lambda: share)
    expected = f"other processes take {share:.0%} of this machine's processors; what is measured beside them"
    assert machine.busy_warning() == (f"{expected} is not what the device can do" if is_told else None)


def test_the_time_of_this_machines_processors_passes() -> None:
    if not Path("/proc/stat").exists():
        pytest.skip("only Linux tells the time of its processors")
    first, second = machine._processor_times(), machine._processor_times()
    assert first is not None and second is not None
    assert 0 < first[0] < first[1] <= second[1]


def test_as_many_threads_as_there_are_are_not_set_again(monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", found.append)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    machine.set_num_threads(3)
    machine.set_num_threads(2)
    assert found == [2]


@pytest.mark.parametrize(
    ("output", "expected"),
    [
        (" 0123456789ab-dirty\n", "0123456789ab-dirty"),
        ("\n", None),
        (FileNotFoundError("no git"), None),
        (subprocess.TimeoutExpired("git", 10), None),
        (subprocess.CalledProcessError(128, "git"), None),
    ],
)
def test_the_commit_of_a_checkout(
    monkeypatch: pytest.MonkeyPatch, output: str | Exception, expected: str | None
) -> None:
    root = Path(sparsevit.__file__).parent

    def run(command: list[str], **options: object) -> SimpleNamespace:
        assert command == ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12"]
        assert options == {"capture_output": True, "text": True, "check": True, "timeout": 10}
        if isinstance(output, Exception):
            raise output
        return SimpleNamespace(stdout=output)

    monkeypatch.setattr(subprocess, "run", run)
    assert machine._commit() == expected


def test_first_lines(tmp_path: Path) -> None:
    path = tmp_path / "lines"
    assert machine._first_line(path) is None
    path.write_text("")
    assert machine._first_line(path) is None
    path.write_text("one\ntwo\n")
    assert machine._first_line(path) == "one"


@pytest.fixture
def process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[int, int], None]:
    """A process whose memory is as it is told, in KiB: resident now, and the most that ever was."""
    monkeypatch.setattr(memory, "SELF", tmp_path)
    (tmp_path / "clear_refs").touch()

    def tell(now: int, most: int) -> None:
        lines = f"VmPeak:\t 9 kB\nVmHWM:\t  {most} kB\nVmRSS:\t  {now} kB\n"
        (tmp_path / "status").write_text(lines)

    tell(2048, 9999)
    return tell


def test_memory_is_what_was_resident_at_most_beyond_the_start(
    process: Callable[[int, int], None], tmp_path: Path
) -> None:
    assert memory.peak_mib(lambda: process(3000, 2048 + 1536), CPU) == 1.5
    assert (tmp_path / "clear_refs").read_text() == "5"  # which sets the mark to what is resident
    process(2048, 0)
    assert memory.peak_mib(lambda: process(10, 1000), CPU) == 0
    (tmp_path / "status").unlink()
    assert memory.peak_mib(lambda: None, CPU) is None


@pytest.mark.parametrize("can_trim", [True, False])
def test_what_the_c_library_keeps_is_given_back_before(
    process: object, monkeypatch: pytest.MonkeyPatch, can_trim: bool
) -> None:
    given: list[int] = []
    library = SimpleNamespace(malloc_trim=given.append) if can_trim else SimpleNamespace()
    monkeypatch.setattr(ctypes, "CDLL", lambda name: library)
    assert memory.peak_mib(lambda: None, CPU) == pytest.approx((9999 - 2048) / 1024)
    assert given == ([0] if can_trim else [])


def test_memory_of_a_gpu_is_that_of_its_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is there before does not count; the device has done what it was given whenever it is asked."""
    gpu, done = torch.device("cuda:1"), []

    def tell(name: str, mib: float) -> None:
        def function(device: torch.device) -> int:
            assert device == gpu
            done.append(name)
            return int(mib * 2**20)

        monkeypatch.setattr(memory if name == "synchronize" else torch.cuda, name, function)

    tell("synchronize", 0)
    tell("reset_peak_memory_stats", 0)
    tell("memory_allocated", 10)
    tell("max_memory_allocated", 12.5)
    assert memory.peak_mib(lambda: done.append("call"), gpu) == 2.5
    assert done == [
        "synchronize", "reset_peak_memory_stats", "memory_allocated", "call", "synchronize",
        "max_memory_allocated",
    ]  # fmt: skip
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (3 * 2**20, 9 * 2**20))
    assert memory._free_mib(gpu) == 3


@pytest.mark.skipif(not Path("/proc/meminfo").exists(), reason="only Linux tells the memory that is free")
def test_this_machine_has_memory() -> None:
    free_mib = memory._free_mib(CPU)
    assert free_mib is not None and free_mib > 1


def test_a_line_of_the_kernel_that_is_not_there(process: object, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="status has no line VmR"):
        memory._kib(tmp_path / "status", "VmR")


@pytest.mark.parametrize(
    ("limit", "used", "expected"),
    [
        (None, None, 4096),
        ("max", None, 4096),
        (f"{3 * 2**30}\n", 2**30, 2048),
        (f"{30 * 2**30}\n", 2**30, 4096),
    ],
)
def test_free_is_what_the_machine_and_the_container_leave(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: str | None, used: int | None, expected: float
) -> None:
    monkeypatch.setattr(memory, "MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(memory, "CGROUP", tmp_path)
    assert memory._free_mib(CPU) is None
    (tmp_path / "meminfo").write_text(f"MemFree: 7 kB\nMemAvailable:   {4 * 2**20} kB\n")
    for name, value in (("memory.max", limit), ("memory.current", used)):
        if value is not None:
            (tmp_path / name).write_text(str(value))
    assert memory._free_mib(CPU) == expected


@pytest.mark.parametrize(
    ("needed", "free", "batch_size", "largest"),
    [(100.0, 750.0, 8, 7), (800.0, 750.0, 1, 1), (250.0, 750.0, 4, 3), (250.0, 750.0, 3, None),
     (None, 1.0, 9, None), (0.0, 1.0, 9, None), (9.0, None, 9, None)],
)  # fmt: skip
def test_the_largest_batch_that_fits(
    monkeypatch: pytest.MonkeyPatch, needed: float | None, free: float | None, batch_size: int,
    largest: int | None,
) -> None:  # fmt: skip
    def one_image() -> None:
        raise AssertionError("is called by what measures its memory alone")

    monkeypatch.setattr(memory, "peak_mib", lambda call, device: needed if call is one_image else None)
    monkeypatch.setattr(memory, "_free_mib", lambda device: free)
    if largest is None:
        memory.require_memory(one_image, CPU, batch_size)
        return
    with pytest.raises(ValueError, match=rf"takes {needed:.0f} MiB, and 750 MiB are free; {largest} fit$"):
        memory.require_memory(one_image, CPU, batch_size)


def failing(error: Exception) -> Callable[[], None]:
    def call() -> None:
        raise error

    return call


def test_an_error_that_is_not_of_memory_stays_what_it_is() -> None:
    with pytest.raises(RuntimeError, match="shapes do not match"):
        memory.require_memory(failing(RuntimeError("shapes do not match")), CPU, 1)
    with pytest.raises(ValueError, match="not even one image fits into the memory of cpu"):
        memory.require_memory(failing(torch.OutOfMemoryError("CUDA out of memory")), CPU, 1)


def package(folder: Path, name: str, value: int) -> None:
    (folder / name).mkdir(exist_ok=True)
    (folder / name / "energy_uj").write_text(str(value))
    (folder / name / "max_energy_range_uj").write_text("9999")


def test_every_package_goes_on_where_its_counter_wraps_around(tmp_path: Path) -> None:
    package(tmp_path, "intel-rapl:0", 5000)
    package(tmp_path, "intel-rapl:10", 8000)
    package(tmp_path, "intel-rapl:0:1", 777_777)
    package(tmp_path, "intel-rapl-mmio:0", 777_777)
    meter = EnergyMeter(CPU, tmp_path)
    assert meter.step_s == 0.001
    assert meter.read_mj() == 13
    package(tmp_path, "intel-rapl:0", 5000)  # stands still: no wrap
    assert meter.read_mj() == 13
    for last, expected in ((1000, 19), (500, 28.5)):  # 10 000 more, twice
        package(tmp_path, "intel-rapl:0", last)
        assert meter.read_mj() == expected
    (tmp_path / "intel-rapl:0" / "energy_uj").write_text("none of your business")
    assert EnergyMeter(CPU, tmp_path).read_mj() is None


def test_a_short_call_is_repeated_for_five_steps_of_the_counter(clock: Clock, tmp_path: Path) -> None:
    """Four calls a step, 6 mJ each; those before its first move do not count."""
    package(tmp_path, "intel-rapl:0", 0)
    meter, calls = EnergyMeter(CPU, tmp_path), 0

    def call() -> None:
        nonlocal calls
        calls += 1
        clock.now += 0.00025
        package(tmp_path, "intel-rapl:0", 24_000 * ((calls + 1) // 4))

    assert meter.measure_mj(call) == 6
    assert calls == 3 + 5 * 4
    assert EnergyMeter(CPU, tmp_path / "nowhere").measure_mj(call) is None


def test_a_counter_may_stand_still_for_twenty_steps(clock: Clock, tmp_path: Path) -> None:
    package(tmp_path, "intel-rapl:0", 0)
    calls = 0

    def call() -> None:
        nonlocal calls
        calls += 1
        clock.now += 1
        package(tmp_path, "intel-rapl:0", 1000 * (calls // 20))

    meter = EnergyMeter(CPU, tmp_path)
    meter.step_s = 1
    assert meter.measure_mj(call) == 0.05
    package(tmp_path, "intel-rapl:0", 0)
    calls, meter.step_s = 0, 0.88
    assert meter.measure_mj(call) is None
    assert calls == 18  # the first that is more than 17.6 s after the start


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


@pytest.mark.parametrize("lacks", [None, "the library", "the driver", "the counter"])
def test_a_gpu_tells_by_its_driver(monkeypatch: pytest.MonkeyPatch, lacks: str | None) -> None:
    called: list[object] = []

    def tell(name: str, result: object, needs: str) -> Callable[..., object]:
        def function(*arguments: object) -> object:
            called.append((name, *arguments))
            if lacks == needs:
                raise RuntimeError
            return result

        return function

    nvml = SimpleNamespace(
        nvmlInit=tell("init", None, "the driver"),
        nvmlDeviceGetHandleByUUID=tell("handle", "a handle", "the driver"),
        nvmlDeviceGetTotalEnergyConsumption=tell("energy", 1234, "the counter"),
    )
    monkeypatch.setitem(sys.modules, "pynvml", None if lacks == "the library" else nvml)
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid=f"u-{device}")
    )
    meter = EnergyMeter(torch.device("cuda:1"))
    assert meter.step_s == energy.NVML_STEP_S == 0.1
    assert meter.read_mj() == (None if lacks else 1234)
    if lacks is None:
        assert called == [("init",), ("handle", "GPU-u-cuda:1"), *[("energy", "a handle")] * 2]
