"""A rented training rehearsed on this machine: the budget ends it, and a second launch ends it."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from accel_gpt2.classify.spending import read_ledger, spent_usd
from accel_gpt2.train.manifest import verify
from tests.conftest import write_texts

SECRETS = {"LAMBDA_API_KEY": "planted-lambda", "HF_TOKEN": "hf_planted", "AWS_SECRET_KEY": "aws"}

TRAINING = (
    "--dataset=texts.csv",
    "--model=gpt2-tiny",
    "--init=scratch",
    "--epochs=6",
    "--global-batch-tokens=256",
    "--set=tokenizer=train",
    "--set=tokenizer_vocab_size=400",
    "--max-length=64",
)

# Almost two hours pass at the third validation, in every process of the launch, and no time else
# but the real: how fast this machine is makes no difference to when the money ends.
_VIRTUAL_CLOCK = """\
import os, time
from pathlib import Path

PASSED = Path({folder!r}) / "hours"

def hours_passed():
    if not PASSED.exists():
        logs = Path("runs").glob("*/log.jsonl")
        if sum(log.read_text().count('"evaluate"') for log in logs) < 3:
            return 0.0
        staged = PASSED.with_name(f"hours-{{os.getpid()}}")
        staged.write_text("1.91")
        staged.replace(PASSED)
    return float(PASSED.read_text())

for name in ("time", "monotonic"):
    def clock(real=getattr(time, name)):
        return real() + 3600 * hours_passed()
    setattr(time, name, clock)
"""


@dataclass(frozen=True)
class Work:
    """An empty folder with texts, a state folder of its own, and a clock of its own."""

    folder: Path

    @property
    def run(self) -> Path:
        return self.folder / "runs" / "texts.csv-gpt2-tiny"

    def launch(self, budget_usd: float) -> tuple[int, str]:
        """`accel-gpt2 cloud launch --provider local`, at $1 an hour: exit code and stderr."""
        argv = (
            "cloud",
            "launch",
            "--provider=local",
            "--usd-per-hour=1",
            "--hours=0.01",
            f"--budget={budget_usd}",
            "--bucket=kept",
            "--yes",
            *TRAINING,
        )
        ended = subprocess.run(
            [sys.executable, "-c", "from accel_gpt2.cli.app import main; main()", *argv],
            cwd=self.folder,
            env={
                **os.environ,
                **SECRETS,
                "PYTHONPATH": str(self.folder / "clock"),
                "XDG_STATE_HOME": str(self.folder / "state"),
                "ACCEL_GPT2_CACHE": str(self.folder / "cache"),
                "HF_HUB_OFFLINE": "1",
            },
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        return ended.returncode, ended.stderr


@pytest.fixture
def work(tmp_path: Path) -> Work:
    """With 40 documents of two classes."""
    write_texts(tmp_path / "texts.csv", documents_per_class=20, num_classes=2)
    clock = tmp_path / "clock"
    clock.mkdir()
    (clock / "sitecustomize.py").write_text(_VIRTUAL_CLOCK.format(folder=str(clock)))
    return Work(tmp_path)


def _resumed_at(run: Path) -> list[int]:
    rows = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [row["step"] for row in rows if row["event"] == "resume"]


@pytest.mark.slow
def test_a_budget_ends_a_training_and_a_second_launch_ends_it(work: Work) -> None:
    """Exit code 4 in mid-training, a whole checkpoint, a ledger; then more money goes on from the
    bucket, on a fresh machine, and ends within what is left. Nothing has a secret in it."""
    code, said = work.launch(2.0)
    assert code == 4, said
    assert "95% of the budget of $2.00 is reached" in said
    assert "Stopped by the budget, saved: about $1.9" in said
    checkpoints = list(work.run.glob("class-*/checkpoint-*"))
    assert len(checkpoints) >= 1
    for checkpoint in checkpoints:
        verify(checkpoint)
    (first,) = read_ledger(work.run)
    assert first.billed_since is not None
    assert first.price_usd_per_hour == 1
    assert 1.91 <= spent_usd(work.run) < 2
    assert len(list(work.run.glob("class-*/final"))) < 2
    newest = max(checkpoints, key=lambda path: path.stat().st_mtime)

    code, said = work.launch(1.915)
    assert code == 3
    assert "which exceeds --budget 1.915" in said

    (work.folder / "clock" / "hours").write_text("0")  # on a machine with another bill
    shutil.rmtree(work.run)  # what is here may be lost
    code, said = work.launch(4.0)
    assert code == 0, said
    assert f"goes on from runs/{work.run.name}/{newest.parent.name}/{newest.name}" in said
    assert "Trained: about $" in said
    assert _resumed_at(work.run) == [int(newest.name.removeprefix("checkpoint-"))]
    assert len(list(work.run.glob("class-*/final"))) == 2
    earlier, later = read_ledger(work.run)
    assert earlier == first
    assert later.launch != first.launch
    assert spent_usd(work.run) < 4

    launches = list((work.folder / "state").glob("accel-gpt2/cloud/*"))
    assert len(launches) == 2
    assert not [path for path in launches if (path / "machine").exists()]
    files = [path for path in work.folder.rglob("*") if path.is_file()]
    assert len(files) >= 30
    for path in files:
        content = path.read_bytes()
        for secret in SECRETS.values():
            assert len(secret) < 4 or secret.encode() not in content, path
