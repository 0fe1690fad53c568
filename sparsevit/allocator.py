"""Memory that a forward pass on a CPU frees, and takes again at the next."""

import ctypes
import platform

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h of glibc
KEPT_BYTES = 2**30
MAX_BYTES_OF_OLD_GLIBC = 2**25


def keep_freed_memory() -> bool:
    """Have the C library keep what is freed for the next allocation, up to 1 GiB at the end of the heap.

    glibc gives large blocks back to the kernel as soon as they are free, and the kernel clears each page
    again when it is touched. A forward pass does both with all its activations, whose cost hardly falls
    with a ratio: small backbones lose half of what pruning saves (docs/benchmarks/latency.md). It holds for
    the whole process, which keeps its peak of memory.

    Returns:
        Whether it could be had: on Linux with glibc. Elsewhere nothing changes.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    has_threshold = any(mallopt(M_MMAP_THRESHOLD, size) for size in (KEPT_BYTES, MAX_BYTES_OF_OLD_GLIBC))
    return bool(mallopt(M_TRIM_THRESHOLD, KEPT_BYTES)) and has_threshold
