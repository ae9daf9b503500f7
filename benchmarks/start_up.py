"""What a person waits for an answer of the planning verbs: whole processes, verbs in turn.

    python benchmarks/start_up.py [--rounds 15]

Wall-clock time includes what other programs take of the machine; CPU time does not.
"""

import argparse
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

_VERBS = (
    ("--version",),
    ("profiles",),
    ("plan", "--model", "gpt2-large", "--profile", "rtx4070ti"),
    ("plan", "--model", "gpt2-large", "--profile", "rtx4070ti", "--json"),
    ("plan", "--model", "gpt2-xl", "--profile", "2x-rtx4070ti"),
    ("cost", "--gpu", "a100-40", "--hours", "3"),
    ("train", "--model", "gpt2", "--profile", "cpu", "--dry-run"),
)


def main() -> None:
    """Print a table for docs/benchmarks/."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    rounds = parser.parse_args().rounds
    program = str(Path(sys.executable).with_name("accel-gpt2"))
    wall: dict[tuple[str, ...], list[float]] = {verb: [] for verb in _VERBS}
    cpu: dict[tuple[str, ...], list[float]] = {verb: [] for verb in _VERBS}
    for _ in range(rounds + 1):
        for verb in _VERBS:
            before = resource.getrusage(resource.RUSAGE_CHILDREN)
            started = time.perf_counter()
            subprocess.run([program, *verb], check=True, capture_output=True, env=os.environ)
            wall[verb].append(time.perf_counter() - started)
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            cpu[verb].append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    lines = [
        f"Python {platform.python_version()}, {os.cpu_count()} cores, {rounds} rounds",
        "",
        "| command | wall, median | least | most | CPU, median |",
        "|---|---|---|---|---|",
    ]
    for verb in _VERBS:
        own = wall[verb][1:]  # the first fills the disk's cache
        lines.append(
            f"| `accel-gpt2 {' '.join(verb)}` | {statistics.median(own):.2f} s | {min(own):.2f} | "
            f"{max(own):.2f} | {statistics.median(cpu[verb][1:]):.2f} s |"
        )
    sys.stdout.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
