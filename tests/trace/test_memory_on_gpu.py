"""The table of predicted and measured memory, rehearsed without a GPU."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

_SCRIPT = Path(__file__).parents[2] / "benchmarks" / "memory_on_gpu.py"


@pytest.mark.skipif(not _SCRIPT.is_file(), reason="benchmarks are not part of a release")
def test_plans_hold_against_the_allocator_of_a_cpu(tmp_path: Path) -> None:
    """Within the bars that `make gpu-check` holds them to, closer even: a CPU rounds nothing, and
    only packed rows may have some padding that these have not."""
    command = [sys.executable, str(_SCRIPT), "--device", "cpu", "--sizes", "tiny"]
    done = subprocess.run(
        [*command, "--output", str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = tmp_path.glob("*-memory-on-cpu.json")
    found = json.loads(path.read_text())
    assert found["summary"]["num_cases"] == 11
    assert found["summary"]["missed"] == found["summary"]["left_out"] == []
    errors = {case["label"]: case["error"] for case in found["cases"]}
    assert 0 < errors.pop("gpt2-tiny, 4x64, fp32, packed rows") < 0.03
    assert max(map(abs, errors.values())) < 3e-3
    table = path.with_suffix(".md").read_text()
    assert "0 of 11 missed" in table
    assert all(f"| {case['label']} |" in table for case in found["cases"])
