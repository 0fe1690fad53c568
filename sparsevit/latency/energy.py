"""Energy that a device has used, where it tells: NVML for NVIDIA GPUs, RAPL for processors on Linux.

Nothing here is required: where a counter is not there or may not be read, there is no energy.
"""

import importlib
import time
from collections.abc import Callable
from pathlib import Path

import torch

RAPL = Path("/sys/class/powercap")
Counter = Callable[[], float]
NVML_STEP_S, RAPL_STEP_S = 0.1, 0.001
NUM_STEPS = 5
"""Of the counter, that calls are repeated for which are short against one."""
MAX_STILL_STEPS = 20


class EnergyMeter:
    """A counter of millijoules that only grows.

    Args:
        device: whose energy; for a CPU that of all its packages, whatever runs on them.

    Attributes:
        step_s: about how often the counter moves. A call that is not much longer says nothing by itself.
    """

    def __init__(self, device: torch.device, rapl: Path = RAPL) -> None:
        is_gpu = device.type == "cuda"
        self._counter = _nvml_counter(device) if is_gpu else _rapl_counter(rapl)
        self.step_s = NVML_STEP_S if is_gpu else RAPL_STEP_S

    def read_mj(self) -> float | None:
        """Millijoules since some moment; None where nobody tells."""
        return self._counter() if self._counter is not None else None

    def measure_mj(self, call: Callable[[], object]) -> float | None:
        """Millijoules of a call that is short against a step: it is repeated from one step to a later one.

        Args:
            call: returns when the device is done.

        Returns:
            None where nobody tells, or the counter stands still.
        """
        if self._counter is None:
            return None
        first, num_calls, num_steps = self._counter(), 0, -1  # until the counter moves, calls do not count
        last, moved_at = first, time.monotonic()
        while num_steps < NUM_STEPS:
            call()
            num_calls += 1
            now = self._counter()
            if now != last:
                last, moved_at = now, time.monotonic()
                num_steps += 1
                if num_steps == 0:
                    first, num_calls = now, 0
            elif time.monotonic() - moved_at > MAX_STILL_STEPS * self.step_s:
                return None
        return (last - first) / num_calls


def _rapl_counter(folder: Path) -> Counter | None:
    """The sum over the packages, each continued where its counter wraps around."""
    packages = [
        _Package(zone) for zone in sorted(folder.glob("intel-rapl:[0-9]*")) if zone.name.count(":") == 1
    ]
    try:
        for package in packages:
            package.read_uj()
    except (OSError, ValueError):  # only the superuser may read them on most machines
        return None
    if not packages:
        return None
    return lambda: sum(package.read_uj() for package in packages) / 1000


class _Package:
    def __init__(self, zone: Path) -> None:
        self._energy = zone / "energy_uj"
        self._range = zone / "max_energy_range_uj"
        self._last: int | None = None
        self._wrapped = 0

    def read_uj(self) -> int:
        value = int(self._energy.read_text())
        if self._last is not None and value < self._last:
            self._wrapped += int(self._range.read_text()) + 1
        self._last = value
        return self._wrapped + value


def _nvml_counter(device: torch.device) -> Counter | None:
    try:
        pynvml = importlib.import_module("pynvml")
        pynvml.nvmlInit()
        uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
        handle = pynvml.nvmlDeviceGetHandleByUUID(uuid)
        pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)
    except Exception:  # noqa: BLE001  (no library, no driver, or a GPU that has no counter)
        return None
    return lambda: float(pynvml.nvmlDeviceGetTotalEnergyConsumption(handle))
