"""Energy that a device has used, where it tells: NVML for NVIDIA GPUs, RAPL for processors on Linux.

Nothing here is required: where a counter is not there or may not be read, there is no energy.
"""

import importlib
from collections.abc import Callable
from pathlib import Path

import torch

RAPL = Path("/sys/class/powercap")
Counter = Callable[[], float]


class EnergyMeter:
    """A counter of millijoules that only grows.

    Args:
        device: whose energy; for a CPU that of all its packages, whatever runs on them.
    """

    def __init__(self, device: torch.device, rapl: Path = RAPL) -> None:
        self._counter = _nvml_counter(device) if device.type == "cuda" else _rapl_counter(rapl)

    def read_mj(self) -> float | None:
        """Millijoules since some moment; None where nobody tells."""
        return self._counter() if self._counter is not None else None


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
