"""What this machine, as if rented, does when set-up fails or hangs, and when our programs die."""

import datetime
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from accel_gpt2.classify.spending import read_ledger
from accel_gpt2.cloud.ledger import launch_directory, launches_directory, read_launches
from tests.cloud.conftest import CommandLine

LAUNCH = (
    "cloud", "launch", "--provider=local", "--model=gpt2-tiny", "--dataset=imdb", "--hours=0.0003",
    "--yes",
)  # fmt: skip


def _executable(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/bash\n{text}\n")
    path.chmod(0o755)


@pytest.mark.parametrize(
    ("uv", "limit_seconds"),
    [("echo 'no such package' >&2; exit 1", 1200), ("exec sleep 600", 2)],
    ids=["fails", "hangs"],
)
def test_a_setup_in_vain_is_paid_for(
    accel_gpt2: CommandLine,
    home: Path,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    uv: str,
    limit_seconds: int,
) -> None:
    """The launch is a row of the ledger, and the next one has so much less."""
    # As on a rented machine, which has no environment yet.
    monkeypatch.setattr("accel_gpt2.cloud.local._bin", str)
    monkeypatch.setattr("accel_gpt2.render.cloud_job.SETUP_LIMIT_SECONDS", limit_seconds)
    _executable(home / ".local" / "bin" / "uv", uv)
    before = time.time()
    code, _, err = accel_gpt2(*LAUNCH, "--usd-per-hour=36", "--budget=10")
    took_seconds = time.time() - before
    assert code == 1
    said = " ".join(err.split())
    assert re.search(r"set up in vain, as is said above: about \$0\.\d+ of \$10\.00 spent", said)
    run = tmp_path / "work" / "runs" / "imdb-gpt2-tiny"
    (row,) = read_ledger(run)
    (launch,) = read_launches()
    assert (launch.state, launch.exit_code) == ("ended", 1)
    assert (row.launch, row.price_usd_per_hour) == (launch.name, 36)
    least_seconds = limit_seconds if uv.startswith("exec") else 0
    assert least_seconds <= row.seconds <= took_seconds + 1  # a launch begins at a whole second
    code, out, _ = accel_gpt2(*LAUNCH, "--usd-per-hour=36", "--budget=10", "--dry-run", "--json")
    assert code == 0
    assert json.loads(out)["spent_usd"] == pytest.approx(row.seconds / 100, abs=1e-3)


# The launcher, on a machine with another environment.
_LAUNCHER = """\
import sys
from pathlib import Path
from accel_gpt2.cli.app import main
from accel_gpt2.cloud import local
_, bin_folder, *words = sys.argv
local._bin = lambda: Path(bin_folder)
sys.argv = ["accel-gpt2", *words]
main()
"""

# Heeds no signal, as what waits for a GPU that hangs.
_HANGING = "trap '' TERM INT HUP\necho $$ > training.pid\nwhile :; do sleep 1; done"


def _wait(what: str, is_there: Callable[[], bool], *, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not is_there():
        assert time.monotonic() < deadline, f"{what} did not come"
        time.sleep(0.1)


def _processes_in(folder: Path) -> list[psutil.Process]:
    """What was started there or below, and runs."""
    found = []
    for process in psutil.process_iter():
        try:
            is_there = Path(process.cwd()).is_relative_to(folder)
        except (psutil.Error, OSError):
            continue
        if is_there and process.status() != psutil.STATUS_ZOMBIE:
            found.append(process)
    return found


def test_a_machine_ends_itself_when_all_of_ours_is_dead(
    accel_gpt2: CommandLine, home: Path, tmp_path: Path
) -> None:
    """Launcher, scripts and `timeout` are killed (SIGKILL), and what trains hangs: at the budget's
    end nothing runs any more. What was there can be fetched, and the time is paid for."""
    bin_folder = tmp_path / "bin"
    _executable(bin_folder / "python", f'exec {sys.executable} "$@"')
    _executable(bin_folder / "accel-gpt2", _HANGING)
    argv = (*LAUNCH, "--usd-per-hour=1", "--budget=1")
    launcher = subprocess.Popen(
        [sys.executable, "-c", _LAUNCHER, str(bin_folder), *argv],
        cwd=tmp_path / "work",
        stderr=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
    )
    try:
        _wait("a launch", lambda: bool(read_launches()))
        (launch,) = read_launches()
        machine = launch_directory(launch.name) / "machine"
        _wait("a training", (machine / "training.pid").exists)
        training = int((machine / "training.pid").read_text())
        began = datetime.datetime.fromisoformat(launch.began).timestamp()
        # An hour, and the time for what is done at its end.
        assert 3600 < int((machine / ".ends_at").read_text()) - began < 4200
        launcher.kill()
        for process in _processes_in(machine):
            if process.pid != training:
                process.kill()
        os.kill(training, signal.SIGTERM)
        time.sleep(3)  # the watchdog has looked in between
        assert training in [x.pid for x in _processes_in(machine)]
        (machine / ".ends_at").write_text(str(int(time.time())))  # an hour later, as it were
        _wait("the machine's end", lambda: not _processes_in(machine))
    finally:
        launcher.kill()
        launcher.wait()
        for process in _processes_in(launches_directory()):
            process.kill()

    code, _, err = accel_gpt2(*argv)
    assert code == 1
    assert f"{launch.name} trains this run, as far as is known here" in err
    code, _, err = accel_gpt2("cloud", "fetch", launch.name)
    assert code == 0, err
    assert read_launches()[0].state == "ended"
    (row,) = read_ledger(tmp_path / "work" / "runs" / "imdb-gpt2-tiny")
    assert row.launch == launch.name
    assert row.billed_since is not None
    assert accel_gpt2("cloud", "cancel", launch.name)[0] == 0
