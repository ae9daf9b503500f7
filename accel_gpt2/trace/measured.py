"""What work really allocates on a device, by the device's own allocator."""

import itertools
import json
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile


def peak_allocated_bytes(device: torch.device, work: Callable[[], None]) -> int:
    """The most that tensors hold while `work` runs.

    On a GPU all of them; on a CPU those that are made meanwhile, because its allocator keeps no
    books but tells the profiler of what it does.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        work()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "events.json"
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text("utf-8"))["traceEvents"]
    changes = sorted((e["ts"], e["args"]["Bytes"]) for e in events if e["name"] == "[memory]")
    return int(max(itertools.accumulate(num_bytes for _, num_bytes in changes)))
