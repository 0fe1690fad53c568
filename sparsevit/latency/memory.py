"""Memory of a forward pass: how much it takes, and whether it is there."""

import contextlib
import ctypes
from pathlib import Path

import torch

from sparsevit.latency.timing import Call, synchronize

SELF, MEMINFO, CGROUP = Path("/proc/self"), Path("/proc/meminfo"), Path("/sys/fs/cgroup")
MIB = 2**20


class PeakMemory:
    """The most memory that a device had in use above what it had at first.

    On a GPU of tensors, by PyTorch's allocator; on a CPU of the whole process, where Linux tells.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._before: int | None
        if device.type == "cuda":
            synchronize(device)
            torch.cuda.reset_peak_memory_stats(device)
            self._before = torch.cuda.memory_allocated(device)
        else:
            self._before = _reset_high_water_mark()

    def read_mib(self) -> float | None:
        """None where nobody tells."""
        if self._before is None:
            return None
        if self._device.type == "cuda":
            synchronize(self._device)
            return (torch.cuda.max_memory_allocated(self._device) - self._before) / MIB
        return max(0, _kib(SELF / "status", "VmHWM") - self._before) / 1024


def peak_mib(call: Call, device: torch.device) -> float | None:
    """MiB that a call takes on top of what is there before; None where the device does not tell."""
    peak = PeakMemory(device)
    call()
    return peak.read_mib()


def require_memory(one_image: Call, device: torch.device, batch_size: int) -> None:
    """Check that a batch fits, from what one image takes.

    Args:
        one_image: the forward pass of a batch of one.

    Raises:
        ValueError: if it does not, naming the largest batch that does.
    """
    try:
        needed_mib = peak_mib(one_image, device)
    except (torch.OutOfMemoryError, RuntimeError) as error:
        if not _is_out_of_memory(error):
            raise
        raise ValueError(f"not even one image fits into the memory of {device}") from error
    free_mib = _free_mib(device)
    if not needed_mib or free_mib is None or needed_mib * batch_size <= free_mib:
        return
    raise ValueError(
        f"a batch of {batch_size} does not fit into the memory of {device}: an image takes "
        f"{needed_mib:.0f} MiB, and {free_mib:.0f} MiB are free; {max(1, int(free_mib / needed_mib))} fit"
    )


def _is_out_of_memory(error: RuntimeError) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def _free_mib(device: torch.device) -> float | None:
    """What a process may still take; None where nobody tells."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] / MIB
    if not MEMINFO.is_file():
        return None
    free = _kib(MEMINFO, "MemAvailable") / 1024
    if CGROUP.joinpath("memory.max").is_file():
        limit = CGROUP.joinpath("memory.max").read_text().strip()
        if limit.isdigit():  # of a container; "max" elsewhere
            used = int(CGROUP.joinpath("memory.current").read_text())
            free = min(free, (int(limit) - used) / MIB)
    return free


def _reset_high_water_mark() -> int | None:
    """KiB that are resident now; the mark of the most that ever were is set to that.

    What the C library keeps for later is given back before, or it would hide what a call takes.
    """
    try:
        with contextlib.suppress(AttributeError):  # not every C library can
            ctypes.CDLL(None).malloc_trim(0)
        (SELF / "clear_refs").write_text("5")
        return _kib(SELF / "status", "VmRSS")
    except OSError:
        return None


def _kib(path: Path, name: str) -> int:
    """A line such as ``VmRSS:  1234 kB``."""
    for line in path.read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1])
    raise ValueError(f"{path} has no line {name}")
