"""`doctor RUN` and `report RUN`: where the classes of a run stand, whoever looks."""

import json
import os
import time
from pathlib import Path

import pytest

from accel_gpt2.classify.lock import claim
from accel_gpt2.classify.status import ClassStatus, RunStatus, with_ending
from accel_gpt2.recipe import TrainRecipe
from accel_gpt2.recipe.layers import to_yaml

from .conftest import CommandLine


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Three classes: trained, failed, and at its third step when its process was last heard of."""
    directory = tmp_path / "my run"
    directory.mkdir()
    (directory / "recipe.yaml").write_text(to_yaml(TrainRecipe()))
    classes = [
        ClassStatus(index=index, name=name, state="waiting", step=0, total_steps=9)
        for index, name in enumerate(("kitchen", "orbit", "river"))
    ]
    status = RunStatus(directory, classes)
    for index, step in ((0, 9), (1, 4), (2, 3)):
        status.reached(index, step, process=1)
    status.best(0, 6.25)
    status.ended(0, "finished")
    status.ended(1, "failed", "its disk is full.")
    return directory


def test_a_killed_run_is_told_from_one_at_work(run: Path, accel_gpt2: CommandLine) -> None:
    """What nobody trains any more was killed; while somebody is there, it is being trained."""
    killed = accel_gpt2("doctor", str(run))
    rows = [line.split() for line in killed.stdout.splitlines()]
    assert [row[:3] for row in rows if row and row[0] in {"kitchen", "orbit", "river"}] == [
        ["kitchen", "finished", "9/9"],
        ["orbit", "failed", "4/9"],
        ["river", "killed", "3/9"],
    ]
    said = " ".join(killed.stderr.split())
    assert "orbit failed: its disk is full. Nobody is at work" in said
    assert f"accel-gpt2 train --recipe '{run}/recipe.yaml' --output-dir '{run}'" in said
    pid = os.fork()
    if pid == 0:
        with claim(run):
            (run / "claimed").touch()
            while (run / "claimed").exists():
                time.sleep(0.02)
        os._exit(0)
    try:
        while not (run / "claimed").exists():
            time.sleep(0.02)
        found = accel_gpt2("doctor", str(run), "--json")
    finally:
        (run / "claimed").unlink()
        os.waitpid(pid, 0)
    document = json.loads(found.stdout)
    assert document["at_work"]["pid"] == pid
    assert [row["state"] for row in document["classes"]] == ["finished", "failed", "training"]
    assert document["classes"][0]["best_loss_bits"] == 6.25


def test_how_the_last_training_ended_is_told(run: Path, accel_gpt2: CommandLine) -> None:
    """Exit code and sentence, beside where each class is."""
    ending = with_ending(run, exit_code=75, message="Stopped by SIGTERM.", process=1)
    (run / "status.json").write_text(ending)
    said = " ".join(accel_gpt2("doctor", str(run)).stderr.split())
    assert "the last training ended with exit code 75. Stopped by SIGTERM." in said
    document = json.loads(accel_gpt2("doctor", str(run), "--json").stdout)
    assert document["ending"] == {"exit_code": 75, "message": "Stopped by SIGTERM."}


def test_the_report_of_an_unfinished_run_says_so(run: Path, accel_gpt2: CommandLine) -> None:
    """Which class is where, and why one failed, above everything else on the page."""
    page = Path(accel_gpt2("report", str(run)).stdout.strip()).read_text("utf-8")
    said = "kitchen is trained; orbit failed at step 4 of 9; river was killed at step 3 of 9."
    assert f"Not all is trained: {said}" in page
    assert "orbit failed: its disk is full." in page


def test_what_is_no_run_is_refused(tmp_path: Path, accel_gpt2: CommandLine) -> None:
    """As any other verb does."""
    found = accel_gpt2("doctor", str(tmp_path))
    assert found.returncode == 2
    assert "is not a run directory" in " ".join(found.stderr.split())
