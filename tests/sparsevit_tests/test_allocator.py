"""Memory that is kept from a forward pass to the next."""

import platform
import subprocess
import sys

import pytest

FAULTS = """
import resource, sys
import torch
from sparsevit.allocator import keep_freed_memory
if sys.argv[1] == "keep":
    assert keep_freed_memory()
for _ in range(3):
    torch.ones(12 * 2**20)
faults = []
for _ in range(11):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(12 * 2**20)  # 48 MiB
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(sorted(faults)[5])  # beside other work the block may have to move once
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_freed_memory_is_taken_again_without_a_fault() -> None:
    given_back, kept = (
        int(subprocess.run([sys.executable, "-c", FAULTS, how], capture_output=True, check=True).stdout)
        for how in ("default", "keep")
    )
    assert given_back > 20
    assert kept < 0.1 * given_back


def test_other_systems_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    from sparsevit.allocator import keep_freed_memory

    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    assert not keep_freed_memory()
