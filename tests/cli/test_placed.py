"""`accel-gpt2 train --placement per-gpu` as a person starts and stops it, on the CPU."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from accel_gpt2.classify.status import read_classes
from accel_gpt2.errors import ExitCode
from tests.conftest import write_texts

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="refused there")

START_SECONDS = 180.0  # four processes that load torch, on a busy machine


def test_ctrl_c_saves_every_class_and_comes_through_as_one_exit_code(tmp_path: Path) -> None:
    """The command, its launcher, the process that watches and two that train: one Ctrl-C stops all
    of them, saved, with 75 and one sentence; the run directory says where each class is."""
    texts = write_texts(tmp_path / "texts.csv", documents_per_class=200, num_classes=2)
    run = tmp_path / "run"
    command = [
        str(Path(sys.executable).with_name("accel-gpt2")), "train", "--model", "gpt2-tiny",
        "--dataset", str(texts), "--output-dir", str(run), "--placement", "per-gpu",
        "--profile", "cpu", "--epochs", "50", "--max-length", "48", "--quiet",
        "--set", "tokenizer_vocab_size=300", "--set", "global_batch_size=4",
        "--set", "log_every_steps=1", "--set", "trackers=",
    ]  # fmt: skip
    with subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True) as process:
        try:
            deadline = time.monotonic() + START_SECONDS
            while [x.step > 1 for x in read_classes(run)] != [True, True]:
                assert process.poll() is None
                assert time.monotonic() < deadline
                time.sleep(0.1)
            trainers = [x.process for x in read_classes(run)]
            process.send_signal(signal.SIGINT)
            _, said = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == ExitCode.STOPPED, said
    assert said.count("Stopped by SIGINT; the work is saved. Start again to go on.") == 1
    assert said.count("Finishing the step and saving; Ctrl-C again leaves at once.") == 1
    assert re.search(r"^\$ .*single\.yaml --num_processes=1 ", said, re.MULTILINE)
    assert "Traceback" not in said
    status = json.loads((run / "status.json").read_text())
    assert (status["exit_code"], status["message"]) == (
        ExitCode.STOPPED,
        "Stopped by SIGINT; the work is saved. Start again to go on.",
    )
    assert [x["state"] for x in status["classes"]] == ["stopped", "stopped"]
    for row, trainer in zip(status["classes"], trainers, strict=True):
        assert trainer is not None
        with pytest.raises(ProcessLookupError):
            os.kill(trainer, 0)
        (directory,) = run.glob(f"class-{row['index']}-*")
        assert (directory / f"checkpoint-{row['step']}").is_dir()
