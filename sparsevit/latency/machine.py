"""The machine that is measured: what it is, and whether it is busy with something else."""

import os
import platform
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

import sparsevit
from sparsevit.allocator import keep_freed_memory

MAX_BUSY_SHARE = 0.1


def device_name(device: torch.device) -> str:
    """What the device calls itself."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def describe_machine(device: torch.device) -> dict[str, Any]:
    """Where a measurement comes from, beyond what a prediction depends on; without what cannot be read."""
    found: dict[str, Any] = {
        "release": sparsevit.__version__,
        "system": platform.platform(),
        "python": platform.python_version(),
        "cores": os.cpu_count(),
        "processor": device_name(torch.device("cpu")),
    }
    if device.type == "cpu":
        found["keeps_freed_memory"] = keep_freed_memory()
    commit = _commit()
    if commit:
        found["commit"] = commit
    clock = _first_line(Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_max_freq"))
    if clock:
        found["max_clock_mhz"] = int(clock) // 1000
    if device.type == "cuda":
        found["cuda"] = torch.version.cuda
        driver = _first_line(Path("/proc/driver/nvidia/version"))
        if driver:
            found["driver"] = driver
    return found


def busy_warning() -> str | None:
    """In words, if other processes take so much of the machine that a measurement would be off."""
    busy = busy_share()
    if busy <= MAX_BUSY_SHARE:
        return None
    return (
        f"other processes take {busy:.0%} of this machine's processors; what is measured beside them is not "
        "what the device can do"
    )


def busy_share(seconds: float = 1.0) -> float:
    """Share of all processors' time that was not idle while this process slept; 0 where nobody tells."""
    before = _processor_times()
    time.sleep(seconds)
    after = _processor_times()
    if before is None or after is None or after[1] == before[1]:
        return 0.0
    return 1 - (after[0] - before[0]) / (after[1] - before[1])


def set_num_threads(num_threads: int) -> None:
    """As `torch.set_num_threads`, but nothing where that is the number already.

    To say it again takes a third more time for a small backbone's forward pass (torch 2.14, two cores).
    """
    if torch.get_num_threads() != num_threads:
        torch.set_num_threads(num_threads)


@contextmanager
def naming_lost_device(device: torch.device) -> Iterator[None]:
    """What a driver raises when a device falls off the bus says little to the user.

    Raises:
        ValueError: in place of an error of the device's driver.
    """
    try:
        yield
    except torch.AcceleratorError as error:
        raise ValueError(
            f"the device {device} stopped answering while it was measured: {str(error).splitlines()[0]}. "
            "Nothing was written; look at its driver's log, and calibrate again when it is back"
        ) from error


def _commit() -> str | None:
    """Of the checkout that runs, with a mark if it has changes; None outside of a checkout."""
    folder = Path(sparsevit.__file__).parent
    command = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return None
    return result.stdout.strip() or None


def _processor_times() -> tuple[int, int] | None:
    """Idle and total ticks of all processors since the start."""
    stat = _first_line(Path("/proc/stat"))
    if stat is None:
        return None
    user_to_steal = [int(field) for field in stat.split()[1:9]]
    return user_to_steal[3] + user_to_steal[4], sum(user_to_steal)


def _first_line(path: Path) -> str | None:
    try:
        return path.read_text().splitlines()[0]
    except (OSError, IndexError):
        return None
