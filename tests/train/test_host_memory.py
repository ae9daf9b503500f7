import subprocess
import sys

import pytest

# Pages that the kernel hands out while 64 MB are taken, written and given back ten times.
PROGRAM = """
import resource, sys
import torch
from accel_gpt2.train.host_memory import keep_freed_memory

if sys.argv[1] == "keep":
    assert keep_freed_memory()
for _ in range(20):  # until the heap is as large as it has to be
    torch.ones(16 * 2**20)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    torch.ones(16 * 2**20)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="mallopt is glibc's")
def test_freed_memory_is_used_again() -> None:
    """Large tensors cost the kernel's pages once, not in every step."""
    faults = {
        how: int(subprocess.check_output([sys.executable, "-c", PROGRAM, how], text=True))
        for how in ("keep", "as it is")
    }
    assert faults["keep"] < faults["as it is"] / 20, faults
