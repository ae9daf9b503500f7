"""The comparison of trainings, with a tiny model and the peers that need no further package."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

_SCRIPT = Path(__file__).parents[2] / "benchmarks" / "training_peers.py"


@pytest.mark.slow
@pytest.mark.skipif(not _SCRIPT.is_file(), reason="benchmarks are not part of a release")
def test_every_side_trains_the_same_loss_when_it_is_its_turn(tmp_path: Path) -> None:
    """Padded, flattened and ours agree on each document and on their batch, and on what four
    steps of training do to held-out text; what is not here is named."""
    sizes = ["--layers", "1", "--width", "64", "--documents-per-step", "2", "--rounds", "1"]
    chosen = [
        "--lengths",
        "ag_news",
        "--peers",
        "reference",
        "trainer:dynamic",
        "trainer:flattened",
        "nanogpt",
    ]
    done = subprocess.run(
        [sys.executable, str(_SCRIPT), *sizes, *chosen, "--output", str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = tmp_path.glob("*-training-peers.json")
    found = json.loads(path.read_text())["workloads"]["ag_news"]
    sides = {"ours", "reference", "trainer:dynamic", "trainer:flattened"}
    assert found["losses"].keys() == sides
    for side in sides:
        row = found["summary"][side]
        assert max(row["loss_difference"], row["batch_difference"]) < 1e-5
        assert sum(turn["steps"] for turn in found["turns"][side]) == 3
        assert row["held_out_loss"] < 10.81  # ln 50,257 = 10.825, and a little is learnt
        assert abs(row["held_out_difference"]) < 0.05
    assert abs(found["summary"]["reference"]["held_out_difference"]) < 1e-5
    # Flattened rows and ours waste nothing, but for the EOS that nothing follows.
    assert found["summary"]["trainer:dynamic"]["token_efficiency"] < 0.95
    assert found["summary"]["trainer:flattened"]["token_efficiency"] > 0.95
    assert found["left_out"].keys() == {"nanogpt"}
    table = path.with_suffix(".md").read_text()
    assert "nanoGPT is left out: no copy of it: give --nanogpt FOLDER." in table
    assert "| Trainer, flattened |" in table
    assert "ours reaches" in table
